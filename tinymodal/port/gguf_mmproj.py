"""The picture tower and its connector as llama.cpp's ``mmproj`` file: SigLIP, one hidden state, two layers.

llama.cpp's graph for LLaVA runs all blocks but the last and then projects, so the file always holds one block
more than are run; where our tower ends at the block that is read, that one is zeros. There must be no
``v.post_ln``: it would be applied to what is read.

Checked by rebuilding tower and projector from the file alone. llama.cpp computes gelu by its tanh form in the
projector too, where training had the exact one: at most 5e-4 a value.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from tinymodal.compose.build import Composed
from tinymodal.compose.targets import blocks_run
from tinymodal.port.gguf_text import read_tensors
from tinymodal.port.gguf_types import FILE_TYPES, as_stored, stored
from tinymodal.port.parity import TOLERANCE
from tinymodal.port.proof import Check
from tinymodal.port.to_llava import whole_tower

BLOCK = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
"""What SigLIP calls the parts of a block -> what llama.cpp does."""

OUTSIDE = {
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
}

NUM_PICTURES = 3


def theirs(name: str) -> str | None:
    """llama.cpp's name for a tensor of SigLIP; None for what is behind the last block."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    for ours, other in BLOCK.items():
        head, found, kind = name.partition(f".{ours}.")
        if found:
            return f"v.blk.{head.rpartition('.')[2]}.{other}.{kind}"
    return None


def mmproj_tensors(composed: Composed) -> dict[str, Tensor]:
    """Every tensor of the file, float32."""
    found: dict[str, Tensor] = {}
    for name, tensor in whole_tower(composed, tower_of(composed)).items():
        if (place := theirs(name)) is not None:
            found[place] = tensor
    layers: Any = composed.model.model.connectors["image"].state_dict()  # type: ignore[union-attr]
    for layer in (0, 2):
        for kind in ("weight", "bias"):
            found[f"mm.{layer}.{kind}"] = layers[f"proj.{layer}.{kind}"]
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


def tower_of(composed: Composed) -> Any:
    """The tower's config with one block more than are run."""
    config = copy.deepcopy(composed.model.config.vision_config)
    config.num_hidden_layers = max(blocks_run(composed.model.config)) + 1
    config.vision_use_head = False
    return config


def write_mmproj(composed: Composed, file: Path, weights: str, name: str) -> None:
    """Write the file; arguments as :func:`~tinymodal.port.gguf_text.write_text`."""
    import gguf

    tower = tower_of(composed)
    how = composed.processor.image_processor.preparation
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(tower.num_hidden_layers)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_projection_dim(composed.model.get_input_embeddings().embedding_dim)  # type: ignore[arg-type]
    writer.add_vision_image_mean(list(how.mean))
    writer.add_vision_image_std(list(how.std))
    writer.add_vision_use_gelu(True)
    for place, tensor in mmproj_tensors(composed).items():
        array, kind = stored(place, tensor, weights)
        writer.add_tensor(place, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def checks(composed: Composed, file: Path, weights: str) -> list[Check]:
    """The tensors as they were stored, and the embeddings of some pictures by the file alone."""
    read, wanted = read_tensors(file), mmproj_tensors(composed)
    rounded = {name: as_stored(name, tensor, weights) for name, tensor in wanted.items()}
    odd = [name for name in sorted(set(read) ^ set(rounded))]
    odd += [n for n in rounded if n in read and not torch.equal(read[n].view(rounded[n].shape), rounded[n])]
    exact = "" if weights == "f32" else f" rounded to {weights}"
    told = f"{len(rounded)} in {file.name}" + (f", {len(odd)} not, first {odd[0]}" if odd else "")
    tensors = Check(f"dequantised tensors equal the tower's and the connector's{exact}", not odd, told)
    if odd:
        return [tensors]
    random = torch.Generator().manual_seed(0)
    edge = tower_of(composed).image_size
    tiles_I3HW = torch.randn(NUM_PICTURES, 3, edge, edge, generator=random)
    with torch.no_grad():
        seen_ISD = rebuilt(file)(tiles_I3HW)
        wanted_ISD = ours(composed, rounded if weights != "f32" else None, tiles_I3HW)
    apart = float((seen_ISD - wanted_ISD).abs().max())
    return [
        tensors,
        Check(
            "a tower rebuilt from the file alone sees the same",
            apart <= TOLERANCE,
            f"embeddings of {NUM_PICTURES} pictures differ by at most {apart:.1e}",
        ),
    ]


def ours(composed: Composed, rounded: dict[str, Tensor] | None, tiles_I3HW: Tensor) -> Tensor:
    """Embeddings by our own tower and connector, [I, S, D]; with ``rounded`` in place of their weights."""
    core: Any = composed.model.model
    if rounded is not None:
        tower = core.towers["image"].module.state_dict()
        layers = core.connectors["image"].state_dict()
        for name, tensor in tower.items():
            if (place := theirs(name)) is not None:
                tensor.copy_(rounded[place])
        for name, tensor in layers.items():
            tensor.copy_(rounded[f"mm.{name.removeprefix('proj.')}"])
    (seen_ISD,) = core.perceive("image", tiles_I3HW.to(composed.model.dtype))
    return seen_ISD.float()


def rebuilt(file: Path) -> nn.Module:
    """Tower and projector as the file describes them; reads nothing else.

    A module: float [I, 3, H, W] -> embeddings [I, S, D].
    """
    import gguf

    fields = gguf.GGUFReader(file)

    def said(key: str) -> Any:
        field = fields.get_field(f"clip.vision.{key}")
        assert field is not None, key
        return field.contents()

    blocks = said("block_count")
    config = SiglipVisionConfig(
        hidden_size=said("embedding_length"),
        intermediate_size=said("feed_forward_length"),
        num_hidden_layers=blocks,
        num_attention_heads=said("attention.head_count"),
        image_size=said("image_size"),
        patch_size=said("patch_size"),
        layer_norm_eps=said("attention.layer_norm_epsilon"),
        vision_use_head=False,
    )
    tensors = read_tensors(file)
    tower = SiglipVisionModel(config).eval()
    own = {
        name: tensors[place].view(tensor.shape)
        for name, tensor in tower.state_dict().items()
        if (place := theirs(name)) is not None
    }
    tower.load_state_dict(own, strict=False)
    hidden, width = tensors["mm.2.weight"].shape[1], tensors["mm.2.weight"].shape[0]
    project = nn.Sequential(nn.Linear(config.hidden_size, hidden), nn.GELU(), nn.Linear(hidden, width))
    project.load_state_dict(
        {f"{n}.{kind}": tensors[f"mm.{n}.{kind}"] for n in (0, 2) for kind in ("weight", "bias")}
    )

    class Rebuilt(nn.Module):
        def forward(self, tiles_I3HW: Tensor) -> Tensor:
            # All blocks but the last, and no norm behind them: what llama.cpp's graph does.
            states = tower(tiles_I3HW, output_hidden_states=True).hidden_states
            return project(states[blocks - 1])

    return Rebuilt()
