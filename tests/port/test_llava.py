"""LLaVA 1, 1.5, 1.6 and TinyLLaVABench against their forward, restated."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig, MistralForCausalLM

from tests.port.foreign import (
    SIZES,
    WIDTH,
    Restated,
    a_clip,
    a_llama,
    a_phi,
    a_siglip,
    a_tokenizer,
    an_mlp,
    compared,
    keyed,
    numbers,
    pixels,
    write,
)
from tinymodal.compose.build import load
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.core.errors import CheckpointError
from tinymodal.port.adopt import REPORT, adopt
from tinymodal.port.llava import own_language
from tinymodal.port.parity import cases, prepared
from tinymodal.port.source import Extras

WORDS = ("model.language_model.embed_tokens.weight", "lm_head.weight")

LLAVA_KEYS = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False,
}


def flat(language, tower="tower", **keys):
    """The config of LLaVA: the language model's values and its own on one level."""
    return {**language.config.to_dict(), **LLAVA_KEYS, "mm_vision_tower": str(tower), **keys}


def projector(module, prefix="model.mm_projector."):
    return keyed(prefix, module)


def seeing(clip, connector, layer=-2, first=1):
    def see(values):
        return connector(clip(values, output_hidden_states=True).hidden_states[layer][:, first:])

    return see


@pytest.fixture
def clip_folder(tmp_path):
    clip = a_clip()
    clip.save_pretrained(tmp_path / "clip")
    return clip, tmp_path / "clip"


def test_a_whole_llava_1_5_without_its_tower_says_what_llava_says(tmp_path, clip_folder):
    clip, folder = clip_folder
    tokenizer = a_tokenizer()
    language, mlp = a_llama(tokenizer), an_mlp()
    source = write(
        tmp_path / "llava",
        flat(language),
        tokenizer,
        pytorch_model={
            **keyed("", language),
            **projector(mlp),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
    )

    report = adopt(source, tmp_path / "out", Extras(vision=folder))

    parity = compared(
        tmp_path / "out", Restated(language, lambda p: pixels(p, "pad"), seeing(clip, mlp), tokenizer)
    )
    assert parity.passed, parity.rows
    assert parity.largest < 1e-5
    assert report.template == "vicuna_v1"
    assert report.dropped == {"behind feature layer -2: never reached": 18, "computed, not learned": 1}
    assert load(tmp_path / "out").model.config.chat_template == "vicuna_v1"
    assert report.made == dict.fromkeys(WORDS, "1 rows of new words, the mean of the others")


def test_weights_may_lie_in_several_files(tmp_path, clip_folder):
    clip, folder = clip_folder
    tokenizer = a_tokenizer()
    language, mlp = a_llama(tokenizer), an_mlp()
    words = keyed("", language)
    source = write(tmp_path / "llava", flat(language), tokenizer)
    shards = {"pytorch_model-00001-of-00002.bin": words, "pytorch_model-00002-of-00002.bin": projector(mlp)}
    for name, tensors in shards.items():
        torch.save(tensors, source / name)
    index = {key: name for name, tensors in shards.items() for key in tensors}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))

    adopt(source, tmp_path / "out", Extras(vision=folder))

    restated = Restated(language, lambda p: pixels(p, "pad"), seeing(clip, mlp), tokenizer)
    assert compared(tmp_path / "out", restated).passed
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.bin, which is not there"):
        adopt(source, tmp_path / "other", Extras(vision=folder))


