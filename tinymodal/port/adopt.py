"""A foreign checkpoint becomes ours, with proof: ``tinymodal adopt CHECKPOINT OUT``.

A family is recognised by what its files say, never by the name of a folder. Its reader hands over every
tensor with its place (``port.source``); what is missing, not expected or misshapen is refused
(``port.ledger``). The result is written beside OUT, read back and compared: each weight bit for bit, and
where transformers has the family's class, logits and greedy text on the same pictures (``port.parity``).
Only then does OUT appear.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tinymodal.chat.template import TEMPLATES, TokenizerTemplate, known_as
from tinymodal.compose.build import CONTRADICTIONS, IMAGE_TOKEN, Composed, add_tokens, assemble, load, save
from tinymodal.compose.pretrained import one_line, read_json
from tinymodal.core.errors import CheckpointError, RecipeError
from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration
from tinymodal.port import hf_llava, llava, omnilmm, tinygptv, tinyllava
from tinymodal.port.ledger import Fate, Placement, num_words, place
from tinymodal.port.parity import Parity, cases, differing, judge, record, written
from tinymodal.port.source import Extras, Source

if TYPE_CHECKING:
    from rich.table import Table

REPORT = "adoption.json"
"""The report's name in OUT."""


class Family(NamedTuple):
    """Checkpoints of one system."""

    name: str
    looked_for: str
    """What recognises it, for the error where nothing is recognised."""
    recognise: Callable[[Path, Mapping[str, Any]], bool]
    """Asked with the checkpoint and its ``config.json`` (empty where there is none)."""
    read: Callable[[Path, Mapping[str, Any], Extras], Source]


FAMILIES = (
    Family(
        "HF Llava",
        "config.json with model_type llava or llava_next, text_config and vision_config",
        hf_llava.recognise,
        hf_llava.read,
    ),
    Family("TinyLLaVA Factory", "config.json with model_type tinyllava", tinyllava.recognise, tinyllava.read),
    Family("OmniLMM", "config.json with model_type omnilmm", omnilmm.recognise, omnilmm.read),
    Family("LLaVA", "config.json with mm_vision_tower", llava.recognise, llava.read),
    Family(
        "MiniGPT-4 and TinyGPT-V",
        "a .pth file with llama_proj.weight among its tensors",
        tinygptv.recognise,
        tinygptv.read,
    ),
)


