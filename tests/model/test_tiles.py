"""Pixels of the tiles: Pillow's within two levels, and those of the published models' own processors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.model import tiles as arithmetic
from tinymodal.model.image import Preparation
from tinymodal.model.strategies import STRATEGIES, plan, room
from tinymodal.model.tiles import NARROW_PX, TALL, cut, prepare, resized_by_pillow

CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SIZES = [(40, 60), (61, 37), (30, 30), (28, 28), (200, 21), (13, 150), (1, 90), (5, 7), (113, 113), (70, 35)]


def noise(height: int, width: int) -> PIL.Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiles_of(image: PIL.Image.Image, how: Preparation) -> list[torch.Tensor]:
    return cut(image, how, plan((image.height, image.width), how))


LEVEL = 1 / (255 * min(CLIP["std"]))
"""One level of 255 in normalised values, at most: 0.015."""


@pytest.fixture(params=["pillow", "torch"])
def assert_same(request, monkeypatch):
    """Compares tiles; once with every resize Pillow's, so that nothing hides behind what torch rounds."""
    exact = request.param == "pillow"
    if exact:
        monkeypatch.setattr(arithmetic, "resized_by_pillow", lambda *_: True)

    def compare(ours: list[torch.Tensor], theirs: torch.Tensor) -> None:
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            # 5e-7 at most where Pillow resizes, else two levels.
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if exact else 2.01 * LEVEL)

    return compare


# ---- as transformers does


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos"])
def test_square_is_siglips_processor(resample, assert_same):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    filters = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
    theirs = SiglipImageProcessorPil(size={"height": 28, "width": 42}, resample=filters[resample])
    for size in SIZES:
        how = Preparation(28, 42, **HALF, resample=resample)
        assert_same([prepare(noise(*size), how)], theirs(noise(*size), return_tensors="pt")["pixel_values"])


def test_crop_is_clips_processor(assert_same):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for size in SIZES:
        how = Preparation(28, 28, **CLIP, resize="crop")
        assert_same([prepare(noise(*size), how)], theirs(noise(*size), return_tensors="pt")["pixel_values"])


def test_pad_is_llavas_processor(assert_same):
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    edge = {"height": 28, "width": 28}
    theirs = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=edge, do_pad=True)
    for size in SIZES:
        how = Preparation(28, 28, **CLIP, resize="pad")
        assert_same([prepare(noise(*size), how)], theirs(noise(*size), return_tensors="pt")["pixel_values"])


def test_anyres_is_llava_nexts_processor(assert_same):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=pinpoints,
    )
    how = Preparation(28, 28, **CLIP, resize="anyres", pinpoints=pinpoints)
    seen = set()
    for size in SIZES:
        ours = tiles_of(noise(*size), how)
        assert_same(ours, theirs(noise(*size), return_tensors="pt")["pixel_values"][0])
        seen.add(plan(size, how).canvas_px)
    assert len(seen) == 5


def test_tiles_are_internvls_processor(assert_same):
    """InternVL's processor takes GOT-OCR 2's pictures; there the thumbnail comes last."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    theirs = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=6)
    how = Preparation(28, 28, **CLIP, resize="tiles", max_tiles=6)
    for size in SIZES:
        whole, *rest = tiles_of(noise(*size), how)
        assert_same([*rest, whole], theirs(noise(*size), return_tensors="pt")["pixel_values"])


def test_tiles_at_a_longest_edge_are_idefics3s_processor(assert_same):
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    theirs = Idefics3ImageProcessorPil(size={"longest_edge": 100}, max_image_size={"longest_edge": 28})
    how = Preparation(28, 28, **HALF, resize="tiles", longest_px=100, resample="lanczos")
    for size in SIZES:
        whole, *rest = tiles_of(noise(*size), how)
        assert_same([*rest, whole], theirs(noise(*size), return_tensors="pt")["pixel_values"][0])
    single = replace(how, longest_px=20, max_tiles=0)
    theirs = Idefics3ImageProcessorPil(size={"longest_edge": 20}, max_image_size={"longest_edge": 28})
    assert_same(
        tiles_of(noise(40, 60), single), theirs(noise(40, 60), return_tensors="pt")["pixel_values"][0]
    )


def test_slices_are_minicpm_vs_processor(assert_same):
    """Its pixels come as one strip of patches of 7 px in columns of 7; in blocks of 2 x 2 they are 14 px."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    theirs = MiniCPMV4_6ImageProcessorPil(scale_resolution=56, patch_size=7, downsample_mode="4x")
    how = Preparation(56, 56, **HALF, resize="slices", step_px=14)
    for size in [*SIZES, (300, 200), (112, 448)]:
        out = theirs(noise(*size), return_tensors="pt")
        lengths = (out["target_sizes"].prod(-1) * 7).tolist()
        strips = out["pixel_values"][0].split(lengths, dim=-1)
        expected = [
            strip.unflatten(2, (rows, columns, 7)).permute(0, 2, 1, 3, 4).reshape(3, rows * 7, columns * 7)
            for strip, (rows, columns) in zip(strips, out["target_sizes"].tolist(), strict=True)
        ]
        assert_same(tiles_of(noise(*size), how), expected)


