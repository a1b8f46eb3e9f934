"""MiniCPM 1 and 2, OpenBMB's language models: a llama with three scales (arXiv:2404.06395).

Word embeddings are multiplied by ``scale_emb``, what a block adds by ``scale_depth / sqrt(layers)``, and the
last states are divided by ``hidden_size / dim_model_base`` before the head. The config's keys and the
weights' names are those of the published checkpoints, which load unchanged (``model/modeling_minicpm.py`` of
OpenBMB/MiniCPM). It is the language model of MiniCPM-V 1 and 2; MiniCPM 3 is transformers' own ``minicpm3``.
"""

# Shapes: B rows, T positions, D width, V vocabulary.

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .decoder import CausalLanguageModel, Decoder, OwnLanguageModel, activation


class MiniCPMConfig(LlamaConfig):
    """Llama's keys and the three scales.

    Args:
        scale_emb: words' embeddings are multiplied by it; pictures' are not.
        scale_depth: what attention and feed-forward add is multiplied by ``scale_depth / sqrt(layers)``.
        dim_model_base: the last states are divided by ``hidden_size / dim_model_base``.
        tie_word_embeddings: the head is the embedding, before its scale.
        **kwargs: see ``LlamaConfig``.

    Raises:
        ValueError: an option of a later MiniCPM that changes what is computed.
    """

    model_type = "minicpm"

    def __init__(
        self,
        scale_emb: float = 1.0,
        scale_depth: float = 1.0,
        dim_model_base: int = 1,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        for key, name in (("sparse_config", "sparse attention"), ("num_experts", "experts")):
            if kwargs.get(key):
                raise ValueError(f"MiniCPM with {name} ({key}) is not supported; dense ones are")
        self.scale_emb = scale_emb
        self.scale_depth = scale_depth
        self.dim_model_base = dim_model_base
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class ScaledEmbedding(nn.Embedding):
    """Rows times a number. The number is not in the weight, to which a head may be tied."""

    def __init__(self, num_embeddings: int, width: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(num_embeddings, width, padding_idx)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class MiniCPMBlock(GradientCheckpointingLayer):
    """Llama's block, whose two additions are scaled."""

    def __init__(self, config: MiniCPMConfig, layer_idx: int) -> None:
        super().__init__()
        activation(config.hidden_act)
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.scale = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def forward(self, x_BTD: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(x_BTD), **kwargs)
        x_BTD = x_BTD + attended * self.scale
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)) * self.scale


class MiniCPMPreTrainedModel(OwnLanguageModel):
    """What decoder and causal model share."""

    config_class = MiniCPMConfig
    config: MiniCPMConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniCPMBlock"]  # noqa: RUF012 - transformers' own, as the next
    _can_record_outputs = {"hidden_states": MiniCPMBlock, "attentions": LlamaAttention}  # noqa: RUF012


class MiniCPMModel(MiniCPMPreTrainedModel, Decoder):
    """The decoder."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.scale_emb
        )
        self.layers = nn.ModuleList(MiniCPMBlock(config, n) for n in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.post_init()


class MiniCPMForCausalLM(MiniCPMPreTrainedModel, CausalLanguageModel):
    """Decoder and head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config)
        self.model = MiniCPMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def to_logits(self, x_BTD: Tensor) -> Tensor:
        return self.lm_head(x_BTD / (self.config.hidden_size / self.config.dim_model_base))
