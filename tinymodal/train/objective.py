"""Model and losses as one module, so that one object is moved, compiled and (later) sharded.

``text`` is the cross entropy of the next token, at the positions that train and nowhere else: only they
reach the language head. ``cells`` is what each image token shows, known for made pictures only: one linear
head per question, straight on the connector's output. It teaches a tower to see before any language model
looks, and does not run one. ``speech`` is how unlikely the speech head finds the codec's frames of spoken
answers; it reads states that the text loss reads anyway, and changes no text. ``dpo`` is in
``preference.py``, ``distill`` in ``teacher.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.types import IGNORE, Batch
from tinymodal.train import packed
from tinymodal.train.loss import head_cross_entropy, linear_cross_entropy, target_log_probs
from tinymodal.train.preference import Preferred, Reference, of_documents, preferred

if TYPE_CHECKING:
    from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration
    from tinymodal.train.teacher import Teacher

# Shapes: B rows, T positions, I pictures, S tokens a picture, D language width, N positions that train, P of
# them tokens of spoken answers.

Perceived = dict[str, tuple[Tensor, ...]]
"""Kind of media -> what the language model perceives of them, [I, S, D] for each size of tile."""


class Terms(NamedTuple):
    """The losses of one batch. Sums, never means: a step divides by what all its micro-batches count."""

    sums: dict[str, Tensor]
    """Loss -> sum over its targets, float32 [], with its graph."""
    per_target: Tensor | None
    """The text loss of each target, float32 [N], without graph; None where ``text`` is not a loss."""
    measures: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """What is told beside the losses: sums over the targets of the loss that their name begins with."""


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
            losses: of ``text``, ``cells``, ``dpo``, ``distill`` and ``speech``, whose means are added.
            cell_classes: classes of each question of ``cells``.

        Raises:
            RecipeError: ``speech`` of a model without a speech head.
        """
        super().__init__()
        self.model = model
        self.losses = tuple(losses)
        self.weights: dict[str, float] = {}
        """What the mean of a loss counts in their sum; 1 if it is not listed."""
        self.beta = 0.1
        self.reference: Reference | None = None
        """For ``dpo``: what the model was when the stage began."""
        self.teacher: Teacher | None = None
        """For ``distill``."""
        self.heads: CellHeads | None = None
        self.always_speaks = False
        """Give the speech head a gradient of zero where nothing is spoken: shards are added up together."""
        self.packing: packed.Packing | None = None
        """How documents are kept apart; None: by positions and a mask. See ``lean.py``."""
        if "speech" in self.losses and self._mouth is None:
            raise RecipeError(
                "the loss 'speech' needs a model that speaks, and this one has no speech head; add "
                "[model.speech], or leave 'speech' out of the loss."
            )
        if "cells" in self.losses:
            width = int(model.get_input_embeddings().embedding_dim)  # type: ignore[arg-type]
            self.heads = CellHeads(width, cell_classes).to(self.device)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def _mouth(self) -> Any:
        return getattr(self.model, "speech_head", None)

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Targets of each loss in all of ``batches``, counted where they were made, on the CPU."""
        counts = {}
        for loss in self.losses:
            if loss in ("text", "distill"):
                counts[loss] = sum(batch.num_targets for batch in batches)
            elif loss == "dpo":
                counts[loss] = sum(map(_count_pairs, batches))
            elif loss == "speech":
                counts[loss] = sum(map(self._count_speech, batches))
            else:
                counts[loss] = sum(self._count_cells(batch) for batch in batches)
        return counts

    def forward(self, batch: Batch) -> Terms:
        """The losses of one batch, summed over its targets."""
        sums: dict[str, Tensor] = {}
        measures: dict[str, Tensor] = {}
        per_target_N: Tensor | None = None
        with torch.no_grad() if self._only_mouth_trains else nullcontext():
            perceived = self._perceive(batch)
            states_ND = self._states(self._embedded(batch, perceived), batch) if self.reads_words else None
        if states_ND is not None:
            if "text" in self.losses:
                per_target_N = torch.empty(len(batch.target_ids), device=self.device)
                sums["text"] = self._text(states_ND, batch, per_target_N)
            if "dpo" in self.losses:
                found = self._preference(states_ND, batch)
                sums["dpo"] = found.loss
                measures |= {"dpo_right": found.right, "dpo_margin": found.margin}
            if "distill" in self.losses:
                assert self.teacher is not None, "the loss 'distill' needs a teacher"
                sums["distill"] = self.teacher.divergence(states_ND, self.model.head, batch)
            if "speech" in self.losses:
                sums["speech"], told = self._speech(states_ND, batch)
                measures |= told
        if self.heads is not None:
            if "image" not in perceived or batch.image_targets is None:
                sums["cells"] = torch.zeros((), device=self.device)
            else:
                (images_ISD,) = perceived["image"]  # pictures with targets are one tile of one size
                sums["cells"] = self.heads(images_ISD, batch.image_targets)
        return Terms({loss: sums[loss] for loss in self.losses}, per_target_N, measures)

    @property
    def reads_words(self) -> bool:
        """Whether any loss runs the language model."""
        return any(loss != "cells" for loss in self.losses)

    @property
    def _only_mouth_trains(self) -> bool:
        """Whether no gradient is asked of what the speech head reads."""
        return self.losses == ("speech",) and not any(p.requires_grad for p in self.model.model.parameters())

    def states(self, batch: Batch) -> Tensor:
        """The decoder's last states where the next token trains, [N, D]."""
        return self._states(self._embedded(batch, self._perceive(batch)), batch)

    def log_probs(self, states_ND: Tensor, batch: Batch) -> Tensor:
        """Log-probability of each target, float32 [N]."""
        model = self.model
        return target_log_probs(states_ND, model.head, batch.target_ids, len(model.head_weight()))

    def _perceive(self, batch: Batch) -> Perceived:
        """What the language model perceives of pictures and sounds; nothing of a kind that is not there."""
        model = self.model.model
        found: Perceived = {}
        for kind, values, features in (
            ("image", batch.pixel_values, batch.image_features),
            ("audio", batch.audio_values, batch.audio_features),
        ):
            if features is not None:
                found[kind] = model.connect(kind, features)
            elif values is not None:
                found[kind] = model.perceive(kind, values)
        return found

    def _embedded(self, batch: Batch, perceived: Perceived) -> Tensor:
        """Words, pictures and sounds in their places, [B, T, D]."""
        model = self.model.model
        x_BTD: Tensor = model.get_input_embeddings()(batch.input_ids)
        places: dict[str, tuple[Any, Any]] = {
            "image": (batch.image_take, batch.image_put),
            "audio": (batch.audio_take, batch.audio_put),
        }
        for kind, embeddings in perceived.items():
            x_BTD = model.place(x_BTD, model.bank(kind, embeddings), *places[kind])
        return x_BTD

    def _speech(self, states_ND: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The speech head's loss and what it tells beside it; zeros where nothing is spoken."""
        mouth, take_P = self._mouth, batch.speech_take
        if take_P is None:
            nothing = loss = torch.zeros((), device=self.device)
            if self.always_speaks:
                loss = 0.0 * states_ND.sum()
                loss = loss + sum(0.0 * p.flatten()[:1].sum() for p in mouth.parameters() if p.requires_grad)
            # The same names on every rank and in every micro-batch: they are added up by place.
            return loss, dict.fromkeys(mouth.measures, nothing)
        with torch.no_grad():
            words_PD = self.model.get_input_embeddings()(batch.target_ids.index_select(0, take_P))
        loss, _, told = mouth.loss(
            states_ND.index_select(0, take_P),
            words_PD,
            batch.speech_tokens,
            batch.speech_codes,
            batch.speech_frames,
            batch.speech_voices,
        )
        return loss, told

    def _preference(self, states_ND: Tensor, batch: Batch) -> Preferred:
        if self.reference is None:
            raise ValueError("the loss 'dpo' needs a reference")
        document_N, num_documents = batch.target_document, len(batch.lengths)
        assert document_N is not None, "batches of collate say which documents their targets are in"
        pairs_P2 = document_N.new_zeros((0, 2)) if batch.pairs is None else batch.pairs
        ours_D = of_documents(self.log_probs(states_ND, batch), document_N, num_documents)
        before_D = of_documents(self.reference(batch), document_N, num_documents)
        return preferred(ours_D, before_D, pairs_P2, self.beta)

    def _text(self, states_ND: Tensor, batch: Batch, per_target_N: Tensor) -> Tensor:
        if self.model.head_is_plain:
            return linear_cross_entropy(
                states_ND,
                self.model.head_weight(),
                batch.target_ids,
                self.model.head_bias(),
                per_target=per_target_N,
            )
        return head_cross_entropy(
            states_ND, self.model.head, batch.target_ids, len(self.model.head_weight()), per_target_N
        )

    def _states(self, x_BTD: Tensor, batch: Batch) -> Tensor:
        """The decoder's last states where the next token trains, [N, D]."""
        language_model = self.model.model.language_model
        index_N = batch.target_index
        if self.packing is None or not self.packing.by_document or not batch.lengths:
            # No attention_mask and no cache: transformers reads document borders from position_ids only when
            # both are absent, and with either present packed documents see each other without a word.
            out = language_model(inputs_embeds=x_BTD, position_ids=batch.position_ids, use_cache=False)
            return out.last_hidden_state.flatten(0, 1).index_select(0, index_N)
        documents, take_M = self.packing.needed(batch)
        x_MD, positions_M = x_BTD.flatten(0, 1), batch.position_ids.flatten()
        if take_M is not None:
            x_MD, positions_M = x_MD.index_select(0, take_M), positions_M.index_select(0, take_M)
        states_1MD = packed.run(language_model, x_MD[None], positions_M[None], documents)
        if documents.rows is not None:
            return states_1MD[0]
        if take_M is not None:
            index_N = packed.places(take_M, index_N, batch.input_ids.numel())
        return states_1MD[0].index_select(0, index_N)

    def _count_speech(self, batch: Batch) -> int:
        """What the speech loss of a batch is a sum over; refuses frames that the head cannot say."""
        mouth, codes_QG, voices_Z = self._mouth, batch.speech_codes, batch.speech_voices
        if codes_QG is None or voices_Z is None:
            return 0
        if len(codes_QG) < mouth.books:
            raise DataError(
                f"{batch.sample_ids[0]}: spoken answers of {len(codes_QG)} codebooks, but the speech head "
                f"speaks {mouth.books}; encode them with the model's own codec."
            )
        lowest, highest = int(codes_QG.min()), int(codes_QG.max())
        if lowest < 0 or highest >= mouth.book_size:
            raise DataError(
                f"{batch.sample_ids[0]}: spoken answers with code {lowest if lowest < 0 else highest}, but "
                f"codes of the speech head are 0 to {mouth.book_size - 1}; encode them with the model's own "
                f"codec."
            )
        known = max(1, len(mouth.voices))
        if not 0 <= int(voices_Z.min()) <= int(voices_Z.max()) < known:
            raise DataError(
                f"{batch.sample_ids[0]}: spoken answers in voices {sorted(set(voices_Z.tolist()))}, but the "
                f"speech head has {known}; name all of them in model.speech.voices."
            )
        count: int = mouth.count(batch.speech_frames)
        return count

    def _count_cells(self, batch: Batch) -> int:
        """Labels of ``cells`` in a batch; refuses those that no class stands for."""
        assert self.heads is not None
        targets_ISH = batch.image_targets
        if targets_ISH is None:
            if batch.pixel_values is None and batch.image_features is None:
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


def _count_pairs(batch: Batch) -> int:
    """Pairs of answers in a batch; refuses a sample that has only one."""
    pairs = 0 if batch.pairs is None else len(batch.pairs)
    answers = 0 if batch.target_document is None else len(batch.target_document.unique())
    if answers != 2 * pairs:
        raise DataError(
            f"{batch.sample_ids[0]}: the dpo loss needs a chosen and a rejected answer of every sample, and "
            f"this batch has {pairs} pairs in {answers} conversations; give its sources "
            f"format = 'preference', or another loss to the stage."
        )
    return pairs


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
