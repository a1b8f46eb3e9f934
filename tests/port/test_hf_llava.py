"""transformers' own Llava and LlavaNext: its class is the reference, on the same pictures and texts."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessor,
)

from tests.port.foreign import SIZES, a_clip, a_llama, a_siglip, numbers
from tinymodal.compose.build import load
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.core.errors import CheckpointError
from tinymodal.port import hf_llava
from tinymodal.port.adopt import adopt
from tinymodal.port.source import Extras

POINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]


def a_folder(folder, tower=None, text=None, processor=None, next_=False, **keys):
    """What ``save_pretrained`` of transformers' model and processor writes."""
    tokenizer = tiny_tokenizer()
    config = {
        "text_config": text or a_llama(tokenizer, more_rows=3).config,
        "vision_config": (tower or a_clip()).config,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        **({"image_grid_pinpoints": POINTS} if next_ else {}),
        **keys,
    }
    known = {
        "patch_size": 4,
        "vision_feature_select_strategy": keys.get("vision_feature_select_strategy", "default"),
    }
    if next_:
        model = numbers(LlavaNextForConditionalGeneration(LlavaNextConfig(**config)), 1)
        shown = LlavaNextImageProcessor(size={"shortest_edge": 24}, crop_size=24, image_grid_pinpoints=POINTS)
        whole = LlavaNextProcessor(shown, tokenizer, num_additional_image_tokens=1, **known)
    else:
        model = numbers(LlavaForConditionalGeneration(LlavaConfig(**config)), 1)
        shown = processor or CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)
        whole = LlavaProcessor(
            shown, tokenizer, num_additional_image_tokens=0 if tower is not None else 1, **known
        )
    model.save_pretrained(folder)
    whole.save_pretrained(folder)
    return folder


def adopted(tmp_path, **what):
    return adopt(a_folder(tmp_path / "source", **what), tmp_path / "out")


def assert_equal(report):
    assert report.parity.passed
    assert len(report.parity.rows) == 4
    assert report.parity.largest <= 1e-5
    assert max(row.pixels for row in report.parity.rows) < 1e-6
    assert len({row.texts[0] for row in report.parity.rows}) > 1  # the model does look


def test_llava_is_equal_in_logits_and_text(tmp_path):
    report = adopted(tmp_path)
    assert_equal(report)
    assert (report.family, report.template) == ("HF Llava", "vicuna_v1")
    assert report.made == {}
    assert report.dropped == {"behind feature layer -2: never reached": 18}
    assert load(tmp_path / "out").processor.image_processor.preparation.resize == "crop"


def test_llava_next_is_equal_in_logits_and_text(tmp_path):
    report = adopted(tmp_path, next_=True)
    assert_equal(report)
    assert report.family == "HF LlavaNext"
    assert [row.tokens for row in report.parity.rows] == [11, 180, 177, 329]


@pytest.mark.parametrize(
    "keys",
    [
        {"vision_feature_select_strategy": "full", "projector_hidden_act": "relu"},
        {"vision_feature_layer": [-1, 1]},
    ],
    ids=["class-token-and-relu", "two-layers"],
)
def test_every_choice_of_the_config_is_kept(tmp_path, keys):
    assert_equal(adopted(tmp_path, **keys))


def test_a_missing_bias_is_made_of_zeros_and_listed(tmp_path):
    report = adopted(tmp_path, multimodal_projector_bias=False)
    assert_equal(report)
    made = "zeros: the source has no such bias"
    assert report.made == {f"model.connectors.image.proj.{i}.bias": made for i in (0, 2)}


def test_a_processor_that_pads_is_followed(tmp_path):
    shown = LlavaImageProcessor(size={"shortest_edge": 24}, crop_size=24, do_pad=True)
    assert_equal(adopted(tmp_path, processor=shown))
    assert load(tmp_path / "out").processor.image_processor.preparation.resize == "pad"


def test_a_tower_without_class_token_loses_a_patch_if_it_did_there(tmp_path):
    """Strategy 'default' drops the first token of any tower; SigLIP's first is a patch."""
    shown = SiglipImageProcessor(size={"height": 24, "width": 24})
    report = adopted(tmp_path, tower=a_siglip(), processor=shown)
    assert load(tmp_path / "out").processor.image_processor.typical().tokens == 35
    assert report.parity.passed


def test_siglip_as_a_whole_is_equal(tmp_path):
    shown = SiglipImageProcessor(size={"height": 24, "width": 24})
    keys = {"vision_feature_select_strategy": "full"}
    assert_equal(adopted(tmp_path, tower=a_siglip(), processor=shown, **keys))
    assert load(tmp_path / "out").processor.image_processor.preparation.resize == "square"


def test_other_language_models_and_tied_heads_are_equal(tmp_path):
    values = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": len(tiny_tokenizer())}
    text = Qwen2Config(**values, tie_word_embeddings=True)
    report = adopted(tmp_path, text=text, tie_word_embeddings=True)
    assert_equal(report)
    assert report.template == "chatml"


@pytest.mark.parametrize("version", ["4.36", "5"])
def test_names_of_other_versions_of_transformers_are_known(tmp_path, version):
    folder = a_folder(tmp_path / "source", next_=True)
    adopt(folder, tmp_path / "plain", forward=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if version == "4.36":
        renamed = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in tensors.items()}
        renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    else:
        renamed = {}
        for key, tensor in tensors.items():
            key = key.replace("language_model.model.", "language_model.")
            renamed["lm_head.weight" if key == "language_model.lm_head.weight" else f"model.{key}"] = tensor
    save_file(renamed, file, metadata={"format": "pt"})
    adopt(folder, tmp_path / "out", forward=False)
    ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("next_", [False, True], ids=["llava", "llava_next"])
def test_a_folder_without_processor_is_compared_on_our_pixels(tmp_path, next_):
    folder = a_folder(tmp_path / "source", next_=next_)
    (folder / "processor_config.json").unlink()
    report = adopt(folder, tmp_path / "out")
    assert report.parity.passed


def test_the_forward_pass_can_be_left_out_and_the_template_chosen(tmp_path):
    folder = a_folder(tmp_path / "source")
    report = adopt(folder, tmp_path / "out", Extras(template="chatml"), forward=False)
    assert report.parity is None
    assert report.arrived == 62
    assert report.template == load(tmp_path / "out").model.config.chat_template == "chatml"


def test_a_model_that_says_something_else_is_not_written(tmp_path, monkeypatch):
    """The proof can fail: with one matrix negated on the way, nothing appears."""
    folder = a_folder(tmp_path / "source")
    read_folder = hf_llava.read_folder

    def negated(path):
        files = read_folder(path)
        for file in files:
            file.tensors["multi_modal_projector.linear_2.weight"].neg_()
        return files

    monkeypatch.setattr(hf_llava, "read_folder", negated)
    with pytest.raises(
        CheckpointError, match=r"and transformers do not agree within 0.0001: .*; nothing was written"
    ):
        adopt(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
