"""Folders of every family become towers that compute what the folder's own class computes, or are refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, PreTrainedModel, SiglipModel

from tinymodal.compose.tiny import tiny_vision
from tinymodal.compose.towers import load_tower, normalisation, read_pair_config, read_tower_config
from tinymodal.core.errors import CheckpointError
from tinymodal.model.encoders import encoder_of, tower_config
from tinymodal.model.hf_tower import new_backbone
from tinymodal.model.media import MediaEncoder
from tinymodal.model.pair import PairTower
from tinymodal.model.timm_tower import load_timm

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")

PIXELS = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def loud(model: Any) -> Any:
    """With weights large enough that a wrong one would show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


def saved(kind: str, folder: Path) -> PreTrainedModel:
    model = loud(new_backbone(tower_config(tiny_vision(kind))))
    model.save_pretrained(folder)
    return model


def read(folder: Path, layer: Any = -2, keep_class: bool = False) -> MediaEncoder:
    found, config = read_tower_config(str(folder), "model.vision.path")
    tower = encoder_of(config).build(config, layer, keep_class=keep_class).eval()
    load_tower(tower, found, "model.vision.path")
    return tower


def state(model: Any, layer: int = -2) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=PIXELS, output_hidden_states=True).hidden_states[layer]


def same(tower: MediaEncoder, theirs: torch.Tensor) -> None:
    """The positions that are kept are the last ones."""
    with torch.no_grad():
        ours = tower(PIXELS).values
    torch.testing.assert_close(ours, theirs[:, theirs.shape[1] - ours.shape[1] :], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    ["clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit",
     "blip_2_vision_model", "vit", "data2vec-vision"],
)  # fmt: skip
def test_a_folder_of_transformers_is_read(kind, tmp_path):
    model = saved(kind, tmp_path)
    same(read(tmp_path), state(model))
    same(read(tmp_path, 1), state(model, 1))


def test_a_folder_of_siglip_2_in_its_flexible_form_is_read(tmp_path):
    model = saved("siglip2_vision_model", tmp_path)
    patches = PIXELS.permute(0, 2, 3, 1).reshape(2, 6, 4, 6, 4, 3).transpose(2, 3).reshape(2, 36, 48)
    with torch.no_grad():
        theirs = model(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(2, 36, dtype=torch.long),
            spatial_shapes=torch.tensor([[6, 6]] * 2),
            output_hidden_states=True,
        ).hidden_states[-2]
    same(read(tmp_path), theirs)


