"""Random parts of under a million parameters, and a tokenizer in memory: all runs offline in a second.

For tests, examples and experiments with the machinery. Nothing here has learned anything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tinymodal.compose.build import Composed
    from tinymodal.model.codec import Codec

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>")
"""Ids 0 to 5."""

WORDS = (
    "a the red green blue yellow white black square circle triangle star small large thing digit picture "
    "colour shape what which where how many is are there it one two three four left right above below yes no "
    "of in on and or with same different user assistant system USER ASSISTANT answer question"
)

LanguageKind = Literal[
    "llama",
    "qwen2",
    "qwen3",
    "phi",
    "gemma2",
    "gpt2",
    "stablelm",
    "smollm3",
    "openelm",
    "minicpm",
    "tinygptv_phi",
]
VisionKind = Literal[
    "clip_vision_model",
    "siglip_vision_model",
    "siglip2_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "blip_2_vision_model",
    "tinymodal_timm",
    "tinymodal_pair",
]


AudioKind = Literal[
    "tinymodal_ear",
    "whisper",
    "wav2vec2",
    "hubert",
    "wavlm",
    "data2vec-audio",
    "wav2vec2-bert",
    "wav2vec2-conformer",
    "clap_audio_model",
]


def tiny_tokenizer(words: Iterable[str] = (), chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE that can write any text.

    Args:
        words: texts whose words shall be one token each, beside :data:`WORDS`. Trained by counting, so equal
            texts give an equal tokenizer.
        chat_template: a Jinja template for it to carry.

    Returns:
        Pad, BOS, EOS, the ChatML words and the placeholder are ids 0 to 5; it begins no text with BOS by
        itself.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(tuple(words))),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=chat_template,
    )


@functools.lru_cache(maxsize=16)
def _tokenizer_json(words: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Each word with a space before it and at the start of a text; twice, because a pair must occur twice.
    texts = [form for text in (WORDS, *words) for word in text.split() for form in (word, f" {word}")]
    tokenizer.train_from_iterator(texts * 2, trainer)
    return tokenizer.to_str()


def tiny_language(kind: LanguageKind | str = "llama", vocab_size: int | None = None) -> dict[str, Any]:
    """A config for :class:`~tinymodal.compose.spec.LanguageSpec`: two layers, 32 wide.

    Args:
        kind: any ``model_type`` of a causal language model.
        vocab_size: rows of the embedding; None: as many as :func:`tiny_tokenizer` has words.
    """
    from transformers import CONFIG_MAPPING

    from tinymodal.model.language import OWN_LANGUAGES

    values: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()) if vocab_size is None else vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # What gpt2 and opt call the width of their feed-forward, and opt that of its words.
        "n_inner": 64,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        # MiniCPM's three scales.
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 8,
    }
    if kind == "openelm":
        # Its own names; the second layer is twice as wide as the first.
        shapes = {"model_dim": 32, "head_dim": 8, "num_transformer_layers": 2, "max_context_length": 1024}
        layers = {"qkv_multipliers": [0.5, 1.0], "num_gqa_groups": 2, "ffn_multipliers": [1.0, 2.0]}
        rest = {"ffn_dim_divisor": 16, "normalize_qk_projections": True, "share_input_output_layers": True}
        kept = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
        return {"model_type": kind} | {key: values[key] for key in kept} | shapes | layers | rest
    if kind == "tinygptv_phi":
        del values["num_key_value_heads"]
    family = OWN_LANGUAGES[kind].config() if kind in OWN_LANGUAGES else CONFIG_MAPPING[kind]()
    return {"model_type": kind} | {key: value for key, value in values.items() if hasattr(family, key)}


def tiny_vision(kind: VisionKind | str = "siglip_vision_model", image_px: int = 24) -> dict[str, Any]:
    """A config for :class:`~tinymodal.compose.spec.VisionSpec`: three blocks, 32 wide, patches of 4 px.

    Args:
        kind: a tower's ``model_type``; or ``timm:`` and timm's name of a model with blocks, such as
            ``timm:eva_giant_patch14_clip_224`` (``tinymodal_timm`` alone is EVA02-CLIP-E).
        image_px: edge of the picture; 24 px are a 6 x 6 grid.
    """
    model_type, _, architecture = kind.partition(":")
    if model_type in ("timm", "tinymodal_timm"):
        return _tiny_timm(architecture or "eva02_enormous_patch14_clip_224", image_px)
    if kind == "tinymodal_pair":
        towers = [tiny_vision("clip_vision_model", image_px), tiny_vision("dinov2", image_px)]
        return {"model_type": kind, "towers": towers}
    if kind == "tinymodal_written":
        return {"model_type": kind, "image_size": image_px, "hidden_size": 32}
    if kind == "tinymodal_tower":
        return {
            "model_type": kind,
            "image_size": image_px,
            "channels": [8, 32],
            "residual_convs": [0, 1],
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    if kind.endswith(("convnext", "convnextv2")):
        sizes = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
        return {"model_type": kind, "image_size": max(32, image_px), **sizes}
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": image_px,
        "patch_size": 4,
    }
    if kind == "siglip2_vision_model":
        config["num_patches"] = (image_px // 4) ** 2
        del config["image_size"]
    if kind in ("dinov2", "dinov2_with_registers"):
        config["mlp_ratio"] = 2
        del config["intermediate_size"]
    if kind == "dinov3_vit":
        config["num_register_tokens"] = 4
    return config


def _tiny_timm(architecture: str, image_px: int) -> dict[str, Any]:
    """A model of timm whose blocks are of the named one's kind."""
    sizes = {
        "img_size": image_px,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 2,
    }
    return {"model_type": "tinymodal_timm", "architecture": architecture, "model_args": sizes}


