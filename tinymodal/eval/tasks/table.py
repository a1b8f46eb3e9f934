"""Every benchmark that is built in, by the name ``tinymodal eval --on`` takes. Imports nothing heavy."""

from __future__ import annotations

from tinymodal.eval.benchmark import Benchmark
from tinymodal.eval.tasks import scenes

TASKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in scenes.BENCHMARKS.values()}
