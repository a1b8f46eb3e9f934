"""A reply that is held to a JSON schema is JSON of it, whatever the tokenizer, the batch and the sampling."""

import json
from functools import partial

import pytest

pytest.importorskip("llguidance")
jsonschema_rs = pytest.importorskip("jsonschema_rs")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.chat.test_families import sentencepiece  # noqa: E402
from tests.infer.test_engine import QUESTIONS, heard, speaking, written  # noqa: E402
from tinymodal.compose.tiny import tiny_model  # noqa: E402
from tinymodal.core.errors import DataError  # noqa: E402
from tinymodal.infer import grammar_trial  # noqa: E402
from tinymodal.infer.engine import Engine, Sampling  # noqa: E402
from tinymodal.infer.grammar import GrammarError, Grammars  # noqa: E402
from tinymodal.infer.grammar_trial import TrialTimeout, fault_of, tried  # noqa: E402
from tinymodal.infer.scheduler import Scheduler  # noqa: E402

ROOM = 400
"""Tokens within which every reply of a schema below is complete, whatever a random model says."""
RING = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "grün", "blue.", "no ring"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "says": {"type": "string", "maxLength": 6},
    },
    "required": ["colour", "size", "says"],
    "additionalProperties": False,
}
HOT = Sampling(max_new_tokens=ROOM, temperature=1.5, json_schema=RING)
SHORT = Sampling(max_new_tokens=8)
TOKENIZERS = {
    "byte level": lambda: None,
    **{kind: partial(sentencepiece, kind) for kind in ("legacy", "first", "always")},
}


def checked(text: str, schema) -> None:
    """That a text is JSON of a schema, as somebody else's library has it."""
    jsonschema_rs.validate(schema, json.loads(text))


@pytest.fixture(scope="module", params=TOKENIZERS)
def of_kind(request) -> Engine:
    tokenizer = TOKENIZERS[request.param]()
    size = {} if tokenizer is None else {"vocab_size": len(tokenizer) + 7}  # as embeddings are padded
    return Engine(tiny_model(vision=None, tokenizer=tokenizer, **size))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model())


@pytest.mark.parametrize("seed", range(6))
def test_replies_are_json_of_the_schema_whatever_the_tokenizer(of_kind, seed):
    how = Sampling(max_new_tokens=ROOM, temperature=2.0 * (seed > 0), seed=seed, json_schema=RING)
    (reply,) = of_kind.reply([QUESTIONS[3]], how)
    assert reply.stopped_by == "stop"
    checked(reply.text, RING)
    assert "".join(map(str, of_kind.stream(QUESTIONS[3], how))) == reply.text


NAMES = st.sampled_from(["a", "colour", "wie groß", "x y", 'quo"te', "back\\slash"])
LEAVES = st.one_of(
    st.builds(lambda values: {"enum": values}, st.lists(st.text(max_size=4), min_size=1, max_size=3)),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.builds(lambda n: {"type": "integer", "minimum": -n, "maximum": n}, st.integers(0, 2000)),
    st.sampled_from(
        [
            {"type": "null"},
            {"const": [1, "é"]},
            {"type": ["null", "boolean"]},
            {"type": "string", "pattern": "^[a-c]{2,4}-\\d$"},
            {"type": "string", "format": "date"},
        ]
    ),
)


def composed(inner):
    properties = st.dictionaries(NAMES, inner, max_size=3)
    return st.one_of(
        st.builds(
            lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3)
        ),
        st.builds(lambda each: {"anyOf": each}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(
            lambda each, all_of: {
                "type": "object",
                "properties": each,
                "required": list(each)[: len(each) if all_of else 1],
                "additionalProperties": False,
            },
            properties,
            st.booleans(),
        ),
    )


@settings(max_examples=25, deadline=None)
@given(schema=st.recursive(LEAVES, composed, max_leaves=5), seed=st.integers(0, 2**31))
def test_replies_are_json_of_any_schema(engine, schema, seed):
    assert fault_of(json.dumps(schema)) == ""
    how = Sampling(max_new_tokens=ROOM, temperature=1.0, seed=seed, json_schema=schema)
    (reply,) = engine.reply([QUESTIONS[0]], how)
    if reply.stopped_by == "stop":
        checked(reply.text, schema)
    else:
        assert reply.tokens_out == ROOM  # five strings of a model that knows nothing may fill it


