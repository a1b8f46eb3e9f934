"""The files for test servers hold every question, the answered ones as the servers compare them."""

from __future__ import annotations

import json

import pytest

from tinymodal.core.errors import RecipeError
from tinymodal.eval.names import opened
from tinymodal.eval.score import score_answers
from tinymodal.eval.submission import write_submission
from tinymodal.eval.tasks.table import ON_DISK


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_vqav2s_file_has_all_of_test2015_in_the_servers_words(tmp_path):
    asked = [{"question_id": n, "image": f"{n}.jpg", "text": f"What {n}?"} for n in (1, 2, 3)]
    lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", asked)
    lines(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", asked[:2])
    answers = lines(
        tmp_path / "answers.jsonl",
        [{"question_id": 1, "text": "Two dogs."}, {"question_id": 2, "text": "a cat"}],
    )
    result = score_answers(opened(ON_DISK["vqav2"], tmp_path), answers, tmp_path / "out")
    assert result.metrics == {}
    out = tmp_path / "sent" / "vqav2.json"
    told = write_submission([result], out)
    assert json.loads(out.read_text()) == [
        {"question_id": 1, "answer": "2 dogs"},
        {"question_id": 2, "answer": "cat"},
        {"question_id": 3, "answer": ""},
    ]
    assert "2 replies; left empty: 1 questions without an answer" in told


def test_mmbenchs_file_is_a_table_with_predictions(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    head = ("index", "question", "hint", "A", "B", "answer", "category", "l2-category", "image")
    rows = [
        (7, "Which?", "", "red", "blue", "A", "colour", "looks", ""),
        (8, "Who?", "", "me", "you", "B", "x", "y", ""),
    ]
    text = "\n".join("\t".join(map(str, row)) for row in (head, *rows))
    (tmp_path / "mmbench_dev_20230712.tsv").write_text(text)
    answers = lines(tmp_path / "answers.jsonl", [{"question_id": 7, "text": "A"}])
    result = score_answers(opened(ON_DISK["mmbench"], tmp_path), answers, tmp_path / "out")
    told = write_submission([result], tmp_path / "mmbench.xlsx")
    sheet = openpyxl.load_workbook(tmp_path / "mmbench.xlsx").worksheets[0]
    names, *cells = sheet.iter_rows(values_only=True)
    table = [dict(zip(names, row, strict=True)) for row in cells]
    assert [(row["index"], row["prediction"] or "") for row in table] == [(7, "A"), (8, "")]
    assert "left empty: 1" in told


def test_a_benchmark_without_a_server_is_refused(tmp_path):
    rows = [{"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"}]
    for split in ("adversarial", "popular", "random"):
        lines(tmp_path / f"coco_pope_{split}.json", rows)
    answers = lines(tmp_path / "answers.jsonl", [{"id": "random/1", "reply": "yes"}])
    result = score_answers(opened(ON_DISK["pope"], tmp_path), answers, tmp_path / "out")
    with pytest.raises(RecipeError, match="pope has no test server"):
        write_submission([result], tmp_path / "x.json")
    with pytest.raises(RecipeError, match="names 2"):
        write_submission([result, result], tmp_path / "x.json")
