"""A folder that lies as LibriSpeech does is a benchmark of its word error rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import soundfile

from tinymodal.core.types import Audio
from tinymodal.eval.folder import digest
from tinymodal.eval.names import benchmark
from tinymodal.eval.run import NO_PICTURE, _questions
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.librispeech import TASK


@pytest.fixture
def folder(tmp_path):
    at = tmp_path / "test-clean" / "84" / "121123"
    at.mkdir(parents=True)
    (at / "84-121123.trans.txt").write_text("84-121123-0000 GO ON\n84-121123-0001 TWO RED CATS\n\n")
    for n in range(2):
        wave = np.sin(np.arange(8_000) * (n + 1) / 20).astype(np.float32)
        soundfile.write(at / f"84-121123-000{n}.flac", wave, 16_000)
    return tmp_path / "test-clean"


def test_every_utterance_is_asked_once_and_the_rate_is_over_all(folder):
    found = benchmark(str(folder))
    assert found.name == "test-clean"
    asked = list(found.load())
    assert [question.answer for question in asked] == ["GO ON", "TWO RED CATS"]
    sounds = [part for q in asked for part in q.sample.messages[0].parts if isinstance(part, Audio)]
    assert [sound.source.name for sound in sounds] == ["84-121123-0000.flac", "84-121123-0001.flac"]
    scores = [
        replace(found.score(q, r), meta=q.meta) for q, r in zip(asked, ["go on.", "2 dogs"], strict=True)
    ]
    assert [score.value for score in scores] == pytest.approx([1, 1 / 3])
    assert found.reduce(scores)["wer"] == pytest.approx(2 / 5)


def test_what_is_missing_is_named_with_its_line(folder):
    (folder / "84" / "121123" / "84-121123-0001.flac").unlink()
    _, problems = _questions(benchmark(str(folder)), None)
    (named,) = problems.told()[NO_PICTURE]["named"]
    assert named.startswith("84-121123-0001: no file ")
    assert named.endswith("84-121123-0001.flac")
    (folder / "84" / "121123" / "84-121123.trans.txt").write_text("84-121123-0000\n")
    without = benchmark(str(folder))
    assert [q.sample.id for q in without.load()] == []
    assert without.problems.told()["utterances without a transcript"]["named"] == [
        "84-121123.trans.txt: line 1: 84-121123-0000"
    ]


def test_another_sound_is_another_question(folder):
    first, second = benchmark(str(folder)).load()
    assert digest(first) != digest(second)
    same = next(iter(benchmark(str(folder)).load()))
    assert digest(first) == digest(same)


def test_transcripts_that_were_made_elsewhere_are_scored_without_sounds(folder, tmp_path):
    for sound in folder.rglob("*.flac"):
        sound.unlink()
    answers = tmp_path / "said.txt"
    answers.write_text("84-121123-0001 2 dogs\n84-121123-0000 go on.\n84-121123-0009 what?\n")
    result = score_answers(TASK, answers, tmp_path / "out", data=folder)
    assert result.metrics["wer"] == pytest.approx(2 / 5)
    assert not result.summary()["complete"]
    assert list(result.problems.told()) == ["answers to no question"]
    rows = tmp_path / "said.jsonl"
    rows.write_text(
        '{"id": "84-121123-0000", "text": "go on"}\n{"id": "84-121123-0001", "text": "two red cats"}\n'
    )
    result = score_answers(TASK, rows, tmp_path / "out", data=folder)
    assert (result.metrics["wer"], result.summary()["complete"]) == (0, True)
