"""The demo's benchmark: fair, fresh, and with pictures that can be shuffled."""

import re

import pytest

from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import best_constants
from tinymodal.eval.tasks import scenes
from tinymodal.eval.tasks.table import TASKS

pytest.importorskip("sklearn")


def asked(seed: int = 5, per_kind: int = 6, unseen: bool = False):
    return scenes.questions("val", seed, per_kind, unseen)


def sources(question) -> list[int]:
    return [id(image.source) for image in question.sample.media()]


def words(question) -> str:
    return " ".join(p.text for m in question.sample.messages for p in m.parts if isinstance(p, Text))


def test_the_first_questions_are_one_of_each_kind():
    kinds = [question.meta["kind"] for question in asked()]
    number = len(set(kinds))
    assert number >= 10
    assert len(set(kinds[:number])) == number


def test_another_seed_asks_other_questions_and_the_same_seed_the_same():
    one, other = asked(seed=5), asked(seed=6)
    assert [words(q) for q in one] != [words(q) for q in other]
    scenes.questions.cache_clear()
    again = asked(seed=5)
    assert [words(q) for q in one] == [words(q) for q in again]
    for a, b in zip(one, again, strict=True):
        for x, y in zip(a.sample.media(), b.sample.media(), strict=True):
            assert x.source.tobytes() == y.source.tobytes()


def test_every_question_ends_with_the_user_and_has_a_picture():
    for question in [*asked(), *asked(unseen=True)]:
        assert question.sample.messages[-1].role == "user"
        assert any(isinstance(part, Image) for part in question.sample.messages[-1].parts)


def test_questions_about_unseen_pairs_name_one_or_show_one():
    from tinymodal.data.scenes import UNSEEN_PAIRS

    pairs = {f"{colour} {shape}" for shape, colour in UNSEEN_PAIRS}
    named = [q for q in asked(per_kind=20, unseen=True) if any(pair in words(q) for pair in pairs)]
    assert named
    assert not [q for q in asked(per_kind=20) if any(pair in words(q) for pair in pairs)]


def test_shuffling_gives_nobody_its_own_pictures_and_keeps_kind_and_number():
    before = asked()
    after = scenes.shuffled(before, seed=3)
    assert len(after) == len(before)
    owner = {source: question.meta["kind"] for question in before for source in sources(question)}
    for old, new in zip(before, after, strict=True):
        assert words(new) == words(old)
        assert new.answer == old.answer
        assert not set(sources(new)) & set(sources(old))
        assert len(sources(new)) == len(sources(old))
        assert {owner[source] for source in sources(new)} == {old.meta["kind"]}
    # Every picture is used exactly once: shuffled, not sampled.
    assert sorted(s for q in before for s in sources(q)) == sorted(s for q in after for s in sources(q))


def test_a_question_alone_in_its_kind_is_left_out_of_the_shuffle():
    assert scenes.shuffled(asked(per_kind=1)) == []


def test_ids_of_all_questions_differ():
    ids = [q.sample.id for q in asked()] + [q.sample.id for q in asked(unseen=True)]
    ids += [q.sample.id for q in scenes.shuffled(asked())]
    assert len(set(ids)) == len(ids)


def test_no_constant_answer_does_well():
    """Answers are balanced: measured at most .55 (yes/no and the two-way kinds) on 200 of each kind."""
    constants = best_constants(asked(per_kind=200))
    assert max(constant.accuracy for constant in constants.values()) < 0.62


def test_the_report_table_has_null_where_a_kind_has_no_unseen_pairs():
    questions = asked()
    kinds = dict.fromkeys((q.meta["kind"] for q in questions), 0.5)
    table = scenes.by_kind(kinds, {"colour": 1.0, "shape": 0.0}, kinds, questions)
    assert table["kinds"]["number"]["unseen_pairs"] is None
    assert table["kinds"]["colour"] == {
        "new": 0.5,
        "unseen_pairs": 1.0,
        "shuffled": 0.5,
        "constant": best_constants(questions)["colour"].accuracy,
        "n": 6,
    }
    assert table["mean"]["unseen_pairs"] == 0.5
    assert set(table["mean"]) == {"new", "unseen_pairs", "shuffled", "constant"}


def test_the_three_tests_are_built_in_by_name():
    assert {"scenes", "scenes-unseen", "scenes-shuffled"} <= set(TASKS)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in TASKS)
