"""Every benchmark that is built in, by the name ``tinymodal eval --on`` takes.

Imports numpy, but no torch: ``--where`` and ``--answers`` need none.
"""

from __future__ import annotations

from tinymodal.eval.benchmark import Benchmark, OnDisk
from tinymodal.eval.speaking import aloud
from tinymodal.eval.tasks import (
    chartqa,
    docvqa,
    gqa,
    librispeech,
    llava_bench,
    mmbench,
    mme,
    mmmu,
    mmstar,
    mmvet,
    pope,
    refcoco,
    scenes,
    scienceqa,
    seedbench,
    sounds,
    textcaps,
    textvqa,
    vizwiz,
    vqav2,
)

PER_KIND_ALOUD = 20
"""Questions of each kind whose answers are spoken: some 340 answers, some 500 words."""
SPEECH_ROUNDTRIP = aloud(scenes.benchmarks(per_kind=PER_KIND_ALOUD)["new"], name="speech-roundtrip")
"""Answers about new scenes, spoken, and understood by the built-in recogniser."""
TASKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (*scenes.BENCHMARKS.values(), *sounds.BENCHMARKS.values(), SPEECH_ROUNDTRIP)
}

ON_DISK: dict[str, OnDisk] = {
    task.name: task
    for task in (
        vqav2.TASK, gqa.TASK, vizwiz.TASK, textvqa.TASK, textvqa.TASK_OCR, scienceqa.TASK, pope.TASK,
        mme.TASK, *mmbench.TASKS, seedbench.TASK, mmstar.TASK, mmmu.TASK, mmvet.TASK, llava_bench.TASK,
        textcaps.TASK, *refcoco.TASKS, docvqa.TASK, chartqa.TASK, librispeech.TASK,
    )
}  # fmt: skip
"""Those of the field: the user has their files, see ``tinymodal eval --where``."""
