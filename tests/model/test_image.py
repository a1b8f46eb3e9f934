"""What files do to us is undone or refused; a preparation holds numbers that its strategy can use."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.model import picture_file as reading
from tinymodal.model.image import Preparation, load_pixels
from tinymodal.model.picture_file import load_image

MEDIA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "media"
NASTY = MEDIA / "images_nasty"

REFUSED = {
    "bad_palette_file.gpl": "not a picture",
    "broken.png": "not a picture",
    "decompression_bomb.gif": "too large",
    "png_decompression_dos.png": "broken in its header",
    "truncated_jpeg.jpg": "broken or cut short .*truncated",
    "zero_height.j2k": "not a picture",
}


def photo(height: int = 40, width: int = 60) -> PIL.Image.Image:
    """Smooth in both directions and different in each channel, so that a turn or a swap shows."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    channels = (255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 255 * (x + y) / (height + width))
    return PIL.Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def as_file(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ---- reading


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_a_lossless_file_is_read_to_the_pixel_from_path_bytes_and_picture(kind, tmp_path):
    data = as_file(photo(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (data, path, str(path), PIL.Image.open(path)):
        read = load_image(source)
        assert read.mode == "RGB"
        assert np.array_equal(pixels(read), pixels(photo()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright_as_its_exif_says(orientation):
    """What a camera stores lying on its side is what it saw standing."""
    turns = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }
    stored = photo().transpose(turns[orientation]) if orientation in turns else photo()
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(load_image(as_file(stored, "PNG", exif=exif))), pixels(photo()))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_shows_white_and_never_what_lies_hidden_behind_it(mode):
    """The left half is opaque grey, the right half transparent over black."""
    rgba = PIL.Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    rgba.paste((128, 128, 128, 255), (0, 0, 10, 10))
    image = rgba.convert(mode) if mode != "P" else rgba.quantize(4)
    read = pixels(load_image(image if mode == "PA" else as_file(image, "PNG")))
    assert (read[:, :10] == 128).all()
    assert (read[:, 10:] == 255).all()


def test_a_palette_png_with_one_transparent_colour_shows_white_there():
    image = PIL.Image.new("P", (4, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1, 0, 1])
    read = pixels(load_image(as_file(image, "PNG", transparency=1)))
    assert read[0].tolist() == [[10, 20, 30], [255, 255, 255], [10, 20, 30], [255, 255, 255]]


def test_half_transparent_colour_is_mixed_with_white():
    read = pixels(load_image(as_file(PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")))
    assert abs(read[0, 0, 0] - 127) <= 1


def test_cmyk_becomes_the_colours_it_means():
    red = load_image(as_file(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert pixels(red)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_neither_clipped_nor_black(kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    read = pixels(load_image(as_file(PIL.Image.fromarray(ramp), kind)))
    # 65535 / 255 = 257: every level is met exactly.
    assert np.array_equal(read[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_few_bits_in_a_16_bit_file_are_stretched_instead_of_shown_as_black(bits):
    ramp = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16).reshape(16, 16)
    read = pixels(load_image(as_file(PIL.Image.fromarray(ramp), "PNG")))
    assert read.min() == 0
    assert read.max() == 255
    assert (np.diff(read[..., 0].ravel()) >= 0).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([[0.0, 0.5, 1.0]]), [0, 128, 255]),
        (np.float32([[0.0, 51.0, 255.0]]), [0, 51, 255]),
        (np.float32([[-1.0, 0.0, 3.0]]), [0, 64, 255]),
        (np.int32([[0, 32896, 65535]]), [0, 128, 255]),
        (np.int32([[-100, 0, 300]]), [0, 64, 255]),
        (np.int32([[0, 1_000_000, 4_000_000]]), [0, 64, 255]),
    ],
)
def test_floats_and_wide_integers_keep_their_order_and_fill_the_range(values, expected):
    assert pixels(load_image(PIL.Image.fromarray(values)))[0, :, 0].tolist() == expected


def test_a_picture_of_numbers_that_are_none_is_refused():
    with pytest.raises(ValueError, match="values that are not numbers"):
        load_image(PIL.Image.fromarray(np.float32([[0.0, np.nan]])))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_shown(kind):
    first, second = PIL.Image.new("RGB", (8, 8), (255, 0, 0)), PIL.Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = as_file(first, kind, save_all=True, append_images=[second], **options)
    assert pixels(load_image(data))[4, 4].tolist() == [255, 0, 0]


def test_a_given_picture_is_not_changed():
    image = PIL.Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    load_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (1, 2, 3, 4)


def bomb_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose data would take long to find out it lied."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_a_very_large_picture_is_refused_from_its_header_with_size_and_limit():
    """The data is a lie, so decoding would say 'cut short': the size was checked before."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match=r"10000 x 9000 px are 90,000,000 pixels, the limit is 89,478,485"
        ):
            load_image(bomb_png(10_000, 9_000))
        with pytest.raises(ValueError, match=r"too large, the limit is 89,478,485"):
            load_image(bomb_png(60_000, 60_000))
    with pytest.raises(ValueError, match="are 2,400 pixels, the limit is 2,000"):
        load_image(as_file(photo(), "PNG"), max_pixels=2_000)
    with pytest.raises(ValueError, match="the limit is 2,000"):
        load_image(photo(), max_pixels=2_000)
    assert load_image(as_file(photo(), "PNG"), max_pixels=2_400).size == (60, 40)


def test_what_is_no_picture_is_refused_with_the_name_of_the_file(tmp_path):
    empty, text, half = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "half.jpg"
    empty.touch()
    text.write_text("not a picture")
    jpeg = as_file(photo(400, 600), "JPEG")
    half.write_bytes(jpeg[: len(jpeg) // 2])
    for path, found in (
        (tmp_path / "missing.png", "does not exist"),
        (tmp_path, "is a folder"),
        (empty, "the file is empty"),
        (text, "not a picture"),
        (half, "cut short"),
    ):
        with pytest.raises(ValueError, match=found) as caught:
            load_image(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="picture of 0 bytes: the file is empty"):
        load_image(b"")


def test_a_program_that_calls_itself_a_picture_is_not_run():
    with pytest.raises(ValueError, match="EPS is a program to run"):
        load_image(as_file(photo(), "EPS"))


@settings(max_examples=60, deadline=None)
@given(
    cut=st.integers(1, 800),
    flip=st.integers(0, 800),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]),
)
def test_a_damaged_file_is_read_or_refused_but_nothing_else_happens(cut, flip, kind):
    data = bytearray(as_file(photo(), kind))
    data[flip % len(data)] ^= 0xFF
    with contextlib.suppress(ValueError):
        assert load_image(bytes(data[: max(1, len(data) - cut)])).mode == "RGB"


@pytest.mark.skipif(not NASTY.is_dir(), reason="needs ../shared/data/media/images_nasty")
def test_every_nasty_picture_is_read_as_it_is_meant_or_refused():
    """Against what Pillow sees, where Pillow sees rightly; 16 bits and transparency are where it does not."""
    index = json.loads((MEDIA / "index.json").read_text())["files"]
    silently_black = []
    for file in sorted(NASTY.iterdir()):
        seen = index[f"images_nasty/{file.name}"]["pillow"]
        if file.name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[file.name]):
                load_image(file)
            continue
        if file.name == "9000x9000.png":
            continue  # seconds; its size is below the limit and nothing else is special
        image = load_image(file)
        assert image.mode == "RGB"
        assert list(image.size) == seen["exif_transposed_size"], file.name
        read = pixels(image)
        with PIL.Image.open(file) as opened:
            transparent = opened.has_transparency_data
        if seen["mode"] in ("RGB", "L", "CMYK", "P") and not transparent:
            assert np.allclose(read.mean((0, 1)), seen["rgb_mean"], atol=0.6), file.name
        if read.max() < 32:
            silently_black.append(file.name)
    # Eight by eight pixels of true black, says its own decoder.
    assert silently_black == ["exif_gps.jpg"]


@pytest.mark.skipif(not NASTY.is_dir(), reason="needs ../shared/data/media/images_nasty")
def test_a_photograph_stored_in_four_orientations_is_four_times_the_same():
    upright = pixels(load_image(NASTY / "hopper.jpg"))
    for turn in (2, 4, 6, 7):
        read = pixels(load_image(NASTY / f"hopper_orientation_{turn}.jpg"))
        # They were compressed anew: 2.5 levels apart on average; a photograph turned or mirrored is 60 apart.
        assert np.abs(read - upright).mean() < 6, turn


# ---- the quick way


@pytest.fixture
def decoded(monkeypatch):
    """How often simplejpeg decoded a picture without a fault."""
    simplejpeg = pytest.importorskip("simplejpeg")
    found = []

    def counted(data, **options):
        pixels = simplejpeg.decode_jpeg(data, **options)
        found.append(pixels.shape)
        return pixels

    monkeypatch.setattr(reading, "_jpeg_decoder", lambda: counted)
    return found


def scene(height: int, width: int) -> PIL.Image.Image:
    """Smooth, with noise on top: no block of it is trivial."""
    rng = np.random.default_rng(height * 1000 + width)
    noisy = pixels(photo(height, width)) + rng.integers(-40, 40, (height, width, 3))
    return PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(40, 60), (47, 61), (1, 9), (16, 16), (333, 17)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"subsampling": "4:2:0", "progressive": True, "quality": 30},
        {"keep_rgb": True},
        {"restart_marker_rows": 1, "optimize": True},
        {"grey": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_jpeg_read_the_quick_way_is_pillows_to_the_bit(options, size, decoded, tmp_path):
    image = scene(*size)
    options = dict(options)
    if options.pop("grey", False):
        image = image.convert("L")
    data = as_file(image, "JPEG", **options)
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    expected = np.asarray(load_image(data))
    for source in (data, path, str(path)):
        read = load_pixels(source)
        assert (read.dtype, read.is_contiguous()) == (torch.uint8, True)
        assert np.array_equal(read.numpy(), expected)
    assert decoded == [expected.shape] * 3


@pytest.mark.parametrize("orientation", [*range(10), 0xFFFF])
def test_a_jpeg_is_turned_by_the_quick_way_as_by_pillow(orientation, decoded):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = as_file(scene(24, 40), "JPEG", exif=exif)
    assert np.array_equal(load_pixels(data).numpy(), np.asarray(load_image(data)))
    assert load_pixels(data).shape == ((40, 24, 3) if orientation in (5, 6, 7, 8) else (24, 40, 3))
    assert len(decoded) == 2


def test_what_is_no_plain_jpeg_goes_the_way_of_pillow_and_gives_the_same(decoded):
    many = io.BytesIO()
    scene(20, 30).save(many, "MPO", save_all=True, append_images=[scene(20, 30).rotate(180)])
    second = PIL.Image.open(io.BytesIO(many.getvalue()))
    second.seek(1)
    cases = {
        "a picture of several": (many.getvalue(), 1),
        "its second": (second, 0),
        "CMYK": (as_file(scene(20, 30).convert("CMYK"), "JPEG"), 0),
        "PNG": (as_file(scene(20, 30), "PNG"), 0),
        "16 bits": (as_file(PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG"), 0),
        "transparent": (as_file(PIL.Image.new("RGBA", (9, 9), (1, 2, 3, 90)), "PNG"), 0),
        "decoded": (scene(20, 30), 0),
    }
    for name, (source, quick) in cases.items():
        decoded.clear()
        assert np.array_equal(load_pixels(source).numpy(), np.asarray(load_image(source))), name
        assert len(decoded) == quick, name


def test_numbers_are_the_same_without_simplejpeg(monkeypatch):
    data = as_file(scene(47, 61), "JPEG")
    quick = load_pixels(data)
    monkeypatch.setattr(reading, "_jpeg_decoder", lambda: None)
    assert torch.equal(load_pixels(data), quick)


def test_numbers_do_not_share_their_memory_with_the_picture():
    image = scene(8, 9)
    load_pixels(image).zero_()
    assert np.asarray(image).any()


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 3000), flip=st.integers(0, 3000), bit=st.integers(0, 7))
def test_a_damaged_jpeg_is_read_or_refused_alike_by_both_ways(cut, flip, bit):
    """Libjpeg mends much silently, and the two ways must agree on what it made of it."""
    data = bytearray(as_file(scene(40, 60), "JPEG"))
    data[flip % len(data)] ^= 1 << bit
    broken = bytes(data[: max(1, len(data) - cut)])

    def outcome(read):
        try:
            return np.asarray(read(broken)).tolist()
        except ValueError as fault:
            return str(fault)

    assert outcome(load_pixels) == outcome(load_image)


def test_both_ways_name_the_picture_as_they_are_told_and_keep_to_the_limit(tmp_path):
    data = as_file(scene(40, 60), "JPEG")
    for read in (load_image, load_pixels):
        with pytest.raises(
            ValueError, match=r"^shard 3, cat\.jpg: 60 x 40 px are 2,400 pixels, the limit is 2"
        ):
            read(data, 2_000, "shard 3, cat.jpg")
        with pytest.raises(ValueError, match=r"^shard 3, cat\.jpg: broken or cut short .*truncated"):
            read(data[:900], name="shard 3, cat.jpg")
        with pytest.raises(ValueError, match="does not exist"):
            read(tmp_path / "none.jpg")


@pytest.mark.skipif(not NASTY.is_dir(), reason="needs ../shared/data/media/images_nasty")
def test_every_nasty_picture_is_the_same_by_both_ways():
    for file in sorted(NASTY.iterdir()):
        if file.name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[file.name]):
                load_pixels(file)
        elif file.name != "9000x9000.png":
            assert np.array_equal(load_pixels(file).numpy(), np.asarray(load_image(file))), file.name


# ---- preparing


def test_a_preparation_survives_json_and_refuses_nonsense():
    how = Preparation(24, 36, mean=(0.5, 0.4, 0.3), std=(1, 1, 1), resize="pad", max_pixels=1000)
    assert Preparation.from_dict(json.loads(json.dumps(how.to_dict()))) == how
    with pytest.raises(ValueError, match=r"unknown \['hight_px'\], missing \['height_px'\]"):
        Preparation.from_dict({"hight_px": 3, "width_px": 3, "mean": [0] * 3, "std": [1] * 3})
    for wrong in (
        {"height_px": 0},
        {"mean": (0.5,)},
        {"std": (0.0, 1.0, 1.0)},
        {"resize": "stretch"},
        {"resample": "nearest"},
        {"resizer": "opencv"},
        {"max_pixels": 0},
        {"max_tiles": -1},
    ):
        with pytest.raises(ValueError):
            Preparation.from_dict({**how.to_dict(), **wrong})


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        ({"resize": "square"}, {}),
        ({"resize": "anyres"}, {"pinpoints": ((48, 24), (24, 48), (48, 48), (24, 72), (72, 24))}),
        ({"resize": "anyres", "pinpoints": [[24, 48]], "max_tiles": 3}, {"pinpoints": ((24, 48),)}),
        ({"resize": "slices", "step_px": 4}, {"max_tiles": 9}),
        ({"resize": "tiles", "thumbnail": False}, {"max_tiles": 12}),
        ({"resize": "tiles", "longest_px": 90}, {"max_tiles": 16}),
        ({"resize": "native", "step_px": 8}, {"fit_pixels": (576, 576)}),
        ({"resize": "native", "fit_pixels": [300, 900]}, {"fit_pixels": (300, 900)}),
    ],
)
def test_a_strategy_fills_in_its_own_numbers_and_keeps_them_in_its_file(options, holds):
    how = Preparation(24, 24, mean=(0.5,) * 3, std=(0.5,) * 3, **options)
    assert {name: getattr(how, name) for name in holds} == holds
    again = Preparation.from_dict(json.loads(json.dumps(how.to_dict())))
    assert again == how
    assert hash(again) == hash(how)
    assert set(how.to_dict()) <= {
        "height_px", "width_px", "mean", "std", "resize", "resample", "max_pixels", *options, *holds
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (
            {"max_tiles": 4},
            "max_tiles is read by anyres, slices, tiles, but resize is 'square'; leave it out",
        ),
        ({"resize": "pad", "pinpoints": ((24, 24),)}, "pinpoints is read by anyres, but resize is 'pad'"),
        (
            {"resize": "anyres", "pinpoints": ((24, 30),)},
            "pinpoint 24 x 30 px is not made of tiles of 24 x 24",
        ),
        ({"resize": "native", "fit_pixels": (9, 3)}, r"least, then the most pixels, got \(9, 3\)"),
        ({"resize": "native", "step_px": 32}, "at most 576 pixels hold no patch of 32 x 32 px"),
        ({"resize": "slices", "width_px": 30}, "slices needs tiles as high as wide, got 24 x 30 px"),
        ({"resize": "pinpoints"}, "known: square, crop, pad, anyres, slices, tiles, native"),
    ],
)
def test_numbers_that_a_strategy_does_not_read_or_cannot_use_are_refused(options, refusal):
    size = {"height_px": 24, "width_px": 24, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match=refusal):
        Preparation(**{**size, **options})


def test_a_recipe_of_the_shipped_model_still_reads():
    starter = (
        Path(__file__).resolve().parents[2] / "tinymodal" / "starter" / "model" / "processor_config.json"
    )
    said = json.loads(starter.read_text())
    how = Preparation.from_dict(said["image_processor"]["preparation"])
    assert how.resize == "square"
