"""Phi-2 as TinyGPT-V changed it: more norms, without which it diverged (arXiv:2312.16862).

Against transformers' ``phi``: one matrix makes queries, keys and values, head by head; a LayerNorm on the
queries and one on the keys of every head; an RMS norm on the output of attention before it is added. Weights'
names are those of the public repository's ``modeling_phi.py``, so that its checkpoints load unchanged. The
weights of microsoft/phi-2 do not hold the norms, and with new ones the model writes nonsense.
"""

# Shapes: B rows, T positions, D width, A heads, H width of a head.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PhiConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi.modeling_phi import (
    PhiMLP,
    PhiRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .decoder import CausalLanguageModel, Decoder, OwnLanguageModel


class TinyGPTVPhiConfig(PhiConfig):
    """Phi's keys; ``qk_layernorm`` says nothing here, the norms are always there.

    Raises:
        ValueError: ``num_key_value_heads`` other than ``num_attention_heads``.
    """

    model_type = "tinygptv_phi"

    def __init__(self, num_key_value_heads: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"num_key_value_heads is {num_key_value_heads}, but each of the {self.num_attention_heads} "
                f"heads has its own keys; leave it out"
            )


class TinyGPTVPhiAttention(nn.Module):
    """Every head has as many keys as queries; the first part of a head turns with the position."""

    def __init__(self, config: TinyGPTVPhiConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim = width // self.num_heads
        # The names transformers' attention functions ask for.
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self.q_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        self.k_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # Head after head, each with its query, key and value.
        qkv_BTA3H = self.query_key_value(x_BTD).unflatten(-1, (self.num_heads, 3, self.head_dim))
        q_BATH, k_BATH, v_BATH = (part.transpose(1, 2) for part in qkv_BTA3H.unbind(-2))
        q_BATH, k_BATH = self._turned(self.q_layernorm(q_BATH), self.k_layernorm(k_BATH), position_embeddings)
        if past_key_values is not None:
            k_BATH, v_BATH = past_key_values.update(k_BATH, v_BATH, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        a_BTAH, weights = attend(
            self, q_BATH, k_BATH, v_BATH, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.dense(a_BTAH.flatten(2)), weights

    @staticmethod
    def _turned(q_BATH: Tensor, k_BATH: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        turning = positions[0].shape[-1]
        q_turn, k_turn = apply_rotary_pos_emb(q_BATH[..., :turning], k_BATH[..., :turning], *positions)
        q_BATH = torch.cat((q_turn, q_BATH[..., turning:]), dim=-1)
        return q_BATH, torch.cat((k_turn, k_BATH[..., turning:]), dim=-1)


class TinyGPTVPhiBlock(GradientCheckpointingLayer):
    """Attention and feed-forward side by side, of one normed input."""

    def __init__(self, config: TinyGPTVPhiConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = TinyGPTVPhiAttention(config, layer_idx)
        self.mlp = PhiMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_layernorm = LlamaRMSNorm(config.hidden_size)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BTD: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(x_BTD)
        attended, _ = self.self_attn(normed, **kwargs)
        attended = self.resid_dropout(self.post_layernorm(attended))
        return attended + self.resid_dropout(self.mlp(normed)) + x_BTD


class TinyGPTVPhiPreTrainedModel(OwnLanguageModel):
    """What decoder and causal model share."""

    config_class = TinyGPTVPhiConfig
    config: TinyGPTVPhiConfig
    base_model_prefix = "model"
    _no_split_modules = ["TinyGPTVPhiBlock"]  # noqa: RUF012 - transformers' own, as the next
    _can_record_outputs = {"hidden_states": TinyGPTVPhiBlock, "attentions": TinyGPTVPhiAttention}  # noqa: RUF012


class TinyGPTVPhiModel(TinyGPTVPhiPreTrainedModel, Decoder):
    """The decoder."""

    def __init__(self, config: TinyGPTVPhiConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(TinyGPTVPhiBlock(config, n) for n in range(config.num_hidden_layers))
        self.rotary_emb = PhiRotaryEmbedding(config=config)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def before_blocks(self, x_BTD: Tensor) -> Tensor:
        return self.embed_dropout(x_BTD)

    def after_blocks(self, x_BTD: Tensor) -> Tensor:
        return self.final_layernorm(x_BTD)


class TinyGPTVPhiForCausalLM(TinyGPTVPhiPreTrainedModel, CausalLanguageModel):
    """Decoder and head, which has a bias."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TinyGPTVPhiConfig) -> None:
        super().__init__(config)
        self.model = TinyGPTVPhiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
