"""Towers give what transformers' own classes give at the chosen layer, and keep nothing behind it."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tinymodal.model.encoders import ENCODERS, encoder_of, tower_config
from tinymodal.model.geometry import num_tokens
from tinymodal.model.hf_tower import AnyTower, new_backbone
from tinymodal.model.media import MediaEncoder, hidden_states
from tinymodal.model.modeling_tinymodal import load_exactly

BLOCKS = 3

NAMED = [
    "clip_vision_model",
    "siglip_vision_model",
    "siglip2_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "blip_2_vision_model",
]
GENERAL = ["vit", "beit", "data2vec-vision", "ijepa", "deit"]
"""Families that have no adapter of their own: positions in one sequence."""
STAGES = ["convnext", "dinov3_convnext", "swin", "resnet"]
"""The same, in stages of falling resolution."""
LEADING = {
    "clip_vision_model": 1,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "blip_2_vision_model": 1,
    "vit": 1,
    "beit": 1,
    "data2vec-vision": 1,
    "deit": 2,
}


def config_of(kind: str, **more: Any) -> PreTrainedConfig:
    values: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    values |= {"patch_size": 4, "image_size": 24, "intermediate_size": 64}
    if kind == "siglip2_vision_model":
        values |= {"num_patches": 36}
        del values["image_size"]
    elif kind in ("dinov2", "dinov2_with_registers"):
        values |= {"mlp_ratio": 2}
        del values["intermediate_size"]
    elif kind == "dinov3_vit":
        values |= {"num_register_tokens": 4}
    elif kind == "beit":
        values |= {"use_mask_token": True}
    elif kind.endswith("convnext"):
        values = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "image_size": 32}
    elif kind == "swin":
        values = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
        values |= {"image_size": 32, "patch_size": 4}
    elif kind == "resnet":
        values = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        values |= {"image_size": 32}
    return CONFIG_MAPPING[kind](**values, **more)


@functools.cache
def whole_tower(kind: str) -> Any:
    """transformers' own class, with weights large enough that a skipped block would show."""
    torch.manual_seed(0)
    tower = new_backbone(config_of(kind)).eval()
    with torch.no_grad():
        for p in tower.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return tower


def own_states(kind: str, pixels: torch.Tensor) -> Any:
    """What transformers' own class says, all hidden states included."""
    if kind != "siglip2_vision_model":
        flags = {"output_hidden_states": True}
        if kind not in ("dinov2", "dinov2_with_registers", "dinov3_vit", *STAGES):
            flags["interpolate_pos_encoding"] = tuple(pixels.shape[2:]) != (24, 24)
        return whole_tower(kind)(pixel_values=pixels, **flags)
    h, w = (edge // 4 for edge in pixels.shape[2:])
    # As transformers' image processor cuts patches: rows, columns, channels last.
    hwc = pixels.permute(0, 2, 3, 1)[:, : h * 4, : w * 4].reshape(len(pixels), h, 4, w, 4, 3)
    return whole_tower(kind)(
        pixel_values=hwc.transpose(2, 3).reshape(len(pixels), h * w, 48),
        pixel_attention_mask=torch.ones(len(pixels), h * w, dtype=torch.long),
        spatial_shapes=torch.tensor([[h, w]] * len(pixels)),
        output_hidden_states=True,
    )


def cut_like(kind: str, layer: Any = -2, keep_class: bool = False, **more: Any) -> MediaEncoder:
    """Our tower with the weights of transformers' own class."""
    config = config_of(kind, **more)
    encoder = encoder_of(config).build(config, layer, keep_class=keep_class).eval()
    ours = encoder.module.state_dict()
    load_exactly(encoder.module, {k: v for k, v in whole_tower(kind).state_dict().items() if k in ours})
    return encoder


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("layer", [-2, -1, 0, 1, BLOCKS, -BLOCKS - 1])
def test_a_tower_equals_transformers_hidden_state_at_the_chosen_layer(kind, layer):
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        theirs = own_states(kind, pixels).hidden_states[layer][:, LEADING.get(kind, 0) :]
        ours = cut_like(kind, layer)(pixels)
    assert ours.grid == (6, 6)
    # 0.0 with transformers 5.23; the neighbouring layer differs by more than 1.
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("size", [(32, 20), (12, 44), (25, 31)])
def test_a_tower_reads_other_sizes_than_it_was_trained_on_as_transformers_does(kind, size):
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        theirs = own_states(kind, pixels).hidden_states[-2][:, LEADING.get(kind, 0) :]
        ours = cut_like(kind)(pixels)
    assert ours.grid == (size[0] // 4, size[1] // 4)
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [*NAMED, "vit"])
def test_the_features_of_several_layers_stand_side_by_side_in_the_order_asked_for(kind):
    pixels = torch.randn(2, 3, 24, 24)
    tower = cut_like(kind, [-2, 1, -2])
    with torch.no_grad():
        states = own_states(kind, pixels).hidden_states
        ours = tower(pixels)
    leading = LEADING.get(kind, 0)
    theirs = torch.cat([states[layer][:, leading:] for layer in (-2, 1, -2)], dim=-1)
    assert tower.width == 96
    assert tower.widths == (96,)
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)
    # The last block is not built.
    assert not any(f".{BLOCKS - 1}." in name for name in tower.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in (*NAMED, "deit") if kind in LEADING])
