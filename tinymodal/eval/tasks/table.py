"""Every benchmark that is built in, by the name ``tinymodal eval --on`` takes. Imports nothing heavy."""

from __future__ import annotations

from tinymodal.eval.benchmark import Benchmark
from tinymodal.eval.speaking import aloud
from tinymodal.eval.tasks import scenes, sounds

PER_KIND_ALOUD = 20
"""Questions of each kind whose answers are spoken: some 340 answers, some 500 words."""
SPEECH_ROUNDTRIP = aloud(scenes.benchmarks(per_kind=PER_KIND_ALOUD)["new"], name="speech-roundtrip")
"""Answers about new scenes, spoken, and understood by the built-in recogniser."""
TASKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (*scenes.BENCHMARKS.values(), *sounds.BENCHMARKS.values(), SPEECH_ROUNDTRIP)
}
