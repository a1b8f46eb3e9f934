"""Rows of samples -> one ``Batch``, and the last check before the model.

Everything that the forward pass relies on is established here, on the CPU: where documents begin, which
positions train, which embedding of which picture goes to which placeholder. What does not add up is a
``DataError`` with the sample's id; the forward pass has nothing left to check and never waits for the device.

The padding behind the last document of a row is a document of its own: its positions restart at 0, so nothing
attends from it to the samples, and nothing of it trains. No rows at all make one row of one padding position:
the batch of a process that has run out of data while others have not. It has no targets and no pictures.

A sample of several parts (``Encoded.parts``) is several documents. Its pictures are listed once, go through
the tower once, and stand in each part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Batch, Encoded, MediaItem
from tinymodal.model.layout import Picture, lay_out

# Shapes: B rows, T positions, D documents (padding tails included), I tiles, S tokens a tile, K placeholders,
# N targets.


def collate(
    rows: Sequence[Sequence[Encoded]],
    pad_id: int,
    image_token_id: int,
    pad_to: int | None = None,
    num_sources: int = 1,
) -> Batch:
    """Lay each row's samples one behind the other.

    Args:
        rows: B rows, each of at least one sample, in the order they were packed; none: one row of padding.
        pad_id: token that fills the tails; any but ``image_token_id``.
        image_token_id: the placeholder that one embedding of a picture replaces.
        pad_to: T; the longest row by default.
        num_sources: of the stage; every sample's ``source`` is below it.

    Raises:
        DataError: a sample whose placeholders, labels or pictures contradict each other; names the sample.
        ValueError: a row without a sample or longer than ``pad_to``: the caller packed wrongly.
    """
    if not all(len(row) for row in rows):
        raise ValueError(f"collate needs rows of at least one sample each, got {[len(row) for row in rows]}")
    if pad_id == image_token_id:
        raise ValueError(f"pad_id and image_token_id are both {pad_id}; padding would be taken for pictures")
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
    places_F = ids_F == image_token_id
    trains_F = labels_F != IGNORE
    _check_labels(owners, ids_F, labels_F, trains_F, places_F, starts_D)
    _check_places(owners, places_F, starts_D, sizes_D)

    samples = [sample for row in rows for sample in row]
    pictures = [(item, sample.sample_id) for sample in samples for item in sample.media]
    seen = _seen(pictures)
    tiles, take_K = gather(pictures) if pictures else ((), None)
    if take_K is not None and any(sample.parts for sample in samples):
        take_K = _show_again(samples, take_K)
    images = None if not pictures else tiles[0] if len(tiles) == 1 else tiles
    next_N = trains_F.nonzero().squeeze(1)
    document_F = torch.arange(len(sizes)).repeat_interleave(sizes_D)
    groups_D = torch.tensor([2 * owner.source + bool(owner.media) if owner else 0 for owner in owners])
    return Batch(
        input_ids=ids_F.view(-1, length),
        labels=labels_F.view(-1, length),
        position_ids=(torch.arange(len(ids_F)) - starts_D[document_F]).view(-1, length),
        pixel_values=None if seen else images,
        image_take=take_K,
        image_put=places_F.nonzero().squeeze(1) if pictures else None,
        # No document's first label trains, so the position before a target is always in the same document.
        target_index=next_N - 1,
        target_ids=labels_F[next_N],
        image_targets=_targets(pictures),
        sample_ids=tuple(sample.sample_id for sample in samples),
        num_tokens=sum(filled),
        lengths=tuple(sizes),
        reach=_reach(sizes_D, starts_D, document_F[next_N], next_N - 1),
        target_document=document_F[next_N],
        target_group=groups_D[document_F[next_N]],
        num_sources=num_sources,
        image_features=images if seen else None,
        pairs=torch.tensor(pairs) if pairs else None,
    )


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
    places_F: Tensor,
    starts_D: Tensor,
) -> None:
    wrong_F = trains_F & ((labels_F != ids_F) | places_F)
    wrong_F[starts_D] |= trains_F[starts_D]
    if not wrong_F.any():
        return
    at = int(wrong_F.nonzero()[0])
    which = int((starts_D <= at).nonzero()[-1])
    owner, place = owners[which], at - int(starts_D[which])
    if place == 0:
        what = "the first position trains, though nothing comes before it"
    elif places_F[at]:
        what = f"position {place} is a picture's placeholder and trains"
    else:
        what = f"position {place} has the label {int(labels_F[at])} but the id {int(ids_F[at])}"
    raise DataError(
        f"{owner.sample_id if owner else 'padding'}: {what}; expected the id or {IGNORE}, as the encoder "
        f"gives"
    )


def _check_places(
    owners: Sequence[Encoded | None], places_F: Tensor, starts_D: Tensor, sizes_D: Tensor
) -> None:
    before = torch.cat([torch.zeros(1, dtype=torch.int64), places_F.cumsum(0)])
    found = (before[starts_D + sizes_D] - before[starts_D]).tolist()
    for owner, places in zip(owners, found, strict=True):
        tokens = sum(item.tokens for item in owner.media) if owner else 0
        if owner and places != tokens:
            raise DataError(
                f"{owner.sample_id}: {places} placeholders for {len(owner.media)} pictures of {tokens} "
                f"tokens in all; expected as many placeholders as tokens. Encode the sample again with this "
                f"model's processor"
            )


def _seen(pictures: Sequence[tuple[MediaItem, str]]) -> bool:
    """Whether the tower has run for these pictures; a batch is either way for all of them."""
    seen = [sample_id for item, sample_id in pictures if item.seen]
    if seen and len(seen) < len(pictures):
        pixels = next(sample_id for item, sample_id in pictures if not item.seen)
        raise DataError(
            f"{pixels}: pixels of a picture in a batch with a tower's features ({seen[0]}); expected one or "
            f"the other. Complete the rows from the cache, or train without it"
        )
    return bool(seen)


def _show_again(samples: Sequence[Encoded], take_K: Tensor) -> Tensor:
    """``take_K`` of pictures that are listed once, repeated for each part that shows them."""
    own = take_K.split([sum(item.tokens for item in sample.media) for sample in samples])
    return torch.cat([take.repeat(len(s.parts) or 1) for s, take in zip(samples, own, strict=True)])


def gather(pictures: Sequence[tuple[MediaItem, str]]) -> tuple[tuple[Tensor, ...], Tensor]:
    """All tiles of some pictures, and which embedding goes to each placeholder; see ``model.layout``.

    Args:
        pictures: in reading order, each with the id of its sample.

    Raises:
        DataError: tiles of one size that take different numbers of tokens; names the samples.
    """
    first: dict[torch.Size, tuple[int, str]] = {}
    found = []
    for item, sample_id in pictures:
        counts = item.tile_tokens or (item.tokens,)
        for tile, tokens in zip(item.tiles, counts, strict=True):
            known, known_id = first.setdefault(tile.shape, (tokens, sample_id))
            if known != tokens:
                raise DataError(
                    f"{sample_id}: a tile of {list(tile.shape)} and {tokens} tokens in a batch with one of "
                    f"{known} tokens ({known_id}); expected one number for one size. Encode all with one "
                    f"processor"
                )
        found.append(Picture(item.tiles, counts, item.order))
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