def test_class_token_and_registers_are_kept_on_demand(kind):
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        ours = cut_like(kind, keep_class=True)(pixels)
        theirs = own_states(kind, pixels).hidden_states[-2]
    assert ours.grid == (LEADING[kind] + 36,) == type(cut_like(kind)).grid(config_of(kind), (24, 24), True)
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["siglip_vision_model", "siglip2_vision_model", "ijepa", "tinymodal_tower"])
def test_a_class_token_that_does_not_exist_cannot_be_kept(kind):
    config = tower_config({"model_type": kind}) if kind.startswith("tinymodal") else config_of(kind)
    for ask in (
        lambda: encoder_of(config).build(config, keep_class=True),
        lambda: encoder_of(config).grid(config, encoder_of(config).preparation_of(config).size_px, True),
    ):
        with pytest.raises(ValueError, match=f"'{kind}' has no class token to keep; leave keep_class out"):
            ask()


NORMS = {"dinov2": "layernorm", "dinov2_with_registers": "layernorm", "dinov3_vit": "norm"}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("layer", [-2, [-1, 1]])
def test_the_last_norm_is_applied_to_any_layer_on_demand(kind, layer):
    pixels = torch.randn(2, 3, 24, 24)
    norm = getattr(whole_tower(kind), NORMS.get(kind, "post_layernorm"))
    tower = cut_like(kind, layer, final_norm=True)
    with torch.no_grad():
        states = own_states(kind, pixels).hidden_states
        theirs = [norm(states[i]) for i in ([layer] if isinstance(layer, int) else layer)]
        ours = tower(pixels)
    torch.testing.assert_close(
        ours.values, torch.cat(theirs, -1)[:, LEADING.get(kind, 0) :], rtol=0, atol=1e-6
    )
    ours.values.square().mean().backward() if ours.values.requires_grad else None
    assert config_of(kind, final_norm=True).to_diff_dict()["final_norm"]  # and it is saved


def test_the_first_patch_is_left_out_where_an_old_checkpoint_was_trained_so():
    """TinyLLaVA's SigLIP: 728 features of 729 patches. Folding connectors see that it is no rectangle."""
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        ours = cut_like("siglip_vision_model", drop_first=True)(pixels)
        theirs = own_states("siglip_vision_model", pixels).hidden_states[-2][:, 1:]
    assert ours.grid == (35,)
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="has 1 leading tokens, which are dropped anyway"):
        ENCODERS["clip_vision_model"].grid(config_of("clip_vision_model", drop_first=True), (24, 24))


@pytest.mark.parametrize("kind", [*NAMED, *GENERAL, *STAGES])
def test_every_parameter_that_is_kept_is_used(kind):
    """No post-norm, pooling head, mask token or unreached block stays to be stored without a gradient."""
    config = config_of(kind)
    tower = encoder_of(config).build(config, -1 if kind in STAGES else -2)
    tower(
        torch.randn(1, 3, *encoder_of(config).preparation_of(config).size_px)
    ).values.square().mean().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []
    if kind not in STAGES:
        assert not any(f".{BLOCKS - 1}." in name for name, _ in tower.named_parameters())


@functools.cache
def built(kind: str) -> MediaEncoder:
    config = config_of(kind)
    return encoder_of(config).build(config, -1 if kind in STAGES else -2).eval()


