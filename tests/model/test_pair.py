"""Two towers at once are the two towers alone, side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinymodal.compose.tiny import tiny_vision
from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.model.modeling_tinymodal import load_exactly
from tinymodal.model.pair import PairConfig, PairTower

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pair_config(**more: Any) -> PairConfig:
    return tower_config(tiny_vision("tinymodal_pair") | more)


def built(layer: Any = -2, keep_class: bool = False, **more: Any) -> PairTower:
    torch.manual_seed(0)
    config = pair_config(**more)
    tower = encoder_of(config).build(config, layer, keep_class=keep_class).eval()
    assert isinstance(tower, PairTower)
    return tower


def alone(
    tower: PairTower, which: str, kind: str, layer: Any = -2, keep_class: bool = False
) -> torch.nn.Module:
    config = tower_config(tiny_vision(kind))
    single = encoder_of(config).build(config, layer, keep_class=keep_class).eval()
    load_exactly(single, getattr(tower, which).state_dict())
    return single


def normalised(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize(("layer", "keep_class"), [(-2, False), ([-1, -3], False), (-1, True)])
def test_each_tower_of_a_pair_gives_what_it_gives_alone_of_a_picture_normalised_its_own_way(
    layer, keep_class
):
    pixels = torch.rand(2, 3, 32, 20)
    tower = built(layer, keep_class)
    first = alone(tower, "first", "clip_vision_model", layer, keep_class)
    second = alone(tower, "second", "dinov2", layer, keep_class)
    with torch.no_grad():
        a = first(normalised(pixels, CLIP_MEAN, CLIP_STD))
        b = second(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD))
        both = tower(normalised(pixels, CLIP_MEAN, CLIP_STD))
    assert both.grid == a.grid == b.grid == ((41,) if keep_class else (8, 5))
    assert tower.widths == (first.width, second.width) == ((64, 64) if isinstance(layer, list) else (32, 32))
    torch.testing.assert_close(both.values[..., : first.width], a.values, rtol=0, atol=0)
    # 1.2e-7: only the rounding of the second normalisation.
    torch.testing.assert_close(both.values[..., first.width :], b.values, rtol=0, atol=1e-5)


def test_both_towers_see_what_the_first_one_sees_where_a_checkpoint_was_trained_so():
    """As in TinyLLaVA, whose DINOv2 is fed CLIP's pictures."""
    pixels = normalised(torch.rand(2, 3, 24, 24), CLIP_MEAN, CLIP_STD)
    tower = built(normalise="first")
    with torch.no_grad():
        theirs = alone(tower, "second", "dinov2")(pixels).values
        ours = tower(pixels).values[..., 32:]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with torch.no_grad():
        own = built(normalise="own")(pixels).values[..., 32:]
    assert (own - ours).abs().max() > 1e-2


def test_what_a_folder_says_of_its_own_normalisation_is_kept():
    tower = built(means=[[0.0] * 3, [0.5] * 3], stds=[[1.0] * 3, [0.25] * 3])
    pixels = torch.rand(1, 3, 24, 24)
    torch.testing.assert_close(tower.for_second(pixels), (pixels - 0.5) / 0.25, rtol=0, atol=1e-6)
    how = PairTower.preparation_of(tower.config)
    assert (how.mean, how.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_pictures_are_prepared_for_the_first_tower():
    config = pair_config()
    how = PairTower.preparation_of(config)
    assert how.size_px == (24, 24)
    assert (how.mean, how.std) == (CLIP_MEAN, CLIP_STD)
    assert PairTower.patch_px(config) == 4
    assert PairTower.grid(config, (32, 20)) == (8, 5)
    assert PairTower.grid(config, (32, 20), True) == (41,)


def test_two_towers_that_do_not_see_the_same_places_are_refused_with_both_grids():
    coarse = tiny_vision("dinov2") | {"patch_size": 8}
    config = pair_config(towers=[tiny_vision("clip_vision_model"), coarse])
    with pytest.raises(ValueError, match=r"'clip_vision_model' and 'dinov2' make 6 x 6 and 3 x 3 positions"):
        PairTower.grid(config, (24, 24))
    with pytest.raises(ValueError, match="make 6 x 6 and 3 x 3"):
        PairTower.build(config)(torch.rand(1, 3, 24, 24))
    registers = pair_config(towers=[tiny_vision("clip_vision_model"), tiny_vision("dinov2_with_registers")])
    assert PairTower.grid(registers, (24, 24)) == (6, 6)
    with pytest.raises(ValueError, match="make 37 and 41 positions"):
        PairTower.grid(registers, (24, 24), True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"towers": [tiny_vision("dinov2")]}, "a pair has two towers, got 1"),
        ({"normalise": "second"}, "unknown normalise 'second'; known: own, first"),
        (
            {"towers": [tiny_vision("dinov2"), {"model_type": "clip_vison_model"}]},
            "did you mean 'clip_vision_model'",
        ),
        ({"towers": [tiny_vision("dinov2"), tiny_vision("tinymodal_pair")]}, "is a pair itself"),
        ({"means": [[0.5] * 3]}, "means must be three numbers for each of two towers"),
    ],
)
def test_a_pair_that_cannot_be_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        pair_config(**values)
    with pytest.raises(ValueError, match="needs 'towers'"):
        PairTower.grid(PairConfig(), (24, 24))


def test_a_pairs_config_comes_back_from_json_as_it_was():
    config = TinyModalConfig(vision_config=tiny_vision("tinymodal_pair") | {"normalise": "first"})
    again = TinyModalConfig.from_dict(config.to_dict())
    assert isinstance(again.vision_config, PairConfig)
    assert again.vision_config.to_diff_dict() == config.vision_config.to_diff_dict()
    assert [part.model_type for part in again.vision_config.parts()] == ["clip_vision_model", "dinov2"]


def test_every_parameter_of_a_pair_is_used_and_bears_its_towers_name():
    tower = built()
    tower(torch.rand(1, 3, 24, 24)).values.square().mean().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in tower.state_dict()} == {
        "first.backbone",
        "second.backbone",
    }


def test_an_option_of_the_pair_is_one_of_both_towers():
    tower = built(final_norm=True)
    assert tower.first.config.final_norm
    assert tower.second.config.final_norm
    pixels = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        a, b = tower.first(pixels), tower.second(tower.for_second(pixels))
        torch.testing.assert_close(tower(pixels).values, torch.cat([a.values, b.values], -1), rtol=0, atol=0)
    assert type(tower.first.backbone.post_layernorm) is torch.nn.LayerNorm


def test_the_attention_asked_for_reaches_both_towers():
    config = pair_config()
    config._attn_implementation = "eager"
    tower = PairTower.build(config)
    assert tower.first.backbone.config._attn_implementation == "eager"
    assert tower.second.backbone.config._attn_implementation == "eager"
    assert PairTower.build(config, attn="sdpa").second.backbone.config._attn_implementation == "sdpa"
