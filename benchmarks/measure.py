"""How all benchmarks measure: interleaved rounds, counts that no machine changes, one form of record.

Two ways to do the same work take turns, round by round, so that a busy moment of the machine meets both; the
median of each is reported. Beside seconds stand counts that do not depend on the machine: floating point
operations of matrix products, bytes that operators read and write, operator calls, and the most bytes that
were alive at once.

A benchmark is a file with ``main(argv)``: it begins with :func:`words` and :func:`begin`, and ends with
:func:`finish`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tinymodal.train import machine

Work = Callable[[], Any]

RECORDS = Path(__file__).parent / "records"


class Row(NamedTuple):
    """One line of a benchmark: how many times better ours is, and the two numbers it comes from."""

    name: str
    ratio: float | None
    """Above 1: ours is better, whichever way the unit counts. None where there is nothing to compare with."""
    ours: float
    plain: float | None
    unit: str


def more(name: str, ours: float, plain: float | None, unit: str) -> Row:
    """A row where the larger number is better: samples per second."""
    return Row(name, ours / plain if plain else None, ours, plain, unit)


def less(name: str, ours: float, plain: float | None, unit: str) -> Row:
    """A row where the smaller number is better: seconds, bytes, operations."""
    return Row(name, plain / ours if plain is not None and ours else None, ours, plain, unit)


class Seconds(NamedTuple):
    """Medians over the rounds."""

    cpu: float
    """Of all threads of this process."""
    wall: float
    rounds: int


def interleave(
    works: Mapping[str, Work], rounds: int = 5, warmup: int = 1, device: str | torch.device = "cpu"
) -> dict[str, Seconds]:
    """Run each of ``works`` once a round, by turns; odd rounds go backwards.

    Args:
        works: what to run, by name.
        rounds: turns that are timed.
        warmup: turns before them that are not.
        device: where the work is queued; it is waited for before the clock is read.
    """
    wait = _waiter(device)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(-warmup, rounds):
        for name in list(works) if turn % 2 == 0 else list(works)[::-1]:
            wait()
            cpu, wall = time.process_time(), time.perf_counter()
            works[name]()
            wait()
            if turn >= 0:
                found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: Seconds(
            statistics.median(cpu for cpu, _ in times), statistics.median(wall for _, wall in times), rounds
        )
        for name, times in found.items()
    }


def _waiter(device: str | torch.device) -> Callable[[], None]:
    if torch.device(device).type != "cuda":
        return lambda: None
    return torch.cuda.synchronize


class Counts(NamedTuple):
    """What a piece of work does, however fast."""

    gflop: float
    """Multiplications and additions of matrix products, convolutions and attention, in 10^9. Attention counts
    as full squares, masked halves included."""
    touched_gb: float
    """Bytes of all tensors that operators read and write, views left out, in 10^9. Of a table only the rows
    that are looked up."""
    calls: int
    """Operators called, views left out."""
    activations_mb: float
    """Most bytes alive at once that the work itself made, parameters' gradients left out, in 10^6."""
    live_mb: float
    """The same with gradients."""


def count(work: Work, parameters: Iterable[Tensor] = ()) -> Counts:
    """Run ``work`` once and count.

    Args:
        work: forward and backward, on any device; ``meta`` too.
        parameters: those whose gradients are told apart; their gradients are dropped before.
    """
    counter = _Counter()
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        p.grad = None
    hooks = [p.register_post_accumulate_grad_hook(counter.gradient) for p in parameters]
    try:
        with counter:
            work()
    finally:
        for hook in hooks:
            hook.remove()
    return Counts(
        counter.flop / 1e9, counter.touched / 1e9, counter.calls, counter.most[0] / 1e6, counter.most[1] / 1e6
    )


def peak_mb(work: Work, device: str | torch.device) -> float:
    """Most bytes that torch's allocator held on a GPU during ``work`` above what it held before, in 10^6."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


class _Counter(TorchDispatchMode):
    """Sees every operator, in the backward pass and inside custom functions too."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.touched = self.calls = 0
        self.live = 0
        self.most = (0, 0)
        self._alive: dict[int, int] = {}
        self._gradients: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func.namespace == "prim":
            return out
        results = _tensors(out)
        given = _tensors((args, kwargs))
        name = func._schema.name.partition("::")[2]
        self.calls += 1
        self.flop += flop(func, args, kwargs, out)
        if name in LOOKUPS:
            self.touched += 2 * sum(_bytes(result) for result in results)
        elif name not in EMPTY:
            self.touched += sum({id(t): _bytes(t) for t in (*given, *results)}.values())
        old = {t.untyped_storage()._cdata for t in given}
        for result in results:
            storage = result.untyped_storage()
            if storage._cdata not in old and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._dead, storage._cdata)
        self.most = (
            max(self.most[0], self.live - sum(self._gradients.values())),
            max(self.most[1], self.live),
        )
        return out

    def gradient(self, parameter: Tensor) -> None:
        """Called when ``parameter.grad`` is complete: from now on its bytes are no activation's."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self._alive:
            self._gradients[key] = self._alive[key]

    def _dead(self, key: int) -> None:
        self.live -= self._alive.pop(key, 0)
        self._gradients.pop(key, None)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    # A tensor that repeats one row for all (expand) reads that row.
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size()


LOOKUPS = {"embedding", "index_select", "gather"}
"""Read as many bytes as they give back, not the whole table."""
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Touch nothing."""


def flop(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating point operations of one call of an operator; 0 for all but products.

    torch's own table (``torch.utils.flop_counter``) and what it leaves out: products in place and the
    attention kernels of the CPU, which ``FlopCounterMode`` takes for nothing.
    """
    name = func._schema.name.partition("::")[2]
    if name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    ):
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return int(sdpa_backward_flop_count(args[0].shape, *(t.shape for t in args[1:4])))
    if name in ("addmm_", "_addmm_activation"):
        return 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
    if name == "baddbmm_":
        return 2 * math.prod(args[1].shape) * args[2].shape[2]
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def words(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line: ``--quick``, ``--json FILE``, ``--threads N``."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller and fewer rounds: minutes on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than one spin while they wait")
    return parser


def begin(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for; torch has as many threads from now on.

    One by default: several wait for each other by spinning, and that counts as seconds of the processor.
    """
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    return asked


def finish(rows: Sequence[Row], to: Path | None = None, quick: bool = False, **more_keys: Any) -> None:
    """Print the table and write the record.

    Args:
        rows: in the order they are shown.
        to: file of the record, or None.
        quick: told in the record, so that no page shows a quick run's numbers as the real ones.
        more_keys: further plain values of the record, such as the shapes.
    """
    print(table(rows), flush=True)
    if to is not None:
        found = machine.record()
        record = {"rows": [row._asdict() for row in rows], **found, "quick": quick, **more_keys}
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Lines of aligned columns."""
    cells = [("", "ours", "plain", "unit", "ratio")]
    for row in rows:
        plain = "" if row.plain is None else figure(row.plain)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        cells.append((row.name, figure(row.ours), plain, row.unit, ratio))
    widths = [max(len(cell[i]) for cell in cells) for i in range(5)]
    return "\n".join(
        "  ".join(
            text.ljust(w) if i in (0, 3) else text.rjust(w)
            for i, (text, w) in enumerate(zip(c, widths, strict=True))
        )
        for c in cells
    )


def figure(value: float) -> str:
    """``12345.6`` -> ``12,346``; ``1.2345`` -> ``1.234``: four digits are read, more are noise."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