@pytest.mark.parametrize(("whole", "family"), [("clip", CLIPModel), ("siglip", SiglipModel)])
def test_a_whole_model_gives_its_half_that_sees(whole, family, tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = tiny_vision(f"{whole}_vision_model")
    config = family.config_class(text_config=text | {"vocab_size": 99}, vision_config=vision)
    model = loud(family(config))
    model.save_pretrained(tmp_path)
    same(read(tmp_path), state(model.vision_model))


@pytest.mark.parametrize(
    ("model_type", "kind", "prefix"),
    [
        ("blip-2", "blip_2_vision_model", "vision_model."),
        ("llava", "clip_vision_model", "model.vision_tower."),
    ],
)
def test_a_tower_is_found_within_a_larger_model_by_its_names(model_type, kind, prefix, tmp_path):
    """Only the tower's weights are looked for; those of the language model are not even named here."""
    model = loud(new_backbone(tower_config(tiny_vision(kind))))
    weights = {f"{prefix}{name}": weight for name, weight in model.state_dict().items()}
    save_file(weights | {"language_model.embed.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    document = {"model_type": model_type, "vision_config": tiny_vision(kind)}
    (tmp_path / "config.json").write_text(json.dumps(document))
    same(read(tmp_path), state(model))


def test_weights_in_several_files_and_in_pickle_are_read(tmp_path):
    model = saved("clip_vision_model", tmp_path / "whole")
    model.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1
    same(read(tmp_path / "pieces"), state(model))
    (tmp_path / "pickle").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    same(read(tmp_path / "pickle"), state(model))


def test_a_tower_saved_in_half_precision_is_read_in_full(tmp_path):
    model = loud(new_backbone(tower_config(tiny_vision("dinov2"))))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tower = read(tmp_path)
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    same(tower, state(model.float()))


def timm_model(architecture: str) -> tuple[Any, dict[str, Any]]:
    values = tower_config(tiny_vision(f"timm:{architecture}"))
    model = load_timm().create_model(architecture, num_classes=7, **values.model_args)
    return loud(model), values.model_args


def timm_state(model: Any, block: int) -> torch.Tensor:
    with torch.no_grad():
        found = model.forward_intermediates(PIXELS, indices=[block], intermediates_only=True)[0]
    return found.flatten(2).transpose(1, 2)


@needs_timm
@pytest.mark.parametrize("layout", ["hub", "wrapper", "ours"])
def test_a_folder_of_timm_is_read_in_each_of_its_layouts(layout, tmp_path):
    """timm's own, with a classifier's head; transformers' wrapper of it; what ``save_part`` writes."""
    name = "eva02_base_patch16_clip_224"
    model, model_args = timm_model(name)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    document: dict[str, Any] = {"architecture": name, "num_classes": 7, "model_args": model_args}
    document["pretrained_cfg"] = {
        "input_size": [3, 24, 24],
        "fixed_input_size": True,
        "mean": [0.1, 0.2, 0.3],
    }
    document["pretrained_cfg"]["std"] = [0.4, 0.5, 0.6]
    if layout == "wrapper":
        weights = {f"timm_model.{k}": v for k, v in weights.items()}
        document["model_type"] = "timm_wrapper"
    if layout == "ours":
        config = tower_config(document)
        document = config.to_diff_dict() | {"model_type": config.model_type}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(document))
    tower = read(tmp_path)
    same(tower, timm_state(model, 1))
    assert normalisation(tmp_path, tower.config) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@needs_timm
def test_learned_positions_of_another_size_are_resampled_as_timm_does_it(tmp_path):
    name = "vit_tiny_patch16_224"
    model, model_args = timm_model(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    larger = {"architecture": name, "model_args": model_args | {"img_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(larger))
    tower = read(tmp_path)
    assert tower.state_dict()["backbone.pos_embed"].shape == (1, 65, 32)
    model.set_input_size(img_size=(32, 32))
    torch.testing.assert_close(tower.state_dict()["backbone.pos_embed"], model.pos_embed.data)


def test_two_folders_make_a_pair(tmp_path):
    first, second = saved("clip_vision_model", tmp_path / "a"), saved("dinov2", tmp_path / "b")
    (tmp_path / "b" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.0] * 3, "image_std": [1.0] * 3})
    )
    names = (str(tmp_path / "a"), str(tmp_path / "b"))
    folders, config = read_pair_config(names, "model.vision.path", "own")
    assert config.means == [[0.48145466, 0.4578275, 0.40821073], [0.0] * 3]
    assert config.stds[1] == [1.0] * 3
    tower = PairTower.build(config, -2).eval()
    load_tower(tower, folders, "model.vision.path")
    same(tower.first, state(first))
    same(tower.second, state(second))
    # The pair as one folder, as it is saved for another recipe.
    (tmp_path / "pair").mkdir()
    save_file(tower.module.state_dict(), tmp_path / "pair" / "model.safetensors")
    document = config.to_diff_dict() | {"model_type": config.model_type}
    (tmp_path / "pair" / "config.json").write_text(json.dumps(document))
    again = read(tmp_path / "pair")
    with torch.no_grad():
        torch.testing.assert_close(again(PIXELS).values, tower(PIXELS).values, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"model\.vision\.path: 1 towers, expected two"):
        read_pair_config(names[:1], "model.vision.path")
    with pytest.raises(CheckpointError, match=r"model.vision.path\[1\]: the folder .* does not exist"):
        read_pair_config((names[0], str(tmp_path / "c")), "model.vision.path")


# Its name in the file, which may be older than transformers' class, and in the tower.
SPOILT = {
    "clip_vision_model": ("encoder.layers.1.mlp.fc1.weight",) * 2,
    "dinov3_vit": ("layer.0.norm1.weight", "model.layer.0.norm1.weight"),
    "vit": ("encoder.layer.1.intermediate.dense.weight", "layers.1.mlp.fc1.weight"),
    "tinymodal_pair": ("second.backbone.encoder.layer.0.norm1.weight",) * 2,
}


def spoilt_folder(kind: str, folder: Path) -> str:
    """A folder whose weights lack one, by the name it has there."""
    if kind == "tinymodal_pair":
        folder.mkdir()
        config = tower_config(tiny_vision(kind))
        tower = PairTower.build(config, -2)
        save_file(tower.module.state_dict(), folder / "model.safetensors")
        document = config.to_diff_dict() | {"model_type": kind}
        (folder / "config.json").write_text(json.dumps(document))
    else:
        saved(kind, folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith(SPOILT[kind][0])]
    return name


@pytest.mark.parametrize("kind", SPOILT)
def test_a_folder_that_lacks_a_weight_is_refused_by_its_name(kind, tmp_path):
    name = spoilt_folder(kind, tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    cut = {k: v for k, v in weights.items() if k != name}
    save_file(cut, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"1 weights are not in the checkpoint .* first {SPOILT[kind][1]}"
    ):
        read(tmp_path / "part")


@pytest.mark.parametrize("kind", SPOILT)
def test_a_weight_of_another_shape_is_refused_with_both_shapes(kind, tmp_path):
    name = spoilt_folder(kind, tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    shape = tuple(weights[name].shape)
    weights[name] = torch.zeros(5, *shape[1:])
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    said = rf"1 weights have another shape .* first {SPOILT[kind][1]}: \(5,.* for \({shape[0]},"
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "part")


@needs_timm
def test_a_folder_of_timm_that_lacks_a_weight_is_refused_by_its_name(tmp_path):
    model, model_args = timm_model("vit_tiny_patch16_224")
    weights = model.state_dict()
    del weights["blocks.0.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    document = {"architecture": "vit_tiny_patch16_224", "model_args": model_args}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"1 weights are not .* first blocks.0.mlp.fc1.weight"):
        read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["dinov3_vit", "vit", "convnext", "tinymodal_pair"])
def test_a_tower_that_was_saved_by_its_own_names_is_read_again(kind, tmp_path):
    """transformers renames weights when it saves; ``save_part`` does not."""
    config = tower_config(tiny_vision(kind, 32))
    layer = -1 if kind == "convnext" else -2
    tower = loud(encoder_of(config).build(config, layer))
    save_file(tower.module.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    document = config.to_diff_dict() | {"model_type": config.model_type}
    (tmp_path / "config.json").write_text(json.dumps(document))
    again = read(tmp_path, layer)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).values, tower(pixels).values, rtol=0, atol=0)


def test_a_deeper_layer_than_the_folder_holds_is_refused(tmp_path):
    """What ``save_part`` writes holds the blocks that were used; its config still counts all of them."""
    tower = read_after_saving(tmp_path)
    assert tower.width == 32
    with pytest.raises(CheckpointError, match="weights are not in the checkpoint"):
        read(tmp_path, -1)


def read_after_saving(folder: Path) -> MediaEncoder:
    config = tower_config(tiny_vision("dinov2"))
    tower = encoder_of(config).build(config, -2)
    save_file(tower.module.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    document = config.to_diff_dict() | {"model_type": config.model_type}
    (folder / "config.json").write_text(json.dumps(document))
    return read(folder)


def test_what_is_no_tower_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"model.vision.path: .*: no tower for model_type 'llama'"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr"}))
    with pytest.raises((CheckpointError, ValueError), match="a 'detr' cannot be made of its config"):
        read(tmp_path)