def test_rows_that_are_held_and_rows_that_are_not_are_as_alone(engine):
    free = Sampling(max_new_tokens=30, temperature=1.0, seed=5)
    held = [
        Sampling(
            max_new_tokens=ROOM, temperature=1.0, seed=seed, json_schema={"type": "array", "maxItems": 1}
        )
        for seed in range(2)
    ]
    hows = [free, HOT, *held, Sampling(max_new_tokens=ROOM, json_schema=RING, repetition_penalty=1.3)]
    alone = [engine.reply([question], how)[0] for question, how in zip(QUESTIONS, hows, strict=True)]
    with Scheduler(engine, max_rows=3) as scheduler:
        for _ in range(2):
            tickets = [scheduler.submit(q, how) for q, how in zip(QUESTIONS, hows, strict=True)]
            pieces = ["".join(map(str, ticket)) for ticket in tickets]
            assert [ticket.reply for ticket in tickets] == alone
            assert pieces == [reply.text for reply in alone]
    checked(alone[1].text, RING)
    checked(alone[4].text, RING)


def test_a_batch_of_one_schema_is_as_each_alone(engine):
    together = engine.reply(QUESTIONS, HOT)
    assert together == [engine.reply([question], HOT)[0] for question in QUESTIONS]
    for reply in together:
        checked(reply.text, RING)


def test_the_likelihoods_are_those_of_the_model_and_not_of_the_schema(engine):
    how = Sampling(max_new_tokens=ROOM, json_schema=RING, num_logprobs=2)
    (reply,) = engine.reply([QUESTIONS[0]], how)
    told = reply.logprobs
    assert told is not None
    assert b"".join(each.raw for each in told).decode() == reply.text
    # A free model would not have begun with a brace: what it would have said stands in its place.
    assert told[0].token.startswith("{")
    assert told[0].logprob < told[0].top[0][1] < 0


def test_a_reply_that_is_cut_says_so_and_has_begun_well(engine):
    whole = engine.reply([QUESTIONS[0]], HOT)[0]
    cut = Sampling(max_new_tokens=5, temperature=1.5, json_schema=RING)
    (reply,) = engine.reply([QUESTIONS[0]], cut)
    assert (reply.stopped_by, reply.tokens_out) == ("length", 5)
    assert whole.text.startswith(reply.text)
    stopped = Sampling(max_new_tokens=ROOM, temperature=1.5, json_schema=RING, stop=('", "size',))
    (reply,) = engine.reply([QUESTIONS[0]], stopped)
    assert reply.stopped_by == "stop"
    assert whole.text.startswith(reply.text + '", "size')


def test_a_least_length_does_not_break_what_is_complete(engine):
    how = Sampling(max_new_tokens=60, min_new_tokens=50, json_schema={"enum": ["red"]})
    (reply,) = engine.reply([QUESTIONS[0]], how)
    assert (reply.text, reply.stopped_by) == ('"red"', "stop")


def test_guessing_ahead_changes_nothing(engine):
    schema = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 6, "maxItems": 9}
    plain = Sampling(max_new_tokens=ROOM, json_schema=schema)
    (expected,) = engine.reply([QUESTIONS[0]], plain)
    how = Sampling(max_new_tokens=ROOM, json_schema=schema, lookup=4)
    assert engine.reply([QUESTIONS[0]], how) == [expected]
    checked(expected.text, schema)


def test_words_that_end_the_turns_of_a_template_may_stand_in_json():
    engine = Engine(tiny_model(vision=None, template="vicuna_v1"))
    engine.stop_words = ("red",)
    (reply,) = engine.reply([QUESTIONS[3]], Sampling(json_schema={"enum": ["a red one"]}))
    assert (reply.text, reply.stopped_by) == ('"a red one"', "stop")


