"""Rows of samples -> one ``Batch``, and the last check before the model.

Everything that the forward pass relies on is established here, on the CPU: where documents begin, which
positions train, which embedding of which picture goes to which placeholder. What does not add up is a
``DataError`` with the sample's id; the forward pass has nothing left to check and never waits for the device.

The padding behind the last document of a row is a document of its own: its positions restart at 0, so nothing
attends from it to the samples, and nothing of it trains.
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
    rows: Sequence[Sequence[Encoded]], pad_id: int, image_token_id: int, pad_to: int | None = None
) -> Batch:
    """Lay each row's samples one behind the other.

    Args:
        rows: B rows, each of at least one sample, in the order they were packed.
        pad_id: token that fills the tails; any but ``image_token_id``.
        image_token_id: the placeholder that one embedding of a picture replaces.
        pad_to: T; the longest row by default.

    Raises:
        DataError: a sample whose placeholders, labels or pictures contradict each other; names the sample.
        ValueError: no sample, or a row longer than ``pad_to``: the caller packed wrongly.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError(f"collate needs rows of at least one sample each, got {[len(row) for row in rows]}")
    if pad_id == image_token_id:
        raise ValueError(f"pad_id and image_token_id are both {pad_id}; padding would be taken for pictures")
    filled = [sum(document.ids.numel() for document in row) for row in rows]
    length = max(filled) if pad_to is None else pad_to
    if max(filled) > length:
        raise ValueError(f"a row holds {max(filled)} tokens, more than the {length} of the batch")

    ids, labels, sizes = [], [], []
    owners: list[Encoded | None] = []  # None: a padding tail
    for row, used in zip(rows, filled, strict=True):
        for document in row:
            _check_lengths(document)
            ids.append(document.ids)
            labels.append(document.labels)
            sizes.append(document.ids.numel())
            owners.append(document)
        if used < length:
            ids.append(torch.full((length - used,), pad_id))
            labels.append(torch.full((length - used,), IGNORE))
            sizes.append(length - used)
            owners.append(None)
    ids_F, labels_F, sizes_D = (
        torch.cat(ids),
        torch.cat(labels),
        torch.tensor(sizes),
    )  # F = B*T, rows end to end
    starts_D = sizes_D.cumsum(0) - sizes_D
    places_F = ids_F == image_token_id
    trains_F = labels_F != IGNORE
    _check_labels(owners, ids_F, labels_F, trains_F, places_F, starts_D)
    _check_places(owners, places_F, starts_D, sizes_D)

    pictures = [(item, document.sample_id) for row in rows for document in row for item in document.media]
    tiles, take_K = gather(pictures) if pictures else ((), None)
    put_K = places_F.nonzero().squeeze(1)
    next_N = trains_F.nonzero().squeeze(1)
    return Batch(
        input_ids=ids_F.view(len(rows), length),
        labels=labels_F.view(len(rows), length),
        position_ids=(torch.arange(len(ids_F)) - starts_D.repeat_interleave(sizes_D)).view(len(rows), length),
        pixel_values=None if not pictures else tiles[0] if len(tiles) == 1 else tiles,
        image_take=take_K,
        image_put=put_K if pictures else None,
        # No document's first label trains, so the position before a target is always in the same document.
        target_index=next_N - 1,
        target_ids=labels_F[next_N],
        image_targets=_targets(pictures),
        sample_ids=tuple(document.sample_id for row in rows for document in row),
        num_tokens=sum(filled),
    )


def _check_lengths(document: Encoded) -> None:
    if not document.ids.numel():
        raise DataError(f"{document.sample_id}: no tokens; expected at least one. Remove the sample")
    if document.labels.numel() != document.ids.numel():
        raise DataError(
            f"{document.sample_id}: {len(document.ids)} ids but {len(document.labels)} labels; expected one "
            f"label for each id, as the encoder gives them"
        )


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
