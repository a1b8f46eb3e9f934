"""TinyGPT-V and MiniGPT-4: a ``.pth`` over EVA-CLIP-g, BLIP-2's Q-Former and a language model."""

import re
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from tests.port.foreign import (
    CLIP_MEAN,
    SIZES,
    WIDTH,
    Restated,
    a_llama,
    a_tokenizer,
    compared,
    numbers,
    pixels,
)
from tinymodal.compose.build import load
from tinymodal.core.errors import CheckpointError
from tinymodal.model.timm_tower import load_timm
from tinymodal.model.tinygptv_phi import TinyGPTVPhiConfig, TinyGPTVPhiForCausalLM
from tinymodal.port.adopt import adopt
from tinymodal.port.source import Extras

EVA_WIDTH, BERT_WIDTH, QUERIES = 88, 64, 5


class Sight(nn.Module):
    """EVA-CLIP-g by timm, ``ln_vision``, Q-Former by transformers, projections: BLIP-2's own order."""

    def __init__(self, edge, middle):
        super().__init__()
        args = {"embed_dim": EVA_WIDTH, "depth": 4, "num_heads": 1, "img_size": edge, "num_classes": 0}
        self.eva = load_timm().create_model("eva_giant_patch14_clip_224", pretrained=False, **args)
        self.ln_vision = nn.LayerNorm(EVA_WIDTH)
        values = {"hidden_size": BERT_WIDTH, "intermediate_size": 4 * BERT_WIDTH, "num_hidden_layers": 4}
        config = Blip2QFormerConfig(
            **values,
            num_attention_heads=1,
            encoder_hidden_size=EVA_WIDTH,
            vocab_size=8,
            max_position_embeddings=8,
        )
        self.bert = Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, QUERIES, BERT_WIDTH))
        sizes = [BERT_WIDTH, *([48] if middle else []), WIDTH]
        self.proj = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        numbers(self, 5)

    def forward(self, values):
        """All positions behind EVA's blocks, the class token too, before any last norm."""
        prefix_and_map = self.eva.forward_intermediates(
            values, indices=[3], return_prefix_tokens=True, norm=False, intermediates_only=True
        )
        x, prefix = prefix_and_map[0]
        x = torch.cat((prefix, x.flatten(2).transpose(1, 2)), 1)
        out = self.bert(
            query_embeds=self.query_tokens, encoder_hidden_states=self.ln_vision(x)
        ).last_hidden_state
        for proj in self.proj:
            out = proj(out)
        return out

    def eva_file(self):
        names = {k: v for k, v in self.eva.state_dict().items() if not k.startswith(("norm.", "fc_norm."))}
        return {**names, "norm.weight": torch.ones(EVA_WIDTH), "head.weight": torch.ones(2, EVA_WIDTH)}

    def blip_file(self):
        """As LAVIS names it, with what is only for text."""
        found = {"query_tokens": self.query_tokens.data}
        found |= {f"ln_vision.{k}": v for k, v in self.ln_vision.state_dict().items()}
        for name, tensor in self.bert.state_dict().items():
            if name.startswith("layernorm."):
                found[f"Qformer.bert.embeddings.LayerNorm.{name.removeprefix('layernorm.')}"] = tensor
                continue
            name = re.sub(r"\.(attention|crossattention)\.attention\.", r".\1.self.", name)
            found[f"Qformer.bert.{name}"] = tensor
        found["Qformer.bert.encoder.layer.0.intermediate.dense.weight"] = torch.ones(3)
        found["Qformer.bert.embeddings.word_embeddings.weight"] = torch.ones(3)
        found["Qformer.cls.predictions.bias"] = torch.ones(3)
        return {"model": {**found, "t5_proj.weight": torch.ones(3)}}


def a_tiny_phi(tokenizer):
    values = {**SIZES, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "pad_token_id": None}
    return numbers(TinyGPTVPhiForCausalLM(TinyGPTVPhiConfig(**values)), 6)


def parts_on_disk(folder, sight, language, tokenizer, as_phi=True):
    """``--vision``, ``--qformer`` and ``--language``."""
    torch.save(sight.eva_file(), folder / "eva_vit_g.pth")
    torch.save(sight.blip_file(), folder / "blip2.pth")
    language.save_pretrained(folder / "base")
    if as_phi:  # its authors replaced a file of transformers and kept the name
        config = folder / "base" / "config.json"
        config.write_text(config.read_text().replace('"tinygptv_phi"', '"phi"'))
    tokenizer.save_pretrained(folder / "base")
    return Extras(vision=folder / "eva_vit_g.pth", qformer=folder / "blip2.pth", language=folder / "base")


def squared(edge):
    return lambda picture: pixels(picture, "square", edge, CLIP_MEAN)


