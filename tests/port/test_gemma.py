"""Checkpoints over Gemma 1 and 2, trained where pictures' embeddings were multiplied by sqrt(width)."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.port.foreign import (
    WIDTH,
    OldGemma,
    Restated,
    a_clip,
    a_gemma,
    a_siglip,
    a_tokenizer,
    an_mlp,
    compared,
    keyed,
    numbers,
    pixels,
    write,
)
from tests.port.test_hf_llava import a_folder
from tests.port.test_llava import flat, projector
from tests.port.test_llava import seeing as seen_by_clip
from tests.port.test_tinyllava import (
    PerceiverRestated,
    QFormerRestated,
    config_of,
    seeing,
    siglip_pixels,
    whole,
)
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.core.errors import CheckpointError
from tinymodal.port.adopt import REPORT, adopt
from tinymodal.port.ledger import last_layers
from tinymodal.port.llava import own_language
from tinymodal.port.source import Extras

TIMES = WIDTH**0.5


def a_tinyllava(folder, language, siglip, connector, tokenizer, tensors=None, **keys):
    config = config_of(language, siglip, **keys)
    return write(folder, config, tokenizer, pytorch_model=tensors or whole(language, siglip, connector))


@pytest.mark.parametrize("second", [False, True])
def test_a_tinyllava_over_gemma_says_what_it_said_with_the_old_scaling(tmp_path, second):
    tokenizer = a_tokenizer("<eos>")
    language, siglip, mlp = a_gemma(tokenizer, second=second), a_siglip(), an_mlp()
    source = a_tinyllava(tmp_path / "tiny", language, siglip, mlp, tokenizer)

    report = adopt(source, tmp_path / "out")

    restated = Restated(OldGemma(language), siglip_pixels, seeing(siglip, mlp), tokenizer)
    parity = compared(tmp_path / "out", restated)
    assert parity.passed, parity.rows
    assert parity.largest < 1e-5
    place = "model.connectors.image.proj.2."
    assert report.scaled == {f"{place}weight": TIMES, f"{place}bias": TIMES}
    fates = {fate.to: fate.reason for fate in report.fates}
    assert fates[f"{place}weight"] == "times 5.65685"
    assert fates["model.connectors.image.proj.0.weight"] == ""
    assert "before version 5.4" in report.notes[-1]
    assert json.loads((tmp_path / "out" / REPORT).read_text())["scaled"] == report.scaled
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved[f"{place}weight"], mlp[2].weight * TIMES)
    # Today's Gemma given the same pictures, as an adopted model without the factor would be.
    today = Restated(language, siglip_pixels, seeing(siglip, mlp), tokenizer)
    assert compared(tmp_path / "out", today).largest > 1e-2


@pytest.mark.parametrize("name", ["linear", "resampler", "qformer"])
def test_every_connector_that_ends_linearly_takes_the_factor(tmp_path, name):
    tokenizer = a_tokenizer("<eos>")
    language, siglip = a_gemma(tokenizer), a_siglip()
    if name == "qformer":
        connector, keys = QFormerRestated(), {"num_queries": 4}
        tensors = whole(language, siglip, nn.Identity()) | connector.in_its_names()
    else:
        connector = numbers(PerceiverRestated() if name == "resampler" else nn.Linear(WIDTH, WIDTH), 6)
        keys = {"num_queries": 4, "num_resampler_layers": 2}
        tensors = whole(language, siglip, connector)
    source = a_tinyllava(
        tmp_path / "tiny", language, siglip, connector, tokenizer, tensors, connector_type=name, **keys
    )
    adopt(source, tmp_path / "out")
    restated = Restated(OldGemma(language), siglip_pixels, seeing(siglip, connector), tokenizer)
    parity = compared(tmp_path / "out", restated)
    assert parity.passed, parity.rows


def test_a_connector_without_a_last_layer_is_refused_over_gemma(tmp_path):
    tokenizer = a_tokenizer("<eos>")
    language, siglip = a_gemma(tokenizer), a_siglip()
    source = a_tinyllava(
        tmp_path / "tiny", language, siglip, nn.Identity(), tokenizer, connector_type="identity"
    )
    with pytest.raises(CheckpointError, match=r"multiplied by 5\.65685, and the connector 'identity' has no"):
        adopt(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_16_bit_layer_times_the_factor_is_kept_in_float32(tmp_path):
    tokenizer = a_tokenizer("<eos>")
    language, siglip, mlp = a_gemma(tokenizer), a_siglip(), an_mlp()
    half = {name: t.bfloat16() for name, t in whole(language, siglip, mlp).items()}
    source = a_tinyllava(tmp_path / "tiny", language, siglip, mlp, tokenizer, half)
    adopt(source, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    place = "model.connectors.image.proj.2.weight"
    assert torch.equal(saved[place], mlp[2].weight.bfloat16().float() * TIMES)
    assert saved["model.connectors.image.proj.0.weight"].dtype == torch.bfloat16
    for module in (language, siglip, mlp):
        for weight in module.parameters():  # buffers are computed anew, in float32
            weight.data = weight.data.bfloat16().float()
    restated = Restated(OldGemma(language), siglip_pixels, seeing(siglip, mlp), tokenizer)
    assert compared(tmp_path / "out", restated).passed


def test_words_around_a_picture_of_llava_take_the_factor_too(tmp_path):
    tokenizer = a_tokenizer("<eos>", "<im_start>", "<im_end>")
    language, clip, mlp = a_gemma(tokenizer), a_clip(), an_mlp()
    clip.save_pretrained(tmp_path / "clip")
    keys = {"architectures": ["LlavaGemmaForCausalLM"], "mm_use_im_start_end": True}
    tensors = keyed("", language) | projector(mlp)
    source = write(tmp_path / "llava", flat(language, **keys), tokenizer, pytorch_model=tensors)

    report = adopt(source, tmp_path / "out", Extras(vision=tmp_path / "clip"))

    old = OldGemma(language)
    marks = [
        old.words(torch.tensor([[tokenizer.convert_tokens_to_ids(w)]])) for w in ("<im_start>", "<im_end>")
    ]
    inside = seen_by_clip(clip, mlp)
    restated = Restated(
        old,
        lambda p: pixels(p, "pad"),
        lambda values: torch.cat((marks[0], inside(values), marks[1]), 1),
        tokenizer,
    )
    assert compared(tmp_path / "out", restated).passed
    made = "model.marks.image.weight (start)"
    assert report.made[made] == "the embedding of '<im_start>' times 5.65685"
    assert report.template == "gemma"


def test_the_class_in_the_config_tells_gemma_2_from_gemma():
    for name in ("Gemma", "Gemma2"):
        config = {"architectures": [f"Llava{name}ForCausalLM"]}
        assert own_language(config).model_type == name.lower()


@pytest.mark.parametrize("version", ["4.45.0", "5.23.0"])
@pytest.mark.parametrize("next_", [False, True])
def test_hf_llava_over_gemma_is_read_as_the_version_that_wrote_it(tmp_path, next_, version):
    a_folder(tmp_path / "hf", text=a_gemma(tiny_tokenizer()).config, next_=next_)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": version}))

    report = adopt(tmp_path / "hf", tmp_path / "out")

    assert report.parity is not None
    assert report.parity.passed
    is_old = version.startswith("4.")
    assert bool(report.scaled) == is_old
    # LlavaNext has a head of its own, whatever its language model's config says: it is not dropped.
    assert any(fate.to == "lm_head.weight" for fate in report.fates) == next_
    assert ("times 5.65685" in report.parity.reference) == is_old


def test_the_layers_that_take_the_factor_are_named_for_each_connector_that_is_read():
    named = {name: last_layers(name, {}) for name in ("linear", "mlp", "interleave", "qformer", "perceiver")}
    assert all(named.values()), named
    assert last_layers("qformer", {"middle": 64}) == ("proj.1",)
    assert last_layers("mlp", {"depth": 1}) == ("proj.0",)
    assert last_layers("interleave", {"depth": 2}) == ("proj.0.2", "proj.1.2")
    assert last_layers("identity", {}) == ()
