"""What frozen towers perceived, kept between epochs, stages, runs and processes: nothing is run twice.

Three pieces. :class:`Remember` stands where the encoder reads a picture, :class:`RememberSound` where it
reads a sound: if the features are in the cache, nothing is decoded or prepared. :class:`Complete` stands
before collating, in the process that trains: it runs the tower on what was not there, and writes it. Both
give the features as the cache rounds them, so a step computes the same whether its media were there or not.
:func:`warm` fills the cache ahead.

A key is all that decides what the tower says: the picture or sound (the bytes of its file, its pixels, or
its samples and the stretch of them), how it is prepared, and the tower itself (its class, its config, which
layers are read, every weight, in which precision it computes) and the type that is kept. Nothing is ever
found under a key that another tower or preparation wrote. What the connector, the marks and the words make of
it is not part of it: features outlive them. A sound that augmentation has changed is another each time, and
is kept nowhere.

On a CPU each tile goes through the tower alone, so that its features do not depend on its neighbours in the
batch, bit for bit. On a GPU tiles go in batches, and kernels may round otherwise in another batch; there the
features are those of the batch that was first.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tinymodal.chat.encode import kind_of, numbered
from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.log import Progress
from tinymodal.core.types import Encoded, Image, MediaItem, Medium
from tinymodal.data.bundle import Bad, Bundle, bundle, unbundle
from tinymodal.data.cache import Entry, FeatureCache
from tinymodal.data.pack import Row
from tinymodal.data.sources import Rows, Source
from tinymodal.model.audio_processing import Sound, TinyModalAudioProcessor
from tinymodal.model.layout import Prepared
from tinymodal.model.picture_file import load_image
from tinymodal.model.processing_tinymodal import PictureLayout, TinyModalImageProcessor
from tinymodal.model.tiles import ARITHMETIC

if TYPE_CHECKING:
    from tinymodal.model.image import Preparation
    from tinymodal.model.media import MediaEncoder
    from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration

AT_ONCE = 64
"""Tiles that go through the tower together on a GPU."""

WRITERS = 4
"""Threads that round, check and write what one batch made; most of that leaves the interpreter free."""

CHUNK = 32
"""Rows that are read together when the cache is filled ahead."""

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

TOWERS = {"image": "vision", "audio": "audio"}
"""What the tower of each kind of media is called in recipes."""


class Kept(NamedTuple):
    """The ends of a cache for one model in one stage."""

    prepare: Remember | None
    """For ``Encoder.using(prepare=...)``; None: the model does not see."""
    complete: Complete
    """For ``Loader(complete=...)``."""
    prepare_sound: RememberSound | None = None
    """For ``Encoder.using(prepare_sound=...)``; None: the model does not hear."""


def keep(
    model: TinyModalForConditionalGeneration,
    images: TinyModalImageProcessor,
    cache: FeatureCache,
    precision: str = "float32",
    place: str = "cache",
    sounds: TinyModalAudioProcessor | None = None,
) -> Kept:
    """Put a cache between media and a model's frozen towers.

    Call it when ``requires_grad`` is as the stage wants it, adapters are in, and before anything makes
    weights narrower or cuts them over processes. Reads every weight of the towers once: 1 s for 430 million.

    Args:
        model: whose towers are frozen.
        images: prepares its pictures.
        cache: where features are kept.
        precision: in which the tower computes, ``float32`` or under autocast ``bfloat16`` or ``float16``.
        place: key of the recipe, for errors.
        sounds: prepares its sounds, if it hears.

    Raises:
        RecipeError: there is no tower, or something in one trains.
    """
    towers: dict[str, Any] = dict(model.model.towers.items())
    if not towers:
        raise RecipeError(f"{place}: 'cache' keeps what towers say, and this model has none; take it out")
    for kind, tower in towers.items():
        require_frozen(tower, place, kind)
    config, see, hear = model.config, None, None
    if "image" in towers:
        how: tuple[Any, ...] = (config.feature_layer, config.keep_class, precision, cache.dtype)
        see = Remember(cache, images, tower_name(towers["image"], how))
    if "audio" in towers:
        assert sounds is not None, "a model that hears has a processor of sounds"
        how = (config.audio_feature_layer, precision, cache.dtype)
        hear = RememberSound(cache, sounds, tower_name(towers["audio"], how))
    return Kept(see, Complete(cache, towers, precision), hear)


def require_frozen(tower: nn.Module, place: str, kind: str = "image") -> None:
    """Raise RecipeError if a weight of the tower, or of an adapter in it, trains."""
    trains = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    if trains:
        raise RecipeError(
            f"{place}: 'cache' keeps what the {TOWERS[kind]} tower says, but {len(trains)} of its tensors "
            f"train in this stage ({', '.join(trains[:2])}{', ...' if len(trains) > 2 else ''}), and what it "
            f"said before a step is wrong after it. Freeze the tower, or take 'cache' out"
        )


def tower_name(tower: MediaEncoder, how: Sequence[Any]) -> str:
    """One word for all that decides what a tower computes.

    Args:
        tower: its class, its config and every weight and buffer are read.
        how: further plain values that decide it.
    """
    config = {
        key: value
        for key, value in tower.config.to_dict().items()
        # What a config says of where it came from. The types of the weights are read off the weights.
        if key not in ("transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype")
    }
    said = json.dumps(
        [type(tower).__name__, config, getattr(tower, "layers", None), how, ARITHMETIC],
        sort_keys=True,
        default=str,
    )
    found = hashlib.sha256(said.encode())
    for name, tensor in sorted(tower.state_dict().items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole = tensor.detach().cpu().contiguous()
        found.update(whole.flatten().view(torch.uint8).numpy().data if whole.numel() else b"")
    return found.hexdigest()


class Remember:
    """Reads pictures for an encoder, as ``TinyModalImageProcessor.prepare`` does; knows what the cache holds.

    Can be pickled: worker processes have one each and never write.
    """

    def __init__(self, cache: FeatureCache, images: TinyModalImageProcessor, tower: str) -> None:
        """Join them; ``tower`` is :func:`tower_name`'s."""
        self.cache, self.images, self.tower = cache, images, tower

    def __call__(
        self,
        source: str | Path | bytes | PIL.Image.Image,
        number: int = 0,
        max_tiles: int | None = None,
        fit_pixels: tuple[int, int] | None = None,
    ) -> Prepared:
        """One picture: its features if they are kept, else its pixels and the key to keep them under.

        Raises:
            ValueError: as ``TinyModalImageProcessor.prepare``.
        """
        limits: dict[str, Any] = {"max_tiles": max_tiles, "fit_pixels": fit_pixels}
        found = self.find(source, max_tiles, fit_pixels)
        if found is None:
            return self.images.prepare(source, number, **limits)
        entry = self.cache.peek(found.key)
        if entry is not None:
            layout = self.images.layout(entry.size, number, **limits)
            if [tuple(tile.shape[:-1]) for tile in entry.tiles] == list(layout.feature_grids):
                return Prepared(tuple(entry.tiles), layout, seen=True, key=found.key)
        prepared = self.images.prepare(found.read, number, **limits, name=found.name)
        assert isinstance(prepared.layout, PictureLayout)
        height, width = prepared.layout.plan.source_px
        return replace(prepared, key=f"{found.key}.{height}x{width}")

    def find(
        self,
        source: str | Path | bytes | PIL.Image.Image,
        max_tiles: int | None = None,
        fit_pixels: tuple[int, int] | None = None,
    ) -> Found | None:
        """The key of a picture; None where there is no such file to read.

        Raises:
            ValueError: a decoded picture is too large or broken.
        """
        how = self.images.preparation_for(max_tiles, fit_pixels)
        read: bytes | PIL.Image.Image
        if isinstance(source, PIL.Image.Image):
            # What a picture in hand shows is in its pixels, palette and flags; all that is in its RGB.
            read = load_image(source, how.max_pixels)
            content, name = hashlib.sha256(f"pixels {read.width} x {read.height}\n".encode()), ""
            content.update(read.tobytes())
        elif (file := file_of(source)) is not None:
            read, content, name = file
        else:
            return None
        return Found(self._key(content.digest(), how), read, name)

    def _key(self, content: bytes, how: Preparation) -> str:
        said = json.dumps(how.to_dict(), sort_keys=True)
        return hashlib.sha256(f"{self.tower}\n{said}\n".encode() + content).hexdigest()