@pytest.mark.parametrize("kind", [*NAMED, "vit", "convnext", "swin", "resnet"])
@settings(deadline=None, max_examples=5)
@given(size=st.tuples(st.integers(16, 70), st.integers(16, 70)))
def test_the_grid_counted_without_weights_is_the_grid_that_comes_out(kind, size):
    config, tower = config_of(kind), built(kind)
    if kind in STAGES:  # which halve a picture four times
        size = (size[0] + 32, size[1] + 32)
    with torch.no_grad():
        features = tower(torch.randn(1, 3, *size))
    assert features.grid == encoder_of(config).grid(config, size)
    assert features.values.shape == (1, num_tokens(features.grid), tower.width)


@pytest.mark.parametrize("kind", [*NAMED, "vit", "ijepa"])
def test_patches_come_in_reading_order(kind):
    """A change in the patch of row 1, column 4 moves that feature alone; no class token shifts the count."""
    tower = cut_like(kind, 0)
    pixels = torch.randn(1, 3, 24, 24)
    changed = pixels.clone()
    changed[:, :, 4:8, 16:20] += 1.0
    with torch.no_grad():
        moved = (tower(changed).values - tower(pixels).values).abs().amax(-1)[0]
    assert moved.nonzero().flatten().tolist() == [1 * 6 + 4]


def test_dinov3_says_the_same_of_a_picture_while_it_trains():
    """transformers moves its rotary positions at random in train mode; features would jump by 1 and more."""
    tower = cut_like("dinov3_vit")
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(tower.train()(pixels).values, tower.eval()(pixels).values, rtol=0, atol=0)


@pytest.mark.parametrize("kind", GENERAL)
def test_the_general_adapter_equals_transformers_hidden_state(kind):
    pixels = torch.randn(2, 3, 24, 24)
    assert encoder_of(config_of(kind)) is AnyTower
    with torch.no_grad():
        theirs = own_states(kind, pixels)
        for layer in (-2, 1):
            ours = cut_like(kind, layer)(pixels)
            assert ours.grid == (6, 6)
            hidden = theirs.hidden_states[layer][:, LEADING.get(kind, 0) :]
            torch.testing.assert_close(ours.values, hidden, rtol=0, atol=1e-6)
        # The last one is from before the last norm, also where transformers gives the normed one.
        last = cut_like(kind, -1)(pixels).values
        normed = getattr(whole_tower(kind), "layernorm", torch.nn.Identity())(last)
    torch.testing.assert_close(normed, theirs.last_hidden_state[:, LEADING.get(kind, 0) :], rtol=0, atol=1e-5)


def test_the_general_adapter_reads_other_sizes():
    pixels = torch.randn(2, 3, 32, 20)
    with torch.no_grad():
        theirs = own_states("vit", pixels).hidden_states[-2][:, 1:]
        ours = cut_like("vit")(pixels)
    assert ours.grid == (8, 5)
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", STAGES)
def test_of_a_tower_in_stages_the_last_ones_map_is_read_row_by_row(kind):
    pixels = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        theirs = own_states(kind, pixels)
        ours = cut_like(kind, -1)(pixels)
    states = getattr(theirs, "reshaped_hidden_states", None) or theirs.hidden_states
    assert ours.grid == tuple(states[-1].shape[2:])
    torch.testing.assert_close(ours.values, states[-1].flatten(2).transpose(1, 2), rtol=0, atol=1e-6)
    if kind != "swin":  # whose -2 is what its last stage begins with
        with pytest.raises(ValueError, match=f"a '{kind}' works in stages.*got feature_layer -2, take -1"):
            encoder_of(config_of(kind)).build(config_of(kind), -2)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("vit_mae", "makes 10 positions of 24 x 24 px, which hold 6 x 6 patches"),  # it hides most of them
        ("yolos", "does not say which of its 42 positions are patches"),
        ("pixtral", "joins the pictures of a batch into one sequence"),
        ("detr", "cannot be made of its config"),
        ("llama", "no tower for model_type 'llama'"),
        ("timesformer", "cannot read a picture of 224 x 224 px"),
    ],
)
def test_what_cannot_be_a_tower_is_refused_before_a_weight_is_read(kind, said):
    more: dict[str, Any] = {"num_detection_tokens": 5, "image_size": [24, 24]} if kind == "yolos" else {}
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 4,
    }
    plain = kind in ("detr", "llama", "timesformer")

    def ask() -> None:
        config = tower_config({"model_type": kind, **({} if plain else values | more)})
        encoder_of(config).grid(config, (224, 224) if plain else (24, 24))

    with pytest.raises(ValueError, match=said):
        ask()


