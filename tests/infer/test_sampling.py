"""Each way to choose a token is the arithmetic it says, and transformers' own where that has it."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.infer.test_engine import QUESTIONS, SHORT, ask, heard, speaking
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.types import Message, Sample, Text
from tinymodal.infer.decoding import Group
from tinymodal.infer.engine import Engine, Sampling
from tinymodal.infer.logprobs import TokenBytes
from tinymodal.infer.sampling import Choice, choose, filtered, restrict
from tinymodal.infer.scheduler import Scheduler

VOCABULARY = 50


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model())


def logits(seed: int, rows: int = 3) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def choices(sampling: Sampling, rows: int = 1, prompt=(1, 2), said=()) -> list[Choice]:
    return [Choice(sampling, torch.tensor(prompt), list(said)) for _ in range(rows)]


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.1, 3.0),
)
@example(seed=0, top_k=0, top_p=0.9999999999999999, min_p=0.0, temperature=0.5)
def test_filters_are_those_of_the_library_in_its_order(seed, top_k, top_p, min_p, temperature):
    given_BV = logits(seed)
    expected = TemperatureLogitsWarper(temperature)(None, given_BV)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    found = filtered(given_BV, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    # A sum that meets top_p to the last bit may be counted either way, so one token more or less is no fault;
    # nor are those that have less of the probability than a float32 sum can tell, where top_p is all but 1.
    differs = found != expected
    shares = (given_BV / temperature).softmax(-1) * differs
    assert (shares.sum(-1) - shares.max(-1).values).max() < 1e-5
    if not differs.any():
        torch.testing.assert_close(found, expected)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), min_p=st.floats(0.01, 1.0), temperature=st.floats(0.2, 3.0))
def test_only_tokens_within_their_share_of_the_likeliest_are_drawn(seed, min_p, temperature):
    given_BV = logits(seed, 1)
    shares = (given_BV[0] / temperature).softmax(-1)
    how = Sampling(temperature=temperature, min_p=min_p, seed=seed)
    token = int(choose(given_BV.clone(), choices(how))[0])
    assert shares[token] >= min_p * shares.max() * (1 - 1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), penalty=st.floats(0.3, 3.0))
def test_what_was_read_or_said_counts_less_as_in_the_library(seed, penalty):
    given_BV = logits(seed, 1)
    read, said = [3, 4, 4, 9], [7, 3]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[*read, *said]]), given_BV.clone())
    rows = choices(Sampling(repetition_penalty=penalty), prompt=read, said=said)
    found = given_BV.clone()
    restrict(found, rows)
    torch.testing.assert_close(found, expected)
    assert int(choose(given_BV.clone(), rows)[0]) == int(expected.argmax())


def test_the_stop_is_not_chosen_before_the_least_length_as_in_the_library():
    stops = [5, 6]
    for said in ([], [1], [1, 2]):
        given_BV = logits(0, 1)
        given_BV[0, 5] = 100.0
        library = MinNewTokensLengthLogitsProcessor(2, 2, stops)
        expected = library(torch.tensor([[1, 2, *said]]), given_BV.clone())
        rows = choices(Sampling(min_new_tokens=2), said=said)
        found = given_BV.clone()
        restrict(found, rows, stops=stops)
        assert torch.equal(found, expected)
        assert (int(choose(given_BV, rows, stops=stops)[0]) == 5) == (len(said) == 2)


def test_a_reply_is_as_long_as_is_asked(engine, monkeypatch):
    stop = engine.tokenizer.convert_tokens_to_ids("<|im_end|>")
    own = Engine._choose

    def eager(self, logits_BV, answers):
        logits_BV[:, stop] = 1000.0
        return own(self, logits_BV, answers)

    monkeypatch.setattr(Engine, "_choose", eager)
    (reply,) = engine.reply([QUESTIONS[0]], Sampling(max_new_tokens=9, min_new_tokens=4))
    assert (reply.tokens_out, reply.stopped_by) == (5, "stop")


def test_a_row_by_chance_says_the_same_alone_and_beside_others(engine):
    for seed in (1, 2, 3):
        hot = Sampling(max_new_tokens=8, temperature=1.5, top_p=0.95, seed=seed)
        together = engine.reply(QUESTIONS, hot)
        assert together == [engine.reply([question], hot)[0] for question in QUESTIONS]
    same = engine.reply([QUESTIONS[0]] * 3, hot)
    assert len({reply.text for reply in same}) == 1


def test_rows_of_one_batch_may_be_chosen_each_in_its_own_way():
    hows = [
        Sampling(),
        Sampling(temperature=2.0, seed=1),
        Sampling(temperature=2.0, seed=2),
        Sampling(temperature=0.7, top_k=3, seed=1),
        Sampling(repetition_penalty=4.0),
    ]
    given_BV = logits(4, len(hows))
    rows = [choices(how)[0] for how in hows]
    alone = [int(choose(given_BV[i : i + 1].clone(), choices(how))[0]) for i, how in enumerate(hows)]
    assert choose(given_BV.clone(), rows).tolist() == alone


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams"),
        ({"stop": "###"}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"num_logprobs": -1}, "num_logprobs"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**wrong)


# Stop strings


@pytest.fixture
def scripted(engine, monkeypatch):
    def make(text: str) -> Engine:
        steps = iter(engine.tokenizer(text, add_special_tokens=False)["input_ids"])
        monkeypatch.setattr(engine, "_choose", lambda logits, *_: torch.full((len(logits),), next(steps)))
        return engine

    return make


def test_a_reply_ends_before_a_stop_string_and_a_stream_never_shows_a_part_of_it(scripted):
    text = "a red END thing ENDING here ENDE blue blue"
    how = Sampling(max_new_tokens=60, stop=("ENDE", "never"))
    (reply,) = scripted(text).reply([QUESTIONS[0]], how)
    assert (reply.text, reply.stopped_by) == ("a red END thing ENDING here", "stop")
    pieces = [delta.text for delta in scripted(text).stream(QUESTIONS[0], how)]
    assert "".join(pieces) == reply.text
    assert len(pieces) > 3
    assert scripted(text).reply([QUESTIONS[0]], Sampling(max_new_tokens=20))[0].text.startswith("a red END")


def test_the_first_of_several_stop_strings_counts(scripted):
    how = Sampling(max_new_tokens=60, stop=("blue", "thing"))
    assert scripted("a red thing and a blue one").reply([QUESTIONS[0]], how)[0].text == "a red"


# Logprobs


def test_logprobs_are_those_of_the_whole_conversation_run_at_once(engine):
    """Before temperature and filters; the placeholder is no word and has no share."""
    for how in (
        Sampling(max_new_tokens=6, num_logprobs=3),
        Sampling(max_new_tokens=6, num_logprobs=3, temperature=2.0, top_k=4, seed=5),
    ):
        encoded = engine.encode(QUESTIONS[0])
        (reply,) = engine.reply([QUESTIONS[0]], how)
        ids = [told.token_id for told in reply.logprobs]
        whole = torch.cat([encoded.ids, torch.tensor(ids)])[None]
        with torch.inference_mode():
            found = engine.model(input_ids=whole, pixel_values=encoded.media[0].tiles[0][None]).logits[0]
            found[:, engine.places["image"][1]] = -torch.inf
        for told, row in zip(reply.logprobs, found[len(encoded) - 1 :].log_softmax(-1), strict=False):
            assert told.logprob == pytest.approx(float(row[told.token_id]), abs=1e-4)
            assert [value for _, value in told.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
            assert told.token == engine.tokenizer.decode([told.token_id])
    (reply,) = engine.reply([QUESTIONS[0]], Sampling(max_new_tokens=2, num_logprobs=0))
    assert [told.top for told in reply.logprobs] == [(), ()]
    assert engine.reply([QUESTIONS[0]], SHORT)[0].logprobs is None


def test_the_bytes_of_the_tokens_are_the_reply_and_a_stop_has_none(scripted):
    text = "é€😀 red"
    how = Sampling(max_new_tokens=60, num_logprobs=1)
    (reply,) = scripted(text + "<|im_end|>").reply([QUESTIONS[0]], how)
    assert b"".join(told.raw for told in reply.logprobs).decode() == text == reply.text
    pieces = list(scripted(text + "<|im_end|>").stream(QUESTIONS[0], how))
    assert [t.token_id for piece in pieces for t in piece.logprobs] == [t.token_id for t in reply.logprobs]
    how = Sampling(max_new_tokens=60, num_logprobs=0, stop=("END",))
    (reply,) = scripted("red END blue").reply([QUESTIONS[0]], how)
    assert "END" not in b"".join(told.raw for told in reply.logprobs).decode()


def test_a_tokens_bytes_are_told_for_other_tokenizers_too():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "▁red": 1, "<0xC3>": 2, "<0xA9>": 3, "s": 4}
    backend = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    name = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert b"".join(map(name, [1, 2, 3, 4])) == " redés".encode()


# Beams


@pytest.mark.parametrize("language", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 0.0},
        {"num_beams": 2, "length_penalty": 3.0, "min_new_tokens": 3},
        {"num_beams": 3, "repetition_penalty": 1.7},
    ],
)
def test_beams_are_the_librarys(language, how):
    engine = Engine(tiny_model(language=language))
    for question in (*QUESTIONS[:3], ask("how many", 7)):
        encoded = engine.encode(question)
        pictures = torch.stack([item.tiles[0] for item in encoded.media])
        whole = engine.model.generate(
            input_ids=encoded.ids[None],
            attention_mask=torch.ones(1, len(encoded), dtype=torch.long),
            pixel_values=pictures,
            max_new_tokens=6,
            do_sample=False,
            early_stopping=False,
            eos_token_id=sorted(engine.stop_ids),
            pad_token_id=0,
            suppress_tokens=[engine.places["image"][1]],
            **how,
        )[0, len(encoded) :]
        stop = [i for i, token in enumerate(whole.tolist()) if token in engine.stop_ids]
        whole = whole[: stop[0] + 1] if stop else whole
        sampling = Sampling(max_new_tokens=6, num_logprobs=1, **how)
        (reply,) = engine.reply([question], sampling)
        assert reply.text == engine.tokenizer.decode(whole, skip_special_tokens=True).strip()
        assert reply.tokens_out == len(whole)
        assert "".join(delta.text for delta in engine.stream(question, sampling)) == reply.text
        assert len(reply.logprobs) == len(whole) - bool(stop)


# Guessing ahead


@pytest.mark.parametrize("language", ["llama", "gemma2", "gpt2", "qwen3"])
def test_a_reply_is_the_same_with_guesses_and_takes_fewer_passes(language, monkeypatch):
    """A tiny model repeats itself before long; then guesses come true."""
    engine = Engine(tiny_model(language=language))
    passes = []
    own = Group._forward
    monkeypatch.setattr(Group, "_forward", lambda *given, **more: passes.append(0) or own(*given, **more))
    fewer = 0
    for question in QUESTIONS[1:3]:
        for how in ({}, {"temperature": 0.3, "seed": 3}, {"repetition_penalty": 1.1, "min_new_tokens": 20}):
            counts = []
            said = []
            for lookup in (0, 5):
                passes.clear()
                sampling = Sampling(max_new_tokens=24, lookup=lookup, num_logprobs=1, **how)
                said.append(engine.reply([question], sampling)[0])
                counts.append(len(passes))
            assert "".join(map(str, engine.stream(question, sampling))) == said[-1].text
            assert said[0] == said[1]
            assert [t.token_id for t in said[0].logprobs] == [t.token_id for t in said[1].logprobs]
            assert counts[1] <= counts[0]
            fewer += counts[1] < counts[0]
    assert fewer


def test_guesses_are_heard_as_what_was_chosen_one_by_one():
    engine = speaking()
    plain, ahead = Sampling(max_new_tokens=30), Sampling(max_new_tokens=30, lookup=4)
    (reply,) = engine.reply([QUESTIONS[0]], plain, speak=True)
    torch.testing.assert_close(engine.reply([QUESTIONS[0]], ahead, speak=True)[0].audio, reply.audio)
    torch.testing.assert_close(heard(engine.stream(QUESTIONS[0], ahead, speak=True)), reply.audio)
    with Scheduler(engine) as scheduler:
        torch.testing.assert_close(scheduler.submit(QUESTIONS[0], ahead, speak=True).reply.audio, reply.audio)


def test_a_search_by_beams_does_not_guess_ahead():
    engine = Engine(tiny_model(language="llama"))
    words = Message("user", (Text("say it say it say it"),))
    question = Sample((words, Message("assistant", (Text("it say it"),)), words), "repeats")
    beams = {"max_new_tokens": 12, "num_beams": 3}
    plain, ahead = (engine.reply([question], Sampling(lookup=n, **beams))[0] for n in (0, 4))
    assert ahead == plain
