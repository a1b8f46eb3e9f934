"""TinyLLaVA Factory's three forms against its forward, restated."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Dinov2Config,
    Dinov2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.port.foreign import (
    HALF,
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
from tinymodal.core.errors import CheckpointError
from tinymodal.model.openelm import OpenELMConfig, OpenELMForCausalLM
from tinymodal.port.adopt import adopt


def config_of(language, tower, **keys):
    return {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "text_config": {**language.config.to_dict(), "model_type": language.config.model_type},
        "vision_config": {**tower.config.to_dict(), "model_type": tower.config.model_type},
        "connector_type": "mlp2x_gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
        **keys,
    }


def whole(language, tower, connector, vision="vision_tower._vision_tower.vision_model."):
    return (
        keyed("language_model.", language) | keyed(vision, tower) | keyed("connector._connector.", connector)
    )


def staged(folder, config, tokenizer, language, tower, connector):
    """The three folders; only parameters, as ``named_parameters`` gives them."""
    write(folder, config, tokenizer)
    write(folder / "language_model", config["text_config"], pytorch_model=language)
    write(folder / "vision_tower", config["vision_config"], pytorch_model=tower)
    write(folder / "connector", {}, pytorch_model=connector)
    return folder


def seeing(tower, connector, first=1):
    def see(values):
        return connector(tower(values, output_hidden_states=True).hidden_states[-2][:, first:])

    return see


def siglip_pixels(picture):
    return pixels(picture, "square", 24, HALF, HALF)


@pytest.fixture
def parts():
    tokenizer = a_tokenizer("<|endoftext|>")
    tokenizer.eos_token = "<|endoftext|>"
    return a_phi(tokenizer), a_siglip(), an_mlp(), tokenizer


def test_a_whole_folder_with_siglip_loses_the_first_patch_as_it_did(tmp_path, parts):
    language, siglip, mlp, tokenizer = parts
    source = write(
        tmp_path / "tiny", config_of(language, siglip), tokenizer, pytorch_model=whole(language, siglip, mlp)
    )

    report = adopt(source, tmp_path / "out")

    parity = compared(tmp_path / "out", Restated(language, siglip_pixels, seeing(siglip, mlp), tokenizer))
    assert parity.passed, parity.rows
    assert parity.largest < 1e-5
    assert (report.family, report.template) == ("TinyLLaVA Factory, whole", "phi")
    assert report.notes == ["the first patch of each picture is left out, as TinyLLaVA did (drop_first)"]
    assert load(tmp_path / "out").processor.image_processor.typical().tokens == 35


def test_the_three_folders_of_a_stage_are_one_model(tmp_path, parts):
    language, siglip, mlp, tokenizer = parts
    source = staged(
        tmp_path / "pretrain",
        config_of(language, siglip),
        tokenizer,
        dict(language.named_parameters()),
        keyed("vision_model.", siglip),
        keyed("_connector.", mlp),
    )

    report = adopt(source, tmp_path / "out")

    restated = Restated(language, siglip_pixels, seeing(siglip, mlp), tokenizer)
    assert compared(tmp_path / "out", restated).passed
    assert report.family == "TinyLLaVA Factory, three folders"
    (source / "connector" / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="connector: holds no weights"):
        adopt(source, tmp_path / "other")


def test_a_lora_run_keeps_the_base_under_other_names_and_is_merged(tmp_path, parts):
    language, siglip, mlp, tokenizer = parts
    adapted = get_peft_model(language, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "fc1"]))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn_like(p)
    adapted.save_pretrained(tmp_path / "run")
    file = tmp_path / "run" / "adapter_model.safetensors"
    inside = {
        k.replace("base_model.model.", "base_model.model.language_model.", 1): v
        for k, v in load_file(file).items()
    }
    save_file(inside, file)
    base = {k: v for k, v in adapted.base_model.model.named_parameters() if "lora_" not in k}
    assert any(".base_layer." in k for k in base)
    source = staged(
        tmp_path / "run",
        config_of(language, siglip),
        tokenizer,
        base,
        keyed("vision_model.", siglip),
        keyed("_connector.", mlp),
    )

    report = adopt(source, tmp_path / "out")

    parity = compared(
        tmp_path / "out", Restated(adapted.eval(), siglip_pixels, seeing(siglip, mlp), tokenizer)
    )
    assert parity.passed
    assert parity.largest < 1e-5
    assert report.family == "TinyLLaVA Factory, LoRA"


def test_clip_with_a_llama_crops_and_keeps_all_its_patches(tmp_path):
    tokenizer = a_tokenizer()
    language, clip, mlp = a_llama(tokenizer), a_clip(), an_mlp()
    keys = {"vision_model_name_or_path": "openai/clip-vit-large-patch14-336"}
    source = write(
        tmp_path / "tiny",
        config_of(language, clip, **keys),
        tokenizer,
        pytorch_model=whole(language, clip, mlp),
    )
    report = adopt(source, tmp_path / "out")
    restated = Restated(language, lambda p: pixels(p, "crop"), seeing(clip, mlp), tokenizer)
    assert compared(tmp_path / "out", restated).passed
    assert (report.template, report.notes) == ("vicuna_v1", [])


def test_cls_patch_keeps_the_class_token(tmp_path):
    tokenizer = a_tokenizer()
    language, clip, mlp = a_llama(tokenizer), a_clip(), an_mlp()
    keys = {"vision_feature_select_strategy": "cls_patch"}
    source = write(
        tmp_path / "tiny",
        config_of(language, clip, **keys),
        tokenizer,
        pytorch_model=whole(language, clip, mlp),
    )
    adopt(source, tmp_path / "out")
    restated = Restated(language, lambda p: pixels(p, "crop"), seeing(clip, mlp, first=0), tokenizer)
    assert compared(tmp_path / "out", restated).passed


@pytest.mark.parametrize(
    ("eos", "template"), [("<|im_end|>", "qwen2_instruct"), ("<|endoftext|>", "qwen2_base")]
)
def test_a_qwen_is_base_or_instruct_by_its_end_of_text(tmp_path, eos, template):
    tokenizer = a_tokenizer("<|endoftext|>")
    tokenizer.eos_token = eos
    values = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    language = numbers(Qwen2ForCausalLM(Qwen2Config(**values, tie_word_embeddings=True)), 4)
    siglip, mlp = a_siglip(), an_mlp()
    tensors = whole(language, siglip, mlp)
    source = write(tmp_path / "tiny", config_of(language, siglip), tokenizer, pytorch_model=tensors)
    report = adopt(source, tmp_path / "out")
    assert report.template == template
    assert report.dropped["the config ties the head to the embedding"] == 1
    restated = Restated(language, siglip_pixels, seeing(siglip, mlp), tokenizer)
    assert compared(tmp_path / "out", restated).passed


def test_openelm_keeps_its_own_names(tmp_path):
    tokenizer = a_tokenizer()
    sizes = {"num_transformer_layers": 2, "model_dim": WIDTH, "head_dim": 8, "num_gqa_groups": 1}
    config = OpenELMConfig(
        **sizes, vocab_size=len(tokenizer), ffn_dim_divisor=8, share_input_output_layers=True
    )
    language, siglip, mlp = numbers(OpenELMForCausalLM(config), 4), a_siglip(), an_mlp()
    tensors = whole(language, siglip, mlp)
    assert "language_model.transformer.token_embeddings.weight" in tensors
    source = write(tmp_path / "tiny", config_of(language, siglip), tokenizer, pytorch_model=tensors)
    report = adopt(source, tmp_path / "out")
    restated = Restated(language, siglip_pixels, seeing(siglip, mlp), tokenizer)
    assert compared(tmp_path / "out", restated).passed
    assert report.template == "vicuna_v1"


class PerceiverRestated(nn.Module):
    """TinyLLaVA's resampler as its specification says it, one latent axis."""

    def __init__(self, depth=2, queries=4):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(queries, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = nn.Module()
            attention.norm_media, attention.norm_latents = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            attention.to_q = nn.Linear(WIDTH, 512, bias=False)
            attention.to_kv = nn.Linear(WIDTH, 1024, bias=False)
            attention.to_out = nn.Linear(512, WIDTH, bias=False)
            layers = (
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 128, bias=False),
                nn.GELU(),
                nn.Linear(128, WIDTH, bias=False),
            )
            self.layers.append(nn.ModuleList([attention, nn.Sequential(*layers)]))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x, latents = self.linear(x), self.latents[None]
        for attention, feed_forward in self.layers:
            media, queries = attention.norm_media(x), attention.norm_latents(latents)
            key, value = attention.to_kv(torch.cat((media, queries), 1)).chunk(2, -1)
            q, k, v = (t.view(1, -1, 8, 64).transpose(1, 2) for t in (attention.to_q(queries), key, value))
            mixed = (q @ k.mT * 64**-0.5).softmax(-1) @ v
            latents = attention.to_out(mixed.transpose(1, 2).reshape(1, -1, 512)) + latents
            latents = feed_forward(latents) + latents
        return self.norm(latents)


