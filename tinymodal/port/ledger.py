"""Every tensor of a foreign checkpoint is accounted for, or nothing is written.

:func:`place` puts the pieces that a reader found into our composition. What does not fit is refused with the
tensor's name, both shapes and the family; what is not used is listed with the reason.
"""

# Shapes: V rows of an embedding, D language width.

from __future__ import annotations

import copy
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinymodal.core.errors import CheckpointError
from tinymodal.model.geometry import MARKS
from tinymodal.model.language import causal_class
from tinymodal.model.pair import PairConfig
from tinymodal.model.timm_tower import TimmConfig, load_timm
from tinymodal.port.source import Part, Piece, Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration

COMPUTED = re.compile(r"(.*\.)?(position_ids|rotary_emb\.(inv_freq|cos_cached|sin_cached))")
"""Buffers that older versions of transformers saved and every version computes anew."""

SPELLINGS = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
"""Parts of DINOv2's names, as in its files and as newer versions of transformers have them in memory."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one tensor of the source."""

    file: str
    name: str
    shape: tuple[int, ...]
    to: str
    """Its name in our model; empty where it is not used."""
    reason: str
    """Why it is not used, or what was added to it; empty for a plain copy."""


@dataclass(slots=True)
class Placement:
    """Weights of our model, and what became of each tensor of the source."""

    weights: dict[str, Tensor]
    fates: list[Fate]
    scaled: dict[str, float] = field(default_factory=dict)
    """Names of ours whose numbers are the source's times a factor, computed and kept in float32."""
    made: dict[str, str] = field(default_factory=dict)
    """Names of ours with what was made for them: rows of new words, marks, zero biases."""


class LanguageNames:
    """Where the parts of a causal language model lie, by the names of its own class."""

    def __init__(self, config: PreTrainedConfig) -> None:
        with torch.device("meta"):
            family: Any = causal_class(config)._from_config(copy.deepcopy(config))
        self.decoder = f"{family.base_model_prefix}."
        head, words = family.get_output_embeddings(), family.get_input_embeddings()
        self.head = next(f"{name}." for name, module in family.named_modules() if module is head)
        self.embedding = next(f"{name}.weight" for name, module in family.named_modules() if module is words)

    def ours(self, name: str) -> str:
        """``model.norm.weight`` -> ``model.language_model.norm.weight``; unknown names stay as they are."""
        if name.startswith(self.head):
            return f"lm_head.{name.removeprefix(self.head)}"
        if name.startswith(self.decoder):
            return f"model.language_model.{name.removeprefix(self.decoder)}"
        return name


def num_words(source: Source) -> int:
    """Rows of the source's embedding.

    Raises:
        CheckpointError: it has none.
    """
    wanted = LanguageNames(source.language).embedding
    found = [p for p in source.pieces if p.part == "language" and p.to == wanted]
    if not found:
        raise CheckpointError(f"{source.family}: the token embedding {wanted} is missing")
    return found[-1].tensor.shape[0]


