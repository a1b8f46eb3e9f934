"""Speech is judged by who listens, against what was written; and streams by the clock."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.eval.test_run import colours, questions
from tests.infer.test_engine import SHORT, Hum, speaking
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, DataError
from tinymodal.core.types import Message, Sample, Text
from tinymodal.eval.benchmark import Judging, Listener
from tinymodal.eval.folder import fingerprint
from tinymodal.eval.results import tables
from tinymodal.eval.run import evaluate, run
from tinymodal.eval.speaking import METRIC, aloud, of_model, time_speech
from tinymodal.eval.tasks.table import TASKS
from tinymodal.infer.engine import AudioDelta, Engine, TextDelta


class Deaf:
    """A listener who writes down what it is told to, and counts what it hears."""

    def __init__(self, *heard: str, mark: str = "deaf") -> None:
        self.heard, self.mark, self.opened, self.sounds = heard, mark, 0, []

    def __call__(self) -> Listener:
        self.opened += 1
        return Listener(name="deaf", mark=self.mark, hear=self.hear, written=str.lower)

    def hear(self, sounds, rate_hz):
        assert rate_hz == 1000
        self.sounds += sounds
        return [self.heard[i % len(self.heard)] for i in range(len(sounds))]


class Codec(Hum):
    def state_dict(self):
        return {"pitch": torch.ones(3)}


def talking(**options) -> Engine:
    engine = speaking(**options)
    engine.composed.codec = Codec()
    return engine


@pytest.fixture(autouse=True)
def few_are_timed(monkeypatch):
    monkeypatch.setattr("tinymodal.eval.run.TIMED", 1)


@pytest.fixture(scope="module")
def mouth() -> Engine:
    return talking()


def test_errors_are_those_of_the_transcript_against_what_was_said_and_not_the_answer(
    mouth, tmp_path, monkeypatch
):
    reply = mouth.reply
    said = iter(["Red circle", "blue", "a green thing", ""])

    def scripted(samples, *given, **named):
        assert named["speak"]
        return [replace(one, text=next(said)) for one in reply(samples, *given, **named)]

    monkeypatch.setattr(mouth, "reply", scripted)
    deaf = Deaf("red circle", "blew", "green thing", "")
    test = aloud(colours(lambda: questions(4), max_new_tokens=4), deaf)
    result = run(test, mouth, tmp_path)
    # One word of six substituted, one left out.
    assert result.numbers["wer"] == pytest.approx(2 / 6)
    assert [row.score.value for row in result.answered] == pytest.approx([1, 0, 2 / 3, 1])
    assert [row.heard for row in result.answered] == ["red circle", "blew", "green thing", ""]
    assert deaf.opened == 1
    assert all(len(sound) > 0 for sound in deaf.sounds)
    rows = [json.loads(line) for line in (tmp_path / "colours-aloud.replies.jsonl").read_text().splitlines()]
    assert [row["heard"] for row in rows] == ["red circle", "blew", "green thing", ""]
    assert rows[0]["meta"]["reference"] == "Red circle"
    told = result.summary()
    assert told["best_constant"] == {}
    assert told["listener"] == "deaf"
    assert set(told["timing"]) >= {"first_sound_ms", "real_time_factor"}
    assert set(result.speech) == {"wer", "cer", "first_sound_ms", "real_time_factor"}


def test_replies_are_asked_again_for_another_listener_or_voice_and_else_kept(tmp_path):
    engine = talking(voices=("ann", "bob"))
    asked = []
    reply = engine.reply
    engine.reply = lambda samples, *given, **named: (
        asked.append(len(samples)) or reply(samples, *given, **named)
    )
    short = colours(lambda: questions(2), max_new_tokens=2)
    for how in ({}, {}, {"voice": "ann"}):
        run(aloud(short, Deaf("one"), **how), engine, tmp_path)
    run(aloud(short, Deaf("one", mark="other"), voice="ann"), engine, tmp_path)
    assert asked == [2, 2, 2]
    with pytest.raises(DataError, match="which has ann, bob"):
        run(aloud(short, Deaf("one"), voice="eve"), engine, tmp_path)


def test_a_model_that_says_nothing_has_no_rate(mouth, tmp_path, monkeypatch):
    reply = mouth.reply
    nothing = torch.zeros(0)
    monkeypatch.setattr(
        mouth, "reply", lambda *a, **k: [replace(r, text="", audio=nothing) for r in reply(*a, **k)]
    )
    monkeypatch.setattr(mouth, "stream", lambda *a, **k: iter(()))
    result = run(aloud(colours(lambda: questions(2), max_new_tokens=2), Deaf("")), mouth, tmp_path)
    assert (result.numbers, result.timing, result.speech) == ({}, None, {})
    assert len(tables([result])) == 1


def test_a_model_without_a_mouth_is_told_which_part_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"no speech head.*\[model\.speech\]"):
        run(aloud(colours(), Deaf("one")), Engine(tiny_model()), tmp_path)


def test_a_model_is_not_its_own_judge(mouth, tmp_path):
    judge = Deaf("one", mark=fingerprint(mouth))
    with pytest.raises(DataError, match="is the model that speaks"):
        run(aloud(colours(), judge), mouth, tmp_path)


def test_a_model_that_hears_listens_and_writes_as_whisper_does(monkeypatch):
    pytest.importorskip("whisper_normalizer")
    monkeypatch.setattr("tinymodal.eval.speaking.MAX_NEW_TOKENS", 6)
    composed = tiny_model(audio="tinymodal_ear")
    listener = of_model(composed, "ears")
    waves = [torch.rand(1200) - 0.5, torch.zeros(0), torch.rand(500) - 0.5]
    together = listener.hear(waves, 1000)
    assert together[1] == ""
    assert together == [listener.hear([wave], 1000)[0] for wave in waves]
    assert listener.written("Colour: Twenty-one!") == "color 21"
    assert listener.mark == fingerprint(Engine(composed))


def test_the_way_there_and_back_is_a_benchmark_by_name(tmp_path, monkeypatch):
    """``tinymodal eval MODEL --on speech-roundtrip``, and ``--aloud`` of any other."""
    assert TASKS["speech-roundtrip"].aloud is not None
    mouth = talking()
    monkeypatch.setattr(
        "tinymodal.eval.names.TASKS", {"one": colours(lambda: questions(3), name="one", max_new_tokens=3)}
    )
    (result,) = evaluate(mouth.composed, ["one"], folder=tmp_path, spoken=True, listener=Deaf("one two"))
    told = json.loads((tmp_path / "results.json").read_text())
    assert set(told) == {"one-aloud"}
    assert told["one-aloud"]["metric"] == METRIC
    assert told["one-aloud"]["metrics"] == result.numbers


def test_a_benchmark_with_numbers_and_a_judge_of_its_own_may_be_spoken(mouth, tmp_path):
    """They are about what is written, and know nothing of transcripts."""

    def never(*_):
        raise KeyError("reference")

    own = {"report": never, "sums": never, "submit": never, "unanswered": "wrong", "family": "pair"}
    judged = Judging(prompt=never, read=never)
    test = aloud(colours(lambda: questions(2), max_new_tokens=3, judge=judged, **own), Deaf("one"))
    assert (test.judge, test.submit, test.unanswered) == (None, None, "left out")
    told = run(test, mouth, tmp_path).summary()
    assert set(told["metrics"]) == {"wer", "cer"}
    assert "judge" not in told["protocol"]


def test_a_table_of_errors_says_that_lower_is_better_and_shows_no_constant(mouth, tmp_path):
    from rich.console import Console

    kinds = [replace(q, meta={"kind": "colour"}) for q in questions(3)]
    result = run(aloud(colours(lambda: kinds, max_new_tokens=3), Deaf("one")), mouth, tmp_path)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(tables([result])[0])
    shown = " ".join(captured.get().split())
    for told in ("word error rate", "lower is better", "wer", "cer", "errors"):
        assert told in shown
    for other in ("best constant", "mean", "colour "):
        assert other not in shown


class Clock:
    """It moves when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def told_by(clock: Clock, *events: tuple[float, object]):
    """A stream whose pieces come after so many seconds each."""
    for wait, delta in events:
        clock.now += wait
        if delta is not None:
            yield delta


