"""What a step was: one row of ``metrics.jsonl``, from the step's report and the time it took.

Every key is explained in docs/metrics.md. Those in ``TIMED`` depend on the machine and the day; all others
are the same, bit for bit, whenever the same run is made again on the same kind of machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tinymodal.core.types import Batch

if TYPE_CHECKING:
    from tinymodal.train.step import Groups, StepReport

TIMED = frozenset(
    {"tokens_per_s", "samples_per_s", "wait_share", "mfu", "peak_memory_bytes", "step_s", "seconds"}
)
"""Keys of a row that two exact repetitions need not share."""

MODALITIES = ("text", "image", "audio")
"""What a document is called without media, with a picture, with a sound. One with both is called both."""
CALLED = (("text",), ("image",), ("audio",), ("image", "audio"))
"""The same by the number of ``step.Groups``."""


class Meter:
    """The clock and the counters of one stage."""

    def __init__(
        self,
        stage: str,
        sources: Sequence[str],
        device: torch.device,
        *,
        seconds: float = 0.0,
        tokens: int = 0,
        flops: Callable[[Sequence[Batch]], float] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        """Begin, or go on.

        Args:
            stage: its name.
            sources: what each source of the stage is called, see :func:`source_names`.
            device: whose memory is watched.
            seconds: spent in the stage's steps before this process.
            tokens: read before this process.
            flops: floating point operations of a step over the batches of this rank.
            peak_flops: operations that the device can do in a second; None: nobody knows, and rows tell no
                share of it.
        """
        self.stage, self.sources, self.device = stage, tuple(sources), device
        self.seconds, self.tokens = seconds, tokens
        self._flops, self._peak_flops = flops, peak_flops
        self._began = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def begin(self) -> None:
        """A step begins with waiting for its data."""
        self._began = time.perf_counter()

    def end(
        self,
        step: int,
        report: StepReport,
        rates: Iterable[Mapping[str, Any]],
        wait_s: float,
        batches: Sequence[Batch] = (),
    ) -> dict[str, Any]:
        """The step has ended: its row.

        Args:
            step: of the stage, from 1.
            report: what it did.
            rates: the optimizer's ``param_groups``: ``lr`` and ``group``.
            wait_s: of the time since :meth:`begin`, how long it waited for data.
            batches: that it was made on, for their operations.
        """
        step_s = max(time.perf_counter() - self._began, 1e-9)
        self.seconds += step_s
        self.tokens += report.num_tokens
        row: dict[str, Any] = {"stage": self.stage, "step": step, "loss": report.loss}
        if len(report.losses) > 1:
            row |= {f"loss_{name}": value for name, value in report.losses.items()}
        row |= report.measures
        row |= by_group("loss", report.groups, self.sources)
        row |= _rates(rates)
        row |= {
            "grad_norm": report.grad_norm,
            "tokens": report.num_tokens,
            "targets": report.num_targets,
            "samples": report.num_samples,
            "padding": round(1 - report.num_tokens / max(report.num_positions, 1), 4),
        }
        if report.skipped:
            row["skipped"] = report.why
        row |= {
            "tokens_per_s": round(report.num_tokens / step_s, 1),
            "samples_per_s": round(report.num_samples / step_s, 2),
            "wait_share": round(min(wait_s / step_s, 1.0), 4),
        }
        if self._flops is not None and self._peak_flops:
            row["mfu"] = round(self._flops(batches) / step_s / self._peak_flops, 4)
        if (peak := peak_memory_bytes(self.device)) is not None:
            row["peak_memory_bytes"] = peak
        return row | {"step_s": round(step_s, 4), "seconds": round(self.seconds, 4)}


def by_group(prefix: str, groups: Groups, sources: Sequence[str]) -> dict[str, float]:
    """Mean loss of every source and modality that had a target: ``loss/captions``, ``loss/image``."""
    sums: dict[str, tuple[float, int]] = {}
    for (source, kinds), (total, count) in groups.items():
        for name in (sources[source], *CALLED[kinds]):
            had, num = sums.get(name, (0.0, 0))
            sums[name] = (had + total, num + count)
    order = (*sources, *MODALITIES)
    return {f"{prefix}/{name}": sums[name][0] / sums[name][1] for name in order if sums.get(name, (0, 0))[1]}


def source_names(labels: Sequence[str]) -> tuple[str, ...]:
    """``labels`` of a stage's sources made different from each other and from the modalities.

    Of two called ``chat`` the second becomes ``chat-2``; ``text`` becomes ``text-source``.
    """
    names: list[str] = []
    for label in labels:
        name = plain = f"{label}-source" if label in MODALITIES else label
        number = 2
        while name in names or (name != label and name in labels):
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return tuple(names)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory so far: of a GPU what torch held at once, else of this process; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rates(groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """``lr``, the highest, and where groups differ ``lr/<group>``."""
    rates: dict[str, float] = {}
    for group in groups:
        name = str(group.get("group", "all"))
        rates[name] = max(rates.get(name, 0.0), float(group["lr"]))
    found = {"lr": max(rates.values(), default=0.0)}
    if len(rates) > 1:
        found |= {f"lr/{name}": rate for name, rate in rates.items()}
    return found
