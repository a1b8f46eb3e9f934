"""Pictures to tensors, ours against Pillow's way; and features from the cache against pixels.

    python benchmarks/data_pipeline.py             15 rounds; two minutes of one core
    python benchmarks/data_pipeline.py --quick     5 rounds

A picture is decoded from the bytes of its file, resized to 384 x 384 (bicubic) and normalised. The plain way
is what trainers of small vision-language models do: ``Image.open(...).convert("RGB")``, ``resize``, and the
normalisation in numpy; and, as most of them call it, transformers' image processor in place of the last two.
Ours is ``TinyModalImageProcessor.prepare``, the path of training, evaluation, chat and server. Both read
the same bytes, one core does one thing, and the clock is that of the processor.

The pixels of both are compared: the largest difference in levels of 255 and the share of values that differ
are printed and recorded. Pictures are made: noise that falls with frequency as in
photographs, saved at quality 90. With ``--photos FOLDER`` the JPEGs of a folder are read too, as they are.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from benchmarks.measure import Row, finish, interleave, more, words
from tinymodal.data.cache import FeatureCache, pack, unpack
from tinymodal.model.image import Preparation, cut, load_pixels
from tinymodal.model.strategies import plan

EDGE_PX = 384
POSITIONS, WIDTH = 27, 1152
"""Rows and columns of SigLIP-so400m's features of such a picture, and their width."""

SIZES = {"640 x 480": (480, 640), "12 megapixels": (3000, 4000)}
"""Name -> height and width."""

HOW = Preparation(EDGE_PX, EDGE_PX, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def main(argv: Sequence[str] | None = None) -> int:
    parser = words(__doc__)
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="also read the JPEGs of this folder")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    equal: dict[str, dict[str, float]] = {}
    for name, (height, width) in SIZES.items():
        large = height * width > 10**6
        files = [made(height, width, seed) for seed in range(1 if large else 8)]
        rows += speed(name, files, rounds=(3 if large else 5) if given.quick else 15)
        equal[name] = apart(files)
    if given.photos is not None:
        files = [path.read_bytes() for path in sorted(given.photos.glob("*.jp*g"))]
        rows += speed("photographs", files, rounds=5 if given.quick else 15)
        equal["photographs"] = apart(files)
    rows += cached(made(*next(iter(SIZES.values())), seed=0), rounds=5 if given.quick else 30)
    for name, found in equal.items():
        print(
            f"{name}: {found['differ']:.2%} of the values differ, by {found['largest']:.0f} of 255 at most; "
            f"decoded pixels {'equal' if found['decoded_equal'] else 'differ'}"
        )
    finish(rows, given.json, given.quick, pixels=equal)
    return 0


def made(height: int, width: int, seed: int) -> bytes:
    """A JPEG whose noise has about the spectrum of a photograph: amplitude as 1 over frequency, and grain."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.sqrt(rows**2 + columns**2)
    frequency[0, 0] = 1
    channels = []
    for _ in range(3):
        waves = rng.normal(size=(*frequency.shape, 2)) @ np.array([1, 1j])
        channels.append(np.fft.irfft2(waves / frequency**1.2, (height, width)))
    x_HWC = np.stack(channels, -1)
    x_HWC = x_HWC.mean(-1, keepdims=True) * 1.2 + 0.4 * x_HWC
    x_HWC = (x_HWC - x_HWC.mean()) / x_HWC.std() * 50 + 120
    file = io.BytesIO()
    PIL.Image.fromarray(x_HWC.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def ours(data: bytes) -> Tensor:
    """float32 [3, H, W]"""
    x_HWC = load_pixels(data)
    return cut(x_HWC, HOW, plan((x_HWC.shape[0], x_HWC.shape[1]), HOW))[0]


def pillow(data: bytes) -> Tensor:
    """float32 [3, H, W]"""
    image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    x_HWC = np.asarray(image.resize((EDGE_PX, EDGE_PX), PIL.Image.Resampling.BICUBIC), dtype=np.float32)
    mean, std = np.array(HOW.mean, dtype=np.float32), np.array(HOW.std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(((x_HWC / 255 - mean) / std).transpose(2, 0, 1)))


def transformers_way() -> Callable[[bytes], Tensor]:
    """With SigLIP's image processor, the one on Pillow."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor: Any = SiglipImageProcessorPil(size={"height": EDGE_PX, "width": EDGE_PX})

    def prepare(data: bytes) -> Tensor:
        image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        prepared: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return prepared

    return prepare


def speed(name: str, files: Sequence[bytes], rounds: int) -> list[Row]:
    """Pictures a second and core, against both plain ways."""
    theirs = transformers_way()
    found = interleave(
        {
            "ours": lambda: [ours(data) for data in files],
            "pillow": lambda: [pillow(data) for data in files],
            "transformers": lambda: [theirs(data) for data in files],
        },
        rounds,
    )
    per_s = {way: len(files) / seconds.cpu for way, seconds in found.items()}
    return [
        more(f"{name}, against Pillow", per_s["ours"], per_s["pillow"], "pictures/s"),
        more(f"{name}, against transformers", per_s["ours"], per_s["transformers"], "pictures/s"),
    ]


def apart(files: Sequence[bytes]) -> dict[str, float]:
    """How far ours and Pillow's are, in levels of 255."""
    levels = torch.stack([((ours(data) - pillow(data)) * 127.5).round().abs() for data in files])
    decoded = [
        np.array_equal(load_pixels(data).numpy(), np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")))
        for data in files
    ]
    return {
        "largest": float(levels.max()),
        "differ": round(float((levels > 0).float().mean()), 6),
        "decoded_equal": float(all(decoded)),
    }


def cached(data: bytes, rounds: int) -> list[Row]:
    """A picture's features read from the cache, against its pixels prepared; then the tower still runs."""
    features = torch.randn(POSITIONS, POSITIONS, WIDTH)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("bfloat16", "float8"):
            cache = FeatureCache(Path(folder), dtype)
            key = dtype.encode().hex()
            kept = cache.put(key, (480, 640), [features])

            def read(cache: FeatureCache = cache, key: str = key) -> None:
                for _ in range(10):
                    assert cache.get(key) is not None

            found = interleave({"read": read, "prepare": lambda: [ours(data) for _ in range(10)]}, rounds)
            per_s = {way: 10 / seconds.cpu for way, seconds in found.items()}
            rows.append(
                more(f"features in {dtype} against pixels", per_s["read"], per_s["prepare"], "pictures/s")
            )
            again = unpack(pack(key, (480, 640), [features], dtype), key)
            assert torch.equal(again.tiles[0], kept.tiles[0])
            rows.append(Row(f"a picture's features in {dtype}", None, kept.num_bytes / 1e6, None, "MB"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