def tiny_audio(kind: AudioKind | str = "tinymodal_ear") -> dict[str, Any]:
    """A config for :class:`~tinymodal.compose.spec.AudioSpec`: two blocks, 32 wide.

    It hears in the steps of its family: Whisper and wav2vec 2.0 have 50 positions a second, our own 25.

    Args:
        kind: a tower's ``model_type``.
    """
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if kind == "tinymodal_ear":
        ear = {"num_mel_bins": 16, "channels": [16, 32], "residual_convs": [0, 0], "reach": 3}
        return {"model_type": kind, **ear, "num_attention_heads": 4}
    if kind in ("whisper", "qwen2_audio_encoder", "audioflamingo3_encoder", "speech_to_text"):
        half = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
        ends = ("encoder", "decoder") if kind in ("whisper", "speech_to_text") else ("encoder",)
        both = {f"{end}_{key}": value for end in ends for key, value in half.items()}
        # 5 s.
        return {"model_type": kind, "d_model": 32, "num_mel_bins": 16, "max_source_positions": 250, **both}
    if kind == "clap_audio_model":
        stages = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
        return {"model_type": kind, "patch_embeds_hidden_size": 4, "hidden_size": 32, **stages}
    if kind == "wav2vec2-bert":
        return {"model_type": kind, **sizes, "feature_projection_input_dim": 32}
    from transformers import CONFIG_MAPPING

    family = CONFIG_MAPPING[kind]()
    places = 3 if kind == "data2vec-audio" else 16  # layers there, positions that one spans elsewhere
    waves: dict[str, Any] = {"conv_dim": [8] * len(getattr(family, "conv_kernel", ()) or ())}
    waves |= {"num_conv_pos_embeddings": places, "num_conv_pos_embedding_groups": 4}
    bands = {"num_mel_bins": 16, "max_source_positions": 250}
    known = {key: value for key, value in (sizes | waves | bands).items() if hasattr(family, key)}
    return {"model_type": kind, **known}


def tiny_codec(folder: Path | str, books: int = 2, seed: int = 0) -> Codec:
    """A codec of our own kind with random codebooks of 16 codes, written into ``folder``.

    25 frames a second at 16 kHz. ``open_codec`` and ``model.speech.codec`` read the folder.
    """
    import torch

    from tinymodal.model.codec import open_codec

    sizes = {f"{part}_width": 16 for part in ("encoder", "decoder", "step")}
    small = {f"{part}_blocks": 1 for part in ("encoder", "decoder", "step")}
    config = {"model_type": "tinymodal_codec", "books": books, "book_size": 16, "encoder_stem": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = open_codec({**config, **sizes, **small, "book_width": 8})
    codec.save(folder)
    return codec


def tiny_model(
    vision: VisionKind | str | None = "siglip_vision_model",
    connector: str = "pixel_shuffle",
    language: LanguageKind | str = "llama",
    template: str = "chatml",
    seed: int = 0,
    *,
    options: dict[str, int | float | str] | None = None,
    feature_layer: int | tuple[int, ...] = -2,
    image_px: int = 24,
    sight: dict[str, Any] | None = None,
    words: Iterable[str] = (),
    tokenizer: PreTrainedTokenizerFast | None = None,
    audio: AudioKind | str | None = None,
    hearing: dict[str, Any] | None = None,
    speech: dict[str, Any] | None = None,
    **language_config: Any,
) -> Composed:
    """A whole model of random parts, in under a second.

    Args:
        vision: a tower's ``model_type``; None: a model that reads text only.
        connector: its name; the default makes 9 tokens of a 6 x 6 grid.
        language: a language model's ``model_type``.
        template: how conversations are written.
        seed: the same seed gives the same weights.
        options: of the connector.
        feature_layer: hidden state that is read, counted as in LLaVA.
        image_px: edge of the prepared picture.
        sight: further keys of :class:`~tinymodal.compose.spec.VisionSpec`, e.g. ``{"resize": "tiles"}``.
        words: see :func:`tiny_tokenizer`.
        tokenizer: instead of :func:`tiny_tokenizer`'s.
        audio: an audio tower's ``model_type``; None: a model that does not hear.
        hearing: further keys of :class:`~tinymodal.compose.spec.AudioSpec`, e.g. ``{"tokens_per_s": 5}``.
        speech: keys of :class:`~tinymodal.compose.spec.SpeechSpec`; its codec may be :func:`tiny_codec`'s
            folder. None: a model that does not speak.
        language_config: further keys of the language model's config, or other values for them.
    """
    from tinymodal.compose.build import compose
    from tinymodal.compose.ears import AUDIO_TOKEN
    from tinymodal.compose.spec import AudioSpec, LanguageSpec, ModelSpec, SpeechSpec, VisionSpec

    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer(words)
    # With a row for the token that composing will add.
    rows = len(tokenizer) + (audio is not None and AUDIO_TOKEN not in tokenizer.get_vocab())
    spec = ModelSpec(
        language=LanguageSpec(
            config={**tiny_language(language, vocab_size=rows), **language_config},
            tokenizer="in memory",
            template=template,
        ),
        vision=None
        if vision is None
        else VisionSpec(
            config=tiny_vision(vision, image_px),
            connector=connector,
            options=options or {},
            feature_layer=feature_layer,
            **(sight or {}),
        ),
        audio=None if audio is None else AudioSpec(config=tiny_audio(audio), **(hearing or {})),
        speech=None if speech is None else SpeechSpec(**speech),
    )
    return compose(spec, tokenizer, seed)