SAMPLE = Sample((Message("user", (Text("what"),)),), "s")


def test_latency_is_from_the_first_text_to_the_first_sound_and_speed_is_of_the_whole_stream():
    clock = Clock()
    word, sound = TextDelta("red"), AudioDelta(torch.zeros(500), 1000)
    slow = ((9.0, word), (9.0, sound))
    first = ((0.5, word), (0.1, word), (0.2, sound), (0.1, word), (0.1, sound))  # 0.3 s, 1.0 s of 1.0 s
    second = ((0.1, word), (0.1, sound), (0.0, sound), (0.3, None))  # 0.1 s, 0.5 s of 1.0 s
    mute = ((3.0, word),)
    streams = iter([slow, first, second, mute])
    engine = SimpleNamespace(stream=lambda *_, **how: told_by(clock, *next(streams)))
    timing = time_speech(engine, [SAMPLE] * 3, clock=clock)
    assert timing.replies == 2
    assert timing.first_sound_ms == pytest.approx(200)
    assert timing.slowest_first_sound_ms == pytest.approx(300)
    assert timing.real_time_factor == pytest.approx(1.5 / 2)
    assert timing.seconds == pytest.approx(2.0)


def test_nothing_said_is_not_timed():
    engine = SimpleNamespace(stream=lambda *_, **how: iter(()))
    assert time_speech(engine, [SAMPLE]) is None
    assert time_speech(engine, []) is None


def test_a_real_stream_is_timed(mouth):
    timing = time_speech(mouth, [q.sample for q in questions(2)], SHORT)
    assert timing.replies == 2
    assert timing.seconds > 0
