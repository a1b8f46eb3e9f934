"""VQA v2: the official numbers on real answers, test splits without answers, and the server's file."""

import gzip
import json
from pathlib import Path

import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.vqav2 import TASK, submission, to_submit

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "vqav2"
SHORT = "\nAnswer the question using a single word or phrase."
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def annotation(name: int, answers: list[str], kind: str = "other", opening: str = "what is") -> dict:
    told = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, 1)
    ]
    return {
        "question_id": name,
        "image_id": 42,
        "answers": told,
        "answer_type": kind,
        "question_type": opening,
    }


def val(folder: Path, *annotations: dict) -> Path:
    names = [row["question_id"] for row in annotations]
    asked = [{"question_id": name, "image_id": 42, "question": f"What is {name}?"} for name in names]
    write(folder / QUESTIONS, {"data_subtype": "val2014", "questions": asked})
    write(folder / ANNOTATIONS, {"data_subtype": "val2014", "annotations": list(annotations)})
    return folder


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real answers is not here")
@pytest.mark.parametrize("name", ["majority", "human3"])
def test_numbers_of_real_answers_equal_the_official_ones(tmp_path, name):
    result = score_answers(TASK, DATA / f"pred_{name}.json.gz", tmp_path, data=DATA)
    assert result.metrics == json.loads((DATA / "expected.json").read_text())[name]
    assert not result.problems
    assert result.summary()["complete"]
    low, high = result.interval
    assert low < result.metrics["overall"] < high < low + 2

    each = json.loads(gzip.decompress((DATA / f"expected_perquestion_{name}.json.gz").read_bytes()))
    assert {a.question.sample.id: round(100 * a.score.value, 2) for a in result.answered} == each


def test_a_question_is_asked_as_llava_does_and_its_picture_is_cocos(tmp_path):
    (question,) = TASK.open(val(tmp_path, annotation(7, ["red"] * 10)), Problems()).load()
    image, text = question.sample.messages[0].parts
    assert question.sample.id == "7"
    assert text == Text("What is 7?" + SHORT)
    assert image == Image(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg")
    assert question.answer == "red"


def test_pictures_are_found_where_they_are(tmp_path):
    (tmp_path / "coco" / "pics").mkdir(parents=True)
    (tmp_path / "coco" / "pics" / "COCO_val2014_000000000001.jpg").touch()
    (question,) = TASK.open(val(tmp_path, annotation(7, ["red"] * 10)), Problems()).load()
    path = tmp_path / "coco" / "pics" / "COCO_val2014_000000000042.jpg"
    assert question.sample.messages[0].parts[0] == Image(path)


def test_answers_are_normalised_only_where_people_differ(tmp_path):
    folder = val(
        tmp_path, annotation(1, ["yes"] * 10, "yes/no"), annotation(2, ["yes"] * 9 + ["no"], "yes/no")
    )
    rows = [{"question_id": 1, "answer": "Yes"}, {"question_id": 2, "answer": "Yes"}]
    result = score_answers(TASK, write(tmp_path / "a.json", rows), tmp_path / "out", data=folder)
    assert result.metrics == {
        "overall": 50.0,
        "perQuestionType": {"what is": 50.0},
        "perAnswerType": {"yes/no": 50.0},
        "m4c_soft": 1.0,
    }


@pytest.mark.parametrize("form", ["llava", "server", "ours"])
def test_every_form_of_answers_scores_the_same(tmp_path, form):
    folder = val(
        tmp_path, annotation(1, ["2"] * 6 + ["3"] * 4, "number"), annotation(2, ["dog", *"abcdefghi"])
    )
    texts = {1: "Two.", 2: "a dog"}
    if form == "server":
        rows = [{"question_id": name, "answer": text} for name, text in texts.items()]
        path = write(tmp_path / "a.json", rows)
    else:
        rows = [{"question_id": n, "prompt": "?", "text": text, "metadata": {}} for n, text in texts.items()]
        if form == "ours":
            rows = [{"id": str(name), "reply": text, "score": 1} for name, text in texts.items()]
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, reversed(rows))).encode()))
    result = score_answers(TASK, path, tmp_path / "out", data=folder)
    assert result.metrics["perAnswerType"] == {"number": 100.0, "other": 30.0}
    assert result.metrics["overall"] == 65.0
    assert not result.problems