def test_native_is_the_processor_of_naflex(assert_same):
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    theirs = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64)
    how = Preparation(32, 32, **HALF, resize="native", step_px=4, resample="bilinear")
    for size in SIZES:
        out = theirs(noise(*size), return_tensors="pt")
        rows, columns = out["spatial_shapes"][0].tolist()
        patches = out["pixel_values"][0][: rows * columns].view(rows, columns, 4, 4, 3)
        expected = patches.permute(4, 0, 2, 1, 3).reshape(3, rows * 4, columns * 4)
        assert_same([prepare(noise(*size), how)], expected[None])


# ---- as PIL does


def test_a_picture_of_the_right_size_is_normalised_and_otherwise_left_alone():
    how = Preparation(40, 60, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    image = noise(40, 60)
    mean, std = torch.tensor(how.mean).view(3, 1, 1), torch.tensor(how.std).view(3, 1, 1)
    for resize in ("square", "crop", "pad"):
        values = prepare(image, replace(how, resize=resize))
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        back = (values * std + mean) * 255
        assert torch.equal(back.round().long(), torch.from_numpy(np.array(image)).permute(2, 0, 1).long())


def resized(image: PIL.Image.Image, size: tuple[int, int], resample: str) -> tuple[np.ndarray, np.ndarray]:
    """In levels of 255: ours and Pillow's."""
    how = Preparation(*size, mean=(0.0,) * 3, std=(1.0,) * 3, resample=resample)
    ours = prepare(image, how).mul(255).round().permute(1, 2, 0).numpy()
    theirs = np.asarray(image.resize(size[::-1], PIL.Image.Resampling[resample.upper()]))
    return ours, theirs


@pytest.mark.parametrize(
    ("source", "target", "resample"),
    [
        ((57, 83), (24, 24), "lanczos"),
        ((57, 83), (100, 90), "lanczos"),
        ((57, 83), (1, 90), "bicubic"),
        ((57, 7), (100, 90), "bilinear"),
        ((2500, 20), (24, 24), "bicubic"),
    ],
)
def test_what_torch_is_not_made_for_is_pillows_to_the_bit(source, target, resample):
    assert resized_by_pillow(source, target, resample)
    ours, theirs = resized(noise(*source), target, resample)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("resize", sorted(STRATEGIES))
def test_a_preparation_may_ask_for_pillow_everywhere(resize, monkeypatch):
    how = Preparation(28, 28, **HALF, resize=resize, resizer="pillow")
    exact = tiles_of(noise(61, 47), how)
    assert Preparation.from_dict(how.to_dict()) == how
    assert "resizer" not in replace(how, resizer="torch").to_dict()
    monkeypatch.setattr(F, "interpolate", None)
    assert all(torch.equal(a, b) for a, b in zip(exact, tiles_of(noise(61, 47), how), strict=True))
    with pytest.raises(TypeError):
        tiles_of(noise(61, 47), replace(how, resizer="torch"))


SIDE = st.one_of(st.integers(NARROW_PX, 40), st.integers(NARROW_PX, 400))


@settings(max_examples=150, deadline=None)
@given(
    height=SIDE,
    width=SIDE,
    target=st.tuples(SIDE, SIDE),
    resample=st.sampled_from(["bicubic", "bilinear"]),
    kind=st.sampled_from(["noise", "edges", "smooth"]),
)
def test_torchs_pixels_are_pillows_within_two_levels(height, width, target, resample, kind):
    image = noise(height, width)
    if kind == "edges":
        image = image.point(lambda value: 255 * (value > 127))
    elif kind == "smooth":
        image = noise(4, 4).resize((width, height), PIL.Image.Resampling.BICUBIC)
    assert not resized_by_pillow((height, width), target, resample)
    ours, theirs = resized(image, target, resample)
    apart = np.abs(ours - theirs)
    assert apart.max() <= 2
    # 0.3 % on average. Where a whole row of an edge lies on the border of two levels, so does all of it.
    assert (apart > 1).mean() < 0.01


def test_of_a_photographs_size_one_value_in_two_hundred_is_a_level_off_at_most():
    ours, theirs = resized(noise(480, 640), (384, 384), "bicubic")
    apart = np.abs(ours - theirs)
    assert apart.max() <= 1
    assert apart.mean() < 0.005


def test_a_picture_taller_than_pillow_resizes_in_one_go_is_left_to_it():
    """From there on Pillow goes down before it goes across, and rounds in between."""
    assert not resized_by_pillow((TALL * 20, 20), (106, 76), "bicubic")
    assert resized_by_pillow((TALL * 20 + 1, 20), (106, 76), "bicubic")
    ours, theirs = resized(noise(TALL * 20, 20), (300, 106), "bicubic")
    assert np.abs(ours - theirs).max() <= 2


def test_a_picture_and_its_numbers_give_the_same_tiles():
    image = noise(61, 47)
    for resize in sorted(STRATEGIES):
        how = Preparation(28, 28, **HALF, resize=resize)
        shapes = plan((61, 47), how)
        for one, other in zip(
            cut(image, how, shapes), cut(torch.from_numpy(np.array(image)), how, shapes), strict=True
        ):
            assert torch.equal(one, other)


def test_the_canvas_of_anyres_is_black_around_the_picture():
    how = Preparation(10, 10, mean=(0.0,) * 3, std=(1.0,) * 3, resize="anyres", pinpoints=((20, 20),))
    whole, *rest = tiles_of(PIL.Image.new("RGB", (40, 20), (255, 255, 255)), how)
    assert (whole == 1).all()
    upper, lower = torch.cat(rest[:2], 2), torch.cat(rest[2:], 2)
    canvas = torch.cat([upper, lower], 1)
    assert (canvas[:, 5:15] == 1).all()
    assert canvas.sum() == 3 * 10 * 20


@settings(max_examples=120, deadline=None)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    target=st.tuples(st.integers(14, 48), st.integers(14, 48)),
    resize=st.sampled_from(sorted(STRATEGIES)),
)
def test_whatever_comes_in_tiles_of_the_plan_come_out(height, width, target, resize):
    if resize == "slices":
        target = (target[0], target[0])
    how = Preparation(*target, **HALF, resize=resize)
    tiles = tiles_of(noise(height, width), how)
    assert [tuple(tile.shape) for tile in tiles] == [(3, *px) for px in plan((height, width), how).tiles_px]
    for tile in tiles:
        assert tile.isfinite().all()
        assert tile.abs().max() <= 1


