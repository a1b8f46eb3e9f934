"""What a server did, in the text form that Prometheus reads.

https://prometheus.io/docs/instrumenting/exposition_formats/. Written by hand: a counter is a number with a
name. All of it is touched from the event loop alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinymodal.infer.scheduler import Stats

BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper ends of the buckets that times are counted in; the last bucket has none."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GONE = 499
"""Counted as the status of requests whose client has hung up, as nginx does."""


@dataclass(slots=True)
class Histogram:
    """Times, counted by their lengths."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def lines(self, name: str) -> Iterator[str]:
        seen = 0
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self.counts, strict=True):
            seen += count
            yield f'{name}_bucket{{le="{bound}"}} {seen}'
        yield f"{name}_sum {self.total_s:.6f}"
        yield f"{name}_count {seen}"


@dataclass(slots=True)
class Metrics:
    """Counts since the start."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By route and status; a route that we do not have is ``other``, so that callers cannot make up names."""
    in_flight: int = 0
    seconds: Histogram = field(default_factory=Histogram)
    first_piece: Histogram = field(default_factory=Histogram)

    def text(self, stats: Stats) -> str:
        """Everything, with what the scheduler counts."""
        lines: list[str] = []

        def metric(name: str, kind: str, sentence: str) -> str:
            whole = f"tinymodal_{name}"
            lines.extend((f"# HELP {whole} {sentence}", f"# TYPE {whole} {kind}"))
            return whole

        name = metric("requests_total", "counter", "Requests by route and status.")
        lines += [
            f'{name}{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        name = metric("requests_in_flight", "gauge", "Requests that are being answered.")
        lines.append(f"{name} {self.in_flight}")
        for key, (kind, sentence) in OF_SCHEDULER.items():
            name = metric(f"{key}_total" if kind == "counter" else key, kind, sentence)
            lines.append(f"{name} {getattr(stats, key):.15g}")
        name = metric(
            "request_seconds", "histogram", "From the first byte of a request to the last of its answer."
        )
        lines += self.seconds.lines(name)
        name = metric(
            "first_piece_seconds", "histogram", "From a request to the first piece of a streamed answer."
        )
        lines += self.first_piece.lines(name)
        return "\n".join(lines) + "\n"


OF_SCHEDULER: Mapping[str, tuple[str, str]] = {
    "rows": ("gauge", "Replies that are being written."),
    "waiting": ("gauge", "Replies that wait for their turn."),
    "kept_mb": ("gauge", "What is kept of conversations, in 10^6 bytes."),
    "finished": ("counter", "Replies that were written to their end."),
    "cancelled": ("counter", "Replies that nobody waited for."),
    "failed": ("counter", "Replies that failed."),
    "refused": ("counter", "Replies that found the queue full."),
    "tokens_in": ("counter", "Tokens of prompts."),
    "tokens_known": ("counter", "Of these, tokens that were kept from an earlier request."),
    "tokens_out": ("counter", "Tokens of replies."),
    "steps": ("counter", "Steps of all rows together."),
    "media": ("counter", "Pictures and sounds of requests."),
    "media_perceived": ("counter", "Of these, those that went through a tower."),
}
"""What the scheduler counts: kind and sentence."""
