"""TextVQA: the official number on real answers, the join by picture and question, OCR tokens or none."""

import json
from pathlib import Path

import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Text
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks.textvqa import TASK, TASK_OCR, question_of

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "textvqa"
SHORT = "\nAnswer the question using a single word or phrase."
OCR = "\nReference OCR token: STOP, 5"
TRUTH = [("aa", "what does it say?", ["stop"] * 10), ("aa", "how many?", ["5"] * 5 + ["five"] * 5),
         ("bb", "what does it say?", ["go"] * 2 + ["Go!"] * 2 + ["none"] * 6)]  # fmt: skip


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def val(folder: Path) -> Path:
    rows = [
        {"question_id": 34602 + i, "image_id": image, "question": words, "answers": answers}
        for i, (image, words, answers) in enumerate(TRUTH)
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    return folder


def asked(folder: Path) -> Path:
    rows = [
        {"question_id": i, "image": f"{i}.jpg", "text": words.capitalize() + OCR + SHORT}
        for i, words, _ in TRUTH
    ]
    lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    return folder


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real answers is not here")
@pytest.mark.parametrize("task", [TASK, TASK_OCR], ids=lambda task: task.name)
def test_numbers_of_real_answers_equal_the_official_ones(tmp_path, task):
    result = score_answers(task, DATA / "llava-v1.5-13b.answers.jsonl.gz", tmp_path, data=DATA)
    expected = json.loads((DATA / "expected.json").read_text())["llava-v1.5-13b"]
    del expected["published"]
    assert result.metrics == expected
    assert not result.problems
    low, high = result.interval
    assert low < 61.25 < high < low + 3


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real answers is not here")
def test_llavas_prompts_differ_from_ours_by_the_tokens_alone():
    ours, theirs = (list(task.open(DATA, Problems()).load()) for task in (TASK, TASK_OCR))
    assert len(ours) == len(theirs) == 5000
    for one, other in zip(ours, theirs, strict=True):
        (image, text), (same, longer) = (q.sample.messages[0].parts for q in (one, other))
        first, tokens, last = longer.text.split("\n")
        assert text.text == f"{first}\n{last}"
        assert tokens.startswith("Reference OCR token: ")
        assert image == same


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("OCR tokens: a, b. Question: What\nis IT? Short answer:", "what\nis it?"),
        ("OCR tokens: a, b. What is it?", None),
        ("What is IT?" + OCR + SHORT, "what is it?"),
        ("What is IT?\nReference OCR token: " + SHORT, "what is it?"),
        ("Reference OCR token: a, b\nWhat is IT?" + SHORT, "what is it?"),
        ("What is IT?" + SHORT, "what is it?"),
        ("What is IT?", None),
        ("What is IT?\nand\nthat?" + SHORT, None),
        ("", None),
    ],
)
def test_the_question_is_found_in_each_of_llavas_prompts(prompt, words):
    assert question_of(prompt) == words


def test_the_same_question_is_asked_with_or_without_tokens(tmp_path):
    folder = asked(val(tmp_path))
    alone, helped = (next(iter(task.open(folder, Problems()).load())) for task in (TASK, TASK_OCR))
    assert alone.sample.id == helped.sample.id == "34602"
    assert alone.sample.messages[0].parts == (
        Image(tmp_path / "train_images" / "aa.jpg"),
        Text("What does it say?" + SHORT),
    )
    assert helped.sample.messages[0].parts[1] == Text("What does it say?" + OCR + SHORT)
    assert alone.answer == "stop"


def test_tokens_that_are_missing_are_not_left_out_in_silence(tmp_path):
    with pytest.raises(DataError, match=r"textvqa_ocr: .* holds no llava_textvqa_val_v051_ocr\.jsonl"):
        list(TASK_OCR.open(val(tmp_path), Problems()).load())
    path = asked(tmp_path) / "llava_textvqa_val_v051_ocr.jsonl"
    path.write_text(
        "".join(path.read_text().splitlines(keepends=True)[:2]) + '{"question_id": "aa", "text": "?"}'
    )
    problems = Problems()
    assert len(list(TASK_OCR.open(tmp_path, problems).load())) == 2
    assert problems.told() == {
        "prompts that hold no question": {"count": 1, "named": [f"{path.name}: line 3"]},
        "questions without OCR tokens": {"count": 1, "named": ["TextVQA_0.5.1_val.json: row 3"]},
    }