def test_a_size_that_a_family_cannot_read_is_refused_with_the_one_it_can():
    config = CONFIG_MAPPING["aimv2_vision_model"](
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=24,
        patch_size=4,
    )
    assert AnyTower.grid(config, (24, 24)) == (6, 6)
    with pytest.raises(ValueError, match=r"cannot read a picture of 28 x 24 px .* made for 24 x 24"):
        AnyTower.grid(config, (28, 24))


def test_building_a_tower_leaves_the_config_it_was_given_alone():
    for kind in ("siglip_vision_model", "dinov3_vit", "vit"):
        config = config_of(kind)
        before = config.to_dict()
        encoder_of(config).build(config, -2)
        assert config.to_dict() == before


@pytest.mark.parametrize("layer", [4, -5, [-2, 4]])
def test_a_layer_the_tower_does_not_have_is_refused(layer):
    with pytest.raises(ValueError, match=r"a tower of 3 blocks has 4 hidden states, 0 to 3 .* -4 to -1"):
        hidden_states(3, layer)
    with pytest.raises(ValueError, match="empty list"):
        hidden_states(3, [])


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        ("clip", "clip_vision_model"),
        ("siglip", "siglip_vision_model"),
        ("siglip2", "siglip2_vision_model"),
        ("blip-2", "blip_2_vision_model"),
        ("metaclip_2", "metaclip_2_vision_model"),
    ],
)
def test_a_whole_model_is_narrowed_to_the_part_that_sees(whole, part):
    found = tower_config(
        {"model_type": whole, "vision_config": {"hidden_size": 32, "num_attention_heads": 4}}
    )
    assert found.model_type == part
    assert found.hidden_size == 32
    assert tower_config(found) is found


def test_a_tower_nobody_knows_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"'siglip_vision'; known: clip.*did you mean 'siglip_vision_model'"):
        tower_config({"model_type": "siglip_vision"})


def test_pictures_are_prepared_as_the_family_was_pretrained():
    """As openai/clip-vit-large-patch14-336, google/siglip-so400m-patch14-384 and SigLIP 2 at 256 px say."""
    clip = CONFIG_MAPPING["clip_vision_model"](image_size=336, patch_size=14)
    how = encoder_of(clip).preparation_of(clip)
    assert how.size_px == (336, 336)
    assert how.mean == (0.48145466, 0.4578275, 0.40821073)
    siglip = CONFIG_MAPPING["siglip_vision_model"](image_size=384, patch_size=14)
    assert encoder_of(siglip).grid(siglip, encoder_of(siglip).preparation_of(siglip).size_px) == (27, 27)
    siglip2 = CONFIG_MAPPING["siglip2_vision_model"](num_patches=256, patch_size=16)
    assert encoder_of(siglip2).preparation_of(siglip2).size_px == (256, 256)
    # BLIP-2's tower: 257 positions with the class token, 1,025 at the size of TinyGPT-V's last stage.
    blip2 = CONFIG_MAPPING["blip_2_vision_model"]()
    assert encoder_of(blip2).grid(blip2, (224, 224), True) == (257,)
    assert encoder_of(blip2).grid(blip2, (448, 448), True) == (1025,)
    assert encoder_of(blip2).preparation_of(blip2).mean == how.mean


def test_the_page_about_towers_says_what_the_code_does():
    rows = {}
    for line in (Path(__file__).parents[2] / "docs" / "towers.md").read_text().splitlines():
        if found := re.match(r"\| [^|]+ \| `(\w+)` \| (\d|[a-z' ]+) \| ([^|]+) \|", line):
            rows[found[1]] = found.groups()[1:]
    named = {kind for kind in ENCODERS if kind not in ("tinymodal_tower", "tinymodal_written")}
    assert named <= set(rows)
    means = {"CLIP": 0.48145466, "0.5": 0.5, "ImageNet": 0.485}
    for kind in NAMED:
        config = config_of(kind)
        leading, mean = rows[kind]
        assert encoder_of(config).leading_tokens(config) == int(leading)
        assert encoder_of(config).preparation_of(config).mean[0] == means[mean]


@pytest.mark.parametrize("kind", [*NAMED, "vit", "resnet"])
def test_sides_that_are_multiples_of_a_step_are_read_to_the_edge(kind):
    config = config_of(kind)
    step = encoder_of(config).patch_px(config)
    assert step == (8 if kind == "resnet" else 4)
    rows, columns = encoder_of(config).grid(config, (6 * step, 9 * step))
    assert (rows, columns) == (6, 9)
