"""What a larger model of the same tokens would say next, as a loss: distillation.

Hinton, Vinyals and Dean 2015, arXiv:1503.02531: with both models' logits divided by a temperature T, the loss
of a target is T^2 times the Kullback-Leibler divergence of the student's next token from the teacher's. With
``top_k`` the teacher's k likeliest tokens count one by one and all others as one: exact where k is the whole
vocabulary, and never more than that otherwise.

The teacher reads the student's batches, so it must write every sample as the same tokens and prepare pictures
alike; :func:`see_alike` looks before the first step. Logits of both exist a block of positions at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinymodal.chat.encode import Encoder
from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.types import Batch, Encoded, Sample
from tinymodal.train.loss import block_of
from tinymodal.train.objective import Objective
from tinymodal.train.preference import Reference
from tinymodal.train.spread import FIELDS, RAW

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed

# Shapes: N positions that train, D width, V vocabulary, K likeliest tokens.

Head = Callable[[Tensor], Tensor]
"""States [n, D] -> logits [n, V]."""


class Likely(NamedTuple):
    """A teacher's choice of next tokens, with its temperature."""

    ids_NK: Tensor
    """int64, the likeliest first."""
    log_probs_NK: Tensor
    """float32"""
    rest_N: Tensor
    """float32: the probability of all other tokens together."""

    def to(self, device: torch.device) -> Likely:
        return Likely(*(tensor.to(device) for tensor in self))


