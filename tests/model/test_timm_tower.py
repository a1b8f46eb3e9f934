"""Towers of timm give what timm's own classes give, and are counted where timm is not installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from tinymodal.compose.tiny import tiny_language, tiny_vision
from tinymodal.model import timm_tower
from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.model.geometry import num_tokens
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration, load_exactly
from tinymodal.model.timm_tower import TimmConfig, TimmTower, load_timm

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is an extra: pip install 'tinymodal[timm]'"
)

EVA02_E, EVA_G = "eva02_enormous_patch14_clip_224", "eva_giant_patch14_clip_224"
BLOCKS = [
    EVA02_E,
    EVA_G,
    "eva02_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_small_patch16_dinov3",
]
SWIN = {
    "model_type": "tinymodal_timm",
    "architecture": "swin_tiny_patch4_window7_224",
    "model_args": {"img_size": 56, "depths": [1, 2], "embed_dim": 16, "num_heads": [1, 2], "window_size": 7},
}
STAGES = {
    "convnext": {
        "model_type": "tinymodal_timm",
        "architecture": "convnext_atto",
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 32]},
        "image_size": 64,
    },
    "swin": SWIN,
    "resnet": {
        "model_type": "tinymodal_timm",
        "architecture": "resnet10t",
        "model_args": {"channels": [8, 8, 16, 16], "stem_width": 8},
        "image_size": 64,
    },
}


def config_of(architecture: str, **more: Any) -> TimmConfig:
    values = tiny_vision(f"timm:{architecture}")
    values["model_args"] |= more.pop("model_args", {})
    return tower_config(values | more)


def whole_of(config: TimmConfig) -> Any:
    """timm's own class, with weights large enough that a skipped block would show."""
    torch.manual_seed(0)
    whole = load_timm().create_model(config.architecture, num_classes=0, **config.model_args).eval()
    with torch.no_grad():
        for p in whole.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return whole


def cut_like(whole: Any, config: TimmConfig, layer: Any = -2, keep_class: bool = False) -> TimmTower:
    tower = TimmTower.build(config, layer, keep_class=keep_class).eval()
    ours = tower.module.state_dict()
    load_exactly(tower.module, {k: v for k, v in whole.state_dict().items() if k in ours})
    return tower


