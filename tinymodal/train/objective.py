"""Model and losses as one module, so that one object is moved, compiled and (later) sharded.

``text`` is the cross entropy of the next token, at the positions that train and nowhere else: only they
reach the language head. ``cells`` is what each image token shows, known for made pictures only: one linear
head per question, straight on the connector's output. It teaches a tower to see before any language model
looks, and does not run one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Batch
from tinymodal.train.loss import head_cross_entropy, linear_cross_entropy

if TYPE_CHECKING:
    from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration

# Shapes: B rows, T positions, I pictures, S tokens a picture, D language width, N positions that train.

LossTerms = dict[str, Tensor]
"""Loss -> sum over targets, float32 []. Never a mean: a step divides by what all its micro-batches count."""


class CellHeads(nn.Module):
    """One linear classifier per question about an image token."""

    def __init__(self, width: int, classes: Sequence[int]) -> None:
        """``width`` of an image token's embedding, and the number of classes of each question."""
        super().__init__()
        self.classes = tuple(classes)
        # One product for all questions; the loss reads its own stretch of columns.
        self.project = nn.Linear(width, sum(classes))

    def forward(self, tokens_ISD: Tensor, targets_ISH: Tensor) -> Tensor:
        """Sum of the cross entropies of all labels that are not ``IGNORE``."""
        stretches = self.project(tokens_ISD).float().flatten(0, 1).split(self.classes, dim=1)
        targets = targets_ISH.flatten(0, 1).unbind(1)
        losses = [
            F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
            for logits, target in zip(stretches, targets, strict=True)
        ]
        return torch.stack(losses).sum()


class Objective(nn.Module):
    """What a stage minimises."""

    def __init__(
        self,
        model: TinyModalForConditionalGeneration,
        losses: Sequence[str] = ("text",),
        cell_classes: Sequence[int] = (),
    ) -> None:
        """Join them.

        Args:
            model: trained in place.
            losses: ``text``, ``cells`` or both, whose means are added.
            cell_classes: classes of each question of ``cells``.
        """
        super().__init__()
        self.model = model
        self.losses = tuple(losses)
        self.heads: CellHeads | None = None
        if "cells" in self.losses:
            width = int(model.get_input_embeddings().embedding_dim)  # type: ignore[arg-type]
            self.heads = CellHeads(width, cell_classes).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Targets of each loss in all of ``batches``, counted where they were made, on the CPU."""
        counts = {}
        for loss in self.losses:
            if loss == "text":
                counts[loss] = sum(batch.num_targets for batch in batches)
            else:
                counts[loss] = sum(self._count_cells(batch) for batch in batches)
        return counts

    def forward(self, batch: Batch) -> LossTerms:
        """The sums over the targets of one batch, one for each loss."""
        model = self.model.model
        seen = None if batch.pixel_values is None else model.perceive("image", batch.pixel_values)
        terms: LossTerms = {}
        if "text" in self.losses:
            terms["text"] = self._text(batch, seen)
        if self.heads is not None:
            if seen is None or batch.image_targets is None:
                terms["cells"] = torch.zeros((), device=self.device)
            else:
                (images_ISD,) = seen  # pictures with targets are one tile of one size
                terms["cells"] = self.heads(images_ISD, batch.image_targets)
        return terms

    def _text(self, batch: Batch, seen: tuple[Tensor, ...] | None) -> Tensor:
        model = self.model.model
        x_BTD = model.get_input_embeddings()(batch.input_ids)
        if seen is not None:
            x_BTD = model.place(x_BTD, model.bank("image", seen), batch.image_take, batch.image_put)
        # No attention_mask and no cache: transformers reads document borders from position_ids only when both
        # are absent, and with either present packed documents see each other without a word.
        out = model.language_model(inputs_embeds=x_BTD, position_ids=batch.position_ids, use_cache=False)
        states_ND = out.last_hidden_state.flatten(0, 1).index_select(0, batch.target_index)
        if self.model.head_is_plain:
            return linear_cross_entropy(
                states_ND, self.model.head_weight(), batch.target_ids, self.model.head_bias()
            )
        return head_cross_entropy(states_ND, self.model.head, batch.target_ids, len(self.model.head_weight()))

    def _count_cells(self, batch: Batch) -> int:
        """Labels of ``cells`` in a batch; refuses those that no class stands for."""
        assert self.heads is not None
        targets_ISH = batch.image_targets
        if targets_ISH is None:
            if batch.pixel_values is None:
                return 0
            raise DataError(f"{batch.sample_ids[0]}: {_why_no_targets(batch)}")
        classes = self.heads.classes
        if targets_ISH.shape[2] != len(classes):
            raise DataError(
                f"{batch.sample_ids[0]}: pictures have {targets_ISH.shape[2]} labels a token, but "
                f"cell_classes names {len(classes)}; give the classes of each label."
            )
        known_ISH = targets_ISH.masked_fill(targets_ISH == IGNORE, 0)
        lowest, highest = (ends.tolist() for ends in (known_ISH.amin((0, 1)), known_ISH.amax((0, 1))))
        for head, (low, label, num) in enumerate(zip(lowest, highest, classes, strict=True)):
            if low < 0:
                raise DataError(
                    f"{batch.sample_ids[0]}: label {low} of head {head}; expected 0 or more, or {IGNORE} "
                    f"where it has nothing to tell."
                )
            if label >= num:
                raise DataError(
                    f"{batch.sample_ids[0]}: label {label} of head {head}, but cell_classes[{head}] "
                    f"is {num}; it must be at least {label + 1}."
                )
        return int((targets_ISH != IGNORE).sum())


def _why_no_targets(batch: Batch) -> str:
    """What keeps a batch of pictures from having targets, and what to do."""
    tiles, take_K = batch.pixel_values, batch.image_take
    one_tile = "the cells loss needs every picture as one tile, all of one size and without learned marks"
    advice = "Prepare them with resize = \"square\" and no marks, or leave 'cells' out of the loss."
    if isinstance(tiles, tuple):
        sizes = " and ".join(f"{height}x{width}" for *_, height, width in (same.shape for same in tiles))
        return f"{one_tile}, and there are tiles of {len(tiles)} sizes ({sizes} px) here. {advice}"
    if take_K is not None and not torch.equal(take_K, torch.arange(len(take_K), device=take_K.device)):
        return f"{one_tile}, and there are learned marks or pictures of several tiles here. {advice}"
    return (
        "the cells loss needs to know what every picture shows, each as one tile, and not every picture here "
        "says so. Use made data with targets, or leave 'cells' out of the loss."
    )