def place(model: TinyModalForConditionalGeneration, source: Source) -> Placement:
    """Find the place of every piece in ``model``, whose weights are only asked for their names and shapes.

    Raises:
        CheckpointError: a tensor is missing, not expected, or of another shape; names it, the shapes and the
            family.
    """
    names = LanguageNames(source.language)
    prefix: dict[Part, str] = {
        "vision": _prefix_of(model, model.model.towers["image"].module),
        "connector": "model.connectors.image.",
    }
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    words = names.ours(names.embedding)
    whole = _all_of_tower(source.vision)
    placement = Placement({}, [])
    taken: dict[str, int] = {}
    marks: dict[str, Piece] = {}

    def drop(piece: Piece, reason: str) -> None:
        placement.fates.append(Fate(piece.file, piece.name, tuple(piece.tensor.shape), "", reason))

    for piece in source.pieces:
        shape = tuple(piece.tensor.shape)
        if piece.part is None:
            drop(piece, piece.reason)
            continue
        if piece.part == "marks":
            marks[piece.to] = piece
            to = f"model.marks.image.weight ({piece.to})"
            reason = " ".join(filter(None, (piece.reason, _times(source))))
            placement.fates.append(Fate(piece.file, piece.name, shape, to, reason))
            continue
        ours = (
            names.ours(piece.to) if piece.part == "language" else spelt(prefix[piece.part] + piece.to, wanted)
        )
        if ours == tied:
            drop(piece, "the config ties the head to the embedding")
            continue
        if ours not in wanted:
            drop(piece, _reason_unused(piece, source, whole))
            continue
        if ours in taken:
            before = placement.fates[taken[ours]]
            placement.fates[taken[ours]] = Fate(
                before.file, before.name, before.shape, "", f"replaced by {piece.file}"
            )
            placement.made.pop(ours, None)
        tensor = piece.tensor
        grows = ours in (words, "lm_head.weight", "lm_head.bias") and shape[0] < wanted[ours][0]
        if grows and shape[1:] == wanted[ours][1:]:
            placement.made[ours] = f"{wanted[ours][0] - shape[0]} rows of new words, the mean of the others"
            tensor = _grown(tensor, wanted[ours][0])
        elif shape != wanted[ours]:
            raise CheckpointError(
                f"{source.family}: {piece.file}: {piece.name} is {shape}, but its place {ours} is "
                f"{wanted[ours]} by the configs; the checkpoint does not hold the model that its config "
                "describes"
            )
        taken[ours] = len(placement.fates)
        placement.fates.append(Fate(piece.file, piece.name, shape, ours, piece.reason))
        placement.weights[ours] = tensor
    _make_marks(source, placement, marks, words, wanted)
    _scale(source, placement, prefix["connector"], taken)
    _make_zeros(source, placement, prefix, wanted)
    missing = sorted(set(wanted) - set(placement.weights) - {tied})
    if missing:
        raise CheckpointError(
            f"{source.family}: {len(missing)} tensors are missing, first "
            f"{_theirs(missing[0], names, prefix)} {wanted[missing[0]]}; the checkpoint is incomplete or "
            "holds another model"
        )
    return placement


def spelt(name: str, known: Container[str]) -> str:
    """``name`` in the spelling that is known, where one is; see :data:`SPELLINGS`."""
    if name not in known:
        for pair in SPELLINGS:
            for old, new in (pair, pair[::-1]):
                if old in name and name.replace(old, new) in known:
                    return name.replace(old, new)
    return name


def _reason_unused(piece: Piece, source: Source, whole: Container[str]) -> str:
    """Why a tensor has no place in our model, whose tower is the first part of one with the names ``whole``.

    Raises:
        CheckpointError: there is no reason: the family's own class has no such tensor either.
    """
    if COMPUTED.fullmatch(piece.to):
        return "computed, not learned"
    if piece.part == "vision" and spelt(piece.to, whole) in whole:
        return f"behind feature layer {source.feature_layer}: never reached"
    raise CheckpointError(
        f"{source.family}: {piece.file}: {piece.name} {tuple(piece.tensor.shape)} is not expected: a "
        f"{piece.part} part of this config has no tensor '{piece.to}'; the checkpoint does not hold the "
        "model that its config describes"
    )


def _all_of_tower(config: Any) -> set[str]:
    """Names of a whole tower, its last norm and head included; of our own towers none."""
    from transformers import AutoModel

    if isinstance(config, PairConfig):
        first, second = config.parts()
        both = (("first", first), ("second", second))
        return {f"{which}.backbone.{name}" for which, part in both for name in _all_of_tower(part)}
    if isinstance(config, TimmConfig):
        with torch.device("meta"):
            whole = load_timm().create_model(config.architecture, pretrained=False, **config.model_args)
        return set(whole.state_dict())
    if type(config) not in AutoModel._model_mapping:
        return set()
    with torch.device("meta"):
        return set(AutoModel.from_config(copy.deepcopy(config)).state_dict())


