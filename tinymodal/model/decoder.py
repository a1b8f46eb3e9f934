"""The way from embeddings to logits, for the language models that transformers has no class for.

A family brings its blocks, its positions and its norm (``openelm``, ``minicpm``, ``tinygptv_phi``). Masks,
caches, kinds of attention, gradient checkpointing and generation are transformers' own, so that whatever
works with its families works with these: packed rows, batches padded on the left, every kind of attention.
"""

# Shapes: B rows, T positions, D width, V vocabulary.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


class OwnLanguageModel(PreTrainedModel):
    """What is true of all of them; a family adds its config and the name of its decoder."""

    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers' own class attribute
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class Decoder(OwnLanguageModel):
    """Embeddings, blocks and the last norm."""

    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module

    def positions(self, x_BTD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines that the blocks turn queries and keys by."""
        cos, sin = self.rotary_emb(x_BTD, position_ids=position_ids)
        return cos, sin

    def before_blocks(self, x_BTD: Tensor) -> Tensor:
        """What is done to the embeddings first."""
        return x_BTD

    def after_blocks(self, x_BTD: Tensor) -> Tensor:
        """What is done to the last block's output."""
        return self.norm(x_BTD)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder; arguments are those of every decoder of transformers.

        Raises:
            ValueError: unless one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        x_BTD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x_BTD.shape[1], device=x_BTD.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        x_BTD = self.before_blocks(x_BTD)
        positions = self.positions(x_BTD, position_ids)
        for block in self.layers:
            x_BTD = block(
                x_BTD,
                attention_mask=mask,
                position_embeddings=positions,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.after_blocks(x_BTD), past_key_values=past_key_values
        )


class CausalLanguageModel(OwnLanguageModel, GenerationMixin):
    """A decoder with a head; the head may be tied to the embedding."""

    lm_head: nn.Linear

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value  # type: ignore[assignment]

    def to_logits(self, x_BTD: Tensor) -> Tensor:
        """The head: [B, T, D] -> [B, T, V]."""
        return self.lm_head(x_BTD)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Decoder and head; arguments are those of every causal language model of transformers."""
        out = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.to_logits(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


def activation(name: str) -> nn.Module:
    """An activation by the name a config has for it.

    Raises:
        ValueError: transformers knows none of that name.
    """
    if name not in ACT2FN:
        raise ValueError(f"unknown activation {name!r}; transformers knows {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]
