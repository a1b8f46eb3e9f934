"""OpenELM, Apple's language models whose layers grow wider towards the last one (arXiv:2404.14619).

Number of heads and width of the feed-forward part are a layer's own. Otherwise a llama: RMS norms, rotated
positions, grouped queries, gated feed-forward; queries and keys are normed before they are turned. The
config's keys and the weights' names are those of the published checkpoints, which load unchanged
(``modeling_openelm.py`` of apple/OpenELM-270M and its sisters).
"""

# Shapes: B rows, T positions, D width, A query heads, G key and value heads, H head width, F feed-forward.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from .decoder import CausalLanguageModel, Decoder, OwnLanguageModel, activation


class OpenELMConfig(PreTrainedConfig):
    """Sizes of an OpenELM.

    Args:
        vocab_size: rows of the embedding.
        max_context_length: positions it was trained for.
        num_transformer_layers: number of blocks.
        model_dim: width.
        head_dim: width of a head, in every layer.
        qkv_multipliers: width of all query heads together relative to ``model_dim``; two numbers: of the
            first and the last layer, the others in between.
        num_gqa_groups: query heads that share one key and value head.
        ffn_multipliers: width of the feed-forward part relative to ``model_dim``: one number for all layers,
            two for the first and the last, or one for each.
        ffn_with_glu: gated feed-forward; ``proj_1`` holds the gate and then what it gates.
        ffn_dim_divisor: feed-forward widths are multiples of it.
        activation_fn_name: transformers' name of the activation.
        normalization_layer_name: only ``rms_norm``.
        normalize_qk_projections: norm queries and keys, each head by itself.
        share_input_output_layers: the head is the embedding.
        rope_freq_constant: base of the rotated positions' wavelengths.
        rope_max_length: kept as published; nothing depends on it.
        num_query_heads: query heads of each layer; by default what ``qkv_multipliers`` say.
        num_kv_heads: key and value heads of each layer; by default ``num_query_heads / num_gqa_groups``.
        tie_word_embeddings: transformers' name of ``share_input_output_layers``, used where that is not
            given.
        **kwargs: what every transformers config takes.

    Raises:
        ValueError: sizes that do not fit, or a key under another family's name.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own, as the next
    attribute_map = {  # noqa: RUF012
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "tie_word_embeddings": "share_input_output_layers",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        max_context_length: int = 2048,
        num_transformer_layers: int = 12,
        model_dim: int = 2048,
        head_dim: int = 128,
        qkv_multipliers: float | Sequence[float] = 1.0,
        num_gqa_groups: int = 1,
        ffn_multipliers: float | Sequence[float] = 4.0,
        ffn_with_glu: bool = True,
        ffn_dim_divisor: int = 256,
        activation_fn_name: str = "swish",
        normalization_layer_name: str = "rms_norm",
        normalize_qk_projections: bool = False,
        share_input_output_layers: bool | None = None,
        rope_freq_constant: float = 10000,
        rope_max_length: int = 4096,
        num_query_heads: Sequence[int] | None = None,
        num_kv_heads: Sequence[int] | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        for theirs in sorted(set(kwargs) & set(self.attribute_map)):
            raise ValueError(f"OpenELM calls {theirs} {self.attribute_map[theirs]}; give that instead")
        if normalization_layer_name != "rms_norm":
            raise ValueError(f"OpenELM's norm is 'rms_norm', got {normalization_layer_name!r}")
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; positions turn pairs of numbers, so it must be even")
        self.vocab_size = vocab_size
        self.max_context_length = max_context_length
        self.num_transformer_layers = num_transformer_layers
        self.model_dim = model_dim
        self.head_dim = head_dim
        self.qkv_multipliers = (
            qkv_multipliers if isinstance(qkv_multipliers, int | float) else [*qkv_multipliers]
        )
        self.num_gqa_groups = num_gqa_groups
        self.ffn_multipliers = per_layer(ffn_multipliers, num_transformer_layers, "ffn_multipliers")
        self.ffn_with_glu = ffn_with_glu
        self.ffn_dim_divisor = ffn_dim_divisor
        self.activation_fn_name = activation_fn_name
        self.normalization_layer_name = normalization_layer_name
        self.normalize_qk_projections = normalize_qk_projections
        if share_input_output_layers is None:
            share_input_output_layers = bool(tie_word_embeddings)
        self.share_input_output_layers = share_input_output_layers
        self.rope_freq_constant = rope_freq_constant
        self.rope_max_length = rope_max_length
        if num_query_heads is None:
            widths = per_layer(qkv_multipliers, num_transformer_layers, "qkv_multipliers")
            group = head_dim * num_gqa_groups
            num_query_heads = [rounded(model_dim * times, group) // head_dim for times in widths]
        if num_kv_heads is None:
            num_kv_heads = [heads // num_gqa_groups for heads in num_query_heads]
        self.num_query_heads, self.num_kv_heads = list(num_query_heads), list(num_kv_heads)
        for name in ("num_query_heads", "num_kv_heads"):
            if len(getattr(self, name)) != num_transformer_layers:
                raise ValueError(
                    f"{name} are of {len(getattr(self, name))} layers, but there are {num_transformer_layers}"
                )
        for layer, (queries, keys) in enumerate(zip(self.num_query_heads, self.num_kv_heads, strict=True)):
            if keys < 1 or queries % keys:
                raise ValueError(
                    f"layer {layer}: {queries} query heads cannot share {keys} key heads evenly; "
                    f"num_gqa_groups is {num_gqa_groups}"
                )
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(**kwargs)


def per_layer(given: float | Sequence[float], num_layers: int, name: str) -> list[float]:
    """One number for each layer, of one for all, of two for the first and the last, or of all of them.

    Numbers in between are rounded to two places, as in Apple's ``configuration_openelm.py``.
    """
    if isinstance(given, int | float):
        return [given] * num_layers
    if len(given) == num_layers:
        return [*given]
    if len(given) == 2:
        return [round(float(n), 2) for n in np.linspace(given[0], given[1], num=num_layers)]
    raise ValueError(f"{name}: {len(given)} numbers for {num_layers} layers; give 1, 2 or {num_layers}")


def rounded(width: float, divisor: int) -> int:
    """The nearest multiple of ``divisor``, but not less than 90 % of ``width`` (MobileNet's rule)."""
    nearest = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * width else nearest


def rotated(x_BAHT: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Heads turned by their positions, in float32: number i of a head with number i + H/2."""
    x = x_BAHT.float()
    first, second = x.chunk(2, dim=-1)
    turned = x * cos_BTH[:, None] + torch.cat((-second, first), dim=-1) * sin_BTH[:, None]
    return turned.to(x_BAHT.dtype)


class OpenELMAttention(nn.Module):
    """Grouped queries with this layer's own number of heads; one matrix makes queries, keys and values."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_heads = config.num_query_heads[layer_idx]
        self.num_key_value_heads = config.num_kv_heads[layer_idx]
        # The names transformers' attention functions ask for.
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        out_heads = self.num_heads + 2 * self.num_key_value_heads
        self.qkv_proj = nn.Linear(config.model_dim, out_heads * self.head_dim, bias=False)
        normed = config.normalize_qk_projections
        self.q_norm = LlamaRMSNorm(self.head_dim) if normed else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim) if normed else nn.Identity()
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, config.model_dim, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
        qkv_BATH = self.qkv_proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_BATH, k_BGTH, v_BGTH = qkv_BATH.split(heads, dim=1)
        q_BATH = rotated(self.q_norm(q_BATH), *position_embeddings)
        k_BGTH = rotated(self.k_norm(k_BGTH), *position_embeddings)
        if past_key_values is not None:
            k_BGTH, v_BGTH = past_key_values.update(k_BGTH, v_BGTH, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        a_BTAH, weights = attend(
            self, q_BATH, k_BGTH, v_BGTH, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.out_proj(a_BTAH.flatten(2)), weights


class OpenELMFeedForward(nn.Module):
    """Gated or plain, with this layer's own width."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        width = rounded(config.ffn_multipliers[layer_idx] * config.model_dim, config.ffn_dim_divisor)
        self.gated = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, 2 * width if self.gated else width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)
        self.act = activation(config.activation_fn_name)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTF = self.proj_1(x_BTD)
        if not self.gated:
            return self.proj_2(self.act(x_BTF))
        gate_BTF, up_BTF = x_BTF.chunk(2, dim=-1)
        return self.proj_2(self.act(gate_BTF) * up_BTF)


class OpenELMBlock(GradientCheckpointingLayer):
    """Attention, then feed-forward, each after a norm and added to what it was given."""

    def __init__(self, config: OpenELMConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer_idx)
        self.ffn = OpenELMFeedForward(config, layer_idx)
        self.ffn_norm = LlamaRMSNorm(config.model_dim)
        self.attn_norm = LlamaRMSNorm(config.model_dim)

    def forward(self, x_BTD: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.attn(self.attn_norm(x_BTD), **kwargs)
        x_BTD = x_BTD + attended
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class OpenELMPreTrainedModel(OwnLanguageModel):
    """What decoder and causal model share."""

    config_class = OpenELMConfig
    config: OpenELMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "token_embeddings"
    _no_split_modules = ["OpenELMBlock"]  # noqa: RUF012 - transformers' own, as the next
    _can_record_outputs = {"hidden_states": OpenELMBlock, "attentions": OpenELMAttention}  # noqa: RUF012


class OpenELMModel(OpenELMPreTrainedModel, Decoder):
    """The decoder."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(OpenELMBlock(config, n) for n in range(config.num_transformer_layers))
        self.norm = LlamaRMSNorm(config.model_dim)
        self.post_init()

    def positions(self, x_BTD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # Computed, not kept: a buffer would have to be filled again wherever a model is made without weights.
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=x_BTD.device)
        frequencies = 1.0 / self.config.rope_freq_constant ** (half / self.config.head_dim)
        angles_BTh = position_ids[..., None].float() * frequencies
        angles_BTH = torch.cat((angles_BTh, angles_BTh), dim=-1)
        return angles_BTH.cos(), angles_BTH.sin()


class OpenELMForCausalLM(OpenELMPreTrainedModel, CausalLanguageModel):
    """Decoder and head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()
