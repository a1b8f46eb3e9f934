"""What files do to us is undone or refused; what is prepared has the numbers the tower was trained on."""

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

from tinymodal.model.image import LONGEST_PAD_PX, Preparation, load_image, prepare

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


# ---- preparing


def test_a_picture_of_the_right_size_is_normalised_and_otherwise_left_alone():
    how = Preparation(40, 60, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    mean, std = torch.tensor(how.mean).view(3, 1, 1), torch.tensor(how.std).view(3, 1, 1)
    values = prepare(photo(), how)
    assert values.dtype == torch.float32
    assert values.is_contiguous()
    back = (values * std + mean) * 255
    assert torch.equal(back.round().long(), torch.from_numpy(pixels(photo())).permute(2, 0, 1))


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    target=st.tuples(st.integers(4, 48), st.integers(4, 48)),
    resize=st.sampled_from(["square", "pad"]),
)
def test_whatever_comes_in_the_prepared_size_comes_out(height, width, target, resize):
    how = Preparation(*target, mean=(0.5,) * 3, std=(0.5,) * 3, resize=resize)
    values = prepare(photo(height, width), how)
    assert values.shape == (3, *target)
    assert values.isfinite().all()
    assert values.abs().max() <= 1


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(24, 24), (100, 90)])
def test_resizing_equals_pil_to_the_rounding(resample, size):
    rng = np.random.default_rng(0)
    image = PIL.Image.fromarray(rng.integers(0, 256, (57, 83, 3), dtype=np.uint8))
    how = Preparation(*size, mean=(0.0,) * 3, std=(1.0,) * 3, resample=resample)
    theirs = image.resize(size[::-1], PIL.Image.Resampling[resample.upper()])
    ours = prepare(image, how).mul(255).round().permute(1, 2, 0).numpy()
    # On pure noise at most 2 of 255 apart, by rounding twice; the other filter is 46 apart or more.
    assert np.abs(ours - pixels(theirs)).max() <= 2


def test_preparation_equals_transformers_siglip_and_padded_clip():
    """SigLIP's own processor stretches; LLaVA pads with the mean colour before CLIP's own processor."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    theirs = SiglipImageProcessorPil(size={"height": 24, "width": 24}, resample=3)(
        photo(), return_tensors="pt"
    )
    ours = prepare(photo(), Preparation(24, 24, mean=(0.5,) * 3, std=(0.5,) * 3))
    torch.testing.assert_close(ours, theirs["pixel_values"][0], rtol=0, atol=1.01 / 127.5)

    mean = (0.48145466, 0.4578275, 0.40821073)
    square = PIL.Image.new("RGB", (60, 60), tuple(int(m * 255) for m in mean))
    square.paste(photo(), (0, 10))
    how = Preparation(24, 24, mean=mean, std=(0.26862954, 0.26130258, 0.27577711))
    padded = prepare(photo(), Preparation.from_dict({**how.to_dict(), "resize": "pad"}))
    assert torch.equal(padded, prepare(square, how))


def test_a_strip_is_padded_without_making_a_square_of_its_length():
    """200,000 x 1 px would be 120 GB as a square; it is shrunk first and stays a line on the mean colour."""
    how = Preparation(16, 16, mean=(0.5,) * 3, std=(0.5,) * 3, resize="pad")
    assert LONGEST_PAD_PX < 200_000
    values = prepare(PIL.Image.new("RGB", (200_000, 1), (255, 255, 255)), how)
    # int(0.5 * 255) = 127, half a level below the mean.
    assert (values[:, 0] + 0.5 / 127.5).abs().max() < 1e-6


def test_a_preparation_survives_json_and_refuses_nonsense():
    how = Preparation(24, 36, mean=(0.5, 0.4, 0.3), std=(1, 1, 1), resize="pad", max_pixels=1000)
    assert Preparation.from_dict(json.loads(json.dumps(how.to_dict()))) == how
    with pytest.raises(ValueError, match=r"unknown \['hight_px'\], missing \['height_px'\]"):
        Preparation.from_dict({"hight_px": 3, "width_px": 3, "mean": [0] * 3, "std": [1] * 3})
    for wrong in (
        {"height_px": 0},
        {"mean": (0.5,)},
        {"std": (0.0, 1.0, 1.0)},
        {"resize": "crop"},
        {"resample": "nearest"},
        {"max_pixels": 0},
    ):
        with pytest.raises(ValueError):
            Preparation.from_dict({**how.to_dict(), **wrong})


def test_only_rgb_is_prepared():
    with pytest.raises(ValueError, match="expected an RGB picture, got mode L; read it with load_image"):
        prepare(PIL.Image.new("L", (4, 4)), Preparation(4, 4, mean=(0.5,) * 3, std=(0.5,) * 3))