def test_tinygptv_with_lora_and_norms_says_what_it_says(tmp_path):
    tokenizer, sight = a_tokenizer(), Sight(28, middle=True)
    language = a_tiny_phi(tokenizer)
    extras = parts_on_disk(tmp_path, sight, language, tokenizer)
    adapted = get_peft_model(
        language, LoraConfig(r=4, lora_alpha=16, target_modules=["query_key_value", "dense"])
    )
    trained = {}
    for name, p in adapted.named_parameters():
        if "lora_" in name or re.search(r"norm\.weight$", name):
            p.data += 0.05 * torch.randn_like(p)
            key = name.replace(".default", "")  # peft 0.2 had no names of adapters
            trained[f"llama_model.{key}"] = p.data.clone()
    assert any(".base_layer." not in k and "lora_A.weight" in k for k in trained)
    for i, proj in enumerate(sight.proj):
        trained |= {f"llama_proj{'2' if i else ''}.{k}": v for k, v in proj.state_dict().items()}
    state = {"model": trained, "config": {"model": {"image_size": 28, "lora_alpha": 16}}, "epoch": 3}
    torch.save(state, tmp_path / "checkpoint_3.pth")

    report = adopt(tmp_path / "checkpoint_3.pth", tmp_path / "out", extras)

    parity = compared(tmp_path / "out", Restated(adapted.eval(), squared(28), sight, tokenizer))
    assert parity.passed, parity.rows
    assert parity.largest < 1e-5
    assert (report.family, report.template) == ("TinyGPT-V", "tinygptv")
    assert load(tmp_path / "out").processor.image_processor.typical().tokens == QUERIES
    assert report.dropped["behind the last block: never reached"] == 2
    assert report.dropped["replaced by checkpoint_3.pth"] == 9
    assert report.dropped["reads and writes text, which the queries do not"] == 2


def test_positions_are_stretched_to_the_size_of_stage_4(tmp_path):
    """As EVA's own code does it: bicubic, the class token's apart. timm's table is set to the result."""
    tokenizer = a_tokenizer()
    language, small = a_tiny_phi(tokenizer), Sight(28, middle=True)
    extras = parts_on_disk(tmp_path, small, language, tokenizer)
    trained = {
        f"llama_proj{'2' if i else ''}.{k}": v
        for i, p in enumerate(small.proj)
        for k, v in p.state_dict().items()
    }
    settings = {"image_size": 56, "chat_template": True}
    torch.save({"model": trained, "config": {"model": settings}}, tmp_path / "stage4.pth")

    report = adopt(tmp_path / "stage4.pth", tmp_path / "out", extras)

    large = Sight(56, middle=True)
    weights = {k: v for k, v in small.state_dict().items() if k != "eva.pos_embed"}
    table = small.eva.pos_embed.data
    grid = table[0, 1:].T.reshape(1, EVA_WIDTH, 2, 2)
    grid = nn.functional.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
    weights["eva.pos_embed"] = torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2)), 1)
    large.load_state_dict(weights)
    parity = compared(tmp_path / "out", Restated(language, squared(56), large, tokenizer))
    assert parity.passed
    assert parity.largest < 1e-5
    assert report.template == "tinygptv_stage4"
    assert [f.reason for f in report.fates if f.name == "pos_embed"] == ["stretched from 2 x 2 to 4 x 4"]


def test_minigpt_4_has_one_projection_and_a_plain_language_model(tmp_path):
    tokenizer, sight = a_tokenizer(), Sight(28, middle=False)
    language = a_llama(tokenizer)
    extras = parts_on_disk(tmp_path, sight, language, tokenizer, as_phi=False)
    trained = {f"llama_proj.{k}": v for k, v in sight.proj[0].state_dict().items()}
    torch.save({"model": trained, "config": {"model": {"image_size": 28}}}, tmp_path / "minigpt4.pth")

    report = adopt(tmp_path / "minigpt4.pth", tmp_path / "out", extras)

    parity = compared(tmp_path / "out", Restated(language, squared(28), sight, tokenizer))
    assert parity.passed
    assert (report.family, report.template) == ("MiniGPT-4", "minigpt_4")


def test_the_fortieth_block_is_left_out_as_blip_2_does(tmp_path):
    from tinymodal.port.tinygptv import _eva_pieces, _tower
    from tinymodal.port.weights import File

    sight = Sight(28, middle=False)
    tensors = {k: v for k, v in sight.eva_file().items() if ".3." not in k}
    tensors |= {
        k.replace("blocks.0.", "blocks.39."): v for k, v in tensors.items() if k.startswith("blocks.0.")
    }
    tower = _tower(tensors, 28)
    assert tower.num_hidden_layers == 39
    reasons = {p.reason for p in _eva_pieces(File("eva", tensors), tower) if p.name.startswith("blocks.39.")}
    assert reasons == {"the block that BLIP-2 leaves out"}


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ("language", "holds only what was trained; give it with --language"),
        ("qformer", "not BLIP-2's Q-Former; give it with --qformer"),
        ("vision", r"not EVA-CLIP-g \(eva_vit_g.pth\); give it with --vision"),
    ],
)
def test_a_part_that_is_not_given_is_asked_for(tmp_path, without, words):
    tokenizer, sight = a_tokenizer(), Sight(28, middle=False)
    extras = parts_on_disk(tmp_path, sight, a_llama(tokenizer), tokenizer, as_phi=False)
    given = {name: getattr(extras, name) for name in ("language", "qformer", "vision") if name != without}
    torch.save({"model": {"llama_proj.weight": torch.ones(WIDTH, BERT_WIDTH)}}, tmp_path / "minigpt4.pth")
    with pytest.raises(CheckpointError, match=words):
        adopt(tmp_path / "minigpt4.pth", tmp_path / "out", Extras(**given))
