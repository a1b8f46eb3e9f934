"""The starter model that ships: it looks, it listens, and it says what it writes."""

from dataclasses import replace

import pytest
import torch

from tinymodal.compose.build import load
from tinymodal.core.types import Audio, Message, Sample, Text
from tinymodal.data.sounds import RATE_HZ, heard_questions, spoken_words
from tinymodal.eval.rules.transcripts import count_errors
from tinymodal.eval.tasks import scenes, sounds
from tinymodal.infer.engine import Engine, Sampling

pytest.importorskip("sklearn")
pytest.importorskip("jiwer")

SHORT = Sampling(max_new_tokens=24)
SEED = 71
"""Of all questions here; none of the seeds that the starter was chosen or scored with."""


@pytest.fixture(scope="module")
def engine():
    return Engine(load("starter"))


def replies(engine, questions, **options):
    return engine.reply([question.sample for question in questions], SHORT, **options)


def wer(questions, said):
    pairs = zip(questions, said, strict=True)
    texts = [(" ".join(spoken_words(q.answer)), " ".join(spoken_words(reply.text))) for q, reply in pairs]
    return count_errors(*zip(*texts, strict=True)).wer


def test_it_hears_words_of_voices_that_it_never_heard(engine):
    questions = sounds.heard("test", SEED, 60, "test")
    assert wer(questions, replies(engine, questions)) < 0.08  # 3 % over many; these are some 150 words


def test_with_the_clips_of_others_it_hears_the_others(engine):
    questions = sounds.shuffled(sounds.heard("test", SEED, 40, "test"))
    assert wer(questions, replies(engine, questions)) > 0.8


def test_swapping_two_clips_swaps_the_answers(engine):
    made = [q for q in heard_questions("test", SEED, 20, speaker="shipped") if " " not in q.answer]
    first, second = (q.sample for q in made[:2])
    clips = [next(p for p in sample.media()) for sample in (first, second)]

    def ask(clip, like):
        parts = tuple(clip if isinstance(p, Audio) else p for p in like.messages[0].parts)
        return replace(like, messages=(Message("user", parts),))

    straight = [reply.text for reply in engine.reply([first, second], SHORT)]
    crossed = engine.reply([ask(clips[1], second), ask(clips[0], first)], SHORT)
    assert straight == [q.answer for q in made[:2]]
    assert [reply.text for reply in crossed] == straight[::-1]


@pytest.mark.parametrize("kind", ["silence", "noise", "one sample", "full scale"])
def test_what_is_no_speech_gets_some_answer(engine, kind):
    wave = {
        "silence": torch.zeros(RATE_HZ),
        "noise": torch.randn(RATE_HZ, generator=torch.Generator().manual_seed(0)) * 0.3,
        "one sample": torch.ones(1),
        "full scale": torch.sign(torch.sin(torch.arange(RATE_HZ) * 0.2)),
    }[kind]
    asked = Message("user", (Audio(wave, RATE_HZ), Text("What do you hear?")))
    (reply,) = engine.reply([Sample((asked,), kind)], SHORT)
    assert reply.tokens_out > 0


def test_a_question_asked_aloud_is_answered_like_the_written_one(engine):
    written = scenes.questions("test", SEED, 6, False)
    aloud = sounds.asked("test", SEED, 6)
    right = [
        sum(scenes.exact(q, reply.text).value for q, reply in zip(asked, replies(engine, asked), strict=True))
        for asked in (written, aloud)
    ]
    assert right[0] > 0.9 * len(written)
    assert right[1] > right[0] - 0.1 * len(written)


def test_it_says_what_it_writes_and_writes_the_same_whether_it_speaks_or_not(engine):
    from tinymodal.eval.speaking import built_in

    questions = scenes.questions("test", SEED, 2, False)
    silent = replies(engine, questions)
    mute = load("starter")
    mute.model.speech_head = None
    for speaking in (replies(engine, questions, speak=True), replies(Engine(mute), questions)):
        assert [reply.text for reply in speaking] == [reply.text for reply in silent]
    said = replies(engine, questions, speak=True)
    listener = built_in()
    heard = listener.hear([reply.audio for reply in said], said[0].rate_hz)
    assert count_errors([listener.written(reply.text) for reply in said], heard).wer < 0.15


def test_it_has_two_voices(engine):
    (question,) = scenes.questions("test", SEED, 1, False)[:1]
    sound = [
        engine.reply([question.sample], SHORT, speak=True, voice=v)[0].audio for v in ("en-us+f1", "en+m4")
    ]
    assert all(len(wave) > RATE_HZ // 10 for wave in sound)
    assert len(sound[0]) != len(sound[1]) or not torch.equal(*sound)
