"""OmniLMM against its forward, restated with timm's tower and torch's attention."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from tests.port.foreign import CLIP_MEAN, Restated, a_tokenizer, compared, keyed, numbers, pixels, write
from tinymodal.compose.build import load
from tinymodal.core.errors import CheckpointError
from tinymodal.model.timm_tower import load_timm
from tinymodal.port.adopt import adopt
from tinymodal.port.source import Extras

WIDTH, EVA_WIDTH, QUERIES = 128, 64, 4
ARCHITECTURE = "eva02_enormous_patch14_clip_224"
ARGS = {"embed_dim": EVA_WIDTH, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "img_size": 28}


def table(side, width):
    """First half of the channels tells the column, second the row; sines before cosines."""
    omega = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = [torch.outer(axis.flatten().double(), omega) for axis in (columns, rows)]
    return torch.cat([f(half) for half in halves for f in (torch.sin, torch.cos)], 1).float()


class Gone(nn.Identity):
    """What stands for the last block there."""

    def forward(self, x, **kwargs):
        return x


class Resampler(nn.Module):
    """As its specification says it; the table of positions is a parameter there."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(QUERIES, WIDTH))
        self.query = nn.Parameter(torch.zeros(QUERIES, WIDTH))
        self.proj = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.kv_proj = nn.Linear(EVA_WIDTH, WIDTH, bias=False)
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 128)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(3))
        numbers(self, 3)
        self.pos_embed.data = table(2, WIDTH)

    def forward(self, x):
        side = round(x.shape[1] ** 0.5)
        grid = self.pos_embed.T.reshape(1, WIDTH, 2, 2)
        keys = grid if side == 2 else F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        keys = keys.flatten(2)[0].T[:, None]
        x = self.ln_kv(self.kv_proj(x)).transpose(0, 1)
        q = self.ln_q(self.query)[:, None]
        out = self.attn(q + self.pos_embed[:, None], x + keys, x)[0]
        return self.ln_post(out.transpose(0, 1)) @ self.proj


@pytest.fixture
def omnilmm(tmp_path):
    tokenizer = a_tokenizer("<im_patch>", "<im_start>", "<im_end>")
    values = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = MistralConfig(**values, num_hidden_layers=2, vocab_size=len(tokenizer), pad_token_id=None)
    language = numbers(MistralForCausalLM(config), 1)
    tower = load_timm().create_model(
        ARCHITECTURE, pretrained=False, num_classes=0, dynamic_img_size=True, **ARGS
    )
    numbers(tower, 2)
    resampler = Resampler()
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(
        json.dumps({"architecture": ARCHITECTURE, "model_args": ARGS})
    )
    settings = {**config.to_dict(), "model_type": "omnilmm", "architectures": ["OmniLMMForCausalLM"]}
    settings |= {"mm_vision_tower": f"{ARCHITECTURE}.laion2b_plus", "num_query": QUERIES, "image_size": 56}
    whole_tower = keyed("model.vision_tower.", tower)
    tower.blocks[-1] = Gone()
    words = language.get_input_embeddings().weight
    start, end = (words[tokenizer.convert_tokens_to_ids(w)][None, None] for w in ("<im_start>", "<im_end>"))

    def see(pixel_values):
        kept = tower.forward_features(pixel_values)[:, tower.num_prefix_tokens :]
        return torch.cat((start, resampler(kept), end), 1)

    restated = Restated(language, lambda p: pixels(p, "square", 56, CLIP_MEAN), see, tokenizer)
    return settings, tokenizer, language, resampler, whole_tower, restated


def test_omnilmm_with_its_tower_inside_says_what_it_says(tmp_path, omnilmm):
    settings, tokenizer, language, resampler, tower, restated = omnilmm
    tensors = {**keyed("", language), **keyed("model.resampler.", resampler)}
    tensors |= {k: v for k, v in tower.items() if "blocks.2." not in k}
    source = write(tmp_path / "omni", settings, tokenizer, pytorch_model=tensors)

    report = adopt(source, tmp_path / "out", Extras(vision=tmp_path / "timm"))

    parity = compared(tmp_path / "out", restated)
    assert parity.passed, parity.rows
    assert parity.largest < 1e-5
    assert (report.family, report.template) == ("OmniLMM", "zephyr")
    assert report.dropped == {"the fixed table of sines and cosines, computed": 1}
    assert load(tmp_path / "out").processor.image_processor.typical().tokens == QUERIES + 2


def test_the_tower_may_lie_beside_it_whole(tmp_path, omnilmm):
    settings, tokenizer, language, resampler, tower, restated = omnilmm
    torch.save(
        {k.removeprefix("model.vision_tower."): v for k, v in tower.items()},
        tmp_path / "timm" / "pytorch_model.bin",
    )
    tensors = {**keyed("", language), **keyed("model.resampler.", resampler)}
    source = write(tmp_path / "omni", settings, tokenizer, pytorch_model=tensors)
    with pytest.raises(CheckpointError, match="does not hold its tower, EVA02-CLIP of timm; give it with"):
        adopt(source, tmp_path / "out", Extras())

    report = adopt(source, tmp_path / "out", Extras(vision=tmp_path / "timm"))

    assert compared(tmp_path / "out", restated).passed
    assert report.dropped["behind feature layer -2: never reached"] > 5


def test_a_table_of_positions_that_was_trained_is_kept(tmp_path, omnilmm):
    settings, tokenizer, language, resampler, tower, restated = omnilmm
    resampler.pos_embed.data += 0.2 * torch.randn_like(resampler.pos_embed)
    tensors = {**keyed("", language), **keyed("model.resampler.", resampler), **tower}
    source = write(tmp_path / "omni", settings, tokenizer, pytorch_model=tensors)

    adopt(source, tmp_path / "out", Extras(vision=tmp_path / "timm"))

    assert compared(tmp_path / "out", restated).passed


def test_a_tokenizer_without_the_words_around_pictures_is_refused(tmp_path, omnilmm):
    settings, _, language, resampler, tower, _ = omnilmm
    tensors = {**keyed("", language), **keyed("model.resampler.", resampler), **tower}
    source = write(tmp_path / "omni", settings, a_tokenizer(), pytorch_model=tensors)
    with pytest.raises(
        CheckpointError, match="pictures stand between <im_start>, <im_end>, but the tokenizer has no"
    ):
        adopt(source, tmp_path / "out", Extras(vision=tmp_path / "timm"))