def test_the_resampler_is_our_perceiver(tmp_path, parts):
    language, siglip, _, tokenizer = parts
    resampler = numbers(PerceiverRestated(), 6)
    keys = {"connector_type": "resampler", "num_queries": 4, "num_resampler_layers": 2}
    tensors = whole(language, siglip, resampler)
    source = write(tmp_path / "tiny", config_of(language, siglip, **keys), tokenizer, pytorch_model=tensors)
    adopt(source, tmp_path / "out")
    restated = Restated(language, siglip_pixels, seeing(siglip, resampler), tokenizer)
    parity = compared(tmp_path / "out", restated)
    assert parity.passed
    assert parity.largest < 1e-5


class QFormerRestated(nn.Module):
    """transformers' Q-Former without the first norm's weights, as TinyLLaVA took them out."""

    def __init__(self):
        super().__init__()
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
        }
        unused = {"vocab_size": 8, "max_position_embeddings": 8}
        self.bert = Blip2QFormerModel(Blip2QFormerConfig(**sizes, **unused, encoder_hidden_size=WIDTH))
        self.query_tokens = nn.Parameter(torch.zeros(1, 4, 64))
        self.projector = nn.Linear(64, WIDTH)
        numbers(self, 11)
        nn.init.ones_(self.bert.layernorm.weight)
        nn.init.zeros_(self.bert.layernorm.bias)

    def forward(self, x):
        return self.projector(
            self.bert(query_embeds=self.query_tokens, encoder_hidden_states=x).last_hidden_state
        )

    def in_its_names(self):
        def renamed(name):
            return re.sub(r"\.(attention|crossattention)\.attention\.", r".\1.self.", name)

        kept = {k: v for k, v in keyed("connector._connector.", self).items() if ".layernorm." not in k}
        return {renamed(k): v for k, v in kept.items()}