class RememberSound:
    """Reads sounds for an encoder, as ``TinyModalAudioProcessor.prepare`` does; knows what the cache holds.

    Can be pickled, as :class:`Remember`.
    """

    def __init__(self, cache: FeatureCache, sounds: TinyModalAudioProcessor, tower: str) -> None:
        """Join them; ``tower`` is :func:`tower_name`'s."""
        self.cache, self.sounds, self.tower = cache, sounds, tower

    def __call__(
        self,
        source: Sound,
        rate_hz: int | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        change: Any = None,
        name: str = "",
    ) -> Prepared:
        """One sound: its features if they are kept, else its windows and the key to keep them under.

        Raises:
            ValueError: as ``TinyModalAudioProcessor.prepare``.
        """
        found = None if change is not None else self.find(source, rate_hz, start_s, end_s)
        if found is None:
            return self.sounds.prepare(source, rate_hz, start_s, end_s, change, name)
        hz = self.sounds.hearing.rate_hz
        entry = self.cache.peek(found.key)
        if entry is not None:
            num_samples = entry.size[0]
            layout = self.sounds.layout(num_samples)
            if [tuple(tile.shape[:-1]) for tile in entry.tiles] == list(layout.feature_grids):
                return Prepared(tuple(entry.tiles), layout, num_samples / hz, seen=True, key=found.key)
        called = name or found.name
        prepared = self.sounds.prepare(found.read, rate_hz, start_s, end_s, name=called)
        assert prepared.seconds is not None
        return replace(prepared, key=f"{found.key}.{round(prepared.seconds * hz)}x1")

    def find(
        self,
        source: Sound,
        rate_hz: int | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> Found | None:
        """The key of a sound; None where there is no such file to read."""
        read: Any
        if isinstance(source, Tensor | np.ndarray):
            samples = source.detach().cpu().numpy() if isinstance(source, Tensor) else source
            read, name = source, ""
            content = hashlib.sha256(f"samples {samples.dtype} {samples.shape}\n".encode())
            content.update(np.ascontiguousarray(samples).tobytes())
        elif (file := file_of(source)) is not None:
            read, content, name = file
        else:
            return None
        said = json.dumps([self.sounds.hearing.to_dict(), rate_hz, start_s, end_s], sort_keys=True)
        key = hashlib.sha256(f"{self.tower}\n{said}\n".encode() + content.digest()).hexdigest()
        return Found(key, read, name)


def file_of(source: str | Path | bytes) -> tuple[bytes, Any, str] | None:
    """The bytes of a file, their SHA-256, and its name; None where there is no such file to read."""
    if isinstance(source, bytes):
        return source, hashlib.sha256(source), ""
    try:
        # Read once: what is hashed is what is decoded.
        read = Path(source).read_bytes()
    except (OSError, TypeError, ValueError):
        return None
    return read, hashlib.sha256(read), str(source)


class Found(NamedTuple):
    """A picture or sound that was read but not decoded."""

    key: str
    read: Any
    """The bytes of a file, a picture, or samples."""
    name: str


class Complete:
    """Runs the frozen towers on media that the cache did not hold, and keeps what they say."""

    def __init__(
        self, cache: FeatureCache, towers: Mapping[str, nn.Module], precision: str = "float32"
    ) -> None:
        """``towers`` by the kind of media; each is run where it lies, in eval mode."""
        self.cache, self.towers, self.precision = cache, dict(towers), precision
        self.num_hits = 0
        """Media whose features were there, or came twice in a batch."""
        self.num_new = 0
        """Media that went through a tower."""
        self.at_once: int | None = None
        """Tiles that go through the tower together; None: one on a CPU, else ``AT_ONCE``."""

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows, with features in place of pixels and samples everywhere."""
        media = [item for row in rows for sample in row for item in sample.media]
        self.num_hits += sum(item.seen for item in media)
        unseen = [item for item in media if not item.seen]
        if not unseen:
            return list(rows)
        done = iter(self.see(unseen))
        completed = []
        for row in rows:
            new = Row()
            for sample, index in zip(row.samples, row.indices, strict=True):
                seen = tuple(item if item.seen else next(done) for item in sample.media)
                new.append(replace(sample, media=seen), index)
            completed.append(new)
        return completed

    def see(self, items: Sequence[MediaItem]) -> list[MediaItem]:
        """Media as pixels or samples -> the same as features. Of one key, the tower sees one.

        Raises:
            RecipeError: something in a tower trains, or its weights are cut over processes.
        """
        for kind in dict.fromkeys(item.kind for item in items):
            require_frozen(self.towers[kind], "cache", kind)
            if any(hasattr(parameter, "placements") for parameter in self.towers[kind].parameters()):
                raise RecipeError(
                    f"cache: the {TOWERS[kind]} tower is cut over processes, which would wait for each "
                    f"other's media; leave a tower with 'cache' whole in every process"
                )
        names = [item.key or f"{n}" for n, item in enumerate(items)]
        known: dict[str, tuple[Tensor, ...]] = {}
        for name, item in zip(names, items, strict=True):
            if item.key and name not in known:
                entry = self.cache.get(_split(name)[0])
                if entry is not None and _fits(entry, item):
                    known[name] = entry.tiles
        new = {name: item for name, item in zip(names, items, strict=True) if name not in known}
        self.num_new += len(new)
        self.num_hits += len(items) - len(new)
        made = self._made(list(new.values()))
        with ThreadPoolExecutor(WRITERS) as writers:
            known.update(zip(new, writers.map(self._keep, new.values(), made), strict=True))
        return [
            replace(item, tiles=known[name], seen=True, key=_split(item.key)[0])
            for name, item in zip(names, items, strict=True)
        ]

    def _keep(self, item: MediaItem, features: list[Tensor]) -> tuple[Tensor, ...]:
        key, size = _split(item.key)
        return self.cache.put(key, size, features).tiles if key else self.cache.rounded(features)

    def _made(self, items: Sequence[MediaItem]) -> list[list[Tensor]]:
        """Features of the tiles of each medium."""
        each: dict[str, Iterator[Tensor]] = {}
        for kind in dict.fromkeys(item.kind for item in items):
            tiles = [tile for item in items if item.kind == kind for tile in item.tiles]
            each[kind] = iter(self._run(self.towers[kind], tiles))
        return [[next(each[item.kind]) for _ in item.tiles] for item in items]

    @torch.no_grad()
    def _run(self, tower: nn.Module, tiles: Sequence[Tensor]) -> list[Tensor]:
        """Features [*grid, E] of tiles [3, H, W] or windows [bands, frames], in order, on the CPU."""
        if not tiles:
            return []
        first = next(tower.parameters())
        at_once = self.at_once or (1 if first.device.type == "cpu" else AT_ONCE)
        dtype = AUTOCAST.get(self.precision)
        narrow = torch.bfloat16 if self.cache.dtype == "bfloat16" else torch.float32
        done: dict[int, Tensor] = {}
        was_training = tower.training
        tower.eval()
        try:
            with torch.autocast(first.device.type, dtype, enabled=dtype is not None):
                for group in _alike(tiles, at_once):
                    values_N = torch.stack([tiles[n] for n in group]).to(first.device, first.dtype)
                    seen = tower(values_N)
                    # Rounded before they travel, as they will be kept.
                    values = seen.values.to(narrow).cpu().unflatten(1, seen.grid)
                    done.update(zip(group, values, strict=True))
        finally:
            tower.train(was_training)
        return [done[n] for n in range(len(tiles))]


def _fits(entry: Entry, item: MediaItem) -> bool:
    """Whether these can be the features of a medium: as many tiles, as many positions."""
    positions = sum(prod(tile.shape[:-1]) for tile in entry.tiles)
    return (len(entry.tiles), positions) == (len(item.tiles), item.patches)


def _split(key: str) -> tuple[str, tuple[int, int]]:
    """The key of the file, and the size of a medium that has none yet: ``ab12.480x640``."""
    name, _, size = key.partition(".")
    height, _, width = size.partition("x")
    return name, (int(height or 0), int(width or 0))


def _alike(tiles: Sequence[Tensor], at_once: int) -> Iterator[list[int]]:
    """The numbers of tiles of one shape, so many at a time."""
    by_shape: dict[torch.Size, list[int]] = {}
    for n, tile in enumerate(tiles):
        by_shape.setdefault(tile.shape, []).append(n)
    for numbers in by_shape.values():
        for begin in range(0, len(numbers), at_once):
            yield numbers[begin : begin + at_once]


class Warmed(NamedTuple):
    """What :func:`warm` did."""

    num_rows: int
    num_pictures: int
    """Pictures and sounds."""
    num_hits: int
    """Of these, those that were there."""
    num_new: int
    """Those that went through a tower."""
    num_bytes: int
    """On disk, of all of them."""
    bad: tuple[tuple[str, str], ...]
    """Rows that cannot be read: the id, and what is wrong."""
    endless: tuple[str, ...]
    """Sources without an end, which cannot be filled ahead."""


def warm(sources: Mapping[str, Source], kept: Kept, workers: int = 0, shown: bool = True) -> Warmed:
    """Fill the cache with every picture and sound of some sources.

    Several processes may do this at once, on one machine or many: each goes through the rows in an order of
    its own, and passes over what is there already. One that is stopped and started again does the same.

    Args:
        sources: by the name that is shown.
        kept: of :func:`keep`.
        workers: processes that read and decode; 0: this one.
        shown: show how far it is.

    Raises:
        DataError: the cache cannot be written.
        RecipeError: they are more than it may hold.
    """
    complete = kept.complete
    cache = complete.cache
    rows = {name: len(source) for name, source in sources.items() if isinstance(source, Sized)}
    endless = tuple(name for name in sources if name not in rows)
    total = sum(rows.values())
    look = _Look([sources[name] for name in rows], kept.prepare, kept.prepare_sound)
    pictures: set[str] = set()
    bad: list[tuple[str, str]] = []
    hits = new = num_bytes = 0
    with Progress("cache", total, "rows", shown=shown) as bar:
        for parcel in _parcels(look, list(rows.values()), workers):
            samples = list(unbundle(parcel))
            bad += [(item.sample_id, str(item.error)) for item in samples if isinstance(item, Bad)]
            media = [item for sample in samples if not isinstance(sample, Bad) for item in sample.media]
            first = {_split(item.key)[0]: item for item in media}
            first = {key: item for key, item in first.items() if key not in pictures}
            pictures |= first.keys()
            before = complete.num_new
            complete.see([item for item in first.values() if not item.seen])
            made = complete.num_new - before
            new, hits = new + made, hits + len(first) - made
            num_bytes += sum(cache.has(key) for key in first)
            if not cache.writing:
                raise DataError(
                    f"{cache.folder}: cannot be written after {len(pictures):,} pictures; make room, or name "
                    f"another cache_folder"
                )
            if num_bytes > cache.max_bytes:
                raise RecipeError(
                    f"cache_gb: {bar.done:,} of {total:,} rows fill the {cache.max_bytes / 1e9:g} GB of "
                    f"{cache.folder}; about {num_bytes / 1e9 * total / max(bar.done, 1):.0f} are needed. "
                    f"Raise cache_gb, or take cache_dtype 'float8'"
                )
            bar.advance(len(samples), f"{new:,} new")
    return Warmed(total, len(pictures), hits, new, num_bytes, tuple(bad), endless)


class _Look(Dataset[Any]):
    """Row -> its media, raw where the cache has nothing. All that workers of :func:`warm` do."""

    def __init__(self, sources: Sequence[Source], see: Remember | None, hear: RememberSound | None) -> None:
        self.sources, self.see, self.hear = tuple(sources), see, hear

    def __getitem__(self, row: tuple[int, int]) -> Encoded | Bad:
        which, n = row
        source = self.sources[which]
        sample_id = source.row_id(n) if isinstance(source, Rows) else f"source {which}, sample {n}"
        try:
            sample = source.sample(n)
        except DataError as error:
            return Bad(sample_id, error)
        media = []
        for name, part in numbered(sample):
            try:
                media.append(self._item(part))
            except (ValueError, OSError) as error:
                return Bad(sample.id, DataError(f"{sample.id}: {name}: {error}"))
        nothing = torch.empty(0, dtype=torch.int64)
        return Encoded(nothing, nothing, tuple(media), sample.id)

    def _item(self, part: Medium) -> MediaItem:
        """With tiles only if the tower must see them."""
        kind = kind_of(part)
        remember = self.see if kind == "image" else self.hear
        if remember is None:
            raise ValueError(f"there is no {TOWERS[kind]} tower in this model; add [model.{TOWERS[kind]}]")
        how: tuple[Any, ...] = (part.source,)
        if isinstance(part, Image):
            how += (part.max_tiles, part.fit_pixels)
        else:
            how += (part.rate_hz, part.start_s, part.end_s)
        found = remember.find(*how)
        if found is not None and remember.cache.has(found.key):
            return MediaItem(kind, (), (), 0, 0, seen=True, key=found.key)
        first, *limits = how
        prepared: Any = remember(first, *((0,) if kind == "image" else ()), *limits)
        return MediaItem(
            kind, prepared.tiles, prepared.grid, prepared.tokens, prepared.patches, key=prepared.key
        )


def _parcels(look: _Look, sizes: Sequence[int], workers: int) -> Iterator[Bundle]:
    """All rows in chunks, in a random order that is this process's own."""
    chunks = [
        [(which, n) for n in range(begin, min(begin + CHUNK, end))]
        for which, size in enumerate(sizes)
        for begin, end in _stretches(look.sources[which], size)
        for begin in range(begin, end, CHUNK)
    ]
    random.Random(os.urandom(8)).shuffle(chunks)
    if not workers:
        yield from (bundle([look[row] for row in chunk]) for chunk in chunks)
        return
    make: Callable[..., Any] = bundle
    yield from DataLoader(
        look, batch_sampler=chunks, num_workers=workers, collate_fn=make, generator=torch.Generator()
    )


def _stretches(source: Source, size: int) -> Iterator[tuple[int, int]]:
    """Rows that are best read together."""
    ends = list(accumulate(getattr(source, "blocks", None) or (size,)))
    yield from zip([0, *ends], ends, strict=False)