@pytest.mark.parametrize("architecture", BLOCKS)
@pytest.mark.parametrize("size", [(24, 24), (32, 20)])
def test_a_tower_of_timm_equals_timms_own_blocks(architecture, size):
    config = config_of(architecture)
    whole, pixels = whole_of(config), torch.randn(2, 3, *size)
    leading = config.num_prefix_tokens
    with torch.no_grad():
        theirs = whole.forward_intermediates(
            pixels, indices=[0, 1, 2], return_prefix_tokens=leading > 0, intermediates_only=True, norm=False
        )
        theirs = [found if leading else (found, None) for found in theirs]
        for layer, i in ((-2, 1), (-1, 2), (1, 0)):
            ours = cut_like(whole, config, layer)(pixels)
            assert ours.grid == (size[0] // 4, size[1] // 4)
            # 0.0 with timm 1.0.31; the neighbouring block differs by more than 1.
            torch.testing.assert_close(
                ours.values, theirs[i][0].flatten(2).transpose(1, 2), rtol=0, atol=1e-6
            )
        tower = cut_like(whole, config, [-1, 1])
        both = torch.cat([theirs[i][0].flatten(2).transpose(1, 2) for i in (2, 0)], -1)
        torch.testing.assert_close(tower(pixels).values, both, rtol=0, atol=1e-6)
    assert tower.width == 64
    if leading:
        with torch.no_grad():
            kept = cut_like(whole, config, keep_class=True)(pixels)
        assert kept.grid == (leading + num_tokens(ours.grid),)
        torch.testing.assert_close(kept.values[:, :leading], theirs[1][1], rtol=0, atol=1e-6)
        patches = theirs[1][0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(kept.values[:, leading:], patches, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", [EVA02_E, EVA_G])
def test_every_linear_layer_of_eva_is_called_so_that_adapters_on_it_count(architecture):
    tower = TimmTower.build(config_of(architecture), -2).eval()
    linear = {name: part for name, part in tower.named_modules() if isinstance(part, torch.nn.Linear)}
    called = set()
    for name, part in linear.items():
        part.register_forward_hook(lambda *_, name=name: called.add(name))
    tower(torch.randn(1, 3, 24, 24))
    assert called == set(linear)


@pytest.mark.parametrize("size", [(24, 24), (31, 22)])
def test_omnilmms_tower_is_the_last_norm_on_the_last_block_but_one(size):
    """omnilmm/model/omnilmm.py replaces the last block by nothing, and drops the leading tokens."""
    config = config_of(EVA02_E, final_norm=True, model_args={"dynamic_img_pad": True})
    whole, pixels = whole_of(config), torch.randn(2, 3, *size)
    tower = cut_like(whole, config)

    class Skip(torch.nn.Identity):
        def forward(self, x, **_):
            return x

    whole.blocks[-1] = Skip()
    with torch.no_grad():
        theirs = whole.forward_features(pixels)[:, whole.num_prefix_tokens :]
        ours = tower(pixels)
    assert ours.grid == (-(-size[0] // 4), -(-size[1] // 4))  # a rest is filled up
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)
    assert len(tower.backbone.blocks) == 2


def test_eva_clip_g_is_the_tower_of_blip_2():
    """Two names for one architecture: timm's without its last block, and transformers' with 39."""
    config = config_of(EVA_G)
    whole, pixels = whole_of(config), torch.randn(2, 3, 24, 24)
    blip2 = CONFIG_MAPPING["blip_2_vision_model"](
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=4,
    )
    theirs = encoder_of(blip2).build(blip2, -1, keep_class=True).eval()
    renamed = {}
    for name, weight in whole.state_dict().items():
        name = name.replace("patch_embed.proj.", "embeddings.patch_embedding.")
        name = name.replace("cls_token", "embeddings.class_embedding")
        name = name.replace("pos_embed", "embeddings.position_embedding").replace(
            "blocks.", "encoder.layers."
        )
        name = name.replace(".attn.proj.", ".self_attn.projection.").replace(".attn.qkv.", ".self_attn.qkv.")
        name = name.replace("norm1.", "layer_norm1.").replace("norm2.", "layer_norm2.")
        renamed[name] = weight
    for i in range(2):
        q, v = (renamed.pop(f"encoder.layers.{i}.attn.{part}_bias") for part in "qv")
        renamed[f"encoder.layers.{i}.self_attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    wanted = theirs.module.state_dict()
    load_exactly(theirs.module, {k: v for k, v in renamed.items() if k in wanted})
    with torch.no_grad():
        a, b = cut_like(whole, config, keep_class=True)(pixels), theirs(pixels)
    assert a.grid == b.grid == (37,)
    # 0.0 with timm 1.0.31 and transformers 5.23.
    torch.testing.assert_close(a.values, b.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_of_a_model_in_stages_the_last_map_is_read(name):
    config = tower_config(STAGES[name])
    whole, pixels = whole_of(config), torch.randn(2, 3, 112, 64)
    with torch.no_grad():
        theirs = whole.forward_intermediates(pixels, intermediates_only=True, norm=False)[-1]
        ours = cut_like(whole, config, -1)(pixels)
    assert ours.grid == tuple(theirs.shape[2:])
    torch.testing.assert_close(ours.values, theirs.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"feature_layer -2 of .* is a grid of .*; take feature_layer -1"):
        TimmTower.build(config, -2)


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        (tiny_vision("timm:vit_tiny_patch16_224"), "multiple"),
        (tiny_vision(f"timm:{EVA02_E}"), "ceil"),
        (STAGES["convnext"], "floor"),
        (STAGES["resnet"], "ceil"),
        (tiny_vision("timm:beit_base_patch16_224"), "fixed"),
    ],
)
@settings(deadline=None, max_examples=8)
@given(size=st.tuples(st.integers(40, 130), st.integers(40, 130)))
def test_the_grid_counted_without_timm_is_the_grid_that_comes_out(values, sizes, size):
    if values["architecture"] == EVA02_E:
        values = values | {"model_args": values["model_args"] | {"dynamic_img_pad": True}}
    config = tower_config(values)
    assert config.sizes == sizes
    key = str(values)
    if key not in BUILT:
        BUILT[key] = TimmTower.build(config, -1).eval()
    if sizes in ("multiple", "fixed"):
        with pytest.raises(ValueError, match="px, got 41 x 43"):
            TimmTower.grid(config, (41, 43))
        size = (size[0] // 4 * 4, size[1] // 4 * 4) if sizes == "multiple" else (24, 24)
    with torch.no_grad():
        assert BUILT[key](torch.randn(1, 3, *size)).grid == TimmTower.grid(config, size)


BUILT: dict[str, TimmTower] = {}


@pytest.mark.parametrize(
    ("values", "layer"),
    [
        *((tiny_vision(f"timm:{name}"), -2) for name in (*BLOCKS, "vit_so150m_patch16_reg4_map_256")),
        *((values, -1) for values in STAGES.values()),
    ],
)
def test_every_parameter_that_is_kept_is_used(values, layer):
    config = tower_config(values)
    tower = TimmTower.build(config, layer)
    tower(torch.randn(2, 3, *TimmTower.preparation_of(config).size_px)).values.square().mean().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("values", "layer"),
    [(tiny_vision("timm:eva02_base_patch16_clip_224"), -2), (SWIN, -1)],
    ids=["rotary", "windows"],
)
def test_a_saved_model_with_a_tower_of_timm_is_the_same_model(values, layer, tmp_path):
    """Rotary frequencies, window masks and relative places are not stored: they are computed again."""
    config = TinyModalConfig(tiny_language("llama"), values, feature_layer=layer, image_token_id=5)
    model = TinyModalForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    again, info = TinyModalForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pixels = torch.randn(2, 3, *TimmTower.preparation_of(config.vision_config).size_px)
    with torch.no_grad():
        tower, other = (m.model.towers["image"] for m in (model, again.eval()))
        torch.testing.assert_close(other(pixels).values, tower(pixels).values, rtol=0, atol=0)
    names = set(model.model.towers["image"].state_dict())
    assert all(name.startswith("backbone.") for name in names)
    assert model.model.towers["image"].state_dict().keys() == other.state_dict().keys()
    # In half precision as well: its frequencies stay those of full precision, or timm's own of that type.
    half = TinyModalForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        seen = half.model.towers["image"](pixels.bfloat16()).values.float()
    assert (seen - tower(pixels).values).abs().max() < 0.1


def test_recomputing_activations_gives_the_same_gradients():
    config = config_of(EVA02_E)
    tower = TimmTower.build(config)
    pixels = torch.randn(2, 3, 24, 24)
    grads = []
    for wanted in (False, True):
        tower.gradient_checkpointing = wanted
        assert tower.gradient_checkpointing == tower.backbone.grad_checkpointing == wanted
        tower.zero_grad()
        tower(pixels).values.square().mean().backward()
        grads.append([p.grad.clone() for p in tower.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_is_known_of_a_tower_is_in_its_config_and_needs_no_timm(monkeypatch):
    config = config_of(EVA02_E, image_size=32)
    values = config.to_diff_dict() | {"model_type": "tinymodal_timm"}

    def missing() -> Any:
        raise AssertionError("timm was asked for")

    monkeypatch.setattr(timm_tower, "load_timm", missing)
    for cached in ("_known", "_shapes", "_empty"):
        monkeypatch.setattr(timm_tower, cached, missing)
    again = tower_config(values)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert TimmTower.grid(again, (32, 24)) == (8, 6)
    assert TimmTower.grid(again, (32, 24), True) == (49,)
    assert TimmTower.patch_px(again) == 4
    how = TimmTower.preparation_of(again)
    assert how.size_px == (32, 32)  # what the config says, not what the learned positions are for
    assert how.mean == (0.48145466, 0.4578275, 0.40821073)
    assert (
        TimmConfig().to_diff_dict()["model_type"] == "tinymodal_timm"
    )  # transformers makes one without arguments


def test_the_published_towers_are_known_by_their_names():
    """As timm has them; nothing of their size is made."""
    huge = tower_config({"model_type": "tinymodal_timm", "architecture": f"{EVA02_E}.laion2b_plus"})
    found = (
        huge.image_size,
        huge.patch_size,
        huge.hidden_size,
        huge.num_hidden_layers,
        huge.num_prefix_tokens,
    )
    assert found == (224, 14, 1792, 64, 1)
    assert TimmTower.grid(huge, (448, 448)) == (32, 32)


def test_a_size_that_patches_do_not_divide_is_read_where_it_is_the_towers_own():
    """As SigLIP so400m at 384 px in patches of 14: 27 x 27, and a rest of 6 px is not seen."""
    config = config_of("vit_base_patch16_siglip_224", model_args={"img_size": 26})
    assert (config.sizes, config.image_size, config.patch_size) == ("fixed", 26, 4)
    whole, pixels = whole_of(config), torch.randn(1, 3, 26, 26)
    with torch.no_grad():
        ours = cut_like(whole, config)(pixels)
        theirs = whole.forward_intermediates(pixels, indices=[1], intermediates_only=True)[0]
    assert ours.grid == TimmTower.grid(config, (26, 26)) == (6, 6)
    torch.testing.assert_close(ours.values, theirs.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)


def test_folders_of_timm_and_of_transformers_wrapper_are_read():
    ours = config_of(EVA_G)
    hub = {
        "architecture": EVA_G,
        "num_classes": 1024,
        "pretrained_cfg": {
            "input_size": [3, 24, 24],
            "fixed_input_size": True,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "interpolation": "bilinear",
        },
        "model_args": {k: v for k, v in ours.model_args.items() if k not in ("img_size", "dynamic_img_size")},
    }
    for values in (hub, hub | {"model_type": "timm_wrapper", "do_pooling": True}):
        config = tower_config(values)
        assert isinstance(config, TimmConfig)
        assert config.architecture == EVA_G
        assert config.model_args["img_size"] == [24, 24]
        assert config.model_args["dynamic_img_size"]
        how = TimmTower.preparation_of(config)
        assert (how.size_px, how.mean, how.resample) == ((24, 24), (0.1, 0.2, 0.3), "bilinear")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "needs 'architecture'"),
        ({"architecture": "eva02_base_patch16_clip_225"}, "did you mean 'eva02_base_patch16_clip_224'"),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"dept": 3}},
            "does not take model_args .*dept",
        ),
    ],
)
def test_a_model_that_timm_does_not_have_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        tower_config({"model_type": "tinymodal_timm"} | values)