def test_llava_1_has_one_matrix_and_crops_and_stands_pictures_between_two_words(tmp_path, clip_folder):
    clip, folder = clip_folder
    tokenizer = a_tokenizer("<im_patch>", "<im_start>", "<im_end>")
    language = a_llama(tokenizer)
    linear = numbers(nn.Linear(WIDTH, WIDTH), 3)
    keys = {"mm_projector_type": "linear", "image_aspect_ratio": None, "mm_use_im_start_end": True}
    source = write(
        tmp_path / "llava",
        flat(language, **keys),
        tokenizer,
        pytorch_model={**keyed("", language), **projector(linear)},
    )

    report = adopt(source, tmp_path / "out", Extras(vision=folder))

    words = language.get_input_embeddings().weight
    start, end = (words[tokenizer.convert_tokens_to_ids(w)][None, None] for w in ("<im_start>", "<im_end>"))
    see = seeing(clip, linear)
    between = Restated(
        language, lambda p: pixels(p, "crop"), lambda v: torch.cat((start, see(v), end), 1), tokenizer
    )
    assert compared(tmp_path / "out", between).passed
    assert report.made["model.marks.image.weight (start)"] == "the embedding of '<im_start>'"


def test_a_projector_alone_goes_over_its_language_model(tmp_path, clip_folder):
    clip, folder = clip_folder
    tokenizer = a_tokenizer()
    language, mlp = a_llama(tokenizer), an_mlp()
    language.save_pretrained(tmp_path / "vicuna")
    tokenizer.save_pretrained(tmp_path / "vicuna")
    source = write(tmp_path / "pretrain", flat(language), mm_projector=projector(mlp))

    report = adopt(source, tmp_path / "out", Extras(language=tmp_path / "vicuna", vision=folder))

    restated = Restated(language, lambda p: pixels(p, "pad"), seeing(clip, mlp), tokenizer)
    assert compared(tmp_path / "out", restated).passed
    assert report.family == "LLaVA, projector over vicuna"
    with pytest.raises(CheckpointError, match="was trained over a language model; give it with --language"):
        adopt(source, tmp_path / "other", Extras(vision=folder))


def test_two_new_rows_in_a_projectors_file_are_the_words_around_a_picture(tmp_path, clip_folder):
    clip, folder = clip_folder
    tokenizer = a_tokenizer()
    language, mlp = a_llama(tokenizer), an_mlp()
    language.save_pretrained(tmp_path / "vicuna")
    tokenizer.save_pretrained(tmp_path / "vicuna")
    rows = torch.randn(2, WIDTH)
    both = {**projector(mlp), "model.embed_tokens.weight": rows}
    source = write(tmp_path / "pretrain", flat(language, mm_use_im_start_end=True), mm_projector=both)

    adopt(source, tmp_path / "out", Extras(language=tmp_path / "vicuna", vision=folder))

    see = seeing(clip, mlp)
    between = Restated(
        language,
        lambda p: pixels(p, "pad"),
        lambda v: torch.cat((rows[:1][None], see(v), rows[1:][None]), 1),
        tokenizer,
    )
    assert compared(tmp_path / "out", between).passed


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"]
)
def test_a_lora_adapter_is_merged_as_peft_computes_it(tmp_path, clip_folder, settings):
    clip, folder = clip_folder
    tokenizer = a_tokenizer()
    language, mlp = a_llama(tokenizer), an_mlp()
    language.save_pretrained(tmp_path / "vicuna")
    tokenizer.save_pretrained(tmp_path / "vicuna")
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], **settings)
    adapted = get_peft_model(language, lora)
    for name, p in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            p.data += 0.1 * torch.randn_like(p)
    adapted.save_pretrained(tmp_path / "lora")
    source = write(
        tmp_path / "lora",
        flat(language),
        non_lora_trainables=projector(mlp, "base_model.model.model.mm_projector."),
    )

    report = adopt(source, tmp_path / "out", Extras(language=tmp_path / "vicuna", vision=folder))

    restated = Restated(adapted.eval(), lambda p: pixels(p, "pad"), seeing(clip, mlp), tokenizer)
    parity = compared(tmp_path / "out", restated)
    assert parity.passed
    assert parity.largest < 1e-5
    halves = report.dropped["merged into the matrix it was trained for"]
    assert halves == (18 if "use_dora" in settings else 12)


