"""Folders of language models that transformers has no class for, or in which one is only a part."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.model import test_minicpm, test_openelm, test_tinygptv_phi
from tests.model.test_language import FAMILIES, loud
from tinymodal.chat.template import TEMPLATES
from tinymodal.compose.build import build, load, save, save_part
from tinymodal.compose.pretrained import read_language, read_tokenizer
from tinymodal.compose.spec import LanguageSpec, ModelSpec
from tinymodal.compose.tiny import tiny_language, tiny_model, tiny_tokenizer, tiny_vision
from tinymodal.core.errors import CheckpointError
from tinymodal.model.language import causal_class, language_config

IDS = torch.arange(6, 15)[None]
OWN = {"openelm": test_openelm, "minicpm": test_minicpm, "tinygptv_phi": test_tinygptv_phi}


def published(folder: Path, kind: str, **values) -> dict[str, torch.Tensor]:
    """A folder as its authors wrote it: their names in ``config.json``, float16, code of their own."""
    config = language_config({**tiny_language(kind), **values})
    torch.manual_seed(0)
    model = loud(causal_class(config)._from_config(config))
    weights = {name: w.half() for name, w in model.state_dict().items() if name != "lm_head.weight"}
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = model.lm_head.weight.detach().half()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    document = {
        **tiny_language(kind),
        **values,
        "model_type": "phi" if kind == "tinygptv_phi" else kind,
        "architectures": [f"{kind}ForCausalLM"],
        "auto_map": {"AutoConfig": f"configuration_{kind}.Config", "AutoModelForCausalLM": "modeling.Model"},
        "torch_dtype": "float16",
        "transformers_version": "4.36.2",
    }
    (folder / "config.json").write_text(json.dumps(document))
    return {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}


def by_hand(kind: str, config, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    turning = (4,) if kind == "tinygptv_phi" else ()
    if kind == "minicpm":
        weights = {"lm_head.weight": weights["model.embed_tokens.weight"], **weights}
    return OWN[kind].by_hand(config, weights, IDS[0], *turning)


@pytest.mark.parametrize("kind", OWN)
@torch.no_grad()
def test_a_published_folder_says_what_the_formula_says(kind, tmp_path):
    tokenizer = tiny_tokenizer()
    weights = published(tmp_path / "llm", kind, vocab_size=len(tokenizer))
    language = read_language(str(tmp_path / "llm"), "model.language.path", len(tokenizer), [])
    assert language.config.model_type == kind
    assert not hasattr(language.config, "auto_map")
    expected = by_hand(kind, language.config, weights)
    logits = language(input_ids=IDS).logits[0].double()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", OWN)
@torch.no_grad()
def test_it_is_composed_saved_and_handed_on_as_any_other(kind, tmp_path):
    """Words of the template are added, and the part that is saved again is read again."""
    tokenizer = tiny_tokenizer()
    published(tmp_path / "llm", kind, vocab_size=len(tokenizer) - 2)
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(
        CheckpointError, match=r"has \d+ tokens and the model \d+ embeddings; they are not of one"
    ):
        build(ModelSpec(language=LanguageSpec(path=str(tmp_path / "llm"), tokenizer=str(tmp_path / "words"))))

    published(tmp_path / "fits", kind, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "fits")
    if kind == "openelm":
        # Only the tokens, not what kind of tokenizer they are: transformers would ask the model's config.
        (tmp_path / "fits" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    composed = build(ModelSpec(language=LanguageSpec(path=str(tmp_path / "fits"), template="phi_3")))
    assert len(composed.tokenizer) == len(tokenizer) + 4
    theirs = read_language(str(tmp_path / "fits"), "", len(tokenizer), []).eval()
    ours = composed.model.eval()(input_ids=IDS).logits
    assert torch.equal(ours[..., : len(tokenizer)], theirs(input_ids=IDS).logits)

    save(composed, tmp_path / "run")
    again = load(tmp_path / "run")
    assert type(again.model.config.text_config) is type(composed.model.config.text_config)
    assert torch.equal(again.model(input_ids=IDS).logits, ours)
    assert (tmp_path / "run" / "decoder.py").is_file()

    save_part(composed.model, "language", tmp_path / "part", composed.tokenizer)
    part = read_language(str(tmp_path / "part"), "", len(composed.tokenizer), []).eval()
    assert torch.equal(part(input_ids=IDS).logits, ours)


def test_the_weights_of_phi_2_are_not_taken_for_tinygptvs(tmp_path):
    """They lack the norms; with new ones the model says "the the"."""
    published(tmp_path / "llm", "tinygptv_phi", vocab_size=96)
    file = tmp_path / "llm" / "model.safetensors"
    norms = ("q_layernorm", "k_layernorm", "post_layernorm")
    kept = {name: w for name, w in load_file(file).items() if not any(norm in name for norm in norms)}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"10 weights are not in the checkpoint .*first .*layernorm"):
        read_language(str(tmp_path / "llm"), "model.language.path", 96, [])


def seeing(kind: str, text: str, **values):
    """A model that sees, as transformers has it, with a language model inside."""
    config = AutoConfig.for_model(
        kind, text_config=tiny_language(text, vocab_size=96), vision_config=tiny_vision(), **values
    )
    torch.manual_seed(0)
    return loud(AutoModelForImageTextToText.from_config(config))


@pytest.mark.parametrize(
    ("kind", "text", "values"),
    [
        ("gemma3", "gemma3_text", {"mm_tokens_per_image": 4, "image_token_index": 5}),
        ("llava", "llama", {"image_token_index": 5}),
        ("llava", "qwen2", {"image_token_index": 5, "tie_word_embeddings": True}),
    ],
)
@torch.no_grad()
def test_of_a_model_that_sees_the_language_part_is_read(kind, text, values, tmp_path):
    whole = seeing(kind, text, **values)
    whole.save_pretrained(tmp_path)
    language = read_language(str(tmp_path), "model.language.path", 96, []).eval()
    assert language.config.model_type == text
    assert type(language) is causal_class(language.config)
    expected = whole(input_ids=IDS).logits
    torch.testing.assert_close(language(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    tied = whole.lm_head.weight is whole.get_input_embeddings().weight
    assert language.config.tie_word_embeddings is tied
    assert (language.lm_head.weight is language.get_input_embeddings().weight) is tied
    # And more words than it had.
    larger = read_language(str(tmp_path), "model.language.path", 98, [96, 97])
    assert torch.equal(larger(input_ids=IDS).logits[..., :96], language(input_ids=IDS).logits)


def test_folders_of_something_else_are_refused_with_a_sentence(tmp_path):
    def refused(document: dict, match: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=match) as error:
            read_language(str(tmp_path), "model.language.path", 96, [])
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"model.language.path: {tmp_path}: ")

    refused(
        {"model_type": "llama2000", "auto_map": {"AutoConfig": "a.B"}},
        "holds a model of type 'llama2000', for which neither transformers nor tinymodal has a class; code",
    )
    refused(tiny_vision(), "no causal language model for model_type 'siglip_vision_model'")
    part = AutoConfig.for_model("qwen2_5_vl").to_dict()
    refused(part, "no causal language model for model_type 'qwen2_5_vl_text'")
    refused({"model_type": "openelm", "hidden_size": 3}, "OpenELM calls hidden_size model_dim")
    refused({"model_type": "minicpm", "num_experts": 8}, "MiniCPM with experts .* is not supported")
    composed = tiny_model(None)
    save(composed, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run: holds a composed model; name it with model\.path"):
        read_language(str(tmp_path / "run"), "model.language.path", 96, [])


def test_a_folder_without_a_tokenizer_says_whose_it_uses(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "openelm"}')
    message = (
        r"has no tokenizer .*name another folder with model\.language\.tokenizer; openelm uses that of meta"
    )
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(str(tmp_path), "model.language.path")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"with model\.language\.tokenizer$"):
        read_tokenizer(str(tmp_path), "model.language.path")


def test_the_page_names_tested_families_and_templates_that_exist():
    page = (Path(__file__).resolve().parents[2] / "docs" / "languages.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if re.match(r"\| [A-Z]", line)]
    assert len(rows) == 20
    for _, model, kind, templates, *_ in rows:
        assert kind.strip(" `") in FAMILIES, model
        for template in re.findall("`(.+?)`", templates):
            assert template in {*TEMPLATES, "tokenizer"}, model
