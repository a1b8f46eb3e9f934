"""Rows of samples -> one ``Batch``, and the last check before the model.

Everything that the forward pass relies on is established here, on the CPU: where documents begin, which
positions train, which embedding of which picture or sound goes to which placeholder. What does not add up is
a ``DataError`` with the sample's id; the forward pass has nothing left to check and never waits for the
device.

The padding behind the last document of a row is a document of its own: its positions restart at 0, so nothing
attends from it to the samples, and nothing of it trains. No rows at all make one row of one padding position:
the batch of a process that has run out of data while others have not. It has no targets and no media.

A sample of several parts (``Encoded.parts``) is several documents. Its media are listed once, go through
their tower once, and stand in each part. What is spoken is spoken of the first part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Batch, Encoded, MediaItem
from tinymodal.data.spoken import lay_speech
from tinymodal.model.layout import Tiled, lay_out

# Shapes: B rows, T positions, D documents (padding tails included), I tiles of a kind (a sound's are its
# windows), S tokens a tile, K placeholders of a kind, N targets.

WORDS = {"image": "picture", "audio": "sound"}
"""What a person calls a medium of each kind."""
GIVEN = {"image": "pixels", "audio": "samples"}
"""And what a tower is given of it."""


def collate(
    rows: Sequence[Sequence[Encoded]],
    pad_id: int,
    image_token_id: int,
    pad_to: int | None = None,
    num_sources: int = 1,
    audio_token_id: int | None = None,
) -> Batch:
    """Lay each row's samples one behind the other.

    Args:
        rows: B rows, each of at least one sample, in the order they were packed; none: one row of padding.
        pad_id: token that fills the tails; any but a placeholder.
        image_token_id: the placeholder that one embedding of a picture replaces.
        pad_to: T; the longest row by default.
        num_sources: of the stage; every sample's ``source`` is below it.
        audio_token_id: the placeholder that one embedding of a sound replaces; None: the model does not hear.

    Raises:
        DataError: a sample whose placeholders, labels, media or speech contradict each other; names the
            sample.
        ValueError: a row without a sample or longer than ``pad_to``: the caller packed wrongly.
    """
    if not all(len(row) for row in rows):
        raise ValueError(f"collate needs rows of at least one sample each, got {[len(row) for row in rows]}")
    place_ids = {"image": image_token_id} | ({} if audio_token_id is None else {"audio": audio_token_id})
    for kind, place_id in place_ids.items():
        if pad_id == place_id:
            raise ValueError(
                f"pad_id and {kind}_token_id are both {pad_id}; padding would be taken for {WORDS[kind]}s"
            )
    filled = [sum(sample.ids.numel() for sample in row) for row in rows] or [0]
    length = max(*filled, 1) if pad_to is None else pad_to
    if max(filled) > length:
        raise ValueError(f"a row holds {max(filled)} tokens, more than the {length} of the batch")

    ids, labels = [], []
    sizes: list[int] = []
    pairs: list[tuple[int, int]] = []
    owners: list[Encoded | None] = []  # of each document; None: a padding tail
    for row, used in zip(rows or [()], filled, strict=True):
        for sample in row:
            _check_lengths(sample, num_sources)
            parts = sample.parts or (sample.ids.numel(),)
            ids.append(sample.ids)
            labels.append(sample.labels)
            if len(sample.parts) == 2:
                pairs.append((len(sizes), len(sizes) + 1))
            sizes += parts
            owners += [sample] * len(parts)
        if used < length:
            ids.append(torch.full((length - used,), pad_id))
            labels.append(torch.full((length - used,), IGNORE))
            sizes.append(length - used)
            owners.append(None)
    # F = B*T, rows end to end
    ids_F, labels_F, sizes_D = torch.cat(ids), torch.cat(labels), torch.tensor(sizes)
    starts_D = sizes_D.cumsum(0) - sizes_D
    places = {kind: ids_F == place_id for kind, place_id in place_ids.items()}
    trains_F = labels_F != IGNORE
    _check_labels(owners, ids_F, labels_F, trains_F, places, starts_D)
    samples = [sample for row in rows for sample in row]
    _check_kinds(samples, places)
    for kind, places_F in places.items():
        _check_places(owners, kind, places_F, starts_D, sizes_D)

    image = _lay(samples, "image", places)
    audio = _lay(samples, "audio", places)
    next_N = trains_F.nonzero().squeeze(1)
    document_F = torch.arange(len(sizes)).repeat_interleave(sizes_D)
    groups_D = torch.tensor([_group(owner) if owner else 0 for owner in owners])
    spoken = lay_speech(rows, length, trains_F) if any(sample.speech for sample in samples) else {}
    return Batch(
        input_ids=ids_F.view(-1, length),
        labels=labels_F.view(-1, length),
        position_ids=(torch.arange(len(ids_F)) - starts_D[document_F]).view(-1, length),
        pixel_values=image.values,
        image_take=image.take_K,
        image_put=image.put_K,
        # No document's first label trains, so the position before a target is always in the same document.
        target_index=next_N - 1,
        target_ids=labels_F[next_N],
        image_targets=_targets([(item, s.sample_id) for s in samples for item in of_kind(s, "image")]),
        sample_ids=tuple(sample.sample_id for sample in samples),
        num_tokens=sum(filled),
        lengths=tuple(sizes),
        reach=_reach(sizes_D, starts_D, document_F[next_N], next_N - 1),
        target_document=document_F[next_N],
        target_group=groups_D[document_F[next_N]],
        num_sources=num_sources,
        image_features=image.features,
        pairs=torch.tensor(pairs) if pairs else None,
        audio_values=audio.values,
        audio_take=audio.take_K,
        audio_put=audio.put_K,
        audio_features=audio.features,
        **spoken,
    )


class Laid(NamedTuple):
    """The media of one kind in a batch, see ``Batch``; all None where there are none."""

    values: Tensor | tuple[Tensor, ...] | None = None
    features: Tensor | tuple[Tensor, ...] | None = None
    take_K: Tensor | None = None
    put_K: Tensor | None = None


def of_kind(sample: Encoded, kind: str) -> list[MediaItem]:
    """Its pictures (``image``) or sounds (``audio``) in reading order."""
    return [item for item in sample.media if item.kind == kind]


def _group(sample: Encoded) -> int:
    """See ``Batch.target_group``."""
    kinds = {item.kind for item in sample.media}
    return 4 * sample.source + ("image" in kinds) + 2 * ("audio" in kinds)


def _lay(samples: Sequence[Encoded], kind: str, places: Mapping[str, Tensor]) -> Laid:
    media = [(item, sample.sample_id) for sample in samples for item in of_kind(sample, kind)]
    if not media:
        return Laid()
    seen = _seen(media)
    tiles, take_K = gather(media)
    if any(sample.parts for sample in samples):
        take_K = _show_again(samples, kind, take_K)
    values = tiles[0] if len(tiles) == 1 else tiles
    put_K = places[kind].nonzero().squeeze(1)
    return Laid(None if seen else values, values if seen else None, take_K, put_K)


def _reach(
    lengths_D: Tensor, starts_D: Tensor, document_N: Tensor, target_N: Tensor
) -> tuple[tuple[int, int], ...]:
    """For each document its positions up to the last target (places ``target_N``), and its targets."""
    counts_D = torch.bincount(document_N, minlength=len(lengths_D))
    within_N = target_N - starts_D[document_N] + 1
    far_D = torch.zeros_like(lengths_D).scatter_reduce_(0, document_N, within_N, "amax")
    return tuple(zip(far_D.tolist(), counts_D.tolist(), strict=True))


def _check_lengths(document: Encoded, num_sources: int) -> None:
    if not document.ids.numel():
        raise DataError(f"{document.sample_id}: no tokens; expected at least one. Remove the sample")
    if document.labels.numel() != document.ids.numel():
        raise DataError(
            f"{document.sample_id}: {len(document.ids)} ids but {len(document.labels)} labels; expected one "
            f"label for each id, as the encoder gives them"
        )
    if document.parts and (min(document.parts) < 1 or sum(document.parts) != document.ids.numel()):
        raise DataError(
            f"{document.sample_id}: parts of {list(document.parts)} positions but {len(document.ids)} ids; "
            f"expected parts of at least one that make up all, as the encoder gives them"
        )
    if not 0 <= document.source < num_sources:
        raise ValueError(f"{document.sample_id}: source {document.source} of a stage with {num_sources}")


def _check_labels(
    owners: Sequence[Encoded | None],
    ids_F: Tensor,
    labels_F: Tensor,
    trains_F: Tensor,
    places: Mapping[str, Tensor],
    starts_D: Tensor,
) -> None:
    wrong_F = labels_F != ids_F
    for places_F in places.values():
        wrong_F |= places_F
    wrong_F &= trains_F
    wrong_F[starts_D] |= trains_F[starts_D]
    if not wrong_F.any():
        return
    at = int(wrong_F.nonzero()[0])
    which = int((starts_D <= at).nonzero()[-1])
    owner, place = owners[which], at - int(starts_D[which])
    if place == 0:
        what = "the first position trains, though nothing comes before it"
    elif filled := [WORDS[kind] for kind, places_F in places.items() if places_F[at]]:
        what = f"position {place} is a {filled[0]}'s placeholder and trains"
    else:
        what = f"position {place} has the label {int(labels_F[at])} but the id {int(ids_F[at])}"
    raise DataError(
        f"{owner.sample_id if owner else 'padding'}: {what}; expected the id or {IGNORE}, as the encoder "
        f"gives"
    )


def _check_kinds(samples: Sequence[Encoded], places: Mapping[str, Tensor]) -> None:
    """Refuse media that the model has no placeholder for."""
    for sample in samples:
        for item in sample.media:
            if item.kind not in places:
                raise DataError(
                    f"{sample.sample_id}: a {WORDS[item.kind]}, but this model has no {item.kind} tower; "
                    f"expected a model with one. Add [model.{item.kind}] to the recipe"
                )


def _check_places(
    owners: Sequence[Encoded | None], kind: str, places_F: Tensor, starts_D: Tensor, sizes_D: Tensor
) -> None:
    before = torch.cat([torch.zeros(1, dtype=torch.int64), places_F.cumsum(0)])
    found = (before[starts_D + sizes_D] - before[starts_D]).tolist()
    for owner, places in zip(owners, found, strict=True):
        media = of_kind(owner, kind) if owner else []
        tokens = sum(item.tokens for item in media)
        if owner and places != tokens:
            raise DataError(
                f"{owner.sample_id}: {places} placeholders for {len(media)} {WORDS[kind]}s of {tokens} "
                f"tokens in all; expected as many placeholders as tokens. Encode the sample again with this "
                f"model's processor"
            )


def _seen(media: Sequence[tuple[MediaItem, str]]) -> bool:
    """Whether the tower has run for these media of one kind; a batch is either way for all of them."""
    seen = [sample_id for item, sample_id in media if item.seen]
    if seen and len(seen) < len(media):
        kind, given = next((item.kind, sample_id) for item, sample_id in media if not item.seen)
        raise DataError(
            f"{given}: {GIVEN[kind]} of a {WORDS[kind]} in a batch with a tower's features ({seen[0]}); "
            f"expected one or the other. Complete the rows from the cache, or train without it"
        )
    return bool(seen)


def _show_again(samples: Sequence[Encoded], kind: str, take_K: Tensor) -> Tensor:
    """``take_K`` of media that are listed once, repeated for each part that shows them."""
    own = take_K.split([sum(item.tokens for item in of_kind(sample, kind)) for sample in samples])
    return torch.cat([take.repeat(len(s.parts) or 1) for s, take in zip(samples, own, strict=True)])


def gather(media: Sequence[tuple[MediaItem, str]]) -> tuple[tuple[Tensor, ...], Tensor]:
    """All tiles of some media of one kind, and which embedding goes to each placeholder.

    See ``model.layout``.

    Args:
        media: in reading order, each with the id of its sample.

    Raises:
        DataError: tiles of one size that take different numbers of tokens; names the samples.
    """
    first: dict[torch.Size, tuple[int, str]] = {}
    found = []
    for item, sample_id in media:
        counts = item.tile_tokens or (item.tokens,)
        for tile, tokens in zip(item.tiles, counts, strict=True):
            known, known_id = first.setdefault(tile.shape, (tokens, sample_id))
            if known != tokens:
                raise DataError(
                    f"{sample_id}: a tile of {list(tile.shape)} and {tokens} tokens in a batch with one of "
                    f"{known} tokens ({known_id}); expected one number for one size. Encode all with one "
                    f"processor"
                )
        found.append(Tiled(item.tiles, counts, item.order))
    return lay_out(found)


def _targets(pictures: Sequence[tuple[MediaItem, str]]) -> Tensor | None:
    """int64 [I, S, heads] if every picture has them and is one tile, all of one size, else None."""
    targets = [item.targets for item, _ in pictures if item.targets is not None and item.order is None]
    if not targets or len(targets) < len(pictures):
        return None
    # Tiles of two sizes lie apart, size by size, also where both take equally many tokens.
    if len({item.tiles[0].shape for item, _ in pictures}) > 1:
        return None
    for (_, sample_id), target in zip(pictures, targets, strict=True):
        if target.shape != targets[0].shape:
            raise DataError(
                f"{sample_id}: picture targets of {list(target.shape)} in a batch with "
                f"{list(targets[0].shape)}; expected one shape, tokens x heads. Give all pictures the same "
                f"heads"
            )
    return torch.stack(targets)