def test_what_a_tower_of_timm_cannot_do_is_refused():
    config = config_of(EVA02_E)
    with pytest.raises(
        ValueError, match="asks for the embedding, which timm's models do not give; take 1 to 3"
    ):
        TimmTower.build(config, 0)
    with pytest.raises(ValueError, match="a tower of 3 blocks has 4 hidden states"):
        TimmTower.build(config, 4)
    with pytest.raises(ValueError, match="multiples of 4 px, got 30 x 24; nearest 32 x 24"):
        TimmTower.build(config)(torch.rand(1, 3, 30, 24))
    with pytest.raises(ValueError, match="has no norm behind its last block; take final_norm out"):
        TimmTower.build(config_of(EVA_G, final_norm=True, model_args={"global_pool": "avg"}))
    with pytest.raises(ValueError, match="'tinymodal_timm' has no class token to keep"):
        TimmTower.build(config_of("vit_base_patch16_siglip_224"), keep_class=True)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; install it with: pip install 'tinymodal\[timm\]'"):
        load_timm()


def test_nothing_stands_in_for_torchvision_after_the_import():
    load_timm()
    if importlib.util.find_spec("torchvision") is None:
        assert [name for name in sys.modules if name.split(".")[0] == "torchvision"] == []


def test_an_import_that_fails_leaves_nothing_behind(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(timm_tower, "_torchvision", dict)
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ValueError, match=r"cannot be imported .*torchvision"):
            load_timm()
        assert [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")] == []