def test_answers_are_joined_by_picture_and_question_in_any_order(tmp_path):
    said = {
        ("bb", "What does it SAY?"): "Go.",
        ("aa", "How many?"): "the Five",
        ("aa", "What does it say?"): "stop?",
    }
    rows = [
        {"question_id": image, "prompt": words + OCR + SHORT, "text": text, "metadata": {}}
        for (image, words), text in said.items()
    ]
    result = score_answers(TASK, lines(tmp_path / "a.jsonl", rows), tmp_path / "out", data=val(tmp_path))
    assert [a.score.value for a in result.answered] == pytest.approx([1.0, 1.0, 1.0])
    assert result.metrics == {
        "accuracy_pct_official": 100.0,
        "accuracy": pytest.approx(1.0),
        "n": 3,
        # VQA's scorer takes "stop?" for another word than "stop": there people agree.
        "VQAEval_overall_raw": 66.67,
        "VQAEval_overall_evalai_normalised": 100.0,
    }
    assert not result.problems


def test_answers_by_the_official_id_and_ours_are_read(tmp_path):
    rows = [
        {"question_id": 34602, "answer": "stop"},
        {"id": "34603", "reply": "5", "answer": "x", "prompt": "?"},
    ]
    rows += [{"question_id": "34604", "text": "none"}]
    result = score_answers(TASK, lines(tmp_path / "a.jsonl", rows), tmp_path / "out", data=val(tmp_path))
    assert result.metrics["accuracy_pct_official"] == 100
    assert not result.problems


def test_answers_can_be_read_before_the_questions(tmp_path):
    rows = [{"question_id": "bb", "prompt": "What does it say?" + SHORT, "text": "go"}]
    benchmark = TASK.open(val(tmp_path), Problems())
    (told,) = benchmark.answers(lines(tmp_path / "a.jsonl", rows))
    assert (told.id, told.text) == ("34604", "go")


def test_answers_that_fit_no_question_are_named(tmp_path):
    rows = [
        {"question_id": "aa", "prompt": "How many?" + SHORT, "text": "5"},
        {"question_id": "bb", "prompt": "How many?" + SHORT, "text": "5"},
        {"question_id": "aa", "prompt": "no form at all", "text": "5"},
        {"question_id": "aa", "text": "5"},
        {"question_id": "aa", "prompt": "How many?" + SHORT},
    ]
    result = score_answers(TASK, lines(tmp_path / "a.jsonl", rows), tmp_path / "out", data=val(tmp_path))
    assert result.metrics["n"] == 1
    assert {kind: told["named"] for kind, told in result.problems.told().items()} == {
        "answers to no question": ["a.jsonl: line 2: 'bb how many?'"],
        "answers that do not tell their question": ["a.jsonl: line 3", "a.jsonl: line 4"],
        "unreadable answers": [
            "a.jsonl: line 5: none of text, prediction, reply, response, caption, pred, hyp, answer"
        ],
        "questions without an answer": ["34602", "34604"],
    }


def test_questions_that_cannot_be_asked_are_named(tmp_path):
    row = {"question_id": 1, "image_id": "aa", "question": "what?", "answers": ["a"] * 10}
    bad = [{k: v for k, v in row.items() if k != left_out} for left_out in row]
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [*bad, row]})
    problems = Problems()
    assert [q.sample.id for q in TASK.open(tmp_path, problems).load()] == ["1"]
    assert problems.counts == {
        "questions without id, picture or words": 3,
        "questions without answers to score by": 1,
    }


def test_parquet_of_the_hub_is_the_same_task(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [
        {"image_id": image, "question_id": 34602 + i, "question": words, "answers": answers,
         "image": {"bytes": b"jpeg", "path": None}}
        for i, (image, words, answers) in enumerate(TRUTH)
    ]  # fmt: skip
    (tmp_path / "hub" / "data").mkdir(parents=True)
    path = tmp_path / "hub" / "data" / "validation-00000-of-00001-ab.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    ours = list(TASK.open(val(tmp_path), Problems()).load())
    theirs = list(TASK.open(tmp_path / "hub", Problems()).load())
    assert [q.meta for q in ours] == [q.meta for q in theirs]
    assert theirs[0].sample.messages[0].parts[0] == Image(b"jpeg")