def test_the_qformer_has_no_weights_in_its_first_norm(tmp_path, parts):
    language, siglip, _, tokenizer = parts
    qformer = QFormerRestated()
    tensors = whole(language, siglip, nn.Identity()) | qformer.in_its_names()
    assert "connector._connector.bert.encoder.layer.0.crossattention.self.key.weight" in tensors
    keys = {"connector_type": "qformer", "num_queries": 4}
    source = write(tmp_path / "tiny", config_of(language, siglip, **keys), tokenizer, pytorch_model=tensors)
    adopt(source, tmp_path / "out")
    parity = compared(tmp_path / "out", Restated(language, siglip_pixels, seeing(siglip, qformer), tokenizer))
    assert parity.passed
    assert parity.largest < 1e-5


class MoFRestated(nn.Module):
    def __init__(self):
        super().__init__()
        self.clip, self.dinov2 = an_mlp(seed=8), an_mlp(seed=9)


def test_a_mixture_of_features_feeds_both_towers_the_same_pixels_and_alternates(tmp_path):
    tokenizer = a_tokenizer()
    language, clip, connector = a_llama(tokenizer), a_clip(), MoFRestated()
    values = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 4,
    }
    dino = numbers(Dinov2Model(Dinov2Config(**values, mlp_ratio=2)), 10)
    dino.save_pretrained(tmp_path / "dinov2")
    keys = {
        "connector_type": "mof_mlp",
        "vision_model_name_or_path": "mof:openai/clip-vit-large-patch14",
        "vision_model_name_or_path2": f"mof:{tmp_path / 'dinov2'}",
    }
    tensors = keyed("language_model.", language) | keyed("connector._connector.", connector)
    tensors |= keyed("vision_tower._vision_tower.clip.vision_model.", clip)
    on_disk = load_file(tmp_path / "dinov2" / "model.safetensors")  # under the names of published files
    tensors |= {f"vision_tower._vision_tower.dinov2.{name}": tensor for name, tensor in on_disk.items()}
    source = write(tmp_path / "tiny", config_of(language, clip, **keys), tokenizer, pytorch_model=tensors)

    adopt(source, tmp_path / "out")

    def see(values):
        pair = ((clip, connector.clip), (dino, connector.dinov2))
        both = [seeing(tower, mlp)(values) for tower, mlp in pair]
        return torch.stack(both, 2).flatten(1, 2)

    parity = compared(tmp_path / "out", Restated(language, lambda p: pixels(p, "crop"), see, tokenizer))
    assert parity.passed
    assert parity.largest < 1e-5
    assert load(tmp_path / "out").processor.image_processor.typical().tokens == 72


def test_a_connector_of_another_architecture_is_refused(tmp_path, parts):
    language, siglip, mlp, tokenizer = parts
    source = write(
        tmp_path / "tiny",
        config_of(language, siglip, connector_type="cnn"),
        tokenizer,
        pytorch_model=whole(language, siglip, mlp),
    )
    with pytest.raises(
        CheckpointError, match="projector 'cnn' is not known; known: identity, linear, mlpNx_gelu"
    ):
        adopt(source, tmp_path / "out")
