"""Requests join, leave, fail and are given up, and nobody else notices."""

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from tests.infer.test_engine import HEARD, QUESTIONS, Hum, ask, heard, speaking, written
from tests.model.test_hearing import build, hearing_config, hearing_tokenizer
from tinymodal.chat.encode import Encoder
from tinymodal.compose.build import load
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, DataError
from tinymodal.core.types import Audio, Image, Message, Sample, Text
from tinymodal.infer.decoding import Group, alike
from tinymodal.infer.engine import Engine, Sampling
from tinymodal.infer.scheduler import QueueFull, Scheduler
from tinymodal.model.processing_tinymodal import TinyModalProcessor

SHORT = Sampling(max_new_tokens=8)
JOINED = ("llama", "gpt2", "gemma2", "qwen3", "minicpm", "openelm")
"""Families with other positions, windows, and layers that differ in heads."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model())


@pytest.fixture(scope="module")
def listener() -> Engine:
    config = hearing_config()
    encoder = Encoder(TinyModalProcessor.of(config, hearing_tokenizer()), "chatml")
    return Engine(SimpleNamespace(model=build(config), encoder=encoder))


def staggered(scheduler: Scheduler, samples, sampling, pause_s=0.004):
    """Replies to samples that are asked one after the other, while others are being answered."""
    tickets = []
    for sample in samples:
        tickets.append(scheduler.submit(sample, sampling))
        time.sleep(pause_s)
    return [ticket.reply for ticket in tickets]


@pytest.mark.parametrize("language", JOINED)
@pytest.mark.parametrize("prefix_mb", [0, 8])
def test_rows_that_join_and_leave_say_what_they_say_alone(language, prefix_mb):
    engine = Engine(tiny_model(language=language))
    alone = [engine.reply([question], SHORT)[0] for question in QUESTIONS]
    with Scheduler(engine, max_rows=3, prefix_mb=prefix_mb) as scheduler:
        assert scheduler.joins
        for _ in range(2):
            assert staggered(scheduler, QUESTIONS, SHORT) == alone
        told = scheduler.stats()
    assert (told.finished, told.rows, told.waiting) == (2 * len(QUESTIONS), 0, 0)
    assert (told.tokens_known > 0) == (prefix_mb > 0)


def test_a_window_that_is_shorter_than_the_rows_makes_no_difference():
    """Gemma 2 looks at 4,096 tokens in every second layer; here at 12, so that rows are longer."""
    engine = Engine(tiny_model(language="gemma2", sliding_window=12))
    long = [ask("what is it " * n, n, n + 1) for n in (1, 9, 4)]
    how = Sampling(max_new_tokens=12)
    alone = [engine.reply([question], how)[0] for question in long]
    with Scheduler(engine, prefix_mb=8) as scheduler:
        for _ in range(2):
            assert staggered(scheduler, long, how) == alone


def test_a_model_whose_state_cannot_be_joined_answers_in_groups_of_its_own():
    """LFM2 has convolutions among its layers of attention."""
    engine = Engine(tiny_model(language="lfm2", layer_types=["conv", "full_attention"]))
    alone = [engine.reply([question], SHORT)[0] for question in QUESTIONS]
    with Scheduler(engine, max_rows=3) as scheduler:
        assert not scheduler.joins
        assert staggered(scheduler, QUESTIONS, SHORT) == alone


def test_rows_of_similar_length_are_read_together():
    """A question of a few words does not pay for the picture beside it; a little padding is no reason."""
    assert alike([5]) == [[0]]
    assert alike([40, 30, 35, 40]) == [[0, 1, 2, 3]]
    assert alike([700, 20, 710, 30, 25]) == [[1, 4, 3], [0, 2]]
    assert alike([20] * 10 + [300] * 3 + [2000]) == [list(range(10)), [10, 11, 12], [13]]


@pytest.mark.parametrize("language", ["llama", "gemma2", "openelm"])
@pytest.mark.parametrize("prefix_mb", [0, 8])
def test_long_and_short_rows_that_come_at_once_say_what_they_say_alone(language, prefix_mb, monkeypatch):
    monkeypatch.setattr("tinymodal.infer.decoding.WASTE", 4)
    engine = Engine(tiny_model(language=language))
    asked = [ask("what is it " * (1 + 9 * (n % 3)), *range(n % 4)) for n in range(6)]
    assert len(alike([len(engine.encode(one)) for one in asked])) > 1
    alone = [engine.reply([one], SHORT)[0] for one in asked]
    assert engine.reply(asked, SHORT) == alone
    with Scheduler(engine, prefix_mb=prefix_mb) as scheduler:
        for _ in range(2):
            assert staggered(scheduler, asked, SHORT, 0) == alone


def test_mixed_media_are_perceived_together_and_each_once(listener):
    alone = [listener.reply([question], SHORT)[0] for question in HEARD]
    with Scheduler(listener) as scheduler:
        assert staggered(scheduler, HEARD, SHORT, 0) == alone
        first = scheduler.stats()
        assert staggered(scheduler, HEARD[::-1], SHORT, 0) == alone[::-1]
        again = scheduler.stats()
    assert first.media == sum(len(list(question.media())) for question in HEARD)
    # Among the questions are sounds and pictures that are the same.
    assert 0 < first.media_perceived <= first.media
    assert again.media_perceived == first.media_perceived
    assert again.media == 2 * first.media


def starter_questions() -> list[Sample]:
    from tinymodal.eval.tasks.scenes import questions

    return [question.sample for question in questions("test", 3, 1, False)]


@pytest.fixture(scope="module")
def starter() -> Engine:
    return Engine(load("starter"))


def test_the_starter_model_answers_pictures_sounds_and_words_as_alone(starter):
    """Threads that ask, in another order each, and rows of all lengths."""
    samples = starter_questions()
    wave = torch.randn(16_000, generator=torch.Generator().manual_seed(0)) / 20
    samples.append(Sample((Message("user", (Audio(wave, 16_000),)),), "sound"))
    samples.append(Sample((Message("user", (Text("What colour is the sky?"),)),), "words"))
    how = Sampling(max_new_tokens=12)
    alone = [starter.reply([sample], how)[0] for sample in samples]
    wrong: list[str] = []
    with Scheduler(starter, max_rows=5) as scheduler:

        def ask_all(seed: int) -> None:
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
            for i in order:
                if (reply := scheduler.submit(samples[i], how).reply) != alone[i]:
                    wrong.append(f"{samples[i].id}: {reply.text} for {alone[i].text}")

        threads = [threading.Thread(target=ask_all, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = scheduler.stats()
    assert not wrong
    assert told.finished == 4 * len(samples)
    assert told.media_perceived <= told.media / 3


def test_requests_are_chosen_each_in_its_own_way_beside_each_other(engine):
    hows = [
        SHORT,
        Sampling(max_new_tokens=8, temperature=1.5, seed=3),
        Sampling(max_new_tokens=3, num_logprobs=2),
        Sampling(max_new_tokens=6, num_beams=3, length_penalty=2.0),
        Sampling(max_new_tokens=8, repetition_penalty=2.0, min_new_tokens=8),
    ]
    alone = [engine.reply([QUESTIONS[0]], how)[0] for how in hows]
    with Scheduler(engine, max_rows=5) as scheduler:
        tickets = [scheduler.submit(QUESTIONS[0], how) for how in hows]
        assert [ticket.reply for ticket in tickets] == alone
        found, expected = tickets[2].reply.logprobs, alone[2].logprobs
    assert [told.token_id for told in found] == [told.token_id for told in expected]
    assert [told.logprob for told in found] == pytest.approx([t.logprob for t in expected], abs=1e-4)


def test_pieces_join_to_the_reply_and_are_told_of(engine):
    with Scheduler(engine) as scheduler:
        called = threading.Event()
        ticket = scheduler.submit(QUESTIONS[0], SHORT)
        ticket.on_piece(called.set)
        assert called.wait(10)
        assert written(ticket) == ticket.reply.text == engine.reply([QUESTIONS[0]], SHORT)[0].text
        assert ticket.done
        assert ticket.get(0) is None


def test_a_listener_that_breaks_breaks_nothing_else(engine):
    with Scheduler(engine) as scheduler:
        ticket = scheduler.submit(QUESTIONS[0], SHORT)

        def gone():
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("Event loop is closed")

        ticket.on_piece(gone)
        assert ticket.reply.text == scheduler.submit(QUESTIONS[0], SHORT).reply.text


def test_first_come_first_served(engine, monkeypatch):
    """With one row, requests are begun in the order in which they came."""
    begun = []
    own = Group.open.__func__

    def opened(cls, language, answers, *rest):
        begun.extend(answer.encoded.sample_id for answer in answers)
        return own(cls, language, answers, *rest)

    monkeypatch.setattr(Group, "open", classmethod(opened))
    with Scheduler(engine, max_rows=1) as scheduler:
        tickets = [scheduler.submit(ask("what", n, name=f"{n}"), SHORT) for n in range(6)]
        assert all(ticket.reply for ticket in tickets)
    assert begun == [f"{n}" for n in range(6)]


def held(engine: Engine, monkeypatch) -> threading.Event:
    """Stop decoding before its next choice until the event is set."""
    go = threading.Event()
    own = Engine._choose

    def choose(self, *given):
        assert go.wait(20)
        return own(self, *given)

    monkeypatch.setattr(Engine, "_choose", choose)
    return go


def test_one_request_too_many_is_refused_and_cancelling_makes_room(engine, monkeypatch):
    go = held(engine, monkeypatch)
    with Scheduler(engine, max_rows=1, max_waiting=2) as scheduler:
        running = scheduler.submit(QUESTIONS[0], SHORT)
        while scheduler.stats().rows == 0:
            time.sleep(0.001)
        waiting = [scheduler.submit(QUESTIONS[0], SHORT) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            scheduler.submit(QUESTIONS[0], SHORT)
        waiting[0].cancel()
        running.cancel()
        go.set()
        assert waiting[1].reply.text == engine.reply([QUESTIONS[0]], SHORT)[0].text
        with pytest.raises(RuntimeError, match="cancelled"):
            _ = waiting[0].reply
        assert list(running) == []
        told = scheduler.stats()
    assert (told.cancelled, told.finished, told.refused) == (2, 1, 1)
    with pytest.raises(QueueFull, match="shut down"):
        scheduler.submit(QUESTIONS[0], SHORT)


def test_a_wait_for_a_piece_ends_in_time(engine, monkeypatch):
    go = held(engine, monkeypatch)
    with Scheduler(engine) as scheduler:
        ticket = scheduler.submit(QUESTIONS[0], SHORT)
        with pytest.raises(TimeoutError, match=r"0\.01 s"):
            ticket.get(0.01)
        go.set()
        assert ticket.reply


def test_what_is_wrong_with_a_request_is_told_where_it_is_submitted(engine):
    with Scheduler(engine, max_rows=2) as scheduler:
        with pytest.raises(DataError, match="no audio tower"):
            scheduler.submit(HEARD[0])
        with pytest.raises(CheckpointError, match="no speech head"):
            scheduler.submit(QUESTIONS[0], speak=True)
        with pytest.raises(ValueError, match="num_beams 3"):
            scheduler.submit(QUESTIONS[0], Sampling(num_beams=3))
        assert scheduler.submit(QUESTIONS[0], SHORT).reply.text
        assert scheduler.stats().failed == 0


def test_what_fails_in_a_prompt_fails_alone(engine, monkeypatch):
    """Newcomers are read together; where that breaks, one by one."""
    own = Engine.open

    def broken(self, answers, *rest):
        if any(answer.encoded.sample_id == "bad" for answer in answers):
            raise RuntimeError("out of luck")
        return own(self, answers, *rest)

    alone = [engine.reply([question], SHORT)[0] for question in QUESTIONS]
    monkeypatch.setattr(Engine, "open", broken)
    with Scheduler(engine) as scheduler:
        bad = scheduler.submit(ask("what", 1, name="bad"), SHORT)
        tickets = [scheduler.submit(question, SHORT) for question in QUESTIONS]
        assert [ticket.reply for ticket in tickets] == alone
        with pytest.raises(RuntimeError, match="out of luck"):
            _ = bad.reply
        with pytest.raises(RuntimeError, match="out of luck"):
            list(bad)
        assert (scheduler.stats().failed, scheduler.stats().finished) == (1, len(QUESTIONS))


def test_a_row_whose_logits_are_no_numbers_fails_alone(engine, monkeypatch):
    hot = Sampling(max_new_tokens=8, temperature=1.0, seed=4)
    alone = [engine.reply([question], hot)[0] for question in QUESTIONS]
    own = Engine._choose

    def choose(self, logits_BV, answers):
        for i, answer in enumerate(answers):
            if answer.encoded.sample_id == "bad" and len(answer.ids) == 2:
                logits_BV[i] = torch.nan
        return own(self, logits_BV, answers)

    monkeypatch.setattr(Engine, "_choose", choose)
    with Scheduler(engine) as scheduler:
        bad = scheduler.submit(ask("what is it", 1, name="bad"), hot)
        tickets = [scheduler.submit(question, hot) for question in QUESTIONS]
        assert [ticket.reply for ticket in tickets] == alone
        with pytest.raises(RuntimeError):
            _ = bad.reply
    with pytest.raises(RuntimeError):
        engine.reply([ask("what is it", 1, name="bad")], hot)


def test_closing_answers_what_was_taken_or_lets_it_go(engine, monkeypatch):
    scheduler = Scheduler(engine, max_rows=2)
    tickets = [scheduler.submit(question, SHORT) for question in QUESTIONS]
    scheduler.close()
    assert all(ticket.reply for ticket in tickets)
    go = held(engine, monkeypatch)
    scheduler = Scheduler(engine, max_rows=2)
    tickets = [scheduler.submit(question, SHORT) for question in QUESTIONS]
    threading.Timer(0.1, go.set).start()
    scheduler.close(timeout_s=0.01)
    assert all(ticket.done for ticket in tickets)
    assert scheduler.stats().cancelled == len(QUESTIONS)


def test_rows_speak_each_for_itself():
    engine = speaking(voices=("ann", "bob"))
    alone = [engine.reply([question], SHORT, speak=True, voice="bob")[0] for question in QUESTIONS]
    with Scheduler(engine) as scheduler:
        tickets = [scheduler.submit(question, SHORT, speak=True, voice="bob") for question in QUESTIONS]
        mute = scheduler.submit(QUESTIONS[0], SHORT)
        for ticket, expected in zip(tickets, alone, strict=True):
            pieces = list(ticket)
            assert written(pieces) == expected.text
            torch.testing.assert_close(heard(pieces), expected.audio)
            torch.testing.assert_close(ticket.reply.audio, expected.audio)
            assert ticket.reply.rate_hz == Hum.rate_hz
        assert mute.reply.audio is None


def test_nothing_is_held_of_a_request_that_is_over(engine):
    """Its caches, its picture and its ticket are gone, also while nothing else is asked."""
    with Scheduler(engine, prefix_mb=0) as scheduler:
        seen = []
        for how in (SHORT, Sampling(max_new_tokens=4, num_beams=2), SHORT):
            ticket = scheduler.submit(ask("what is it", 1), how)
            if len(seen) == 2:
                ticket.cancel()
            list(ticket)
            seen.append(weakref.ref(ticket))
            del ticket
        deadline = time.monotonic() + 20
        while (scheduler._groups or any(ref() for ref in seen)) and time.monotonic() < deadline:
            time.sleep(0.01)
            gc.collect()
        assert [ref() for ref in seen] == [None] * 3
        assert scheduler._groups == []
        assert not scheduler._running


def test_a_picture_may_be_a_file_that_changes_between_questions(engine, tmp_path):
    """What is kept of a file is not taken for what the file has become."""
    path = tmp_path / "picture.png"
    sample = Sample((Message("user", (Image(path), Text("what is it"))),), "file")
    with Scheduler(engine) as scheduler:
        for seed in (1, 2):
            asked = ask("what is it", seed)
            next(asked.media()).source.save(path)
            assert scheduler.submit(sample, SHORT).reply.text == engine.reply([asked], SHORT)[0].text
