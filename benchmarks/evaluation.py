"""Asking and scoring: batches by length against one question at a time, and 100,000 answers on one core.

    python benchmarks/evaluation.py             five rounds of 384 questions; four minutes
    python benchmarks/evaluation.py --quick     three rounds of 192

The starter model answers questions about made scenes. The plain way asks them one by one, as the evaluation
scripts of the systems before us do. The replies are compared and must be the same, greedy and in float32.

The answers that are scored are made, in the files in which VQAv2 and POPE are published: the whole command,
reading included, in a process of its own with one thread, and its largest memory.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Row, finish, interleave, less, more, words

NUM_ANSWERS = 100_000
WORDS = ("yes", "no", "2", "two", "red", "a dog", "on the table", "it's blue.", "US", "skate board", "1,000")
CODE = """
import sys, time
start = time.process_time()
from tinymodal.cli import main
code = main(sys.argv[1:])
seconds = time.process_time() - start
# Not getrusage: its peak is handed down by the process that started this one.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("MEASURED", seconds, int(peak) * 1024)
sys.exit(code)
"""


def main(argv: Sequence[str] | None = None) -> int:
    given = words(__doc__).parse_args(argv)
    rows = [asking(192 if given.quick else 384, rounds=3 if given.quick else 5)]
    for name, make in (("VQAv2", vqav2), ("POPE", pope)):
        rows += scoring(name, make)
    finish(rows, given.json, given.quick)
    return 0


def asking(num: int, rounds: int) -> Row:
    """Questions a second over wall time: both cores belong to the model."""
    from tinymodal.compose.build import load
    from tinymodal.eval.tasks.scenes import questions
    from tinymodal.infer.engine import Engine, Sampling

    engine, greedy = Engine(load("starter")), Sampling(max_new_tokens=16)
    samples = [question.sample for question in questions("test", 9, num // 10 + 1, False)][:num]
    said: dict[str, list[str]] = {}

    def batched() -> None:
        said["batched"] = [reply.text for reply in engine.reply(samples, greedy, 64)]

    def one_by_one() -> None:
        said["one by one"] = [engine.reply([sample], greedy, 1)[0].text for sample in samples]

    took = interleave({"batched": batched, "one by one": one_by_one}, rounds)
    assert said["batched"] == said["one by one"], "the replies differ"
    fast, slow = (num / took[name].wall for name in ("batched", "one by one"))
    return more("questions asked, batches by length against one by one", fast, slow, "questions/s")


def scoring(name: str, make: Any) -> list[Row]:
    """Seconds of one core and the most memory for 100,000 answers."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        answers = make(folder)
        asked = ["eval", "--on", name.lower(), "--data", place, "--answers", str(answers)]
        done = subprocess.run(
            [sys.executable, "-c", CODE, *asked, "--out", place + "/out"],
            check=True,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
            },
        )
        told = json.loads((folder / "out" / "results.json").read_text())[name.lower()]
    assert told["n"] == NUM_ANSWERS, told["n"]
    assert told["complete"]
    seconds, peak = (float(text) for text in done.stdout.split("MEASURED")[1].split()[:2])
    return [
        less(f"100,000 answers of {name} scored", seconds, None, "s of one core"),
        less(f"100,000 answers of {name} scored, memory", peak / 1e9, None, "GB"),
    ]


def vqav2(folder: Path) -> Path:
    """Questions, ten answers of people each, and a model's, as VQAv2 publishes them."""
    rng = random.Random(0)
    questions, annotations, answers = [], [], []
    for n in range(NUM_ANSWERS):
        questions.append({"image_id": n // 3, "question": f"What is number {n}?", "question_id": n})
        people = [
            {"answer": rng.choice(WORDS), "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)
        ]
        annotations.append(
            {
                "question_type": f"what {n % 65}",
                "answer_type": ("yes/no", "number", "other")[n % 3],
                "multiple_choice_answer": people[0]["answer"],
                "answers": people,
                "image_id": n // 3,
                "question_id": n,
            }
        )
        answers.append({"question_id": n, "answer": rng.choice(WORDS)})
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return write(folder / "answers.json", answers)


def pope(folder: Path) -> Path:
    """Labels of the three splits, and our own rows of replies."""
    rng, rows = random.Random(0), []
    for i, split in enumerate(("adversarial", "popular", "random")):
        labels = []
        for n in range(i, NUM_ANSWERS, 3):
            question = {
                "question_id": n,
                "image": f"COCO_val2014_{n // 6:012d}.jpg",
                "text": f"Is there a {n}?",
            }
            labels.append(json.dumps({**question, "label": rng.choice(("yes", "no"))}))
            rows.append(json.dumps({"id": f"{split}/{n}", "reply": rng.choice(("Yes", "No, there is not."))}))
        (folder / f"coco_pope_{split}.json").write_text("\n".join(labels))
    path = folder / "answers.jsonl"
    path.write_text("\n".join(rows))
    return path


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


if __name__ == "__main__":
    sys.exit(main())
