"""The graphs of ``--to onnx`` run by onnxruntime, in numpy: what a program that uses them has to do.

Kept small on purpose: it is also the example to copy from. Prompts come from the processor that lies in the
folder, as ``input_ids``, ``attention_mask`` and the media's tiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinymodal.port.parity import Case

Array = NDArray[Any]

GRAPHS = "graphs.json"
"""What the graphs are: their files, inputs and sizes."""

STEPS = 3
"""Positions at a prompt's end that are read one by one over the cache, when logits are compared."""


class Graphs:
    """The graphs of a folder; also a ``port.parity.Reference``."""

    name = "onnxruntime"

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.about: dict[str, Any] = json.loads((folder / GRAPHS).read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()

        def opened(graph: str) -> Any:
            file = str(folder / graph)
            return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

        self.media = {kind: opened(medium["graph"]) for kind, medium in self.about["media"].items()}
        self.words = opened(self.about["embedding"]["graph"])
        self.decoder = opened(self.about["decoder"]["graph"])

    def embedded(self, inputs: Mapping[str, Any]) -> Array:
        """Embeddings of a prompt, float32 [B, T, D]: of its words, and of its media at their places."""
        ids_BT = np.asarray(inputs["input_ids"])
        (x_BTD,) = self.words.run(None, {"input_ids": ids_BT})
        for kind, medium in self.about["media"].items():
            if medium["input"] not in inputs:
                continue
            bank_RD = self._bank(kind, medium, inputs[medium["input"]])
            take_K = inputs.get(f"{kind}_take")
            places = ids_BT == medium["place"]
            x_BTD[places] = bank_RD[: places.sum()] if take_K is None else bank_RD[np.asarray(take_K)]
        return np.asarray(x_BTD)

    def _bank(self, kind: str, medium: Mapping[str, Any], values: Any) -> Array:
        """What placeholders choose from: the tiles' embeddings, those of each size behind one another."""
        same_size = [values] if not isinstance(values, list | tuple) else list(values)
        banks = [self.media[kind].run(None, {medium["input"]: np.asarray(tiles)})[0] for tiles in same_size]
        return np.concatenate(banks)

    def step(
        self, x_BTD: Array, mask_BK: Array, position_BT: Array, past: list[Array] | None = None
    ) -> tuple[Array, list[Array]]:
        """One pass of the language model.

        Args:
            x_BTD: embeddings of the new positions.
            mask_BK: 0 at padding; of the positions in the cache and the new ones.
            position_BT: number of each new position in its row.
            past: the cache that the last step gave; None: nothing was read yet.

        Returns:
            Logits, float32 [B, T, V]; and the cache.
        """
        about = self.about["decoder"]
        if past is None:
            past = [np.zeros((len(x_BTD), p["heads"], 0, p["width"]), np.float32) for p in about["past"]]
        given = {"inputs_embeds": x_BTD, "attention_mask": mask_BK, "position_ids": position_BT}
        given |= {p["name"]: tensor for p, tensor in zip(about["past"], past, strict=True)}
        logits, *cache = self.decoder.run(None, given)
        return logits, cache

    def batch(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits of all positions of several rows, padded on the left: float32 [B, T, V]."""
        mask_BT = np.asarray(inputs["attention_mask"])
        positions = np.maximum(mask_BT.cumsum(1) - 1, 0)
        return torch.from_numpy(self.step(self.embedded(inputs), mask_BT, positions)[0])

    # As a reference

    def inputs(self, case: Case, ours: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See ``port.parity.Reference``: what the processor gave."""
        return ours

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """See ``port.parity.Reference``: the prompt in one pass, but its last positions one by one."""
        x_BTD, length = self.embedded(inputs), np.asarray(inputs["input_ids"]).shape[1]
        first = max(1, length - STEPS)
        found, past = [], None
        for begin, end in [(0, first), *((at, at + 1) for at in range(first, length))]:
            mask, places = np.ones((1, end), np.int64), np.arange(begin, end)[None]
            logits, past = self.step(x_BTD[:, begin:end], mask, places, past)
            found.append(logits[0])
        return torch.from_numpy(np.concatenate(found))

    def greedy(self, inputs: Mapping[str, Any], num: int) -> list[int]:
        """See ``port.parity.Reference``."""
        x_BTD, ids, past = self.embedded(inputs), [], None
        length = x_BTD.shape[1]
        places = np.arange(length)[None]
        for _ in range(num):
            logits, past = self.step(x_BTD, np.ones((1, length), np.int64), places, past)
            ids.append(int(logits[0, -1].argmax()))
            (x_BTD,) = self.words.run(None, {"input_ids": np.array([[ids[-1]]])})
            places, length = np.array([[length]]), length + 1
        return ids
