"""``--to onnx``: towers with their connectors, the words' embedding, and the language model with its cache.

Four graphs, each a plain function of tensors; ``graphs.json`` says what goes in and comes out. Between them
stands what is no arithmetic: at each placeholder the next embedding is put in place of the word's, as
:class:`~tinymodal.port.onnx_run.Graphs` does in numpy.

Attention is written out instead of called by name, and its mask is made inside the graph of the padding and
the lengths, so that every length of prompt and cache is one graph.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tinymodal.compose.build import Composed
from tinymodal.core.errors import ExportError
from tinymodal.model.audio_connectors import StackFrames
from tinymodal.model.layout import VALUES
from tinymodal.port.onnx_run import GRAPHS, Graphs
from tinymodal.port.parity import TOLERANCE, judge, record
from tinymodal.port.proof import Check, Job, Proof

# Shapes: B rows, T new positions, P positions in the cache, I tiles, S tokens a tile, M marks, D width,
# V vocabulary, H heads of keys, d their width, L layers.

EXAMPLE = {"rows": 2, "new": 3, "past": 4, "tiles": 2}
"""Sizes of what the graphs are traced with. None is 0 or 1, and no two that are free are equal by chance:
torch takes such sizes for constants."""


class Perceive(nn.Module):
    """Tower and connector of one medium: tiles -> what placeholders choose from, [I*S + M, D]."""

    def __init__(self, core: Any, kind: str) -> None:
        super().__init__()
        self.tower, self.connector = core.towers[kind], core.connectors[kind]
        self.marks: Any = dict(core.marks.items()).get(kind)

    def forward(self, values: Tensor) -> Tensor:
        features = self.tower(values)
        stacks = isinstance(self.connector, StackFrames)
        seen_ISD = self._stacked(features.values) if stacks else self.connector(features)
        bank_RD = seen_ISD.flatten(0, 1)
        return bank_RD if self.marks is None else torch.cat((bank_RD, self.marks.weight))

    def _stacked(self, x_ISE: Tensor) -> Tensor:
        """What StackFrames does, for any number of positions.

        A graph has no branch: whether positions are missing at the end must not be decided while it is
        traced. And it rounds a quotient towards 0, not down, so that -(-S // factor) is another number there.
        """
        factor = self.connector.factor
        num = x_ISE.shape[1]
        groups = (num + factor - 1) // factor
        place = torch.arange(groups * factor).clamp(max=num - 1)
        x_IGE = x_ISE.index_select(1, place).reshape(x_ISE.shape[0], groups, factor * x_ISE.shape[2])
        return self.connector.proj(self.connector.norm(x_IGE))


class Decode(nn.Module):
    """The language model over embeddings and its cache: logits, and the cache with the new positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.decoder = model.model.language_model

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache: Any = DynamicCache(config=self.model.config.text_config)
        for layer, (keys, values) in zip(cache.layers, zip(past[::2], past[1::2], strict=True), strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        out = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=bias_of(attention_mask, inputs_embeds),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return self.model.head(out.last_hidden_state), *kept


def bias_of(mask_BK: Tensor, x_BTD: Tensor) -> Tensor:
    """What is added to attention scores, [B, 1, T, K]: 0 where a position may look, else very little."""
    num_keys, num_new = mask_BK.shape[1], x_BTD.shape[1]
    key_K = torch.arange(num_keys)
    query_T = torch.arange(num_new) + (num_keys - num_new)
    before_TK = key_K[None, :] <= query_T[:, None]
    # A padded position sees itself: over nothing at all, attention would be no number.
    itself_TK = key_K[None, :] == query_T[:, None]
    seen_BTK = (before_TK[None] & mask_BK[:, None].bool()) | itself_TK[None]
    least = torch.finfo(x_BTD.dtype).min
    return torch.where(seen_BTK, 0.0, least)[:, None].to(x_BTD.dtype)


def write(job: Job, folder: Path) -> None:
    """Write the graphs, what they are, and the processor that makes their inputs.

    Raises:
        ExportError: a part cannot be traced; names it.
    """
    folder.mkdir(parents=True)
    composed = job.composed
    with written_out(composed.model):
        for kind in ("image", "audio"):
            if kind in kinds_of(job):
                _write_tower(composed, kind, folder)
        _write_embedding(composed, folder)
        _write_decoder(composed, folder)
    composed.processor.save_pretrained(folder)
    text = json.dumps(described(job), indent=2)
    (folder / GRAPHS).write_text(text + "\n", encoding="utf-8")


def prove(job: Job, folder: Path) -> Proof:
    """Compare with onnxruntime: prompts, the last of their positions one by one over the cache, and text."""
    over, left_out = job.prompts()
    reference = Graphs(folder)
    theirs, longer = record(reference, over, job.composed)
    parity = judge(job.composed, theirs, reference.name)
    parity.left_out = left_out + longer
    return Proof(parity, [_rows_check(job, reference)])


def kinds_of(job: Job) -> list[str]:
    """Media that the graphs perceive."""
    return [kind for kind, has in (("image", job.sees), ("audio", job.hears)) if has]


def described(job: Job) -> dict[str, Any]:
    """What ``graphs.json`` holds."""
    config = job.composed.model.config
    words = config.text_config
    return {
        "format": 1,
        "media": {
            kind: {"graph": f"{kind}.onnx", "input": VALUES[kind], "place": config.place_of(kind)}
            for kind in kinds_of(job)
        },
        "embedding": {"graph": "embed.onnx", "input": "input_ids", "output": "inputs_embeds"},
        "decoder": {
            "graph": "decoder.onnx",
            "past": [
                {"name": f"past.{name}", "heads": heads, "width": width}
                for name, (heads, width) in cache_shapes(job.composed).items()
            ],
            "vocabulary": words.vocab_size,
        },
        "stop_ids": list(job.composed.encoder.stop_ids),
        "context": getattr(words, "max_position_embeddings", None),
    }


def cache_shapes(composed: Composed) -> dict[str, tuple[int, int]]:
    """Heads and their width of every tensor of the cache, by name: ``0.key``, ``0.value``, ``1.key`` ..."""
    model: Any = composed.model
    width = model.get_input_embeddings().embedding_dim
    with torch.no_grad():
        out = model.model.language_model(inputs_embeds=torch.zeros(1, 2, width), use_cache=True)
    return {
        f"{number}.{kind}": (tensor.shape[1], tensor.shape[3])
        for number, layer in enumerate(out.past_key_values.layers)
        for kind, tensor in (("key", layer.keys), ("value", layer.values))
    }


@contextmanager
def written_out(model: Any) -> Iterator[None]:
    """Inside, attention is plain matrix products, whatever the model was loaded with."""
    parts = [m for m in model.modules() if getattr(getattr(m, "config", None), "_attn_implementation", None)]
    configs = {id(part.config): part.config for part in parts}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _write_tower(composed: Composed, kind: str, folder: Path) -> None:
    tiles = example_tiles(composed, kind)
    free: tuple[int, ...] = (0,) if kind == "image" or fixed_windows(composed) else (0, 2)
    _trace(
        Perceive(composed.model.model, kind),
        (tiles,),
        folder / f"{kind}.onnx",
        inputs={VALUES[kind]: free},
        outputs=("bank",),
        part={"image": "vision", "audio": "audio"}[kind],
    )


def example_tiles(composed: Composed, kind: str) -> Tensor:
    """Some prepared tiles."""
    random = torch.Generator().manual_seed(0)
    if kind == "image":
        height, width = composed.processor.image_processor.preparation.size_px
        return torch.randn(EXAMPLE["tiles"], 3, height, width, generator=random)
    ear = composed.processor.feature_extractor
    wave = torch.randn(round(1.9 * ear.hearing.rate_hz), generator=random)
    (tile,) = ear.prepare(wave, ear.hearing.rate_hz).tiles
    return torch.stack([tile] * EXAMPLE["tiles"])


def fixed_windows(composed: Composed) -> bool:
    """Whether every sound is prepared as windows of one length (Whisper)."""
    hearing = composed.processor.feature_extractor.hearing
    return hearing.step == hearing.window


def _write_embedding(composed: Composed, folder: Path) -> None:
    embedding: Any = composed.model.get_input_embeddings()
    ids = torch.zeros(EXAMPLE["rows"], EXAMPLE["new"], dtype=torch.long)
    _trace(
        embedding,
        (ids,),
        folder / "embed.onnx",
        inputs={"input_ids": (0, 1)},
        outputs=("inputs_embeds",),
        part="language",
    )


def _write_decoder(composed: Composed, folder: Path) -> None:
    model: Any = composed.model
    rows, new, past = EXAMPLE["rows"], EXAMPLE["new"], EXAMPLE["past"]
    random = torch.Generator().manual_seed(0)
    width = model.get_input_embeddings().embedding_dim
    shapes = cache_shapes(composed)
    cache = [torch.randn(rows, heads, past, wide, generator=random) for heads, wide in shapes.values()]
    inputs = {"inputs_embeds": (0, 1), "attention_mask": (0, 1), "position_ids": (0, 1)}
    inputs |= {f"past.{name}": (0, 2) for name in shapes}
    outputs = ("logits", *(f"present.{name}" for name in shapes))
    given = (
        torch.randn(rows, new, width, generator=random),
        torch.ones(rows, past + new, dtype=torch.long),
        torch.arange(past, past + new).expand(rows, new).contiguous(),
        cache,
    )
    _trace(Decode(model), given, folder / "decoder.onnx", inputs=inputs, outputs=outputs, part="language")


def _trace(
    module: nn.Module,
    given: tuple[Any, ...],
    file: Path,
    *,
    inputs: Mapping[str, tuple[int, ...]],
    outputs: tuple[str, ...],
    part: str,
) -> None:
    """Write one graph.

    Args:
        module: what it computes.
        given: arguments to trace it with.
        file: to write.
        inputs: their names, and which of their dimensions are free.
        outputs: their names.
        part: of the model, for the error.

    Raises:
        ExportError: torch cannot trace the module.
    """
    module.eval()
    free = [{place: torch.export.Dim.DYNAMIC for place in places} for places in inputs.values()]
    shapes: tuple[Any, ...] = tuple(free)
    if isinstance(given[-1], list):  # the last argument takes all the rest
        shapes = (*free[: len(given) - 1], free[len(given) - 1 :])
    try:
        with quiet(), torch.no_grad():
            torch.onnx.export(
                module,
                given,
                str(file),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # of any kind, from model code and from torch
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(
            f"{part}: torch cannot write it as a graph: {type(error).__name__}: {said}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, torch's exporter does not say what it does without (torchvision) and what will change."""
    told = logging.getLogger("torch.onnx")
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        told.setLevel(level)


def _rows_check(job: Job, reference: Graphs) -> Check:
    """Two prompts of different lengths in one batch, padded on the left, give each what it has alone."""
    texts = [case.text for case in job.prompts()[0] if not case.pictures and not case.sounds][:1]
    texts.append(texts[0] + " One, two, three.")
    both = dict(job.composed.processor(text=texts))
    apart = 0.0
    together = reference.batch(both)
    for row, text in enumerate(texts):
        alone = reference.logits(dict(job.composed.processor(text=text)))
        apart = max(apart, float((together[row, -len(alone) :] - alone).abs().max()))
    return Check("rows of a batch do not see each other", apart <= TOLERANCE, f"logits differ by {apart:.1e}")
