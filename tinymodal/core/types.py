"""The words everyone speaks: what a conversation is, and what becomes of it on the way to the model.

Plain frozen values. torch and PIL are named for the type checker only, so importing this costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

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


@dataclass(frozen=True, slots=True)
class Audio:
    """A sound that is heard: a file, the bytes of one, or its samples. Decoded only when it is encoded."""

    source: Path | bytes | Tensor
    """Samples are float32 [samples] or [channels, samples], full scale 1."""
    rate_hz: int | None = None
    """Of samples; a file says its own."""
    start_s: float | None = None
    end_s: float | None = None
    """Only what lies between is heard; None: from the beginning, to the end."""
    change: Change | None = None
    """What augmentation does to it; None: nothing. See ``data/augment.py``."""


@dataclass(frozen=True, slots=True)
class Speech:
    """How an assistant's turn sounds: the words of the turn, spoken. It is learned and never read."""

    source: Path | bytes | Tensor
    """As :attr:`Audio.source`."""
    rate_hz: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    voice: str | None = None
    """Name of the voice, of those that the speech head knows; None: the first."""


class Change(Protocol):
    """One drawn augmentation: frozen and picklable."""

    def wave(self, samples: Tensor, rate_hz: int) -> Tensor:
        """Changed samples, float32 [samples]."""

    def mel(self, mel: Tensor, frames_per_s: float, silence: float) -> Tensor:
        """Changed log-mel, float32 [bands, frames], or samples [1, samples]; ``silence`` is its quietest."""


Medium = Image | Audio
"""What a model perceives: it has a place among the words."""
Part = Text | Image | Audio | Speech


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

    def media(self) -> Iterator[Medium]:
        """Every picture and sound in reading order."""
        for message in self.messages:
            for part in message.parts:
                if isinstance(part, Image | Audio):
                    yield part


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One prepared medium and the number of tokens it takes; ``tokens == prod(grid)``."""

    kind: Literal["image", "audio"]
    tiles: tuple[Tensor, ...]
    """What the tower takes: of a picture float32 [3, H, W] each, one for most ways to prepare it; of a sound
    its windows, float32 [bands, frames] each, or [1, samples] for a tower that reads the wave itself."""
    grid: tuple[int, ...]
    """Rows and columns of tokens after the connector; one number where they are no rectangle."""
    tokens: int
    patches: int
    """Positions the tower computes for this item: the unit of the packer's second budget (pictures) and of
    its third (``frames``, sounds)."""
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
class SpeechItem:
    """The sound of one answer, and which of the sample's tokens it speaks."""

    first: int
    last: int
    """The answer's tokens are ``ids[first:last]``; all of them train, the stop included."""
    wave: Tensor | None
    """float32 [samples] at the codec's rate; None once ``codes`` are known."""
    codes: Tensor | None = None
    """int64 [Q, F]: F frames of Q codebooks."""
    voice: int = 0
    """Number of the voice, of those that the speech head knows."""
    key: str = ""
    """Under which the codes are kept on disk; empty: nowhere."""


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
    speech: tuple[SpeechItem, ...] = ()
    """In order of the answers; empty where the model does not speak."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Labels that train. Position 0 has no predecessor and never trains."""
        return int((self.labels != IGNORE).sum())

    @property
    def num_patches(self) -> int:
        """Positions of the vision tower."""
        return sum(item.patches for item in self.media if item.kind == "image")

    @property
    def num_frames(self) -> int:
        """Positions of the audio tower."""
        return sum(item.patches for item in self.media if item.kind == "audio")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents.

    B rows of T positions, I tiles, S tokens a tile, K placeholders; A windows of sound with L placeholders.
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
    """int64 [N]: four times the source of the target's document, plus 1 if that document shows a picture,
    plus 2 if it plays a sound."""
    num_sources: int = 1
    pairs: Tensor | None = None
    """int64 [P, 2]: the documents of a chosen and of a rejected answer; None where there are none."""
    image_features: Tensor | tuple[Tensor, ...] | None = None
    """[I, *grid, E], a tower's features from the cache, in place of ``pixel_values``; as there, one tensor
    for each shape where they differ."""
    audio_values: Tensor | tuple[Tensor, ...] | None = None
    """Prepared windows of sound, float32 [A, bands, frames] or [A, 1, samples]; where windows differ in
    length one such tensor for each length; None where no row has a sound: then the tower does not run."""
    audio_take: Tensor | None = None
    """int64 [L]: as ``image_take``."""
    audio_put: Tensor | None = None
    """int64 [L]"""
    audio_features: Tensor | tuple[Tensor, ...] | None = None
    """As ``image_features``, [A, positions, E]."""
    speech_codes: Tensor | None = None
    """int64 [Q, G]: the frames of the Z spoken answers end to end; None where nothing is spoken."""
    speech_frames: tuple[int, ...] = ()
    """Frames of each spoken answer; in sum G."""
    speech_take: Tensor | None = None
    """int64 [P]: which of the N targets are tokens of the spoken answers, answer by answer. The state that a
    speech head reads of a token is the one that predicts it."""
    speech_tokens: tuple[int, ...] = ()
    """Tokens of each spoken answer; in sum P."""
    speech_voices: Tensor | None = None
    """int64 [Z]"""
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
            "audio_values": self.audio_values,
            "audio_take": self.audio_take,
            "audio_put": self.audio_put,
        }
        return {name: value for name, value in named.items() if value is not None}
