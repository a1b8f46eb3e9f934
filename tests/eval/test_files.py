"""Files of benchmarks are found and read as their authors publish them, packed or not."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest

from tinymodal.core.errors import DataError
from tinymodal.eval.benchmark import File, OnDisk, Problems
from tinymodal.eval.files import (
    files_of,
    find_file,
    folder_of,
    need,
    parts_of,
    read_json,
    read_rows,
    read_text,
    rows_by_id,
    rows_of,
    text_of,
)

ROWS = [{"id": 1, "text": "a\tb\u2028c"}, {"id": 2, "text": 'ü, "q"'}]


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rows(path, problems=None):
    return [row for _, row in read_rows(path, Problems() if problems is None else problems)]


def test_the_file_nearest_to_the_top_is_found_packed_or_not(tmp_path):
    deep = put(tmp_path / "a" / "b" / "q.json", "1")
    assert find_file(tmp_path, "q.json") == deep
    near = tmp_path / "z" / "q.json.gz"
    near.parent.mkdir()
    near.write_bytes(gzip.compress(b"2"))
    assert find_file(tmp_path, "q.json") == near
    assert find_file(tmp_path, "b/q.json") == deep
    assert find_file(tmp_path, "other.json", "q.j*") == deep or find_file(tmp_path, "q.j*") == near
    assert find_file(tmp_path, "none.json") is None


def test_all_parts_of_a_file_are_found_and_missing_ones_named(tmp_path):
    for name in (
        "test-00000-of-00003-ab.parquet",
        "test-00001-of-00003-cd.parquet",
        "dev-00000-of-00001.parquet",
    ):
        (tmp_path / name).touch()
    problems = Problems()
    parts = parts_of(tmp_path / "test-00000-of-00003-ab.parquet", problems)
    assert [part.name[:10] for part in parts] == ["test-00000", "test-00001"]
    assert problems.counts == {"parts of files that are missing": 1}
    assert parts_of(tmp_path / "mmstar.parquet", problems) == [tmp_path / "mmstar.parquet"]


def test_all_files_of_a_name_are_found_and_missing_parts_of_any_named_once(tmp_path):
    names = ("art/v-00001-of-00003.parquet", "art/v-00002-of-00003.parquet", "law/v-00000-of-00001.parquet")
    for name in names:
        put(tmp_path / name, "")
    problems = Problems()
    assert files_of(tmp_path, "v-*.parquet", problems) == [tmp_path / name for name in names]
    assert problems.told()["parts of files that are missing"] == {
        "count": 1,
        "named": [f"{tmp_path / names[0]}: found 2 of 3"],
    }
    assert files_of(tmp_path, "w-*.parquet", problems) == []


def test_rows_of_all_parts_of_a_parquet_are_read_and_a_missing_part_is_told(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for part in (0, 1):
        rows = pa.table({"n": [2 * part, 2 * part + 1]})
        pyarrow.parquet.write_table(rows, tmp_path / f"test-0000{part}-of-00003-ab.parquet")
    problems = Problems()
    found = rows_of(tmp_path / "test-00000-of-00003-ab.parquet", "data", problems)
    assert [row["n"] for _, row in found] == [0, 1, 2, 3]
    assert problems.told()["parts of files that are missing"]["named"] == [
        f"{tmp_path}/test-00000-of-00003-ab.parquet: found 2 of 3"
    ]


def test_a_file_without_a_list_of_rows_is_refused_and_an_unreadable_row_is_told(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text('{"data": 3}')
    with pytest.raises(DataError, match=r"a list of rows, or an object with a list called 'questions'"):
        list(rows_of(path, "questions", Problems()))
    path.write_text('{"questions": [3, {"a": 1}]}')
    problems = Problems()
    found = rows_of(path, "questions", problems)
    assert list(found) == [("questions.json: row 2", {"a": 1})]
    assert problems.told() == {"unreadable rows": {"count": 1, "named": ["questions.json: row 1"]}}


def test_rows_by_id_are_those_of_an_object_or_of_all_parts_of_a_table(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    problems = Problems()
    told = put(tmp_path / "q.json", '{"a": {"n": 1}, "b": 2}')
    assert list(rows_by_id(told, "id", problems)) == [("q.json: 'a'", "a", {"n": 1})]
    assert problems.told()["unreadable rows"]["named"] == ["q.json: 'b'"]
    for part in (0, 1):
        pq.write_table(pa.table({"id": [part + 7]}), tmp_path / f"q-0000{part}-of-00003.parquet")
    found = rows_by_id(tmp_path / "q-00000-of-00003.parquet", "id", problems)
    assert [(name, row) for _, name, row in found] == [("7", {"id": 7}), ("8", {"id": 8})]
    assert problems.counts["parts of files that are missing"] == 1


def test_linked_folders_are_looked_through_and_a_circle_of_them_ends(tmp_path):
    there = put(tmp_path / "elsewhere" / "q.json", "1")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val2014").symlink_to(there.parent)
    (there.parent / "up").symlink_to(tmp_path / "data")
    assert find_file(tmp_path / "data", "q.json") == tmp_path / "data" / "val2014" / "q.json"
    assert find_file(tmp_path / "data", "none.json") is None


def test_a_name_with_signs_of_patterns_is_found_as_it_is(tmp_path):
    path = put(tmp_path / "a+(1)" / "q.json.gz", "")
    assert find_file(tmp_path, "a+(1)/q.json") == path
    assert find_file(tmp_path, "a+1/q.json") is None


def test_an_archive_is_found_by_the_name_of_the_file_in_it(tmp_path):
    path = tmp_path / "questions.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("questions.json")
        info.size = 7
        archive.addfile(info, io.BytesIO(b'{"a":1}'))
    assert find_file(tmp_path, "questions.json") == path
    assert read_json(path) == {"a": 1}


def test_an_archive_of_two_files_is_refused(tmp_path):
    path = tmp_path / "two.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("a", "b"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="holds 2 files"):
        read_text(path)


def test_what_is_missing_is_told_with_where_it_is_from(tmp_path):
    with pytest.raises(
        DataError, match=r"pope: .* holds no labels\.json \(labels\); it is from https://here"
    ):
        need(tmp_path, File(("labels.json",), "labels", "https://here"), "pope")


def test_a_benchmark_lies_in_a_folder_of_its_name_or_in_the_one_that_is_named(tmp_path):
    task = OnDisk(name="mmvet", title="", source="", files=(), open=lambda *_: None, folders=("mm-vet",))
    assert folder_of(task, tmp_path) == tmp_path
    (tmp_path / "mm-vet").mkdir()
    assert folder_of(task, tmp_path) == tmp_path / "mm-vet"
    (tmp_path / "mmvet").mkdir()
    assert folder_of(task, tmp_path) == tmp_path / "mmvet"


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl-as-json", "tsv", "csv", "xlsx", "parquet"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, kind, packed):
    name = {"jsonl-as-json": "rows.json"}.get(kind, f"rows.{kind}")
    path, words = tmp_path / name, [{key: str(value) for key, value in row.items()} for row in ROWS]
    if kind in ("xlsx", "parquet") and packed:
        pytest.skip("is packed as it is")
    if kind == "json":
        put(path, json.dumps(words))
    elif kind.startswith("jsonl"):
        put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in words))
    elif kind == "xlsx":
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        book.active.append(["id", "text"])
        for row in words:
            book.active.append(list(row.values()))
        book.save(path)
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")

        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(words), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(words)
    if packed:
        packed_path = path.with_name(path.name + ".gz")
        packed_path.write_bytes(gzip.compress(path.read_bytes()))
        path = packed_path
    assert rows(path) == words


def test_a_broken_row_is_named_and_the_others_are_read(tmp_path):
    problems = Problems()
    path = put(tmp_path / "a.jsonl", '{"id": 1}\n{"id": 2\n\n[3]\n{"id": 4}\n')
    assert rows(path, problems) == [{"id": 1}, {"id": 4}]
    assert problems.told() == {
        "unreadable rows": {"count": 2, "named": ["a.jsonl: line 2", "a.jsonl: line 4"]}
    }


# Named: a packed file holds the time at which it was packed, and the name of a test may not.
@pytest.mark.parametrize(
    "content", [b"\x1f\x8b broken", gzip.compress(b"whole")[:-6], b""], ids=["broken", "cut", "empty"]
)
def test_a_broken_archive_is_named(tmp_path, content):
    path = tmp_path / "a.json.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json\.gz"):
        read_json(path)


def test_text_that_is_no_unicode_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read"):
        rows(path)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected \.jsonl, \.json"):
        rows(put(tmp_path / "a.yaml", "a: 1"))


def test_an_empty_cell_is_empty_text():
    assert [text_of(cell) for cell in (None, float("nan"), "", 3, "x")] == ["", "", "", "3", "x"]


def test_a_broken_parquet_is_refused_by_name(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read as parquet"):
        rows(put(tmp_path / "broken.parquet", "PAR1 no more"))


def test_a_short_row_of_a_workbook_has_all_columns(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (("index", "prediction"), (1,), (2, "B")):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    assert rows(tmp_path / "t.xlsx") == [
        {"index": 1, "prediction": None},
        {"index": 2, "prediction": "B"},
    ]


@pytest.mark.parametrize("name", ["t.xlsx", "t.xlsx.gz"])
def test_a_workbook_that_is_none_is_refused_and_a_packed_one_read(tmp_path, name):
    openpyxl = pytest.importorskip("openpyxl")
    path = tmp_path / name
    broken = b"index,prediction"
    path.write_bytes(gzip.compress(broken) if name.endswith(".gz") else broken)
    with pytest.raises(DataError, match="cannot be read as xlsx"):
        rows(path)
    book, content = openpyxl.Workbook(), io.BytesIO()
    book.active.append(("index",))
    book.active.append((7,))
    book.save(content)
    whole = content.getvalue()
    path.write_bytes(gzip.compress(whole) if name.endswith(".gz") else whole)
    assert rows(path) == [{"index": 7}]


def test_a_packed_file_with_a_broken_block_is_refused(tmp_path):
    content = bytearray(gzip.compress(b"[1, 2, 3]" * 100))
    content[10] = 0xFF
    path = tmp_path / "a.json.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_json(path)


@pytest.mark.parametrize(
    "line",
    ["5", "null", "9" * 5000, "[" * 100_000, '{"a": 1} {"b": 2}'],
    ids=["number", "null", "digits", "lists", "two"],
)
def test_a_line_that_is_no_row_is_noted_and_the_others_are_read(tmp_path, line):
    problems = Problems()
    path = put(tmp_path / "a.jsonl", f'{{"a": 0}}\n{line}\n{{"a": 2}}')
    assert rows(path, problems) == [{"a": 0}, {"a": 2}]
    assert problems.told()["unreadable rows"]["named"] == ["a.jsonl: line 2"]
    if line != '{"a": 1} {"b": 2}':
        whole = Problems()
        assert rows(put(tmp_path / "b.json", line), whole) == []
        assert whole.counts["unreadable rows"] == 1


def test_a_cell_beyond_the_last_column_is_noted(tmp_path):
    problems = Problems()
    assert rows(put(tmp_path / "t.tsv", "index\tanswer\n1\tA\n2\tB\tmore\n"), problems) == [
        {"index": "1", "answer": "A"},
        {"index": "2", "answer": "B"},
    ]
    assert problems.told()["rows with more cells than columns"]["named"] == ["t.tsv: row 2"]
