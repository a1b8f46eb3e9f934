"""Layers over time that are fed piece by piece and give, joined, what they give of the whole.

A codec that speaks while the language model still writes must decode frames as they come. Cutting its input
and decoding each piece alone clicks at every border: convolutions see zeros there, recurrent layers forget.
Here each layer keeps what it needs of the past (a convolution its last inputs, a transposed one its
unfinished outputs, an LSTM its state, attention its keys) and waits for the future it looks at; nothing is
computed twice.

A pipe is called with a piece and with ``last``, whether it is the final one; a piece may be empty. What comes
out of all calls together equals the layer on all pieces joined, up to the rounding of float32 sums.

Shapes: C channels, n steps of a piece; everything is float [1, C, n].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pipe(ABC):
    """A layer in the middle of a sound."""

    @abstractmethod
    def __call__(self, x: Tensor, last: bool) -> Tensor:
        """The next piece [1, C, n], maybe empty -> what is finished by it [1, C', m], maybe nothing."""


class Each(Pipe):
    """A layer that reads every step alone, or makes several steps of each."""

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if x.shape[-1]:
            return self.layer(x)
        # Many layers refuse nothing at all; of one step of zeros they tell how wide their nothing is.
        return self.layer(F.pad(x, (0, 1)))[..., :0]


class Line(Pipe):
    """Pipes one behind the other."""

    def __init__(self, pipes: Sequence[Pipe]) -> None:
        self.pipes = pipes

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        for pipe in self.pipes:
            x = pipe(x, last)
        return x


class Sum(Pipe):
    """Pipes over the same input, added up step by step; the quick ones wait for the slowest."""

    def __init__(self, *pipes: Pipe) -> None:
        self.pipes = pipes
        self.waiting: list[Tensor | None] = [None] * len(pipes)

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        pieces = []
        for pipe, waiting in zip(self.pipes, self.waiting, strict=True):
            new = pipe(x, last)
            pieces.append(new if waiting is None else torch.cat([waiting, new], 2))
        ready = min(piece.shape[2] for piece in pieces)
        self.waiting = [piece[..., ready:] for piece in pieces]
        total = pieces[0][..., :ready]
        for piece in pieces[1:]:
            total = total + piece[..., :ready]
        return total


class Convolve(Pipe):
    """A convolution with stride 1, and the filling it has at both ends.

    Args:
        conv: its own ``padding`` is added to ``left`` and ``right``.
        left: steps filled in before the first; with ``right`` as many as the kernel is longer than one step.
        right: steps filled in behind the last: so far it looks ahead.
        mode: what they are filled with: ``constant`` (zeros), ``reflect`` or ``replicate``. Of a sound too
            short to be reflected, what is missing is zeros, as EnCodec has it.

    Raises:
        ValueError: it has another stride, or another length would come out than went in.
    """

    def __init__(self, conv: nn.Conv1d, left: int = 0, right: int = 0, mode: str = "constant") -> None:
        if isinstance(conv.padding, str):
            raise ValueError(f"cannot stream a convolution with padding {conv.padding!r}; give it in steps")
        self.left, self.right, self.mode = left + conv.padding[0], right + conv.padding[0], mode
        self.reach = (conv.kernel_size[0] - 1) * conv.dilation[0]
        if conv.stride != (1,) or self.left + self.right != self.reach:
            raise ValueError(f"cannot stream {conv} with {left} steps before and {right} behind")
        if conv.padding != (0,) and (mode != "constant" or conv.padding_mode != "zeros"):
            raise ValueError(f"cannot stream {conv}: it fills with {conv.padding_mode} and with {mode}")
        # Read once: a weight under weight norm is computed anew each time it is asked for.
        self.weight, self.bias = conv.weight.detach(), conv.bias
        self.dilation, self.groups = conv.dilation, conv.groups
        self.held: Tensor | None = None
        self.started = False

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if self.held is not None:
            x = torch.cat([self.held, x], 2)
        needed = max(self.left, self.right) if self.mode == "reflect" else 0
        if not self.started:
            if x.shape[2] <= needed and not (last and x.shape[2]):
                self.held = x
                return self._nothing(x)
            self.started = True
            # The two ends are far enough apart to be filled on their own, unless this is all there is.
            x = fill(x, self.left, self.right if last else 0, self.mode)
        elif last and self.right:  # of a kernel of one step nothing is held that could be filled
            x = fill(x, 0, self.right, self.mode)
        self.held = x[..., max(x.shape[2] - self.reach, 0) :]
        if x.shape[2] <= self.reach:
            return self._nothing(x)
        return F.conv1d(x, self.weight, self.bias, dilation=self.dilation, groups=self.groups)

    def _nothing(self, x: Tensor) -> Tensor:
        return x.new_zeros(1, self.weight.shape[0], 0)


def fill(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """[.., n] -> [.., left + n + right]; a sound shorter than its reflection goes on with zeros."""
    if mode != "reflect":
        return F.pad(x, (left, right), mode)
    missing = max(max(left, right) - x.shape[-1] + 1, 0)
    filled = F.pad(F.pad(x, (0, missing)), (left, right), "reflect")
    return filled[..., : filled.shape[-1] - missing]


class Spread(Pipe):
    """A transposed convolution: a step adds to several, which are finished when no later one reaches them.

    Args:
        conv: without ``output_padding``; its own ``padding`` is cut at both ends.
        left: further steps cut off before the first.
        right: and behind the last.

    Raises:
        ValueError: it is dilated, or more is cut than one step reaches beyond its own.
    """

    def __init__(self, conv: nn.ConvTranspose1d, left: int = 0, right: int = 0) -> None:
        cut = int(conv.padding[0])
        self.stride, self.overlap = conv.stride[0], conv.kernel_size[0] - conv.stride[0]
        self.skip, self.right = left + cut, right + cut
        if conv.dilation != (1,) or conv.output_padding != (0,) or not 0 <= self.right <= self.overlap:
            raise ValueError(f"cannot stream {conv}, cut by {left} and {right}")
        self.weight, self.bias, self.groups = conv.weight.detach(), conv.bias, conv.groups
        self.tail: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        n, width = x.shape[2], self.weight.shape[1] * self.groups
        if n:
            y = F.conv_transpose1d(x, self.weight, None, self.stride, groups=self.groups)
            if self.tail is not None:
                y[..., : self.overlap] += self.tail
            out, self.tail = y[..., : n * self.stride], y[..., n * self.stride :]
        else:
            out = x.new_zeros(1, width, 0)
        if last and self.tail is not None:
            out = torch.cat([out, self.tail[..., : self.overlap - self.right]], 2)
        if self.bias is not None:
            out = out + self.bias[:, None]
        skipped = min(self.skip, out.shape[2])
        self.skip -= skipped
        return out[..., skipped:]


class Recur(Pipe):
    """An LSTM (sequence first, as torch has it) whose input is added to its output."""

    def __init__(self, lstm: nn.LSTM) -> None:
        self.lstm = lstm
        self.state: Any = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if not x.shape[2]:
            return x
        x_n1C = x.permute(2, 0, 1)
        y_n1C, self.state = self.lstm(x_n1C, self.state)
        return (y_n1C + x_n1C).permute(1, 2, 0)


class Attend(Pipe):
    """A causal transformer of transformers, which keeps its keys; it takes [1, n, C]."""

    def __init__(self, transformer: nn.Module, cache: Any) -> None:
        self.transformer, self.cache = transformer, cache

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if not x.shape[2]:
            return x
        out = self.transformer(x.transpose(1, 2), past_key_values=self.cache, use_cache=True)
        return out.last_hidden_state.transpose(1, 2)
