"""Error rates are those that jiwer and Whisper's normaliser give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Message, Sample, Text
from tinymodal.eval.benchmark import Question, Score
from tinymodal.eval.rules.transcripts import count_errors, error_rates, normaliser, transcript

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "eval" / "wer"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared test data are not here")
words = st.lists(st.sampled_from(["one", "two", "red", "cat", "sat"]), min_size=1, max_size=6).map(" ".join)


def by_hand(ref: list[str], hyp: list[str]) -> int:
    """Edit distance by the textbook."""
    row = list(range(len(hyp) + 1))
    for i, word in enumerate(ref, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(hyp, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != other))
    return row[-1]


@given(st.lists(st.tuples(words, words | st.just("")), min_size=1, max_size=5))
def test_a_rate_is_all_errors_over_all_words(pairs):
    refs, hyps = [ref for ref, _ in pairs], [hyp for _, hyp in pairs]
    found = count_errors(refs, hyps)
    wrong = sum(by_hand(ref.split(), hyp.split()) for ref, hyp in pairs)
    letters = sum(by_hand(list(ref), list(hyp)) for ref, hyp in pairs)
    assert found.words == sum(len(ref.split()) for ref in refs)
    assert found.wer == pytest.approx(wrong / found.words)
    assert found.substitutions + found.deletions + found.insertions == wrong
    assert found.cer == pytest.approx(letters / sum(map(len, refs)))


def test_words_put_in_where_nothing_was_said_are_errors():
    found = count_errors(["one two", ""], ["one two", "hello there"])
    assert (found.wer, found.insertions) == (1.0, 2)


@needs_data
def test_rates_are_those_of_jiwer_to_the_last_digit():
    rows = [json.loads(line) for line in (DATA / "pairs.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        found = count_errors([row["ref"]], [row["hyp"]])
        assert found.wer == row["jiwer"]["wer"], row["id"]
        assert found.cer == row["jiwer"]["cer"], row["id"]


@needs_data
def test_texts_are_written_as_whisper_writes_them():
    rows = [json.loads(line) for line in (DATA / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        assert normaliser()(row["ref"]) == row["whisper_en_ref"]
        assert normaliser()(row["hyp"]) == row["whisper_en_hyp"]
    for vector in json.loads((DATA / "normaliser_vectors.json").read_text())["official_assertions"]:
        assert normaliser()(vector["input"]) == vector["expected"]


def test_a_reply_scores_by_its_words_and_the_test_by_all_of_them():
    def ask(answer):
        return Question(Sample((Message("user", (Text("?"),)),), "q"), answer, {"reference": answer})

    asked = [ask("Two red cats."), ask("A dog")]
    replies = ["2 red cats", "a cat sat"]
    scores = [transcript(question, reply) for question, reply in zip(asked, replies, strict=True)]
    assert [score.value for score in scores] == [1.0, 0.0]
    kept = [Score(s.value, s.parsed, q.meta) for s, q in zip(scores, asked, strict=True)]
    assert error_rates(kept) == pytest.approx({"wer": 2 / 5, "cer": 7 / 15})
    assert error_rates([]) == {}


def test_what_cannot_be_counted_is_told():
    with pytest.raises(DataError, match="1 transcripts for 2"):
        count_errors(["a", "b"], ["a"])
    with pytest.raises(DataError, match="hold no word"):
        count_errors([" "], ["a"])
