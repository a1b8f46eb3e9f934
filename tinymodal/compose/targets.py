"""Where a composition will run: what transformers' Llava, llama.cpp and onnxruntime have a place for.

Judged from configs alone, so that it is known before anything is trained (``tinymodal preview``) and before
anything is written (``tinymodal export``). A refusal begins with the part that does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinymodal.model.encoders import encoder_of
from tinymodal.model.language import OWN_LANGUAGES, causal_class, packs_exactly
from tinymodal.model.media import OPTIONS, hidden_states
from tinymodal.model.strategies import ONE_TILE

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed
    from tinymodal.model.image import Preparation

PARTS: Mapping[str, tuple[str, ...]] = {
    "hub": (),
    "llava": ("audio", "speech"),
    "gguf": ("vision", "audio", "speech"),
    "onnx": ("vision", "audio", "speech"),
}
"""Target -> parts that may be left out of it, if that is asked for."""

LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""What vLLM's Llava takes for a tower; transformers itself would take more."""

LLAMA_CPP: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` -> llama.cpp's architecture, of the language models whose tensors are mapped and proved."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one target can hold a composition."""

    target: str
    """``hub``, ``llava``, ``gguf`` or ``onnx``."""
    runs_in: str
    """The programs that read it."""
    refusals: Mapping[str, str]
    """Part -> why the target has no place for it; empty: it holds all."""
    notes: tuple[str, ...] = ()
    """What is true of it nevertheless."""

    def refused(self, without: Collection[str] = ()) -> str | None:
        """The first refusal, ``part: reason``, when the parts ``without`` are left out; None: it fits."""
        left = [(part, why) for part, why in self.refusals.items() if part.split(".")[0] not in without]
        return f"{left[0][0]}: {left[0][1]}" if left else None

    @property
    def way_out(self) -> tuple[str, ...]:
        """Parts that must be left out for the rest to fit; empty where that would not do either."""
        parts = {key.split(".")[0] for key in self.refusals}
        out = tuple(part for part in PARTS[self.target] if part in parts)
        return out if self.refused(out) is None else ()


def verdicts(composed: Composed) -> list[Verdict]:
    """What each target says of a composition, in the order of :data:`TARGETS`."""
    return [judge(target, composed) for target in TARGETS]


def judge(target: str, composed: Composed) -> Verdict:
    """What one target says of a composition."""
    runs_in, find = TARGETS[target]
    refusals: dict[str, str] = {}
    notes: list[str] = []
    find(composed, refusals, notes)
    return Verdict(target, runs_in, refusals, tuple(notes))


def lines(found: Collection[Verdict]) -> list[str]:
    """The verdicts for the terminal, one line each."""
    told = []
    for verdict in found:
        reason = verdict.refused()
        if reason is None:
            said = [verdict.runs_in, *verdict.notes]
        elif verdict.way_out:
            said = [f"{verdict.runs_in}, --without {','.join(verdict.way_out)} ({reason})"]
        else:
            said = [f"no ({_hardest(verdict)})"]
        told.append(f"  {verdict.target:<6}{'; '.join(said)}")
    return told


def _hardest(verdict: Verdict) -> str:
    """What stands in the way when all that may be left out is."""
    return verdict.refused(PARTS[verdict.target]) or ""


# One function a target: fills in refusals by part, and notes.

Refusals = dict[str, str]


def _hub(composed: Composed, refusals: Refusals, notes: list[str]) -> None:
    """Remote code holds whatever we compose; vLLM's backend for it asks for more."""
    if (why := not_in_vllm(composed)) is not None:
        notes.append(f"not in vLLM's Transformers backend ({why})")


def not_in_vllm(composed: Composed) -> str | None:
    """Why vLLM's Transformers backend cannot serve the ``hub`` folder; None: it meets the contract.

    The contract as read in ``vllm/model_executor/models/transformers/multimodal.py``, 2026: the embeddings of
    a picture are those of its tiles laid end to end, and sounds come as ``input_features``.
    """
    config, eye = composed.model.config, composed.processor.image_processor
    if config.audio_config is not None:
        return "audio: the backend hears only what comes as input_features"
    if config.speech is not None:
        return "speech: the backend has no place for a speech head"
    if config.vision_config is None:
        return "vision: the backend takes this class for one that sees"
    if eye.preparation.resize not in ONE_TILE or eye.marks:
        return "vision: the backend takes one tile a picture and no learned marks"
    if not packs_exactly(config.text_config):
        return f"language: {config.text_config.model_type!r} is not attention alone"
    return None


def _llava(composed: Composed, refusals: Refusals, notes: list[str]) -> None:
    config, words = composed.model.config, composed.model.config.text_config
    how = composed.processor.image_processor.preparation
    if config.vision_config is None:
        refusals["vision (missing)"] = "this model has no tower, and Llava is a model that sees"
    else:
        _llava_sight(config, how, refusals, notes)
    if words.model_type in OWN_LANGUAGES:
        refusals["language"] = f"transformers has no class for {words.model_type!r}"
    elif (prefix := causal_class(words).base_model_prefix) != "model":
        refusals["language"] = (
            f"a {words.model_type!r} keeps its decoder under '{prefix}', Llava's readers look under 'model'"
        )
    elif (why := head_beyond_a_matrix(composed)) is not None:
        refusals["language"] = f"{why}; Llava's is one matrix"
    _refuse_ears_and_mouth(config, "Llava", refusals)


def _llava_sight(config: Any, how: Preparation, refusals: Refusals, notes: list[str]) -> None:
    tower, chosen = config.vision_config, config.connectors["image"]
    edge = getattr(tower, "image_size", None)
    anyres = how.resize == "anyres"
    if tower.model_type not in LLAVA_TOWERS:
        refusals["vision"] = (
            f"a tower of kind {tower.model_type!r}; vLLM reads Llava with {' or '.join(LLAVA_TOWERS)}"
        )
    elif getattr(tower, "final_norm", False):
        refusals["vision"] = "final_norm: Llava reads hidden states before the tower's last norm"
    elif how.size_px != (edge, edge):
        refusals["vision.size_px"] = (
            f"pictures of {how.height_px} x {how.width_px} px for a tower of {edge} x {edge} px; Llava does "
            f"not interpolate positions"
        )
    elif how.resize not in ("square", "crop", "pad", "anyres"):
        refusals["vision.resize"] = f"'{how.resize}'; Llava has one tile, LlavaNext 'anyres'"
    if (why := _not_two_layers(chosen)) is not None:
        refusals["vision.connector"] = f"{why}; Llava's is 'mlp' of two layers"
    marks, merge = list(chosen["marks"]), chosen["merge"]
    if anyres and (marks, merge) != (["newline"], "spatial_unpad"):
        refusals["vision.merge"] = (
            f"marks {marks} and merge '{merge}'; LlavaNext has marks ['newline'] and merge 'spatial_unpad'"
        )
    elif not anyres and marks:
        refusals["vision.marks"] = f"{', '.join(marks)}; Llava has no learned marks around a picture"
    if how.resizer != "pillow":
        notes.append(
            "pictures are resized by the reader, at most two levels of 255 from what this model was shown"
        )


def _gguf(composed: Composed, refusals: Refusals, notes: list[str]) -> None:
    config, words = composed.model.config, composed.model.config.text_config
    if words.model_type not in LLAMA_CPP:
        refusals["language"] = (
            f"{words.model_type!r} is none of {', '.join(LLAMA_CPP)}, whose tensors are mapped and proved"
        )
    elif (why := _not_plain_llama(words) or head_beyond_a_matrix(composed)) is not None:
        refusals["language"] = why
    if (why := not_byte_level(composed.tokenizer)) is not None:
        refusals["language.tokenizer"] = why
    if config.vision_config is not None:
        _gguf_sight(config, composed.processor.image_processor.preparation, refusals, notes)
    _refuse_ears_and_mouth(config, "the text model and its mmproj file", refusals)


def _gguf_sight(config: Any, how: Preparation, refusals: Refusals, notes: list[str]) -> None:
    tower, chosen = config.vision_config, config.connectors["image"]
    edge = getattr(tower, "image_size", None)
    layer = config.feature_layer
    if tower.model_type == "clip_vision_model":
        refusals["vision"] = (
            "a CLIP tower; llama.cpp puts the class token last and then reads from the second position on, "
            "so the first patch is lost and all others move (measured: embeddings differ by 0.77)"
        )
    elif tower.model_type != "siglip_vision_model":
        refusals["vision"] = (
            f"a tower of kind {tower.model_type!r}; of those that llama.cpp knows, siglip_vision_model is "
            f"written"
        )
    elif odd := [option for option in OPTIONS if getattr(tower, option, False)]:
        refusals["vision"] = f"{' and '.join(odd)}; llama.cpp's graph for LLaVA has no such step"
    elif tower.hidden_act != "gelu_pytorch_tanh":
        refusals["vision"] = f"activation '{tower.hidden_act}'; llama.cpp computes gelu_pytorch_tanh"
    elif not isinstance(layer, int) and len(layer) != 1:
        refusals["vision.feature_layer"] = f"{layer}; llama.cpp's projector reads one layer"
    elif how.resize not in ("square", "crop", "pad"):
        refusals["vision.resize"] = f"'{how.resize}'; written is the projector of one tile a picture"
    elif how.size_px != (edge, edge):
        refusals["vision.size_px"] = (
            f"pictures of {how.height_px} x {how.width_px} px for a tower of {edge} x {edge} px; llama.cpp "
            f"does not interpolate positions"
        )
    if (why := _not_two_layers(chosen, ("gelu",))) is not None:
        refusals["vision.connector"] = f"{why}; llama.cpp's 'mlp' has two layers and gelu"
    elif chosen["marks"]:
        refusals["vision.marks"] = f"{', '.join(chosen['marks'])}; llama.cpp has no learned marks"
    if not any(key.startswith("vision") for key in refusals):
        notes.append(f"llama.cpp prepares pictures its own way; this model was shown them by '{how.resize}'")


def _onnx(composed: Composed, refusals: Refusals, notes: list[str]) -> None:
    config, words = composed.model.config, composed.model.config.text_config
    how = composed.processor.image_processor.preparation
    kinds = set(getattr(words, "layer_types", None) or ())
    if not packs_exactly(words) or kinds - {"full_attention"} or slides(words):
        refusals["language"] = (
            f"a {words.model_type!r} whose layers are not all full attention over positions that are given; "
            f"its cache is no pair of growing tensors a layer"
        )
    if config.vision_config is not None and how.resize in ("native", "slices"):
        refusals["vision.resize"] = f"'{how.resize}': tiles of many sizes; a graph reads one size"
    if config.speech is not None:
        refusals["speech"] = "the graphs hold towers, connectors and the language model; no talker"


Find = Callable[["Composed", Refusals, list[str]], None]

TARGETS: dict[str, tuple[str, Find]] = {
    "hub": ("transformers with remote code", _hub),
    "llava": ("transformers and vLLM", _llava),
    "gguf": ("llama.cpp", _gguf),
    "onnx": ("onnxruntime", _onnx),
}
"""Target -> the programs that read it, and what judges a composition for it."""


# What several targets ask


def canvases(how: Preparation) -> list[tuple[int, int]]:
    """Heights and widths that an ``anyres`` picture may take, those with too many tiles left out."""
    tall, wide = how.size_px
    most = how.max_tiles
    return [(h, w) for h, w in how.pinpoints if not most or h // tall * (w // wide) <= most]


def blocks_run(config: Any) -> tuple[int, ...]:
    """Hidden states of the picture tower that are read, counted from 0; the greatest is the blocks it has."""
    return hidden_states(config.vision_config.num_hidden_layers, config.feature_layer)


def slides(words: Any) -> bool:
    """Whether a language model attends to fewer positions than it has."""
    window = getattr(words, "sliding_window", None)
    return bool(window) and window < words.max_position_embeddings


def head_beyond_a_matrix(composed: Composed) -> str | None:
    """What else the language model does for its logits; None: one matrix over states as wide as its words."""
    model: Any = composed.model
    if not model.head_is_plain:
        return f"the logits of a {model.config.text_config.model_type!r} are capped or scaled"
    if model.lm_head.bias is not None:
        return "the language head has a bias"
    if model.lm_head.in_features != model.get_input_embeddings().embedding_dim:
        return "the language head is of another width than the embeddings"
    return None


def split_steps(tokenizer: Any) -> tuple[str, ...]:
    """What a tokenizer does before BPE: ``Split:REGEX``, ``Digits``, ``GPT-2`` (its rule), ``bytes``, ..."""
    return _split_steps(json.loads(tokenizer.backend_tokenizer.to_str()))


def _split_steps(said: Mapping[str, Any]) -> tuple[str, ...]:
    step = said["pre_tokenizer"] or {"type": "nothing"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    told: list[str] = []
    for each in steps:
        if each["type"] == "Split":
            told.append(f"Split:{each['pattern'].get('Regex', '')}")
        elif each["type"] == "ByteLevel":
            told += ["GPT-2"] * each.get("use_regex", True) + ["bytes"]
        else:
            told.append(each["type"])
    return tuple(told)


def not_byte_level(tokenizer: Any) -> str | None:
    """Why a tokenizer is no byte-level BPE as GPT-2's; None: it is."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return "the tokenizer has no tokenizer.json"
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = said["model"].get("type") or "BPE"
    steps = _split_steps(said)
    if kind != "BPE" or "bytes" not in steps:
        return (
            f"the tokenizer is {kind} over {' and '.join(steps)}; only byte-level BPE is written (those of "
            f"Llama 3, Qwen, SmolLM, GPT-2)"
        )
    normalizer = said.get("normalizer") or {"type": "NFC"}
    if normalizer["type"] != "NFC":
        return f"the tokenizer changes texts first ({normalizer['type']}), which llama.cpp does not"
    return None


def _not_two_layers(chosen: Mapping[str, Any], activations: Collection[str] | None = None) -> str | None:
    name, options = chosen["name"], chosen["options"]
    if name != "mlp":
        return f"'{name}'"
    if options["depth"] != 2:
        return f"'mlp' of depth {options['depth']}"
    if activations is not None and options["activation"] not in activations:
        return f"'mlp' with {options['activation']}"
    return None


def _not_plain_llama(words: Any) -> str | None:
    """What a llama-like model has that its mapping does not carry; None: nothing."""
    rope = getattr(words, "rope_parameters", None) or {}
    for key in ("attention_bias", "mlp_bias"):
        if getattr(words, key, False):
            return f"{key} of a {words.model_type!r}: transformers' reader of GGUF would drop it"
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rotary positions of type '{rope.get('rope_type')}'; written is 'default' alone"
    if words.hidden_act != "silu":
        return f"activation '{words.hidden_act}'; llama.cpp computes silu for {words.model_type!r}"
    kinds = set(getattr(words, "layer_types", None) or ()) - {"full_attention"}
    if kinds or slides(words):
        return "sliding windows; llama.cpp would attend over everything"
    heads, width = words.num_attention_heads, words.hidden_size
    if words.model_type == "qwen2" and (getattr(words, "head_dim", None) or width // heads) != width // heads:
        return f"heads of {words.head_dim} in a 'qwen2' of width {width}; its file has no place to say so"
    return None


def _refuse_ears_and_mouth(config: Any, target: str, refusals: Refusals) -> None:
    if config.audio_config is not None:
        refusals["audio"] = f"this model hears; {target} cannot"
    if config.speech is not None:
        refusals["speech"] = f"this model speaks; {target} cannot"


def leading_tokens(config: Any) -> int:
    """Class token and registers that the picture tower has before its patches."""
    return encoder_of(config.vision_config).leading_tokens(config.vision_config)
