import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image as Pictures
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tinymodal.compose.build import (
    RESAMPLE,
    build,
    fetch,
    load,
    locate,
    parameter_report,
    save,
    save_part,
)
from tinymodal.compose.pretrained import SHIPPED
from tinymodal.compose.spec import LanguageSpec, ModelSpec, VisionSpec
from tinymodal.compose.tiny import tiny_language, tiny_model, tiny_tokenizer, tiny_vision
from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.core.types import Image, Message, Sample, Text

PICTURE = Pictures.effect_noise((40, 30), 90).convert("RGB")


def sample(*parts) -> Sample:
    parts = parts or (Image(PICTURE), Text("what colour is it ?"))
    return Sample((Message("user", parts), Message("assistant", (Text("a red square"),))), "x:1")


@torch.no_grad()
def logits(composed, which=None):
    encoded = composed.encoder(which or sample())
    pixels = {"pixel_values": torch.stack([m.tiles[0] for m in encoded.media])} if encoded.media else {}
    return composed.model(input_ids=encoded.ids[None], **pixels).logits


def plain_words_tokenizer():
    """A tokenizer as a text-only checkpoint has it: no placeholder and no ChatML words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a red square what colour is it"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Tiny checkpoints of the real architectures, written by transformers as the published ones are."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    tokenizer = plain_words_tokenizer()

    # SmolLM2 and TinyLlama are llama, Qwen2.5 is qwen2, Phi-2 is phi (bias in its head, rows to spare).
    sizes = {
        "llama": len(tokenizer),
        "qwen2": len(tokenizer) + 64,
        "phi": len(tokenizer) + 64,
        "stablelm": len(tokenizer),
    }
    for kind, rows in sizes.items():
        values = tiny_language(kind, vocab_size=rows) | {
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": 0,
        }
        config = AutoConfig.for_model(**values, tie_word_embeddings=kind in ("llama", "qwen2"))
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    shutil.copytree(root / "llama", root / "no_tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (root / "no_tokenizer" / file).unlink()

    text = {
        k: v
        for k, v in tiny_language(vocab_size=99).items()
        if k not in ("model_type", "num_key_value_heads")
    }
    for whole, tower in (
        ("clip", "clip_vision_model"),
        ("siglip", "siglip_vision_model"),
        ("siglip2", "siglip2_vision_model"),
    ):
        vision = tiny_vision(tower)
        # As published: a head on top, which we do not keep.
        config = AutoConfig.for_model(whole, text_config=text, vision_config=vision)
        AutoModel.from_config(config).save_pretrained(root / whole)
        AutoModel.from_config(AutoConfig.for_model(**vision)).save_pretrained(root / tower)
    for kind in ("dinov2", "dinov2_with_registers"):
        AutoModel.from_config(AutoConfig.for_model(**tiny_vision(kind))).save_pretrained(root / kind)
    return root


TOWERS = (
    "clip",
    "clip_vision_model",
    "siglip",
    "siglip_vision_model",
    "siglip2",
    "siglip2_vision_model",
    "dinov2",
    "dinov2_with_registers",
)


def spec_of(checkpoints, tower="siglip", language="llama", template="chatml", **vision) -> ModelSpec:
    return ModelSpec(
        language=LanguageSpec(path=str(checkpoints / language), template=template),
        vision=VisionSpec(path=str(checkpoints / tower), **vision),
    )


@pytest.mark.parametrize("tower", TOWERS)
def test_a_pretrained_tower_sees_what_it_saw_in_transformers(checkpoints, tower):
    composed = build(spec_of(checkpoints, tower))
    pixels = torch.stack([composed.processor.prepare(PICTURE).tiles[0]])
    theirs = AutoModel.from_pretrained(checkpoints / tower)
    theirs = getattr(theirs, "vision_model", theirs).eval()
    inputs = {"pixel_values": pixels}
    if "siglip2" in tower:
        # 6 x 6 patches of 4 x 4 px, flattened as transformers' own image processor does.
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(1, 36, 48)
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(1, 36, dtype=torch.long),
            "spatial_shapes": torch.tensor([[6, 6]]),
        }
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True).hidden_states[-2]
        ours = composed.model.model.towers["image"](pixels).values
    torch.testing.assert_close(ours, expected[:, -36:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi", "stablelm"])
@pytest.mark.parametrize("template", ["chatml", "vicuna_v1"])
def test_a_pretrained_language_model_says_what_it_said_in_transformers(checkpoints, kind, template):
    composed = build(spec_of(checkpoints, language=kind, template=template))
    ids = torch.tensor([plain_words_tokenizer()("what colour is a red square")["input_ids"]])
    assert composed.tokenizer("what colour is a red square")["input_ids"] == ids[0].tolist()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoints / kind).eval()
    with torch.no_grad():
        expected, ours = theirs(ids).logits, composed.model(input_ids=ids).logits
    words = len(plain_words_tokenizer())  # the rows behind them were spare, and are the new tokens' now
    torch.testing.assert_close(ours[..., :words], expected[..., :words], rtol=0, atol=1e-6)
    assert logits(composed).isfinite().all()


def test_new_tokens_begin_as_the_mean_of_the_old(checkpoints):
    composed = build(spec_of(checkpoints, language="stablelm"))
    old = AutoModelForCausalLM.from_pretrained(checkpoints / "stablelm")
    for ours, theirs in (
        (composed.model.get_input_embeddings(), old.get_input_embeddings()),
        (composed.model.get_output_embeddings(), old.get_output_embeddings()),
    ):
        rows = len(theirs.weight)
        assert torch.equal(ours.weight[:rows], theirs.weight)
        assert len(ours.weight) == rows + 3 == len(composed.tokenizer)
        torch.testing.assert_close(ours.weight[rows:], theirs.weight.mean(0).expand(3, -1))


def test_rows_to_spare_are_used_and_nothing_is_resized(checkpoints):
    composed = build(spec_of(checkpoints, language="phi"))
    rows = len(plain_words_tokenizer()) + 64
    assert len(composed.model.get_input_embeddings().weight) == rows
    ids = [composed.tokenizer.convert_tokens_to_ids(w) for w in ("<image>", "<|im_start|>", "<|im_end|>")]
    assert ids == [rows - 64, rows - 63, rows - 62]
    table = composed.model.get_input_embeddings().weight
    old = torch.ones(rows, dtype=torch.bool)
    old[ids] = False
    torch.testing.assert_close(table[ids], table[old].mean(0).expand(3, -1))


def test_tokens_the_template_does_not_need_are_not_added(checkpoints):
    composed = build(spec_of(checkpoints, template="vicuna_v1"))
    assert len(composed.tokenizer) == len(plain_words_tokenizer()) + 1
    assert composed.encoder.stop_ids == (composed.tokenizer.eos_token_id,)
    assert composed.tokenizer.pad_token == "<|endoftext|>"


def test_tied_heads_stay_tied(checkpoints):
    composed = build(spec_of(checkpoints, language="llama"))
    assert composed.model.lm_head.weight is composed.model.get_input_embeddings().weight


@pytest.mark.parametrize("tower", ["clip", "siglip2", "dinov2"])
@pytest.mark.parametrize("language", ["llama", "phi"])
def test_a_saved_model_loads_equal(checkpoints, tower, language, tmp_path):
    composed = build(spec_of(checkpoints, tower, language, connector="pixel_shuffle"), seed=3)
    save(composed, tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(logits(composed), logits(again))
    assert torch.equal(composed.encoder(sample()).ids, again.encoder(sample()).ids)
    assert torch.equal(composed.encoder(sample()).labels, again.encoder(sample()).labels)
    assert again.encoder.stop_ids == composed.encoder.stop_ids
    assert again.model.generation_config.eos_token_id == list(composed.encoder.stop_ids)
    assert not again.model.training
    assert torch.equal(logits(build(ModelSpec(path=str(tmp_path / "model")))), logits(again))


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "chatml"])
def test_the_template_travels_with_the_model(template, tmp_path):
    composed = tiny_model(template=template)
    save(composed, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.encoder.template == composed.encoder.template
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    which = Sample(
        (Message("user", (Image(PICTURE), Text("what"))), Message("assistant", (Text("red"),))), "x"
    )
    rendered = composed.encoder.template.render(which.messages, iter(["<image>"]))
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == rendered.text


def test_the_tokenizers_own_template_and_one_of_your_own_travel_too(tmp_path):
    jinja = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    own = tiny_model(template="tokenizer", tokenizer=tiny_tokenizer(chat_template=jinja))
    (tmp_path / "mine.py").write_text(
        "from tinymodal.chat.template import ChatTemplate, Turn\n"
        "T = ChatTemplate(name='mine', turns={'system': Turn(), 'user': Turn('Q: ', '', ' '), "
        "'assistant': Turn('A:', ' ', '{eos}')}, stops=('{eos}',), control=('{eos}',))\n"
    )
    mine = tiny_model(template=f"{tmp_path}/mine.py:T")
    for name, composed in (("own", own), ("mine", mine)):
        save(composed, tmp_path / name)
        (tmp_path / "mine.py").unlink(missing_ok=True)
        again = load(tmp_path / name)
        for reply in (False, True):
            which = Sample(sample().messages[: 1 if reply else 2], "x")
            ours, theirs = composed.encoder(which, reply=reply), again.encoder(which, reply=reply)
            assert torch.equal(ours.ids, theirs.ids)
            if name == "own":
                assert torch.equal(ours.labels, theirs.labels)


def test_a_model_without_tower_reads_text_and_refuses_pictures(tmp_path):
    composed = tiny_model(None)
    save(composed, tmp_path / "model")
    text = sample(Text("what is it"))
    assert torch.equal(logits(composed, text), logits(load(tmp_path / "model"), text))
    with pytest.raises(
        DataError, match="x:1: picture 1: a picture is given, but this model has no vision tower"
    ):
        composed.encoder(sample())
    assert [row.part for row in parameter_report(composed.model)] == ["language", "embeddings", "head"]


@pytest.mark.parametrize("tower", ["clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers"])
def test_a_saved_tower_is_named_like_any_other(checkpoints, tower, tmp_path):
    composed = build(spec_of(checkpoints, tower, size_px=24, resize="pad"), seed=1)
    save_part(composed.model, "vision", tmp_path / "tower")
    assert {p.name for p in (tmp_path / "tower").iterdir()} == {"config.json", "model.safetensors"}
    again = build(spec_of(checkpoints, tmp_path / "tower", size_px=24, resize="pad"), seed=1)
    assert torch.equal(logits(composed), logits(again))


def test_a_saved_tower_of_ours_is_named_like_any_other(checkpoints, tmp_path):
    composed = tiny_model("tinymodal_tower", feature_layer=-1, seed=1)
    save_part(composed.model, "vision", tmp_path / "tower")
    for layer in (-1, -2):
        again = build(spec_of(checkpoints, tmp_path / "tower", feature_layer=layer), seed=2)
        ours, theirs = (c.model.model.towers["image"].state_dict() for c in (composed, again))
        assert theirs.keys() == ours.keys() if layer == -1 else theirs.keys() < ours.keys()
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_a_tower_saved_short_of_its_last_block_refuses_a_later_layer(checkpoints, tmp_path):
    composed = build(spec_of(checkpoints, "siglip", feature_layer=-2))
    save_part(composed.model, "vision", tmp_path / "tower")
    with pytest.raises(
        CheckpointError, match=r"model.vision.path: .* weights are not in the checkpoint and would be random"
    ):
        build(spec_of(checkpoints, tmp_path / "tower", feature_layer=-1))


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_saved_language_model_is_one_of_transformers(checkpoints, kind, tmp_path):
    composed = build(spec_of(checkpoints, language=kind), seed=1)
    save_part(composed.model, "language", tmp_path / "llm", composed.tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    text = sample(Text("what is it"))
    with torch.no_grad():
        expected = theirs(composed.encoder(text).ids[None]).logits
    assert torch.equal(logits(composed, text), expected)
    again = build(spec_of(checkpoints, language=tmp_path / "llm"), seed=1)
    assert torch.equal(logits(composed), logits(again))
    with pytest.raises(ValueError, match="saved with its tokenizer"):
        save_part(composed.model, "language", tmp_path / "llm")


def test_the_preparation_is_the_familys_then_the_checkpoints_then_the_recipes(checkpoints, tmp_path):
    how = build(spec_of(checkpoints, "siglip")).processor.image_processor.preparation
    assert (how.mean, how.size_px, how.resample, how.resize) == (
        (0.5, 0.5, 0.5),
        (24, 24),
        "bicubic",
        "square",
    )
    shutil.copytree(checkpoints / "siglip", tmp_path / "tower")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "do_normalize": True}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(said))
    spec = spec_of(checkpoints, tmp_path / "tower", size_px=32, resize="pad", max_pixels=5000)
    how = build(spec).processor.image_processor.preparation
    assert (how.mean, how.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (how.size_px, how.resample, how.resize, how.max_pixels) == ((32, 32), RESAMPLE[2], "pad", 5000)


def test_parameters_are_reported_by_part_and_add_up(checkpoints):
    for language in ("llama", "phi"):
        model = build(spec_of(checkpoints, language=language)).model
        rows = parameter_report(model)
        assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
        assert sum(row.bytes for row in rows) == 4 * sum(row.parameters for row in rows)
        assert ("head" in [row.part for row in rows]) == (language == "phi")


def test_dtype_is_what_is_asked_for_whatever_was_saved(tmp_path):
    composed = tiny_model()
    composed.model.to(torch.bfloat16)
    save(composed, tmp_path / "model")
    assert load(tmp_path / "model").model.dtype == torch.float32
    assert load(tmp_path / "model", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_run_folder_stands_for_its_model(tmp_path):
    composed = tiny_model()
    save(composed, tmp_path / "run" / "model")
    assert torch.equal(logits(load(tmp_path / "run")), logits(composed))


def test_saving_again_replaces_and_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    save(tiny_model(seed=1), tmp_path / "model")
    save(tiny_model(seed=2), tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), logits(tiny_model(seed=2)))
    broken = tiny_model(seed=3)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(broken.processor), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save(broken, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), logits(tiny_model(seed=2)))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_weights_do_not_depend_on_whether_a_part_is_pretrained(checkpoints):
    """The connector's first numbers are the seed's."""
    one, other = build(spec_of(checkpoints), seed=4), build(spec_of(checkpoints), seed=4)
    for a, b in zip(
        one.model.model.connectors.parameters(), other.model.model.connectors.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def edit(folder: Path, name: str, **values) -> Path:
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**document, **values}))
    return folder


@pytest.fixture
def broken(checkpoints, tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoints / name, tmp_path / name))

    return copy


def test_an_incomplete_checkpoint_is_refused_not_filled_with_random_numbers(checkpoints, broken):
    from safetensors.torch import load_file, save_file

    for name, lost in (
        ("siglip", "vision_model.encoder.layers.0.mlp.fc1.weight"),
        ("llama", "model.norm.weight"),
    ):
        folder = broken(name)
        weights = load_file(folder / "model.safetensors")
        del weights[lost]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        key = {"siglip": "tower", "llama": "language"}[name]
        with pytest.raises(
            CheckpointError,
            match=f"1 weights are not in the checkpoint and would be random, first .*{lost[-20:]}",
        ):
            build(spec_of(checkpoints, **{key: folder}))


def test_what_is_wrong_with_a_part_is_one_line_that_names_its_key(checkpoints, broken, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    truncated = broken("clip")
    (truncated / "model.safetensors").write_bytes((truncated / "model.safetensors").read_bytes()[:999])
    not_json = broken("dinov2")
    (not_json / "config.json").write_text("{")
    foreign = broken("siglip")
    edit(foreign, "config.json", model_type="bert")
    bad_tokenizer = broken("qwen2")
    (bad_tokenizer / "tokenizer.json").write_text("{}")
    small = broken("phi")
    shutil.rmtree(small)
    shutil.copytree(checkpoints / "stablelm", small)
    tiny_tokenizer(["x" * i for i in range(99)]).save_pretrained(small)
    cases = {
        "tower that does not exist": (
            dict(tower="nowhere"),
            "model.vision.path: the folder .*nowhere does not exist",
        ),
        "tower that is a file": (
            dict(tower=tmp_path / "file"),
            "model.vision.path: .*file is a file; expected a folder",
        ),
        "tower without config": (
            dict(tower=tmp_path / "empty"),
            "model.vision.path: .*empty: has no config.json",
        ),
        "tower cut short": (dict(tower=truncated), "model.vision.path: .*clip: "),
        "tower with a bad config": (dict(tower=not_json), "model.vision.path: .*config.json is not JSON"),
        "tower nobody knows": (
            dict(tower=foreign),
            "model.vision.path: .*model_type 'bert'",
        ),
        "language without tokenizer": (
            dict(language="no_tokenizer"),
            "model.language.path: .*no_tokenizer has no tokenizer .*name another folder with "
            "model.language.tokenizer",
        ),
        "language that does not exist": (
            dict(language="nowhere"),
            "model.language.path: the folder .*nowhere does not exist",
        ),
        "a tower as language": (
            dict(language=broken("siglip_vision_model")),
            "model.language.path: .* has no tokenizer",
        ),
        "bad tokenizer": (dict(language=bad_tokenizer), "model.language.path: .*the tokenizer: "),
        "tokenizer of another model": (dict(language=small), "they are not of one model"),
    }
    for name, (parts, words) in cases.items():
        with pytest.raises(CheckpointError, match=words) as raised:
            build(spec_of(checkpoints, **parts))
        assert "\n" not in str(raised.value), name


def test_what_is_wrong_with_a_spec_is_one_line_that_names_its_key(checkpoints):
    cases = {
        "no such connector": (dict(connector="mpl"), "model: unknown connector 'mpl'.*did you mean 'mlp'"),
        "no such option": (dict(options={"deep": 2}), "model: unknown option 'deep'"),
        "ratio that does not fit": (
            dict(connector="pixel_shuffle", options={"ratio": 4}),
            "ratio 4 needs a grid divisible",
        ),
        "no such layer": (dict(feature_layer=-9), "feature_layer -9, but a tower of 3 blocks"),
        "template": (dict(template="chatlm"), "unknown template 'chatlm'"),
        "template of the tokenizer": (
            dict(template="tokenizer"),
            "model.language.template: the tokenizer has no chat template",
        ),
    }
    for name, (parts, words) in cases.items():
        with pytest.raises(RecipeError, match=words) as raised:
            build(spec_of(checkpoints, **parts))
        assert "\n" not in str(raised.value), name
    tokenizer = str(checkpoints / "llama")
    vision = {"model_type": "siglip_vision_model"}
    configs = {
        "unknown family": (dict(model_type="lama"), None, "model.language.config: .*'lama'"),
        "unknown key": (
            tiny_language() | {"hidden_sise": 8},
            None,
            "unknown key 'hidden_sise' .*did you mean 'hidden_size'",
        ),
        "too few rows": (
            tiny_language(vocab_size=8),
            None,
            "model.language.config.vocab_size is 8, but the tokenizer has",
        ),
        "wrong kind": (tiny_language() | {"hidden_size": "big"}, None, "model.language.config: "),
        "not a language model": (tiny_vision(), None, "no causal language model"),
        "unknown tower": (
            tiny_language(),
            dict(model_type="siglip_vision"),
            "did you mean 'siglip_vision_model'",
        ),
        "unknown tower key": (
            tiny_language(),
            vision | {"imagesize": 8},
            "model.vision.config: unknown key 'imagesize'",
        ),
    }
    for name, (language, vision_config, words) in configs.items():
        language.pop("vocab_size", None) if name != "too few rows" else None
        spec = ModelSpec(
            language=LanguageSpec(config=language, tokenizer=tokenizer),
            vision=vision_config and VisionSpec(config=vision_config),
        )
        with pytest.raises(RecipeError, match=words) as raised:
            build(spec)
        assert "\n" not in str(raised.value), name


def test_loading_something_else_says_what_it_is(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match="holds a model of type 'llama', not a composed one; compose it in a recipe"
    ):
        load(checkpoints / "llama")
    with pytest.raises(CheckpointError, match=r"the folder .*runs/nothing/here does not exist"):
        load(tmp_path / "runs/nothing/here")
    with pytest.raises(CheckpointError, match=r"no folder 'org/name' here .* and the Hub does not give it: "):
        load("org/name")
    save(tiny_model(), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"model: "):
        load(tmp_path / "model")


def test_shipped_parts_have_short_names(monkeypatch, tmp_path):
    monkeypatch.setattr("tinymodal.compose.pretrained.files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="'starter' is not in this installation"):
        locate("starter")
    save(tiny_model(), tmp_path / "starter" / "model")
    assert fetch("starter") == tmp_path / SHIPPED["starter"]
    assert torch.equal(logits(load("starter")), logits(tiny_model()))
    assert locate("some/folder") == "some/folder"


def test_a_hub_name_is_fetched_once_and_without_what_is_not_needed(monkeypatch, tmp_path):
    calls = []

    def snapshot_download(name, **how):
        calls.append((name, how["allow_patterns"][-1]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert fetch("org/name") == tmp_path
    assert calls == [("org/name", "*.safetensors"), ("org/name", "*.bin")]


@pytest.mark.slow
def test_a_saved_model_loads_in_a_process_without_our_package(tmp_path):
    composed = tiny_model("clip_vision_model")
    save(composed, tmp_path / "model")
    encoded = composed.encoder(sample())
    torch.save({"ids": encoded.ids[None], "pixels": encoded.media[0].tiles[0][None]}, tmp_path / "in.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForImageTextToText\n"
        f"x = torch.load({str(tmp_path / 'in.pt')!r}, weights_only=True)\n"
        f"folder, out = {str(tmp_path / 'model')!r}, {str(tmp_path / 'out.pt')!r}\n"
        "m = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "torch.save(m(input_ids=x['ids'], pixel_values=x['pixels']).logits, out)\n"
        "sys.exit('tinymodal' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), logits(composed))


def test_marks_and_merges_that_no_picture_would_meet_are_refused():
    cases = {
        "mark 'tile_start' is never written with resize 'square'": {"marks": ("tile_start",)},
        "merge 'spatial' puts tiles together, and resize 'square'": {"merge": "spatial"},
        "never written with resize 'square' and connector 'perceiver'": {
            "connector": "perceiver",
            "marks": ("newline",),
        },
        "tiles are merged by their rows and columns of tokens": {
            "resize": "tiles",
            "merge": "spatial",
            "connector": "perceiver",
        },
    }
    for words, sight in cases.items():
        connector = sight.pop("connector", "mlp")
        with pytest.raises(RecipeError, match=words):
            tiny_model(connector=connector, sight=sight)


def test_a_tower_says_how_its_pictures_are_normalised_or_is_refused(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints / "siglip", tmp_path / "siglip"))
    file = folder / "preprocessor_config.json"
    for said, mean, std in (
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": None}, (0.1, 0.2, 0.3), (0.5,) * 3),
    ):
        file.write_text(json.dumps(said))
        how = build(spec_of(checkpoints, tower=folder)).processor.image_processor.preparation
        assert (how.mean, how.std) == (mean, std)
    file.write_text(json.dumps({"image_mean": 0.5}))
    with pytest.raises(CheckpointError, match=r"image_mean is 0\.5, expected three numbers"):
        build(spec_of(checkpoints, tower=folder))