def test_what_is_wrong_with_questions_and_answers_is_named(tmp_path):
    folder = val(tmp_path, *(annotation(name, ["red"] * 10) for name in (1, 2, 3)))
    asked = [{"question_id": n, "image_id": 4, "question": "?"} for n in (1, 2, 4)] + [{"question_id": 5}]
    write(folder / QUESTIONS, {"questions": asked})
    told = [annotation(1, ["red"] * 10), annotation(2, []), annotation(3, ["red"] * 10), annotation(5, ["a"])]
    write(folder / ANNOTATIONS, {"annotations": [*told, 6]})
    rows = [{"question_id": 1, "answer": "red"}, {"question_id": 9, "answer": "red"}, {"answer": "red"}]
    result = score_answers(TASK, write(tmp_path / "a.json", rows), tmp_path / "out", data=folder)
    assert result.metrics["overall"] == 100
    counts = {kind: told["count"] for kind, told in result.problems.told().items()}
    assert counts == {
        "questions without id, words or answers": 2,
        "annotations of no question": 1,
        "unreadable rows": 1,
        "questions without answers to score by": 1,
        "answers to no question": 1,
        "answers without an id": 1,
    }
    assert result.problems.named["annotations of no question"] == [f"{ANNOTATIONS}: row 3: 3"]
    assert not result.summary()["complete"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no v2_OpenEnded_mscoco_val2014_questions\.json or"):
        list(TASK.open(tmp_path, Problems()).load())


def llava(folder: Path, split: str, *names: int) -> Path:
    rows = [
        {
            "question_id": n,
            "image": f"COCO_test2015_{n:012}.jpg",
            "text": f"Why {n}?{SHORT}",
            "category": "default",
        }
        for n in names
    ]
    path = folder / f"llava_vqav2_mscoco_{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_without_answers_there_is_no_score_and_it_says_so(tmp_path):
    folder = llava(tmp_path, "test-dev2015", 5, 6)
    problems = Problems()
    first, _ = TASK.open(folder, problems).load()
    assert first.sample.messages[0].parts == (
        Image(folder / "test2015" / "COCO_test2015_000000000005.jpg"),
        Text("Why 5?" + SHORT),
    )
    assert problems.told() == {"questions without answers to score by": {"count": 2, "named": ["5", "6"]}}

    rows = [{"question_id": 5, "answer": "red"}, {"question_id": 6, "answer": "red"}]
    result = score_answers(TASK, write(tmp_path / "a.json", rows), tmp_path / "out", data=folder)
    assert result.metrics == {}
    assert result.interval is None
    assert not result.summary()["complete"]


def test_official_questions_of_a_test_split_are_asked_the_same(tmp_path):
    asked = {"questions": [{"question_id": 5, "image_id": 5, "question": "Why 5?"}]}
    write(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", asked)
    (official,) = TASK.open(tmp_path, Problems()).load()
    (asked_by_llava,) = TASK.open(llava(tmp_path, "test-dev2015", 5), Problems()).load()
    assert official == asked_by_llava


def test_the_servers_file_answers_every_question_of_test2015(tmp_path):
    folder = llava(llava(tmp_path, "test-dev2015", 6), "test2015", 5, 6)
    problems = Problems()
    text = submission(to_submit(folder, problems), {"6": "A man's hat."}, problems)
    assert text == '[{"question_id": 5, "answer": ""}, {"question_id": 6, "answer": "man \'s hat"}]'
    assert problems.told() == {"questions without an answer": {"count": 1, "named": ["5"]}}


def test_the_servers_file_is_made_of_the_questions_at_hand_where_there_are_no_others(tmp_path):
    folder = llava(tmp_path, "test-dev2015", 6)
    text = submission(to_submit(folder, Problems()), {"6": "été"}, Problems())
    assert json.loads(text) == [{"question_id": 6, "answer": "été"}]
