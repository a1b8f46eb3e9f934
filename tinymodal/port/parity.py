"""When two models are equal: the same token ids, logits within a tolerance, the same greedy text.

A port is not done until both sides agree. The other side is a :class:`Reference`: the family's own class
where there is one, run on the same pictures and texts through its own processor. Both run in float32, one
after the other, so that one of the two must fit into memory at a time.
"""

# Shapes: T positions, V vocabulary.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from tinymodal.compose.build import IMAGE_TOKEN, Composed
from tinymodal.port.weights import read_folder

TOLERANCE = 1e-4
"""Largest |difference| of logits in float32. Equal arithmetic in another order differs by about 1e-5; a wrong
layer, norm or order of tokens by more than 1e-2."""

RATE_HZ = 16_000
"""Of a case's sounds."""

NUM_NEW_TOKENS = 8
"""Length of the greedy text that is compared."""


class Case(NamedTuple):
    """Pictures and sounds, and a text with a place (``<image>``, ``<audio>``) for each."""

    name: str
    pictures: tuple[PIL.Image.Image, ...]
    text: str
    sounds: tuple[Tensor, ...] = ()
    """float32 [samples] each, at 16,000 Hz."""


class Reference(Protocol):
    """The other side of a comparison."""

    name: str
    """What runs there, for the report."""

    def inputs(self, case: Case, ours: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What its forward takes, by its own processor; ``ours`` is what our processor made of the case."""

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Of every position and word: float32 [T, V]."""

    def greedy(self, inputs: Mapping[str, Tensor], num: int) -> list[int]:
        """The likeliest next tokens, one after the other."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One case, compared."""

    case: str
    text: str
    pictures: tuple[str, ...]
    """Sizes, e.g. ``640 x 480 px``."""
    tokens: int
    """Positions of our prompt."""
    pixels: float
    """Largest |difference| of what the towers are shown, in units of a normalised picture."""
    logits: float
    """Largest |difference|; infinite where the prompts differ in their tokens."""
    texts: tuple[str, str]
    """What each side says first: ours, theirs."""

    @property
    def greedy(self) -> bool:
        """Whether both sides say the same."""
        return self.texts[0] == self.texts[1]


@dataclass(slots=True)
class Parity:
    """What was compared, and whether it is equal."""

    reference: str
    tolerance: float = TOLERANCE
    rows: list[Difference] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Cases that were not run, with the reason."""

    @property
    def passed(self) -> bool:
        """Whether every case is within the tolerance and says the same; False where nothing was compared."""
        return bool(self.rows) and all(row.logits <= self.tolerance and row.greedy for row in self.rows)

    @property
    def largest(self) -> float:
        """The largest |difference| of logits."""
        return max((row.logits for row in self.rows), default=float("inf"))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [asdict(row) | {"greedy_equal": row.greedy} for row in self.rows]
        return {
            "reference": self.reference,
            "tolerance": self.tolerance,
            "passed": self.passed,
            "largest": self.largest,
            "cases": rows,
            "left_out": self.left_out,
        }


def cases(with_pictures: bool = True) -> list[Case]:
    """Made pictures of several shapes, and texts: none, one and two pictures, at the start and inside."""
    found = [Case("words alone", (), "USER: Name three colours. ASSISTANT:")]
    if not with_pictures:
        return found
    wide, tall, small = picture(640, 480, 1), picture(300, 900, 2), picture(90, 60, 3)
    return [
        *found,
        Case("a wide picture", (wide,), f"USER: {IMAGE_TOKEN}\nWhat is shown? ASSISTANT:"),
        Case("a tall picture", (tall,), f"USER: {IMAGE_TOKEN}\nWhat is left of the circle? ASSISTANT:"),
        Case(
            "two pictures",
            (small, wide),
            f"USER: Compare {IMAGE_TOKEN} with {IMAGE_TOKEN}. ASSISTANT: The first",
        ),
    ]


def picture(width_px: int, height_px: int, seed: int) -> PIL.Image.Image:
    """A made picture: coloured slopes, blocks with hard edges, and a little noise, so that resizing shows."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height_px, 0:width_px]
    slopes = np.stack([255 * x / width_px, 255 * y / height_px, 255 * (x + y) / (width_px + height_px)], 2)
    for _ in range(6):
        top, left = random.integers(0, height_px), random.integers(0, width_px)
        slopes[top : top + height_px // 4, left : left + width_px // 5] = random.integers(0, 256, 3)
    noise = random.integers(-12, 13, slopes.shape)
    return PIL.Image.fromarray(np.clip(slopes + noise, 0, 255).astype(np.uint8))


class Recorded(NamedTuple):
    """What the reference made of a case."""

    case: Case
    inputs: Mapping[str, Tensor]
    logits: Tensor
    ids: list[int]


def record(
    reference: Reference, over: Sequence[Case], ours: Composed, num_new_tokens: int = NUM_NEW_TOKENS
) -> tuple[list[Recorded], list[str]]:
    """Run the reference; also which cases are longer than the language model can read.

    Args:
        reference: the other side.
        over: what to run.
        ours: only its processor is used.
        num_new_tokens: length of the greedy text.
    """
    room = ours.encoder.max_prompt_tokens
    found, left_out = [], []
    for case in over:
        prompt = prepared(ours, case)
        length = prompt["input_ids"].shape[1] + num_new_tokens
        if room is not None and length > room:
            left_out.append(f"{case.name}: {length} tokens, the language model reads {room}")
            continue
        inputs = reference.inputs(case, prompt)
        logits = reference.logits(inputs)
        found.append(Recorded(case, inputs, logits, reference.greedy(inputs, num_new_tokens)))
    return found, left_out


def judge(
    ours: Composed,
    theirs: Sequence[Recorded],
    name: str,
    tolerance: float = TOLERANCE,
    num_new_tokens: int = NUM_NEW_TOKENS,
) -> Parity:
    """Run our side on what :func:`record` kept, and compare."""
    parity = Parity(name, tolerance)
    for case, their_inputs, their_logits, their_ids in theirs:
        inputs = prepared(ours, case)
        sizes = tuple(f"{p.width} x {p.height} px" for p in case.pictures)
        same = torch.equal(inputs["input_ids"], their_inputs["input_ids"])
        difference, said = float("inf"), ""
        if same:
            with torch.no_grad():
                logits = ours.model(**inputs).logits[0].float()
            known = min(logits.shape[-1], their_logits.shape[-1])  # rows for words that are new to the source
            difference = float((logits[:, :known] - their_logits[:, :known]).abs().max())
            said = spoken(ours.tokenizer, greedy(ours.model, inputs, num_new_tokens, known))
        parity.rows.append(
            Difference(
                case.name,
                case.text,
                sizes,
                inputs["input_ids"].shape[1],
                _pixels(inputs, their_inputs),
                difference,
                (said, spoken(ours.tokenizer, their_ids)),
            )
        )
    return parity


def prepared(ours: Composed, case: Case) -> dict[str, Any]:
    """The case as our own forward takes it."""
    heard: dict[str, Any] = {"audio": list(case.sounds), "sampling_rate": RATE_HZ} if case.sounds else {}
    return dict(ours.processor(images=list(case.pictures) or None, text=case.text, **heard))


def greedy(model: Any, inputs: Mapping[str, Any], num: int, known: int | None = None) -> list[int]:
    """The likeliest next tokens of a model that is called as transformers' are.

    Args:
        model: takes ``use_cache`` and ``past_key_values``, gives ``logits`` and the cache.
        inputs: one prompt.
        num: how many tokens.
        known: choose among the first so many words; None: all.
    """
    ids: list[int] = []
    step, mask = dict(inputs), inputs["attention_mask"]
    cache = None
    with torch.no_grad():
        for _ in range(num):
            out = model(**step, past_key_values=cache, use_cache=True)
            ids.append(int(out.logits[0, -1, :known].argmax()))
            cache, mask = out.past_key_values, torch.cat((mask, mask.new_ones(1, 1)), 1)
            step = {"input_ids": torch.tensor([[ids[-1]]]), "attention_mask": mask}
    return ids


def spoken(tokenizer: Any, ids: Sequence[int]) -> str:
    """Ids as text, special tokens and all."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _pixels(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Largest difference of the tiles, or infinity where they are not as many or as large."""
    if "pixel_values" not in ours and "pixel_values" not in theirs:
        return 0.0
    if "pixel_values" not in ours or "pixel_values" not in theirs:
        return float("inf")
    left, right = _tiles(ours["pixel_values"]), _tiles(theirs["pixel_values"])
    # transformers fills up pictures of fewer tiles with empty ones.
    right = [tile for tile in right if len(left) == len(right) or tile.abs().sum() > 0]
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def _tiles(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return list(values.flatten(0, -4))
    return [tile for same_size in values for tile in same_size]


def written(folder: Path, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of ``weights`` whose bits are not in a saved folder; empty where all are.

    transformers writes some tensors under the names that older versions had: those are looked for by content.
    """
    saved = {name: tensor for file in read_folder(folder) for name, tensor in file.tensors.items()}
    others = [tensor for name, tensor in saved.items() if name not in weights]
    return [
        name
        for name, tensor in weights.items()
        if not (
            _same_bits(tensor, saved[name])
            if name in saved
            else any(_same_bits(tensor, other) for other in others)
        )
    ]


def differing(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of ``weights`` that a loaded model does not have, in the model's data type."""
    own = model.state_dict()
    return [
        name
        for name, tensor in weights.items()
        if name not in own or not _same_bits(tensor.to(own[name].dtype), own[name])
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes: a NaN equals itself, and 0.0 is not -0.0.
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