def test_json_can_be_said_aloud():
    engine = speaking()
    how = Sampling(max_new_tokens=ROOM, json_schema={"enum": ["red"]})
    (reply,) = engine.reply([QUESTIONS[0]], how, speak=True)
    assert reply.text == '"red"'
    pieces = list(engine.stream(QUESTIONS[0], how, speak=True))
    assert written(pieces) == reply.text
    assert reply.audio is not None
    assert len(heard(pieces)) == len(reply.audio) > 0


def test_a_schema_is_kept_as_text_and_ways_to_choose_stay_comparable():
    assert HOT.json_schema == json.dumps(RING)
    assert hash(HOT) == hash(Sampling(max_new_tokens=ROOM, temperature=1.5, json_schema=json.dumps(RING)))
    with pytest.raises(ValueError, match="num_beams"):
        Sampling(json_schema=RING, num_beams=2)


BAD = {
    '{"type": "strin"}': "strin",
    "[": "EOF",
    "true": "object",
    '{"enum": []}': "empty",
    '{"type": "array", "uniqueItems": true}': "uniqueItems",
    '{"type": "array", "uniqueItems": true, "x-guidance": {"lenient": true}}': "uniqueItems",
    '{"$ref": "http://example.org/a"}': "retriev",
    '{"type": "string", "pattern": "(?=a)b"}': "look-around",
    '{"type": "integer", "minimum": 3, "maximum": 2}': "greater",
    "[" * 5000 + "]" * 5000: "recursion",
}


@pytest.mark.parametrize("schema", BAD, ids=lambda schema: schema[:40])
def test_what_no_reply_can_be_held_to_is_refused_with_the_reason(engine, schema):
    words = fault_of(schema)
    assert BAD[schema] in words
    assert "\n" not in words
    assert len(words) < 300
    with pytest.raises(GrammarError, match=BAD[schema]):
        engine.reply([QUESTIONS[0]], Sampling(json_schema=schema))


def test_what_allows_no_text_is_told_where_it_is_submitted(engine):
    with Scheduler(engine) as scheduler, pytest.raises(GrammarError, match="no text can be of this schema"):
        scheduler.submit(QUESTIONS[0], Sampling(json_schema='{"$ref": "#"}'))


def test_a_row_whose_schema_becomes_too_much_fails_alone(engine):
    # After the first brace a thousand objects are possible at once.
    each = [{"type": "object", "properties": {f"a{i}": {"pattern": f".*{i}"}}} for i in range(999)]
    schema = json.dumps({"anyOf": each})
    free = [engine.reply([question], SHORT)[0] for question in QUESTIONS]
    with Scheduler(engine) as scheduler:
        bad = scheduler.submit(QUESTIONS[0], Sampling(json_schema=schema))
        tickets = [scheduler.submit(question, SHORT) for question in QUESTIONS]
        assert [ticket.reply for ticket in tickets] == free
        with pytest.raises(GrammarError, match=r"json_schema: .*max is"):
            _ = bad.reply
    with pytest.raises(GrammarError):
        engine.reply([QUESTIONS[0]], Sampling(json_schema=schema))


def test_a_schema_that_takes_too_long_is_given_up():
    # Each pair of patterns is looked at for a text that is of both: this has no end in sight.
    patterns = {f"^a{i}.*b{i}(c|d){{1,50}}$": {} for i in range(800)}
    with pytest.raises(TrialTimeout):
        tried(json.dumps({"type": "object", "patternProperties": patterns}), 1.5)


def test_a_trial_in_another_process_says_what_this_one_says(monkeypatch):
    for schema in (json.dumps(RING), *list(BAD)[:3]):
        assert tried(schema, 30.0) == fault_of(schema)
    # A known one is not tried again.
    monkeypatch.setattr(grammar_trial.subprocess, "run", None)
    assert tried(json.dumps(RING), 30.0) == ""


def test_a_tokenizer_whose_text_is_not_its_tokens_is_refused():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "[SEP]", "a", "##b", "{", "}", '"', ":", "1"])}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")
    with pytest.raises(DataError, match="not its tokens in turn"):
        Grammars(tokenizer, [1])
