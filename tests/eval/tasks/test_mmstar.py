"""MMStar: the official letter rule and names, from parquet, tsv, and tables of results."""

import base64
import json

import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image
from tinymodal.eval.benchmark import Problems
from tinymodal.eval.given import NULL, UNANSWERED
from tinymodal.eval.rules.choices import DIRECTLY, write_xlsx
from tinymodal.eval.score import score_answers
from tinymodal.eval.tasks import mmstar

PICTURE = base64.b64encode(b"a picture that is long enough to be one").decode()
ROWS = [
    (0, "Which colour?\nOptions: A: red, B: blue, C: green, D: none", "A", "math", "geometry"),
    (1, "How many?\nOptions: A: 1, B: 2, C: 3, D: 4", "B", "coarse perception", "image emotion"),
    (2, "Who?\nOptions: A: he, B: she, C: it, D: we", "C", "coarse perception", "image emotion"),
    (3, "When?\nOptions: A: 1, B: 2, C: 3, D: 4", "D", "coarse perception", "image style & quality"),
]
HEAD = ("index", "question", "answer", "category", "l2_category", "image")


@pytest.fixture
def folder(tmp_path):
    there = tmp_path / "mmstar"
    there.mkdir()
    lines = ["\t".join(HEAD)]
    for row in ROWS:
        lines.append("\t".join([str(row[0]), f'"{row[1]}"', *row[2:], PICTURE]))
    (there / "MMStar.tsv").write_text("\n".join(lines) + "\n")
    return there


def replies(path, *texts):
    rows = [{"id": str(n), "reply": text} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_numbers_have_the_official_names_and_are_shares(folder, tmp_path):
    answers = replies(tmp_path / "a.jsonl", "A. red", "(b)", "It is C", "The answer is D")
    result = score_answers(mmstar.TASK, answers, tmp_path / "out", data=folder.parent)
    assert not result.problems
    assert result.metrics == {
        "final score": 0.75,
        "coarse perception": 2 / 3,
        "coarse perception(image emotion)": 0.5,
        "coarse perception(image style & quality)": 1.0,
        "math": 1.0,
        "math(geometry)": 1.0,
    }
    assert list(result.metrics)[:2] == ["final score", "coarse perception"]
    low, high = result.interval
    assert 0 <= low < 0.75 < high <= 1


def test_the_official_table_of_results_is_read_and_an_empty_cell_is_wrong(folder, tmp_path):
    predictions = ("A", None, "c", "d. 4")
    rows = [
        dict(zip(HEAD, row, strict=False), prediction=p) for row, p in zip(ROWS, predictions, strict=True)
    ]
    write_xlsx(tmp_path / "model_MMStar.xlsx", (*HEAD[:5], "prediction"), rows)
    result = score_answers(mmstar.TASK, tmp_path / "model_MMStar.xlsx", tmp_path / "out", data=folder.parent)
    assert result.problems.counts == {NULL: 1}
    assert [row.score.value for row in result.answered] == [1.0, 0.0, 1.0, 1.0]


def test_a_missing_answer_is_wrong_and_the_score_incomplete(folder, tmp_path):
    result = score_answers(
        mmstar.TASK, replies(tmp_path / "a.jsonl", "A", "B"), tmp_path / "out", data=folder.parent
    )
    assert result.metrics["final score"] == 0.5
    assert result.problems.counts == {"questions without an answer": 2}
    assert [row.score.parsed for row in result.answered] == ["A", "B", UNANSWERED, UNANSWERED]
    assert not result.summary()["complete"]


def test_the_question_is_followed_by_llavas_words(folder):
    question = next(iter(mmstar.TASK.open(folder, Problems()).load()))
    picture, text = question.sample.messages[0].parts
    assert text.text == ROWS[0][1] + DIRECTLY
    assert picture == Image(base64.b64decode(PICTURE))


def test_options_in_columns_become_lines(tmp_path):
    (tmp_path / "MMStar.tsv").write_text(
        "index\tquestion\tA\tB\tC\tanswer\tcategory\tl2_category\n5\tWhich?\tred\tblue\t\tB\tmath\tgeometry\n"
    )
    [question] = mmstar.TASK.open(tmp_path, Problems()).load()
    picture, text = question.sample.messages[0].parts
    assert text.text == "Which?\nA. red\nB. blue" + DIRECTLY
    assert picture == Image(tmp_path / "images" / "5.jpg")


def test_the_parquet_of_the_hub_is_read(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    image = {"bytes": b"a picture", "path": "0.jpg"}
    rows = [dict(zip(HEAD, (*row, image), strict=True)) for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mmstar.parquet")
    questions = list(mmstar.TASK.open(tmp_path, Problems()).load())
    assert [(q.sample.id, q.answer) for q in questions] == [("0", "A"), ("1", "B"), ("2", "C"), ("3", "D")]
    assert questions[0].sample.messages[0].parts[0] == Image(b"a picture")


def test_rows_without_id_answer_or_picture_are_named(folder, tmp_path):
    with (folder / "MMStar.tsv").open("a") as file:
        file.write("\tq\tA\tmath\tgeometry\t\n7\tq\tE\tmath\tgeometry\t\n8\tq\t\tmath\tgeometry\t\n")
        file.write("9\tq\tA\tmath\tgeometry\tno base64!\n3\tq\tA\tmath\tgeometry\t\n")
    result = score_answers(
        mmstar.TASK, replies(tmp_path / "a.jsonl", *"ABCDABCDAA"), tmp_path / "out", data=folder.parent
    )
    assert result.problems.counts == {
        "questions without id or answer": 3,
        "unreadable pictures": 1,
        "questions with the id of another": 1,
        "answers to no question": 5,
    }
    assert result.metrics["final score"] == 1.0


def test_missing_files_are_told_with_their_origin(tmp_path):
    with pytest.raises(DataError, match="Lin-Chen/MMStar"):
        list(mmstar.TASK.open(tmp_path, Problems()).load())
