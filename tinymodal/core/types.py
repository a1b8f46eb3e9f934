"""The words everyone speaks: what a conversation is, and what becomes of it on the way to the model.

Plain frozen values. torch and PIL are named for the type checker only, so importing this costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

IGNORE = -100
"""Label of a position that does not train (the value torch's cross entropy ignores)."""

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Text:
    """Words as a person wrote them. A placeholder token's spelling in here is refused by the encoder."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture: a file, the bytes of one, or a decoded picture. Decoded only when it is encoded."""

    source: Path | bytes | PIL.Image.Image
    targets: tuple[tuple[int, ...], ...] | None = None
    """What each of the picture's tokens shows, one class id per target head, in reading order. Known for made
    data only; used by the ``cells`` loss that pretrains a tower."""
    max_tiles: int | None = None
    """At most so many tiles for this picture; None: as the model was composed."""
    fit_pixels: tuple[int, int] | None = None
    """At least and at most so many pixels after resizing (``native``); None: as the model was composed."""


Part = Text | Image


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``train=None`` means: assistant turns train, others do not."""

    role: Role
    parts: tuple[Part, ...]
    train: bool | None = None

    @property
    def trains(self) -> bool:
        return self.role == "assistant" if self.train is None else self.train


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation. ``id`` names the file and the row, so that every error can quote it."""

    messages: tuple[Message, ...]
    id: str
    meta: Mapping[str, str] = field(default_factory=dict)
    rejected: tuple[Message, ...] | None = None
    """The same conversation with a worse answer, for the ``dpo`` loss; it shows the same pictures."""

    def media(self) -> Iterator[Image]:
        """Every picture in reading order."""
        for message in self.messages:
            for part in message.parts:
                if isinstance(part, Image):
                    yield part


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One prepared medium and the number of tokens it takes; ``tokens == prod(grid)``."""

    kind: Literal["image"]
    tiles: tuple[Tensor, ...]
    """What the tower sees, float32 [3, H, W] each; one for most ways to prepare a picture."""
    grid: tuple[int, ...]
    """Rows and columns of tokens after the connector; one number where they are no rectangle."""
    tokens: int
    patches: int
    """Positions the tower computes for this item: the unit of the packer's second budget."""
    targets: Tensor | None = None
    """int64 [tokens, heads], see ``Image.targets``."""
    tile_tokens: tuple[int, ...] = ()
    """Embeddings of each tile; empty: one tile of ``tokens``."""
    order: Tensor | None = None
    """int64 [tokens], which embedding stands at each place: from 0 those of the tiles laid end to end, below
    0 the learned marks (``geometry.arrange``). None: one tile, in its own order."""
    seen: bool = False
    """The tower has run already: ``tiles`` are its features, [*grid, E] each, in place of pixels."""
    key: str = ""
    """Under which the features of the tiles are kept on disk; empty: nowhere. See ``data/cache.py``."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as the model reads it: ``labels[0]`` is ``IGNORE``; ``tokens`` counts the placeholders."""

    ids: Tensor
    """int64 [T]"""
    labels: Tensor
    """int64 [T], unshifted: the label of position t is ``ids[t]`` where it trains, else ``IGNORE``."""
    media: tuple[MediaItem, ...]
    sample_id: str
    parts: tuple[int, ...] = ()
    """Lengths of several documents that belong together (an answer and a worse one); empty: one document.
    Each part shows all of ``media``, which are listed, encoded and counted as patches once."""
    source: int = 0
    """Which source of the stage it was drawn from."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Labels that train. Position 0 has no predecessor and never trains."""
        return int((self.labels != IGNORE).sum())

    @property
    def num_patches(self) -> int:
        return sum(item.patches for item in self.media)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents. B rows of T positions, I tiles, S tokens a tile, K placeholders.

    ``image_take`` says which embeddings are used and ``image_put`` at which of the B*T positions; both are
    computed and checked where the batch is made, so the forward pass has nothing left to mismatch.
    """

    input_ids: Tensor
    """int64 [B, T]"""
    labels: Tensor
    """int64 [B, T], unshifted; the first position of every document is ``IGNORE``."""
    position_ids: Tensor
    """int64 [B, T], restarting at 0 with each document: this alone keeps documents apart."""
    pixel_values: Tensor | tuple[Tensor, ...] | None
    """float32 [I, 3, H, W]; where tiles differ in size one such tensor for each size; None where no row has a
    picture: then the tower does not run."""
    image_take: Tensor | None
    """int64 [K]: of the tiles' embeddings laid end to end, size by size, and the learned marks after them."""
    image_put: Tensor | None
    """int64 [K]"""
    target_index: Tensor
    """int64 [N]: positions of the flattened B*T whose *next* token trains."""
    target_ids: Tensor
    """int64 [N]: that next token."""
    image_targets: Tensor | None
    """int64 [I, S, heads], see ``Image.targets``; None unless every picture has them and is one tile, all
    of one size."""
    sample_ids: tuple[str, ...]
    num_tokens: int
    """Positions that hold a document's token; the rest of B*T is padding."""
    lengths: tuple[int, ...] = ()
    """Positions of each of the D documents, row by row, a row's padding tail being one of its own; in sum
    B*T. Plain integers: attention cuts rows by them without asking the device."""
    reach: tuple[tuple[int, int], ...] = ()
    """For each of the D documents its positions up to the last target, and its targets: (0, 0) where nothing
    trains. All that a loss depends on. Where it is empty ``train/packed.py`` finds it, if that needs no
    wait."""
    target_document: Tensor | None = None
    """int64 [N]: which of the D documents each target is in."""
    target_group: Tensor | None = None
    """int64 [N]: twice the source of the target's document, plus 1 if that document shows a picture."""
    num_sources: int = 1
    pairs: Tensor | None = None
    """int64 [P, 2]: the documents of a chosen and of a rejected answer; None where there are none."""
    image_features: Tensor | tuple[Tensor, ...] | None = None
    """[I, *grid, E], a tower's features from the cache, in place of ``pixel_values``; as there, one tensor
    for each shape where they differ."""
    num_draws: int = 0
    """Draws that this batch is done with: its samples, and what was found unusable since the one before."""

    @property
    def num_targets(self) -> int:
        return len(self.target_ids)

    @property
    def num_positions(self) -> int:
        """B * T, padding included."""
        return self.input_ids.numel()

    def inputs(self) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """What the model's forward takes, without labels."""
        named: dict[str, Tensor | tuple[Tensor, ...] | None] = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "pixel_values": self.pixel_values,
            "image_take": self.image_take,
            "image_put": self.image_put,
        }
        return {name: value for name, value in named.items() if value is not None}