@dataclass(slots=True)
class Report:
    """What was adopted, and the proof."""

    checkpoint: str
    family: str
    template: str
    out: str
    fates: list[Fate]
    made: dict[str, str]
    """Tensors of ours, or rows of them, that the source does not have."""
    arrived: int
    """Weights of ours that were read back bit for bit."""
    scaled: dict[str, float] = field(default_factory=dict)
    """Those of ours that are the source's times a factor, in float32."""
    notes: list[str] = field(default_factory=list)
    parity: Parity | None = None
    """None: no class of the family to compare with, or it was not asked for."""

    @property
    def dropped(self) -> Counter[str]:
        """How many tensors were not used, by the reason."""
        return Counter(fate.reason for fate in self.fates if not fate.to)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; every tensor of the source is in ``tensors``."""
        return {
            "checkpoint": self.checkpoint,
            "family": self.family,
            "template": self.template,
            "notes": self.notes,
            "arrived_bit_for_bit": self.arrived,
            "scaled": self.scaled,
            "made": self.made,
            "dropped": dict(self.dropped),
            "parity": None if self.parity is None else self.parity.to_dict(),
            "tensors": [asdict(fate) for fate in self.fates],
        }


def adopt(checkpoint: Path, out: Path, extras: Extras | None = None, *, forward: bool = True) -> Report:
    """Read a foreign checkpoint, write ours.

    Args:
        checkpoint: a folder, or for TinyGPT-V and MiniGPT-4 a ``.pth`` file.
        out: the folder to write; must not exist yet, or be empty. It appears whole or not at all.
        extras: folders of parts that the checkpoint does not hold, and a template instead of the guessed one.
        forward: also compare logits and text with the family's own class, where there is one. Needs memory
            for the whole model in float32.

    Raises:
        CheckpointError: nobody knows the family; a part or a tensor is missing, not expected or misshapen;
            the two sides do not agree.
    """
    extras = extras or Extras()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; name a new folder")
    source = recognise(checkpoint, extras)
    composed, placement = composition(source)
    # The folder itself, also where OUT is '.' or a link to it: it is replaced, and needs a name.
    target = out.resolve()
    staged = target.with_name(f".{target.name}.adopting")
    try:
        save(composed, staged)
        _check_written(staged, placement.weights, out)
        report = Report(
            checkpoint=str(checkpoint),
            family=source.family,
            template=source.template,
            out=str(out),
            fates=placement.fates,
            made=placement.made,
            arrived=len(placement.weights),
            scaled=placement.scaled,
            notes=source.notes,
        )
        if forward and source.reference is not None:
            report.parity = _parity(source, composed, staged)
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        (staged / REPORT).write_text(text + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return report


def recognise(checkpoint: Path, extras: Extras) -> Source:
    """Find the family of a checkpoint and read it.

    Raises:
        CheckpointError: there is no such checkpoint, or no family knows it; says what was looked for.
    """
    if not checkpoint.exists():
        raise CheckpointError(f"{checkpoint}: there is no such folder or file")
    config: dict[str, Any] = {}
    if (checkpoint / "config.json").is_file():
        config = read_json(checkpoint / "config.json", str(checkpoint))
    if config.get("model_type") == TinyModalConfig.model_type:
        raise CheckpointError(f"{checkpoint}: is a model of ours already; load it as it is")
    for family in FAMILIES:
        if family.recognise(checkpoint, config):
            return family.read(checkpoint, config, extras)
    looked_for = "; ".join(f"{family.name}: {family.looked_for}" for family in FAMILIES)
    if checkpoint.is_dir():
        files = sorted(path.name for path in checkpoint.iterdir())
        found = f"model_type {config.get('model_type')!r}" if config else "no config.json"
        found += (
            f" and the files {', '.join(files[:6])}{' ...' if len(files) > 6 else ''}"
            if files
            else ", no file"
        )
    else:
        found = f"the file {checkpoint.name}"
    raise CheckpointError(
        f"{checkpoint}: is of no family that is known. Looked for {looked_for}. Found {found}."
    )


def composition(source: Source) -> tuple[Composed, Placement]:
    """The composition that a source describes, holding the source's tensors.

    Raises:
        CheckpointError: see :func:`tinymodal.port.ledger.place`; parts do not fit together.
    """
    tokenizer = source.tokenizer
    rows, known = num_words(source), len(tokenizer)
    if known > rows:
        raise CheckpointError(
            f"{source.family}: the tokenizer has {known} tokens and the model {rows} embeddings; they are "
            "not of one model, name the right one with --tokenizer FOLDER"
        )
    try:
        add_tokens(tokenizer, source.template)
    except RecipeError as fault:
        said = str(fault).removeprefix("model.language.template: ").rstrip(".")
        raise CheckpointError(f"{source.family}: {said}; choose another with --template NAME") from fault
    words = copy.deepcopy(source.language)
    words.vocab_size = max(rows, len(tokenizer))
    vision = copy.deepcopy(source.vision)
    if source.drop_first:
        vision.drop_first = True
    name = known_as(source.template)
    image_token_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    with one_line(source.family, CheckpointError, CONTRADICTIONS):
        config = TinyModalConfig(
            text_config=words,
            vision_config=vision,
            connectors={
                "image": {
                    "name": source.connector,
                    "options": source.options,
                    "marks": list(source.marks),
                    "merge": source.merge,
                }
            },
            feature_layer=source.feature_layer,
            keep_class=source.keep_class,
            image_token_id=image_token_id,
            # A template of your own travels as the tokenizer's Jinja: its file does not travel.
            chat_template=name if name in TEMPLATES else TokenizerTemplate.name,
        )
        # No numbers yet: only names and shapes are asked for, and then every weight is the source's.
        with torch.device("meta"):
            model = TinyModalForConditionalGeneration(config)
        placement = place(model, source)
        model.load_state_dict(placement.weights, strict=False, assign=True)
        model.tie_weights()
        try:
            # Its pixels to the bit: what an adopted model says is compared with what it said.
            preparation = replace(source.preparation, resizer="pillow")
            composed = assemble(model, tokenizer, preparation, source.template)
        except RecipeError as fault:  # there is no recipe here
            raise CheckpointError(f"{source.family}: {fault}") from fault
    return composed, placement


def _check_written(staged: Path, weights: Mapping[str, Tensor], out: Path) -> None:
    """Read back what was written: the files' bits, and through our own loader the names.

    Raises:
        CheckpointError: a weight is not what was read from the checkpoint.
    """
    # In the data type that most have: a model is loaded in one.
    sizes: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        sizes[tensor.dtype] += tensor.numel()
    model = load(staged, dtype=sizes.most_common(1)[0][0]).model
    if lost := written(staged, weights) or differing(model, weights):
        raise CheckpointError(
            f"{out}: {len(lost)} weights were not written as they were read, first {lost[0]}; nothing was "
            "written"
        )


def _parity(source: Source, composed: Composed, folder: Path) -> Parity:
    """Both sides on made pictures, in float32, one after the other.

    Raises:
        CheckpointError: they do not agree; names the worst case.
    """
    assert source.reference is not None
    reference = source.reference()
    theirs, left_out = record(reference, cases(), composed)
    name = reference.name
    del reference
    gc.collect()
    parity = judge(load(folder), theirs, name)
    parity.left_out = left_out
    if not parity.passed:
        worst = max(parity.rows, key=lambda row: (row.logits, not row.greedy), default=None)
        what = (
            "no case fits the language model's context"
            if worst is None
            else (
                f"'{worst.case}' ({', '.join(worst.pictures) or 'no picture'}; {worst.tokens} tokens): "
                f"logits differ by {worst.logits:.3g}, pixels by {worst.pixels:.3g}, ours says "
                f"{worst.texts[0]!r}, {name} {worst.texts[1]!r}"
            )
        )
        raise CheckpointError(
            f"{source.family}: the adopted model and {name} do not agree within {parity.tolerance}: {what}; "
            "nothing was written"
        )
    return parity


def tables(report: Report) -> list[Table]:
    """The report for the terminal: what became of the tensors, and the comparison."""
    from rich.table import Table

    tensors = Table(title=report.family, title_justify="left")
    tensors.add_column("tensors", justify="right")
    tensors.add_column("what became of them")
    used = Counter(fate.reason for fate in report.fates if fate.to)
    tensors.add_row(str(used.pop("", 0)), "copied bit for bit")
    for reason, count in used.items():
        tensors.add_row(str(count), f"used {reason}")
    for reason, count in report.dropped.items():
        tensors.add_row(str(count), f"not used: {reason}")
    for name, how in report.made.items():
        tensors.add_row("", f"made: {name}: {how}")
    if report.parity is None:
        return [tensors]
    compared = Table(title=f"compared with {report.parity.reference}", title_justify="left")
    for column in ("case", "pictures", "tokens", "pixels differ by", "logits differ by", "same greedy text"):
        compared.add_column(column, justify="right" if "differ" in column or column == "tokens" else "left")
    for row in report.parity.rows:
        compared.add_row(
            row.case,
            ", ".join(row.pictures),
            str(row.tokens),
            f"{row.pixels:.1e}",
            f"{row.logits:.1e}",
            "yes" if row.greedy else "no",
        )
    return [tensors, compared]