def _make_marks(
    source: Source,
    placement: Placement,
    marks: Mapping[str, Piece],
    words: str,
    wanted: Mapping[str, Sequence[int]],
) -> None:
    """The table of marks, each from its own tensor or from the embedding of a word."""
    if not source.marks:
        return
    rows: list[Tensor] = []
    for mark in source.marks:
        if mark in marks:
            row = marks[mark].tensor.reshape(MARKS[mark], -1)
        elif mark in source.mark_words:
            word = source.mark_words[mark]
            number: Any = source.tokenizer.convert_tokens_to_ids(word)
            if number is None or number == source.tokenizer.unk_token_id:
                raise CheckpointError(
                    f"{source.family}: pictures stand between {', '.join(source.mark_words.values())}, but "
                    f"the tokenizer has no token '{word}'; name the right one with --tokenizer FOLDER"
                )
            row = placement.weights[words][number : number + 1]
            placement.made[f"model.marks.image.weight ({mark})"] = (
                f"the embedding of '{word}' {_times(source)}".rstrip()
            )
        else:
            raise CheckpointError(f"{source.family}: the mark '{mark}' is missing from the checkpoint")
        if row.shape[1] != wanted["model.marks.image.weight"][1]:
            raise CheckpointError(
                f"{source.family}: the mark '{mark}' is {tuple(row.shape)}, the language model's width is "
                f"{wanted['model.marks.image.weight'][1]}"
            )
        rows.append(row)
    table = torch.cat(rows)
    if source.times != 1:
        table = table.float() * source.times
        placement.scaled["model.marks.image.weight"] = source.times
    placement.weights["model.marks.image.weight"] = table


def _times(source: Source) -> str:
    return f"times {source.times:.6g}" if source.times != 1 else ""


def last_layers(connector: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the layers whose weight and bias make up a connector's output, all of it linear in them.

    Empty where there is no such layer.
    """
    last = 2 * (options.get("depth", 2) - 1)
    layers = {
        "linear": ("proj",),
        "mlp": (f"proj.{last}",),
        "interleave": (f"proj.0.{last}", f"proj.1.{last}"),
        "qformer": ("proj.1" if options.get("middle") else "proj.0",),
        "perceiver": ("proj" if options.get("width") else "norm",),
    }
    return layers.get(connector, ())


def _scale(source: Source, placement: Placement, prefix: str, taken: Mapping[str, int]) -> None:
    """Put the factor of the pictures' embeddings into the connector's last layer.

    In float32, and kept so: a 16-bit weight times a factor that is no power of two would be rounded.

    Raises:
        CheckpointError: the connector has no such layer.
    """
    if source.times == 1:
        return
    layers = last_layers(source.connector, source.options)
    if not layers:
        raise CheckpointError(
            f"{source.family}: was trained where pictures' embeddings were multiplied by {source.times:.6g}, "
            f"and the connector '{source.connector}' has no last layer that could hold this factor"
        )
    for ours in (f"{prefix}{layer}.{kind}" for layer in layers for kind in ("weight", "bias")):
        if ours not in taken:  # missing, which is said later, or a bias that is zero
            continue
        placement.weights[ours] = placement.weights[ours].float() * source.times
        placement.scaled[ours] = source.times
        fate = placement.fates[taken[ours]]
        reason = " ".join(filter(None, (fate.reason, _times(source))))
        placement.fates[taken[ours]] = replace(fate, reason=reason)
    source.notes.append(
        f"the connector's last layer{' and the marks are' if source.marks else ' is'} the source's "
        f"times {source.times:.6g}: before version 5.4 transformers' {source.language.model_type} multiplied "
        "pictures' embeddings by sqrt(width) as it does words', and does not any more"
    )


def _make_zeros(
    source: Source,
    placement: Placement,
    prefix: Mapping[Part, str],
    wanted: Mapping[str, Sequence[int]],
) -> None:
    """Biases that ours have and the source does not."""
    dtype = next(iter(placement.weights.values())).dtype if placement.weights else torch.float32
    for part, name in source.zeros:
        ours = prefix[part] + name
        placement.weights[ours] = torch.zeros(wanted[ours], dtype=dtype)
        placement.made[ours] = "zeros: the source has no such bias"


def _grown(table: Tensor, rows: int) -> Tensor:
    """An embedding with further rows, each the mean of the others: a typical word."""
    new = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat((table, new.expand(rows - len(table), *table.shape[1:])))


def _prefix_of(model: TinyModalForConditionalGeneration, part: torch.nn.Module) -> str:
    return next(f"{name}." for name, module in model.named_modules() if module is part)


def _theirs(ours: str, names: LanguageNames, prefix: Mapping[Part, str]) -> str:
    """Our name as the source would have it: the part, and the name within it."""
    if ours.startswith("lm_head."):
        return f"{names.head}{ours.removeprefix('lm_head.')} of the language model"
    if ours.startswith("model.language_model."):
        return f"{names.decoder}{ours.removeprefix('model.language_model.')} of the language model"
    for part, start in prefix.items():
        if ours.startswith(start):
            return f"{ours.removeprefix(start)} of the {part} part"
    return ours