def test_llava_1_6_holds_its_tower_and_merges_tiles_as_transformers_does(tmp_path, clip_folder):
    """transformers' LlavaNext is the same arithmetic, but for pinpoints: LLaVA's are (width, height)."""
    _, folder = clip_folder
    tokenizer = tiny_tokenizer()  # transformers' class needs a row for <image>
    points = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
    language, clip = a_llama(tokenizer), a_clip(seed=5)
    config = LlavaNextConfig(
        text_config=language.config,
        vision_config=clip.config,
        image_grid_pinpoints=points,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    whole = numbers(LlavaNextForConditionalGeneration(config), 7)
    inner = whole.model
    names = {0: inner.multi_modal_projector.linear_1, 2: inner.multi_modal_projector.linear_2}
    tensors = keyed("model.", inner.language_model) | keyed("lm_head.", whole.lm_head)
    tensors |= keyed("model.vision_tower.vision_tower.vision_model.", inner.vision_tower)
    tensors |= {
        k: v for i, layer in names.items() for k, v in keyed(f"model.mm_projector.{i}.", layer).items()
    }
    tensors["model.image_newline"] = inner.image_newline.data
    keys = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[w, h] for h, w in points],
    }
    source = write(tmp_path / "llava", flat(language, **keys), tokenizer, pytorch_model=tensors)

    adopt(source, tmp_path / "out", Extras(vision=folder))

    ours = load(tmp_path / "out")
    for case in cases()[1:]:
        inputs = prepared(ours, case)
        tiles = [ours.processor.prepare(p).tiles for p in case.pictures]
        most = max(map(len, tiles))
        padded = [torch.stack([*t, *[torch.zeros_like(t[0])] * (most - len(t))]) for t in tiles]
        sizes = torch.tensor([[p.height, p.width] for p in case.pictures])
        with torch.no_grad():
            theirs = whole.eval()(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                pixel_values=torch.stack(padded),
                image_sizes=sizes,
            ).logits
            mine = ours.model(**inputs).logits
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_a_newline_that_is_never_written_is_listed_as_unused(tmp_path, clip_folder):
    _, folder = clip_folder
    tokenizer = a_tokenizer()
    language, mlp = a_llama(tokenizer), an_mlp()
    tensors = {**keyed("", language), **projector(mlp), "model.image_newline": torch.randn(WIDTH)}
    source = write(tmp_path / "llava", flat(language), tokenizer, pytorch_model=tensors)
    report = adopt(source, tmp_path / "out", Extras(vision=folder))
    assert report.dropped["tiles are merged 'flat', without newline"] == 1


def test_a_mistral_is_told_by_the_class_in_the_config(tmp_path, clip_folder):
    clip, folder = clip_folder
    tokenizer = a_tokenizer()
    values = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    language = numbers(MistralForCausalLM(MistralConfig(**values, pad_token_id=None)), 4)
    mlp = an_mlp()
    keys = {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}
    source = write(
        tmp_path / "llava",
        flat(language, **keys),
        tokenizer,
        pytorch_model={**keyed("", language), **projector(mlp)},
    )

    report = adopt(source, tmp_path / "out", Extras(vision=folder))

    restated = Restated(language, lambda p: pixels(p, "pad"), seeing(clip, mlp), tokenizer)
    assert compared(tmp_path / "out", restated).passed
    assert report.template == "mistral_instruct"


def test_tinyllavabench_cuts_siglip_before_its_last_block_and_drops_no_patch(tmp_path):
    siglip, tokenizer = a_siglip(), a_tokenizer("<|endoftext|>")
    siglip.save_pretrained(tmp_path / "siglip")
    tokenizer.eos_token = "<|endoftext|>"
    language, mlp = a_phi(tokenizer), an_mlp()
    tower = keyed("model.vision_tower.vision_tower.vision_model.", siglip)
    tower = {k: v for k, v in tower.items() if "layers.2." not in k and ".head." not in k}
    keys = {
        "model_type": "tiny_llava_phi",
        "architectures": ["TinyLlavaPhiForCausalLM"],
        "image_aspect_ratio": "square",
    }
    source = write(
        tmp_path / "bench",
        flat(language, **keys),
        tokenizer,
        pytorch_model={**keyed("", language), **projector(mlp), **tower},
    )

    report = adopt(source, tmp_path / "out", Extras(vision=tmp_path / "siglip"))

    half = (0.5, 0.5, 0.5)
    restated = Restated(
        language, lambda p: pixels(p, "square", 24, half, half), seeing(siglip, mlp, first=0), tokenizer
    )
    assert compared(tmp_path / "out", restated).passed
    assert (report.family, report.template) == ("TinyLLaVABench, whole", "phi")
    assert load(tmp_path / "out").processor.image_processor.typical().tokens == 36