# ---- strips


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (7, 9_000), (9_000, 7)])
@pytest.mark.parametrize("resize", sorted(STRATEGIES))
def test_a_strip_never_becomes_a_large_picture_on_the_way(resize, size, monkeypatch):
    """Everything that is made, the picture between the two directions of a resize included."""
    made = []
    interpolate, resize_by_pillow, repeat = F.interpolate, PIL.Image.Image.resize, torch.Tensor.repeat

    def watched_interpolate(x, size, **named):
        made.extend([size[0] * size[1], size[1] * x.shape[2]])
        return interpolate(x, size, **named)

    def watched_resize(self, size, resample, box):
        made.extend([size[0] * size[1], size[0] * (box[3] - box[1])])
        return resize_by_pillow(self, size, resample, box)

    def watched_repeat(self, *times):
        made.append(times[0] * times[1])
        return repeat(self, *times)

    image = noise(*size)
    monkeypatch.setattr(F, "interpolate", watched_interpolate)
    monkeypatch.setattr(PIL.Image.Image, "resize", watched_resize)
    monkeypatch.setattr(torch.Tensor, "repeat", watched_repeat)
    # A limit that a strip of this length meets and a picture of the tile's size does not.
    how = Preparation(336, 336, **HALF, resize=resize, max_pixels=200_000)
    tiles = tiles_of(image, how)
    assert all(tile.isfinite().all() for tile in tiles)
    # Twelve tiles of 336 x 336 are the most that is asked for.
    assert max(made) <= max(1.01 * room(size, how), 12 * 336 * 336)


def test_the_middle_of_a_strip_is_the_same_whether_all_of_it_was_resized_or_not():
    for size in [(20, 700), (700, 20), (31, 777)]:
        how = Preparation(28, 28, mean=(0.0,) * 3, std=(1.0,) * 3, resize="crop")
        exact = prepare(noise(*size), how)
        spared = prepare(noise(*size), replace(how, max_pixels=1))
        # PIL takes the edges in single precision, and torch resizes what is not spared.
        assert (exact - spared).abs().max() * 255 <= 2.01


def test_a_strip_is_padded_without_making_a_square_of_its_length():
    """200,000 x 1 px would be 120 GB as a square; it is shrunk first and stays a line on the mean colour."""
    how = Preparation(16, 16, **HALF, resize="pad", max_pixels=10**6)
    values = prepare(PIL.Image.new("RGB", (200_000, 1), (255, 255, 255)), how)
    # int(0.5 * 255) = 127, half a level below the mean.
    assert (values[:, 0] + 0.5 / 127.5).abs().max() < 1e-6
    assert (values[:, 8] > values[:, 0]).all()


# ---- refusals


def test_only_rgb_is_prepared_by_a_plan_of_its_size():
    how = Preparation(4, 4, **HALF)
    with pytest.raises(ValueError, match="expected an RGB picture, got mode L; read it with load_pixels"):
        prepare(PIL.Image.new("L", (4, 4)), how)
    with pytest.raises(ValueError, match=r"expected a picture as uint8 \[H, W, 3\], got .* \[3, 4, 4\]"):
        prepare(torch.zeros(3, 4, 4, dtype=torch.uint8), how)
    with pytest.raises(ValueError, match="the plan is for a picture of 4 x 5 px, got 5 x 4"):
        cut(noise(5, 4), how, plan((4, 5), how))


def test_several_tiles_are_not_prepared_as_one():
    with pytest.raises(ValueError, match="'anyres' cuts a picture into several tiles; use plan and cut"):
        prepare(noise(5, 5), Preparation(4, 4, **HALF, resize="anyres"))
