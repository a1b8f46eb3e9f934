"""The plain way to train such a model, as the systems before us do it, from the same modules.

What it does follows TinyLLaVA Factory, and LLaVA before it: samples are padded on the right to the longest
of the micro-batch; a row without a picture brings a zero picture, which is encoded too; the tower runs all
its blocks and its pooling head, and the hidden state before the last is read; rows are put together one by
one and padded again; the language model computes logits everywhere, and its own loss follows; a mask tells
attention what is padding. Activations are recomputed, as every script of theirs asks.

Where newer libraries are faster than those it was written for, it has the newer: scaled dot product attention
in tower and decoder, a fused optimizer. Its loss is ours to five digits, by assertion.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel

from tinymodal.core.types import IGNORE, Encoded
from tinymodal.model.language import causal_class
from tinymodal.model.media import Features
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration

HERE = -200
"""Stands for a picture among the ids, one for all of its tokens."""


class Padded(NamedTuple):
    """A micro-batch: B rows, the longest has T tokens, a picture counted as one."""

    ids: Tensor
    """int64 [B, T]"""
    labels: Tensor
    """int64 [B, T]"""
    pixels: Tensor
    """float32 [B, 3, H, W]: zeros where a row has no picture."""
    lengths: tuple[int, ...]
    """Of the rows, without padding."""
    places: tuple[int | None, ...]
    """Where each row's picture stands; None: it has none."""

    def to(self, device: torch.device) -> Padded:
        ids, labels, pixels = (value.to(device, non_blocking=True) for value in self[:3])
        return self._replace(ids=ids, labels=labels, pixels=pixels)


def pad(samples: Sequence[Encoded], image_token_id: int, pad_id: int, image_px: int) -> Padded:
    """Samples of one picture or none each, side by side."""
    ids, labels, pixels, places = [], [], [], []
    for sample in samples:
        found = (sample.ids == image_token_id).nonzero().flatten()
        kept = torch.ones(len(sample.ids), dtype=torch.bool)
        kept[found[1:]] = False
        one = sample.ids.clone()
        one[found] = HERE
        ids.append(one[kept])
        labels.append(sample.labels[kept])
        pixels.append(sample.media[0].tiles[0] if sample.media else torch.zeros(3, image_px, image_px))
        places.append(int(found[0]) if sample.media else None)
    pad_sequence = nn.utils.rnn.pad_sequence
    return Padded(
        pad_sequence(ids, batch_first=True, padding_value=pad_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        torch.stack(pixels),
        tuple(len(row) for row in ids),
        tuple(places),
    )


class Plain(nn.Module):
    """The same weights as one of our models with a SigLIP tower; copies."""

    def __init__(self, model: TinyModalForConditionalGeneration) -> None:
        super().__init__()
        config = model.config
        device = next(model.parameters()).device
        with device, torch.random.fork_rng(devices=[]):
            self.tower = SiglipVisionModel(copy.deepcopy(config.vision_config))
            self.language: Any = causal_class(config.text_config)(copy.deepcopy(config.text_config))
        self.connector = copy.deepcopy(model.model.connectors["image"])
        if device.type != "meta":
            backbone: Any = model.model.towers["image"].module
            missing = self.tower.load_state_dict(backbone.state_dict(), strict=False)
            assert not missing.unexpected_keys, missing.unexpected_keys
            self.language.base_model.load_state_dict(model.model.language_model.state_dict())
            self.language.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
        self.tower.requires_grad_(False)

    def recompute(self, wanted: bool) -> None:
        """Gradient checkpointing of every block, on as shipped."""
        for part in (self.tower, self.language):
            if wanted:
                part.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                part.gradient_checkpointing_disable()

    def adapt(self, rank: int, alpha: int) -> None:
        """LoRA on every linear layer of the language model, which is frozen."""
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        inject_adapter_in_model(config, self.language)
        for name, p in self.language.named_parameters():
            p.requires_grad_("lora_" in name)

    def freeze(self, language: bool) -> None:
        """The tower is frozen, the connector trains, and so does the language model unless told."""
        self.language.requires_grad_(not language)

    def forward(self, batch: Padded, num_targets: int | None = None) -> Tensor:
        """Loss of a micro-batch: the mean over its targets, or the sum over them by ``num_targets``."""
        states = self.tower(pixel_values=batch.pixels, output_hidden_states=True).hidden_states[-2]
        side = int(states.shape[1] ** 0.5)
        pictures = self.connector(Features(states, (side, side)))
        embed = self.language.get_input_embeddings()
        rows, labels = [], []
        for n, (length, at) in enumerate(zip(batch.lengths, batch.places, strict=True)):
            ids, label = batch.ids[n][:length], batch.labels[n][:length]
            if at is None:
                # The empty piece keeps the tower and the connector in the graph.
                rows.append(torch.cat([embed(ids), pictures[n][:0]]))
                labels.append(label)
                continue
            words = embed(torch.cat([ids[:at], ids[at + 1 :]]))
            rows.append(torch.cat([words[:at], pictures[n].to(words.dtype), words[at:]]))
            unlabelled = torch.full((len(pictures[n]),), IGNORE, device=label.device)
            labels.append(torch.cat([label[:at], unlabelled, label[at + 1 :]]))
        longest = max(len(row) for row in rows)
        device = rows[0].device
        embeds, padded_labels, mask, positions = [], [], [], []
        for row, label in zip(rows, labels, strict=True):
            missing = longest - len(row)
            embeds.append(torch.cat([row, row.new_zeros(missing, row.shape[1])]))
            padded_labels.append(torch.cat([label, torch.full((missing,), IGNORE, device=device)]))
            mask.append(torch.arange(longest, device=device) < len(row))
            positions.append(torch.where(mask[-1], torch.arange(longest, device=device), 0))
        told = {} if num_targets is None else {"num_items_in_batch": num_targets}
        out = self.language(
            inputs_embeds=torch.stack(embeds),
            attention_mask=torch.stack(mask),
            position_ids=torch.stack(positions),
            labels=torch.stack(padded_labels),
            use_cache=False,
            **told,
        )
        loss: Tensor = out.loss
        return loss


def plain_step(
    plain: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Padded],
    clip: float = 1.0,
    autocast: torch.dtype | None = None,
) -> float:
    """One optimizer step over the micro-batches; the loss over all of their targets."""
    device = next(plain.parameters()).device
    num_targets = sum(int((batch.labels[:, 1:] != IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = plain(batch.to(device), num_targets)
        loss.backward()
        total += loss.detach()
    if clip:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(total)
