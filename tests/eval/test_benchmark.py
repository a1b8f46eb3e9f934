"""Scores become numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Message, Sample, Text
from tinymodal.eval.benchmark import Question, Score, best_constants, by_category, mean

SCORES = st.lists(
    st.builds(
        lambda value, kind: Score(value, meta={"kind": kind}),
        st.sampled_from((0.0, 1.0)),
        st.sampled_from("abc"),
    ),
    min_size=1,
)


def question(answer: str, kind: str, **meta: str) -> Question:
    return Question(Sample((Message("user", (Text("?"),)),), "q"), answer, {"kind": kind, **meta})


def test_no_scores_have_no_mean():
    assert mean([]) == {}
    assert by_category("kind")([]) == {}


def test_a_large_category_does_not_drown_a_small_one():
    scores = [Score(1.0, meta={"kind": "many"})] * 99 + [Score(0.0, meta={"kind": "one"})]
    assert by_category("kind")(scores) == {"many": 1.0, "one": 0.0, "mean": 0.5}
    assert mean(scores) == {"mean": 0.99}


@given(SCORES)
def test_every_category_has_the_mean_of_its_own_scores(scores):
    numbers = by_category("kind")(scores)
    for kind in {score.meta["kind"] for score in scores}:
        own = [score.value for score in scores if score.meta["kind"] == kind]
        assert numbers[kind] == sum(own) / len(own)


def test_a_score_without_the_key_is_counted_as_other():
    assert by_category("kind")([Score(1.0)]) == {"other": 1.0, "mean": 1.0}


def test_a_category_may_not_take_the_name_of_the_mean():
    scores = [Score(1.0, meta={"kind": "mean"}), Score(0.0, meta={"kind": "size"})]
    with pytest.raises(DataError, match="kind is 'mean'"):
        by_category("kind")(scores)


def test_the_best_constant_is_the_commonest_answer_of_each_kind():
    asked = [question(a, "size") for a in ("big", "big", "small")] + [question("4", "count")]
    best = best_constants(asked)
    assert (best["size"].answer, best["size"].accuracy) == ("big", 2 / 3)
    assert (best["count"].answer, best["count"].accuracy) == ("4", 1.0)


def test_a_blind_model_knows_the_choices_that_a_question_offers():
    """Half are left or right, half above or below: one constant scores 3 of 8, one for each pair 6 of 8."""
    asked = [question(a, "relation", choices="left or right") for a in ("left", "left", "left", "right")]
    asked += [question(a, "relation", choices="above or below") for a in ("below", "below", "below", "above")]
    best = best_constants(asked)["relation"]
    assert best.accuracy == 0.75
    assert best.answer == "left / below"


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("ab")), min_size=1))
def test_no_constant_answer_beats_the_best_one(pairs):
    best = best_constants([question(answer, kind) for answer, kind in pairs])
    for kind in {kind for _, kind in pairs}:
        own = [answer for answer, k in pairs if k == kind]
        assert best[kind].accuracy == max(own.count(answer) / len(own) for answer in "xyz")


def test_a_constant_may_know_the_choices_that_a_question_offers():
    """ "Left or right?" is answered by chance half the time, not a quarter, by a model that cannot see."""
    sample = Sample((Message("user", (Text("?"),)),), "x")
    offered = {"left or right": ["left", "right", "left"], "above or below": ["below"]}
    asked = [
        Question(sample, answer, {"kind": "relation", "choices": choices})
        for choices, answers in offered.items()
        for answer in answers
    ]
    best = best_constants(asked)["relation"]
    assert best.answer == "left / below"
    assert best.accuracy == 3 / 4
