"""What the parts of published models are, by Hub name, for those who ask before anything is downloaded.

Of each config only what decides how pictures and sounds are cut and counted, how many blocks there are, and
how long a text may be. A folder's own ``config.json`` says more, and is asked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CLIP_L = {"model_type": "clip_vision_model", "num_hidden_layers": 24, "patch_size": 14}
_SIGLIP = {"model_type": "siglip_vision_model", "num_hidden_layers": 27, "patch_size": 14, "image_size": 384}
_BASE = {"model_type": "siglip_vision_model", "num_hidden_layers": 12, "patch_size": 16}
_DINO = {"model_type": "dinov2", "patch_size": 14, "image_size": 518}
_DINO3 = {"model_type": "dinov3_vit", "patch_size": 16, "image_size": 224}
_BLIP2 = {"model_type": "blip_2_vision_model", "num_hidden_layers": 39, "patch_size": 14, "image_size": 224}
# With all that would else be looked up in timm.
_EVA = {
    "model_type": "tinymodal_timm",
    "image_size": 224,
    "patch_size": 14,
    "num_prefix_tokens": 1,
    "sizes": "multiple",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "resample": "bicubic",
}
TOWERS: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-large-patch14": {**_CLIP_L, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336},
    "openai/clip-vit-base-patch16": {
        **_CLIP_L, "num_hidden_layers": 12, "patch_size": 16, "image_size": 224,
    },
    "google/siglip-so400m-patch14-384": _SIGLIP,
    "google/siglip-base-patch16-224": {**_BASE, "image_size": 224},
    "google/siglip-base-patch16-512": {**_BASE, "image_size": 512},
    "google/siglip2-so400m-patch14-384": _SIGLIP,
    "google/siglip2-base-patch16-naflex": {
        "model_type": "siglip2_vision_model", "num_hidden_layers": 12, "patch_size": 16, "num_patches": 256,
    },
    "google/siglip2-so400m-patch16-naflex": {
        "model_type": "siglip2_vision_model", "num_hidden_layers": 27, "patch_size": 16, "num_patches": 256,
    },
    "facebook/dinov2-base": {**_DINO, "num_hidden_layers": 12},
    "facebook/dinov2-large": {**_DINO, "num_hidden_layers": 24},
    "facebook/dinov3-vitb16-pretrain-lvd1689m": {**_DINO3, "num_hidden_layers": 12, "num_register_tokens": 4},
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {**_DINO3, "num_hidden_layers": 24, "num_register_tokens": 4},
    "Salesforce/blip2-opt-2.7b": _BLIP2,
    "Salesforce/blip2-flan-t5-xl": _BLIP2,
    "timm/eva02_enormous_patch14_clip_224.laion2b_plus": {
        **_EVA, "architecture": "eva02_enormous_patch14_clip_224", "hidden_size": 1792,
        "num_hidden_layers": 64,
    },
    "timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k": {
        **_EVA, "architecture": "eva_giant_patch14_clip_224", "hidden_size": 1408,
        "num_hidden_layers": 40,
    },
}  # fmt: skip
"""Hub name -> of its config what decides how a picture is cut and counted, and how many blocks there are."""


def _whisper(layers: int, width: int, bands: int = 80) -> dict[str, Any]:
    sizes = {"encoder_layers": layers, "d_model": width, "num_mel_bins": bands}
    sizes["encoder_attention_heads"] = width // 64
    return {"model_type": "whisper", "max_source_positions": 1500, **sizes}


def _waves(kind: str, layers: int = 12, width: int = 768, large: bool = False) -> dict[str, Any]:
    norms = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True} if large else {}
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
    return {"model_type": kind, **sizes, **norms}


EARS: Mapping[str, Mapping[str, Any]] = {
    "openai/whisper-tiny": _whisper(4, 384),
    "openai/whisper-base": _whisper(6, 512),
    "openai/whisper-small": _whisper(12, 768),
    "openai/whisper-medium": _whisper(24, 1024),
    "openai/whisper-large-v3": _whisper(32, 1280, 128),
    "openai/whisper-large-v3-turbo": _whisper(32, 1280, 128),
    "facebook/wav2vec2-base": _waves("wav2vec2"),
    "facebook/wav2vec2-base-960h": _waves("wav2vec2"),
    "facebook/wav2vec2-large-960h-lv60-self": _waves("wav2vec2", 24, 1024, large=True),
    "facebook/hubert-base-ls960": _waves("hubert"),
    "facebook/hubert-large-ls960-ft": _waves("hubert", 24, 1024, large=True),
    "microsoft/wavlm-base-plus": _waves("wavlm"),
    "microsoft/wavlm-large": _waves("wavlm", 24, 1024, large=True),
    "facebook/data2vec-audio-base-960h": _waves("data2vec-audio"),
    "facebook/w2v-bert-2.0": _waves("wav2vec2-bert", 24, 1024),
    "laion/clap-htsat-unfused": {"model_type": "clap_audio_model"},
    "laion/clap-htsat-fused": {"model_type": "clap_audio_model", "enable_fusion": True},
}
"""Hub name -> of a tower that hears what decides how a sound is cut and counted, its width and its blocks."""

CODECS: Mapping[str, Mapping[str, Any]] = {
    "kyutai/mimi": {"model_type": "mimi", "books": 32},
    "facebook/encodec_24khz": {"model_type": "encodec", "books": 32},
    "descript/dac_16khz": {"model_type": "dac", "books": 12},
    "descript/dac_24khz": {"model_type": "dac", "books": 32},
    "descript/dac_44khz": {"model_type": "dac", "books": 9},
}
"""Hub name -> of a codec its family and its codebooks."""


def _llm(kind: str, layers: int, positions: int, tied: bool = False) -> dict[str, Any]:
    found = {"model_type": kind, "tie_word_embeddings": tied}
    return found | {"num_hidden_layers": layers, "max_position_embeddings": positions}


LANGUAGES: Mapping[str, Mapping[str, Any]] = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llm("llama", 22, 2048),
    "stabilityai/stablelm-2-zephyr-1_6b": _llm("stablelm", 24, 4096),
    "stabilityai/stablelm-2-1_6b": _llm("stablelm", 24, 4096),
    "microsoft/phi-2": _llm("phi", 32, 2048),
    "microsoft/phi-1_5": _llm("phi", 24, 2048),
    "microsoft/Phi-3-mini-4k-instruct": _llm("phi3", 32, 4096),
    "google/gemma-2b": _llm("gemma", 18, 8192, tied=True),
    "google/gemma-2b-it": _llm("gemma", 18, 8192, tied=True),
    "google/gemma-2-2b-it": _llm("gemma2", 26, 8192, tied=True),
    "google/gemma-3-1b-it": _llm("gemma3_text", 26, 32_768, tied=True),
    "apple/OpenELM-270M-Instruct": _llm("openelm", 16, 2048, tied=True),
    "apple/OpenELM-450M-Instruct": _llm("openelm", 20, 2048, tied=True),
    "apple/OpenELM-1_1B-Instruct": _llm("openelm", 28, 2048, tied=True),
    "Qwen/Qwen2-0.5B": _llm("qwen2", 24, 131_072, tied=True),
    "Qwen/Qwen2-0.5B-Instruct": _llm("qwen2", 24, 32_768, tied=True),
    "Qwen/Qwen2-7B-Instruct": _llm("qwen2", 28, 32_768),
    "Qwen/Qwen2.5-0.5B": _llm("qwen2", 24, 32_768, tied=True),
    "Qwen/Qwen2.5-0.5B-Instruct": _llm("qwen2", 24, 32_768, tied=True),
    "Qwen/Qwen2.5-3B": _llm("qwen2", 36, 32_768, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": _llm("qwen2", 36, 32_768, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _llm("qwen2", 28, 32_768),
    "Qwen/Qwen3-0.6B": _llm("qwen3", 28, 40_960, tied=True),
    "Qwen/Qwen3-1.7B": _llm("qwen3", 28, 40_960, tied=True),
    "lmsys/vicuna-7b-v1.5": _llm("llama", 32, 4096),
    "lmsys/vicuna-13b-v1.5": _llm("llama", 40, 4096),
    "meta-llama/Llama-2-7b-chat-hf": _llm("llama", 32, 4096),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llm("llama", 32, 8192),
    "mistralai/Mistral-7B-Instruct-v0.2": _llm("mistral", 32, 32_768),
    "HuggingFaceH4/zephyr-7b-beta": _llm("mistral", 32, 32_768),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llm("llama", 30, 8192, tied=True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llm("llama", 32, 8192, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llm("llama", 24, 8192, tied=True),
    "HuggingFaceTB/SmolLM3-3B": _llm("smollm3", 36, 65_536, tied=True),
    "openbmb/MiniCPM-2B-sft-bf16": _llm("minicpm", 40, 2048, tied=True),
    "parts/tinygptv-phi2": _llm("tinygptv_phi", 32, 2048),
}
"""Hub name -> family, blocks, positions, and whether the head is the embedding. TinyGPT-V's Phi-2 has no Hub
name, but the folder that its recipe says."""
