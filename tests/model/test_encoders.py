"""Towers give what transformers' own classes give at the chosen layer, and keep nothing behind it."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

from tinymodal.model.encoders import ENCODERS, encoder_of, num_blocks, tower_config
from tinymodal.model.geometry import num_tokens
from tinymodal.model.modeling_tinymodal import load_exactly

BLOCKS = 3


def config_of(kind: str) -> PreTrainedConfig:
    values = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "patch_size": 4}
    if kind == "siglip2_vision_model":
        values |= {"num_patches": 36, "intermediate_size": 64}
    elif kind.startswith("dinov2"):
        values |= {"image_size": 24, "mlp_ratio": 2}
    else:
        values |= {"image_size": 24, "intermediate_size": 64}
    return CONFIG_MAPPING[kind](**values)


HF_TOWERS = [
    "clip_vision_model",
    "siglip_vision_model",
    "siglip2_vision_model",
    "dinov2",
    "dinov2_with_registers",
]
LEADING = {"clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 5}


def whole_tower(kind: str) -> torch.nn.Module:
    """transformers' own class, with weights large enough that a skipped block would show."""
    torch.manual_seed(0)
    tower = AutoModel.from_config(config_of(kind)).eval()
    with torch.no_grad():
        for p in tower.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return tower


def own_hidden_states(kind: str, tower: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if kind != "siglip2_vision_model":
        return tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    h, w = (edge // 4 for edge in pixels.shape[2:])
    # As transformers' image processor cuts patches: rows, columns, channels last.
    hwc = pixels.permute(0, 2, 3, 1).reshape(len(pixels), h, 4, w, 4, 3)
    patches = hwc.transpose(2, 3).reshape(len(pixels), h * w, 48)
    return tower(
        pixel_values=patches,
        pixel_attention_mask=torch.ones(len(pixels), h * w, dtype=torch.long),
        spatial_shapes=torch.tensor([[h, w]] * len(pixels)),
        output_hidden_states=True,
    ).hidden_states


def cut_like(kind: str, whole: torch.nn.Module, layer: int) -> torch.nn.Module:
    encoder = ENCODERS[kind].build(config_of(kind), layer).eval()
    ours = encoder.module.state_dict()
    load_exactly(encoder.module, {k: v for k, v in whole.state_dict().items() if k in ours})
    return encoder


@pytest.mark.parametrize("kind", HF_TOWERS)
@pytest.mark.parametrize("layer", [-2, -1, 0, 1, BLOCKS, -BLOCKS - 1])
def test_a_tower_equals_transformers_hidden_state_at_the_chosen_layer(kind, layer):
    whole = whole_tower(kind)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        theirs = own_hidden_states(kind, whole, pixels)[layer][:, LEADING.get(kind, 0) :]
        ours = cut_like(kind, whole, layer)(pixels)
    assert ours.grid == (6, 6)
    # 0.0 with transformers 5.23; the neighbouring layer differs by more than 1.
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", HF_TOWERS)
def test_every_parameter_that_is_kept_is_used(kind):
    """No post-norm, pooling head, mask token or unreached block stays to be stored without a gradient."""
    encoder = ENCODERS[kind].build(config_of(kind), -2)
    encoder(torch.randn(1, 3, 24, 24)).values.square().mean().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    blocks = {
        name.split(".layer")[1].split(".")[1] for name, _ in encoder.named_parameters() if ".layer" in name
    }
    assert {b for b in blocks if b.isdigit()} == {str(i) for i in range(BLOCKS - 1)}


@pytest.mark.parametrize("kind", HF_TOWERS)
@pytest.mark.parametrize("size", [(24, 24), (32, 24), (16, 40)])
def test_the_grid_counted_without_weights_is_the_grid_that_comes_out(kind, size):
    config = config_of(kind)
    features = ENCODERS[kind].build(config, -2)(torch.randn(1, 3, *size))
    assert features.grid == ENCODERS[kind].grid(config, size)
    assert features.values.shape == (1, num_tokens(features.grid), 32)


@pytest.mark.parametrize(
    "kind", ["clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2"]
)
def test_patches_come_in_reading_order(kind):
    """A change in the patch of row 1, column 4 moves that feature alone; no class token shifts the count."""
    torch.manual_seed(0)
    encoder = ENCODERS[kind].build(config_of(kind), 0).eval()
    pixels = torch.randn(1, 3, 24, 24)
    changed = pixels.clone()
    changed[:, :, 4:8, 16:20] += 1.0
    moved = (encoder(changed).values - encoder(pixels).values).abs().amax(-1)[0]
    assert moved.nonzero().flatten().tolist() == [1 * 6 + 4]


def test_building_a_tower_leaves_the_config_it_was_given_alone():
    config = config_of("siglip_vision_model")
    before = config.to_dict()
    ENCODERS["siglip_vision_model"].build(config, -2)
    assert config.to_dict() == before


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_the_tower_does_not_have_is_refused(layer):
    with pytest.raises(ValueError, match=f"feature_layer {layer}, but a tower of 3 blocks has .* -4 to 3"):
        num_blocks(3, layer)


@pytest.mark.parametrize("whole", ["clip", "siglip", "siglip2"])
def test_a_whole_clip_or_siglip_is_narrowed_to_the_part_that_sees(whole):
    part = tower_config({"model_type": whole, "vision_config": {"hidden_size": 32, "num_attention_heads": 4}})
    assert part.model_type == f"{whole}_vision_model"
    assert part.hidden_size == 32
    assert tower_config(part) is part


def test_a_tower_nobody_knows_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"'siglip_vision'; known: clip.*did you mean 'siglip_vision_model'"):
        tower_config({"model_type": "siglip_vision"})
    with pytest.raises(ValueError, match="no tower for model_type 'llama'"):
        tower_config({"model_type": "llama"})


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