class Teacher:
    """A frozen model beside the one that trains."""

    def __init__(
        self,
        composed: Composed,
        vocabulary: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        """Freeze it.

        Args:
            composed: the teacher, on the device where batches are.
            vocabulary: of the student. The smaller of both counts: larger tables are padded.
            temperature: T.
            top_k: tokens that count one by one; None: all.
            shelf: where the likeliest tokens are kept; only with ``top_k``.

        Raises:
            RecipeError: more tokens are asked for than there are.
        """
        composed.model.requires_grad_(False).eval()
        self.model: Any = composed.model
        self.vocabulary = min(vocabulary, len(self.model.head_weight()))
        self.temperature, self.top_k, self.shelf = temperature, top_k, shelf
        if top_k is not None and top_k >= self.vocabulary:
            raise RecipeError(
                f"teacher.top_k is {top_k}, and both models have {self.vocabulary} tokens in common; "
                f"leave it out"
            )
        self._objective = Objective(self.model)

    def divergence(self, states_ND: Tensor, head: Head, batch: Batch) -> Tensor:
        """The loss summed over the targets of ``batch``, float32 [].

        Args:
            states_ND: the student's last states at the targets.
            head: the student's.
            batch: what both read.
        """
        if not len(states_ND):
            return states_ND.sum().float()
        scale = self.temperature**2
        if self.top_k is None:
            theirs_ND = self._states(batch)
            return scale * self._in_blocks(self._whole, head, states_ND, (theirs_ND,))
        return scale * self._in_blocks(self._of_likely, head, states_ND, tuple(self.likely(batch)))

    def likely(self, batch: Batch) -> Likely:
        """The teacher's ``top_k`` for each target, from the shelf where it has all of them."""
        if self.shelf is None:
            return self._choose(batch)
        keys = [digest for digest, _ in documents(batch)]
        known = [self.shelf.get(key) for key in keys]
        counts = torch.bincount(_document(batch).cpu(), minlength=len(batch.lengths)).tolist()
        counts = [count for count in counts if count]
        if any(found is None or len(found.rest_N) != n for found, n in zip(known, counts, strict=True)):
            chosen = self._choose(batch)
            parts = zip(*(tensor.cpu().split(counts) for tensor in chosen), strict=True)
            for key, part in zip(keys, parts, strict=True):
                self.shelf.put(key, Likely(*part))
            return chosen
        device = batch.target_ids.device
        joined = zip(*(found for found in known if found is not None), strict=True)
        return Likely(*(torch.cat(tensors) for tensors in joined)).to(device)

    @torch.no_grad()
    def _states(self, batch: Batch) -> Tensor:
        return self._objective.states(batch)

    @torch.no_grad()
    def _choose(self, batch: Batch) -> Likely:
        assert self.top_k is not None
        states_ND = self._states(batch)
        found: list[tuple[Tensor, ...]] = []
        for states in states_ND.split(block_of(states_ND, self.vocabulary)):
            log_probs = self._log_probs(self.model.head(states))
            top, ids = log_probs.topk(self.top_k, dim=1)
            rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(1).exp()
            found.append((ids, top, rest))
        return Likely(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))

    def _log_probs(self, logits_NV: Tensor) -> Tensor:
        return (logits_NV[:, : self.vocabulary].float() / self.temperature).log_softmax(1)

    def _whole(self, ours_NV: Tensor, theirs_ND: Tensor) -> Tensor:
        with torch.no_grad():
            theirs_NV = self._log_probs(self.model.head(theirs_ND))
        return (theirs_NV.exp() * (theirs_NV - ours_NV)).sum()

    def _of_likely(self, ours_NV: Tensor, ids_NK: Tensor, log_probs_NK: Tensor, rest_N: Tensor) -> Tensor:
        ours_NK = ours_NV.gather(1, ids_NK)
        others_N = ours_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
        each = (log_probs_NK.exp() * (log_probs_NK - ours_NK)).sum()
        return each + (torch.xlogy(rest_N, rest_N) - rest_N * others_N).sum()

    def _in_blocks(
        self, measure: Callable[..., Tensor], head: Head, states_ND: Tensor, theirs: tuple[Tensor, ...]
    ) -> Tensor:
        """``measure`` summed over blocks of positions, whose logits are made twice in place of kept."""

        def one(states: Tensor, *rest: Tensor) -> Tensor:
            return measure(self._log_probs(head(states)), *rest)

        size = block_of(states_ND, self.vocabulary)
        blocks = zip(*(tensor.split(size) for tensor in (states_ND, *theirs)), strict=True)
        parts = [checkpoint(one, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
        return torch.stack(parts).sum()


class Itself(Teacher):
    """The student in the place of its teacher: work of about that size, where only its size is asked."""

    def __init__(self, objective: Objective, temperature: float, top_k: int | None) -> None:
        self.model, self._objective = objective.model, objective
        self.vocabulary = len(self.model.head_weight())
        self.temperature, self.top_k, self.shelf = temperature, top_k, None


def reference(composed: Composed) -> Reference:
    """What ``composed`` says of the targets of a batch, for ``dpo``; it is frozen and never trains."""
    composed.model.requires_grad_(False).eval()
    objective = Objective(composed.model)

    def log_probs(batch: Batch) -> Tensor:
        with torch.no_grad():
            return objective.log_probs(objective.states(batch), batch)

    return log_probs


class Shelf:
    """The likeliest tokens of samples on disk, 8 bytes each, a file for every sample."""

    def __init__(
        self,
        folder: Path,
        teacher: str,
        temperature: float,
        top_k: int,
        vocabulary: int = 0,
        precision: str = "float32",
    ) -> None:
        """Read nothing yet.

        Args:
            folder: of all teachers.
            teacher: fingerprint of its weights.
            temperature: that the choice was made with.
            top_k: tokens.
            vocabulary: of the student: tokens that the teacher chose among.
            precision: that it computed in.
        """
        said = f"{teacher}/{temperature!r}/{top_k}/{vocabulary}/{precision}"
        name = hashlib.sha256(said.encode()).hexdigest()[:16]
        self.folder, self.top_k = folder / f"top-{top_k}-{name}", top_k

    def get(self, key: str) -> Likely | None:
        """What is kept under ``key``; None if nothing is, or it cannot be read."""
        from safetensors.torch import load_file

        try:
            found = load_file(self._place(key))
            return Likely(found["ids"].long(), found["log_probs"], found["rest"])
        except Exception:  # missing, cut short, not ours: the teacher is asked again
            return None

    def put(self, key: str, likely: Likely) -> None:
        """Keep it, whole or not at all; a disk that takes no more is no reason to stop."""
        from safetensors.torch import save_file

        place = self._place(key)
        unfinished = place.with_name(f".unfinished-{key}-{os.getpid()}")
        tensors = {
            "ids": likely.ids_NK.int().contiguous(),
            "log_probs": likely.log_probs_NK.contiguous(),
            "rest": likely.rest_N.contiguous(),
        }
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, unfinished)
            unfinished.replace(place)

    def _place(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def documents(batch: Batch) -> Iterator[tuple[str, int]]:
    """A digest of what each document with targets says, shows and plays, and its number in the batch.

    Pixels and samples are part of it: the same words about another picture are another document.
    """
    ids_F, targets_N = batch.input_ids.flatten().cpu(), batch.target_index.cpu()
    document_N = _document(batch).cpu()
    tiles = [_tiles(batch, kind) for kind in ("image", "audio")]
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    for n, (end, length) in enumerate(zip(ends, batch.lengths, strict=True)):
        own = targets_N[document_N == n]
        if not len(own):
            continue
        begin = end - length
        said = hashlib.sha256(ids_F[begin:end].numpy().tobytes())
        said.update((own - begin).numpy().tobytes())
        for kind in tiles:
            for tile in kind(begin, end):
                said.update(tile)
        yield said.hexdigest(), n


def _tiles(batch: Batch, kind: str) -> Callable[[int, int], Iterator[bytes]]:
    """The pixels or samples that stand at positions ``begin`` to ``end`` of a batch, tile by tile."""
    values = getattr(batch, FIELDS[kind][0])
    put, take = getattr(batch, f"{kind}_put"), getattr(batch, f"{kind}_take")
    if values is None or put is None or take is None:
        return lambda begin, end: iter(())
    groups = values if isinstance(values, tuple) else (values,)
    whole = [hashlib.sha256(tile.cpu().numpy().tobytes()).digest() for tiles in groups for tile in tiles]
    put_K, take_K = put.cpu(), take.cpu()
    several = hashlib.sha256(b"".join(whole)).digest()

    def of(begin: int, end: int) -> Iterator[bytes]:
        own = take_K[(put_K >= begin) & (put_K < end)]
        if not len(own):
            return
        tokens = int(take_K.max()) + 1
        if len(groups) == 1 and tokens == len(take_K.unique()) and tokens % len(whole) == 0:
            each = tokens // len(whole)
            for tile in dict.fromkeys((own // each).tolist()):
                yield whole[tile]
            return
        # Tiles of several sizes, or marks: what lies where is the layout's business. All pixels count.
        yield several + own.numpy().tobytes()

    return of


def _document(batch: Batch) -> Tensor:
    if batch.target_document is None:
        raise ValueError("a batch that does not say which documents its targets are in")
    return batch.target_document


def see_alike(student: Encoder, teacher: Encoder, samples: Iterable[Callable[[], Sample]]) -> None:
    """See that both write some samples as the same tokens and the same pixels.

    Args:
        student: writes samples for the model that trains.
        teacher: writes them for the other.
        samples: each read when it is called.

    Raises:
        RecipeError: they do not.
    """
    for read in samples:
        try:
            sample = read()
            ours, theirs = student(sample), teacher(sample)
        except DataError:
            continue  # told when its turn comes
        wrong = _difference(ours, theirs)
        if wrong:
            raise RecipeError(
                f"teacher.path: it reads {sample.id} as {wrong}; a teacher must have the student's tokenizer "
                f"and template, prepare pictures alike, and take equally many tokens for one"
            )


def _difference(ours: Encoded, theirs: Encoded) -> str:
    if len(ours.media) == len(theirs.media):
        for a, b in zip(ours.media, theirs.media, strict=True):
            if a.tokens != b.tokens:
                word = "picture" if b.kind == "image" else "sound"
                return f"{b.tokens} tokens a {word}, and the student as {a.tokens}"
            sizes = [tuple(tile.shape) for tile in b.tiles], [tuple(tile.shape) for tile in a.tiles]
            if sizes[0] != sizes[1]:
                return f"tiles of {sizes[0]}, and the student as {sizes[1]}"
            if not all(torch.equal(x, y) for x, y in zip(a.tiles, b.tiles, strict=True)):
                return f"other {RAW[b.kind]} than the student"
    if not torch.equal(ours.ids, theirs.ids):
        return "other tokens than the student"
    return ""