def test_the_towers_that_llava_names_are_known_and_others_are_asked_for(tmp_path):
    tokenizer = a_tokenizer()
    language, mlp = a_llama(tokenizer), an_mlp()
    weights = {**keyed("", language), **projector(mlp)}
    named = "openai/clip-vit-large-patch14-336"
    source = write(tmp_path / "llava", flat(language, named), tokenizer, pytorch_model=weights)
    with pytest.raises(
        CheckpointError, match=f"does not hold its tower '{named}'; name the tower's folder with --vision"
    ):
        adopt(source, tmp_path / "out")
    other = write(tmp_path / "other", flat(language, "my/tower"), tokenizer, pytorch_model=weights)
    with pytest.raises(CheckpointError, match="'my/tower' is not among those whose config is known"):
        adopt(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_arrives_as_half_precision(tmp_path, clip_folder):
    clip, folder = clip_folder
    tokenizer = a_tokenizer()
    language, mlp = a_llama(tokenizer), an_mlp()
    weights = {k: v.to(torch.bfloat16) for k, v in {**keyed("", language), **projector(mlp)}.items()}
    source = write(tmp_path / "llava", flat(language), tokenizer, pytorch_model=weights)

    adopt(source, tmp_path / "out", Extras(vision=folder))

    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(saved["model.connectors.image.proj.0.weight"], weights["model.mm_projector.0.weight"])
    assert saved["model.towers.image.backbone.pre_layrnorm.weight"].dtype == torch.float32
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["arrived_bit_for_bit"] == len(saved)
    assert math.prod(report["tensors"][0]["shape"]) > 0
    for part in (language, mlp):  # not .to(): the computed buffers stay exact
        part.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in part.state_dict().items()})
    restated = Restated(language, lambda p: pixels(p, "pad"), seeing(clip, mlp), tokenizer)
    assert compared(tmp_path / "out", restated).passed


def test_ways_to_resize_that_nobody_knows_are_refused(tmp_path, clip_folder):
    _, folder = clip_folder
    tokenizer = a_tokenizer()
    language = a_llama(tokenizer)
    for keys, words in (
        (
            {"image_aspect_ratio": "anyres_max_9"},
            "image_aspect_ratio 'anyres_max_9' with image_grid_pinpoints None",
        ),
        (
            {"image_aspect_ratio": "anyres"},
            "image_aspect_ratio 'anyres' with image_grid_pinpoints None is not known",
        ),
        ({"mm_projector_type": "cabstract"}, "the projector 'cabstract' is not known"),
        (
            {"architectures": ["LlavaRwkvForCausalLM"]},
            "the class LlavaRwkvForCausalLM names no known language model",
        ),
    ):
        tensors = {**keyed("", language), **projector(an_mlp())}
        source = write(tmp_path / "llava", flat(language, **keys), tokenizer, pytorch_model=tensors)
        with pytest.raises(CheckpointError, match=words):
            adopt(source, tmp_path / "out", Extras(vision=folder))


def test_stablelms_older_keys_are_translated():
    config = {
        "architectures": ["TinyLlavaStablelmForCausalLM"],
        "rope_pct": 0.5,
        "norm_eps": 1e-4,
        "hidden_size": 64,
    }
    words = own_language(config)
    assert (words.model_type, words.hidden_size, words.layer_norm_eps) == ("stablelm", 64, 1e-4)
    assert words.rope_parameters["partial_rotary_factor"] == 0.5
