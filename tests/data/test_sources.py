import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.types import Text
from tinymodal.data.sources import WINDOW, open_source


def row(n, words="A"):
    return {"image": None, "question": f"Q{n}", "answer": words}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def questions(rows):
    return [rows.sample(n).messages[0].parts[-1].text for n in range(len(rows))]


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.text(max_size=12) | st.integers() | st.none(), max_size=3),
        min_size=1,
    ),
    st.sampled_from([None, 2]),
    st.booleans(),
    st.booleans(),
)
def test_json_rows_read_one_by_one_equal_the_whole_file(tmp_path_factory, rows, indent, escape, bom):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    written = json.dumps(rows, indent=indent, ensure_ascii=escape)
    path.write_text(written, encoding="utf-8-sig" if bom else "utf-8")

    source = open_source(path, "vqa")

    assert [source.row(n) for n in range(len(source))] == rows


def test_jsonl_rows_are_numbered_by_line_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\n\n  \r\n{"n": "\xc3\xa4"}\r\n{"n": 3}')  # no newline at the end
    source = open_source(path, "vqa")

    assert [source.row(n) for n in range(len(source))] == [{"n": 1}, {"n": "ä"}, {"n": 3}]
    assert [source.row_id(n) for n in range(3)] == [f"{path}:1", f"{path}:4", f"{path}:5"]


def test_a_pattern_joins_files_in_the_order_of_their_names(tmp_path):
    for name, numbers in {"b.jsonl": [3, 4], "a.jsonl": [0, 1, 2], "c.txt": [9]}.items():
        write_lines(tmp_path / name, map(row, numbers))
    source = open_source(str(tmp_path / "*.jsonl"), "vqa")

    assert len(source) == 5
    assert questions(source) == ["Q0", "Q1", "Q2", "Q3", "Q4"]
    assert source.row_id(3) == f"{tmp_path / 'b.jsonl'}:1"


def test_only_the_places_of_rows_are_kept_and_a_source_can_be_sent_to_a_worker(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [row(n, "long " * 1000) for n in range(50)])
    source = open_source(path, "vqa")
    sent = pickle.dumps(source)

    assert len(sent) < 2000 < path.stat().st_size
    assert questions(pickle.loads(sent)) == questions(source)


def test_a_broken_line_is_told_when_it_is_read_and_the_others_still_are(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [row(0), row(1)])
    with path.open("ab") as file:
        file.write(b'{"question": "Q2", \n"just words"\n{"question": "\xff"}\n')
    source = open_source(path, "vqa")

    assert source.sample(1).messages[0].parts == (Text("Q1"),)
    for n, words in {2: "not JSON", 3: "the row is str ('just words')", 4: "not JSON"}.items():
        with pytest.raises(DataError) as error:
            source.sample(n)
        assert str(error.value).startswith(f"{path}:{n + 1}: {words}")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"a": 1}, {"a": 2}\n', "broken JSON at line 2: the list has no end"),
        (b'[{"a": 1},\n {"a": ]', "broken JSON at line 2: Expecting value"),
        (b'[{"a": 1} {"a": 2}]', "broken JSON at line 1: expected , or ]"),
        (b'[{"a": 1}] more', "broken JSON at line 1: expected , or ]"),
        (b'[{"a": 1},]', "broken JSON at line 1"),
        (
            b'{"a": 1}\n{"a": 2}\n',
            "begins with an object; expected a list of rows, [...]. If it has a row on each line",
        ),
        (b"", "begins with ''"),
        (b"[]", "no rows; expected at least one"),
        (b"[\xff]", "not UTF-8 at byte 1"),
        (b"[" * 100_000, "broken JSON"),
    ],
)
def test_a_broken_list_is_told_when_it_is_opened(tmp_path, content, words):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_source(path, "vqa")
    assert str(error.value).startswith(f"{path}: {words}")
    assert "\n" not in str(error.value)


def test_a_path_that_leads_to_no_data_says_what_is_there(tmp_path):
    write_lines(tmp_path / "chats.jsonl", [row(0)])
    (tmp_path / "notes.txt").write_text("x")
    for path, words in {
        "chat.jsonl": "no such file .* holds chats.jsonl",
        "none/*.jsonl": "no such file .*no data file in",
        ".": "a folder; expected files",
        "notes.txt": "a file of kind '.txt'; expected .json, .jsonl",
    }.items():
        with pytest.raises(DataError, match=words):
            open_source(tmp_path / path, "vqa")
    with pytest.raises(DataError, match="no such folder of pictures"):
        open_source(tmp_path / "chats.jsonl", "vqa", tmp_path / "pictures")
    with pytest.raises(RecipeError, match="vqq"):
        open_source(tmp_path / "chats.jsonl", "vqq")


def test_a_file_that_vanishes_is_told_by_row(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [row(0)])
    source = open_source(path, "vqa")
    path.unlink()
    with pytest.raises(DataError, match=r"rows.jsonl:1: cannot be read"):
        source.sample(0)


def test_your_own_converter_is_used_and_what_it_raises_names_the_row(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"q": "Q", "a": "A"}, {"q": "Q"}, {"q": "none", "a": "A"}])
    (tmp_path / "my_rows.py").write_text(
        "from tinymodal.core.types import Message, Sample, Text\n"
        "def convert(row, *, row_id, images):\n"
        "    if row['q'] == 'none':\n"
        "        return None\n"
        "    turns = Message('user', (Text(row['q']),)), Message('assistant', (Text(row['a']),))\n"
        "    return Sample(turns, id=row_id)\n"
    )
    source = open_source(path, f"{tmp_path / 'my_rows.py'}:convert")

    assert source.sample(0).messages[1].parts == (Text("A"),)
    with pytest.raises(DataError, match=r"rows.jsonl:2: convert raised KeyError: 'a'"):
        source.sample(1)
    with pytest.raises(DataError, match=r"rows.jsonl:3: convert raised TypeError: it returned NoneType"):
        source.sample(2)


def test_parquet_rows_equal_what_was_written_and_tell_their_groups(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image": {"bytes": bytes([n]), "path": None}, "caption": f"number {n}", "n": n} for n in range(25)
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    source = open_source(path, "caption")

    assert len(source) == 25
    assert source.blocks == (2,) * 12 + (1,)
    order = [24, 0, 13, 12, 1, *range(25)]
    assert [source.row(n) for n in order] == [rows[n] for n in order]
    assert source.sample(7).messages[0].parts[0].source == b"\x07"
    assert source.row_id(7) == f"{path}:8"
    assert len(source.decoded) == WINDOW
    sent = pickle.loads(pickle.dumps(source))
    assert len(sent.decoded) == 0
    assert sent.row(7) == rows[7]
    assert len(sent.decoded) == 1


def test_all_files_of_a_source_share_one_window_of_decoded_groups(tmp_path):
    """A thousand shards do not keep eight groups each."""
    pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    for name in "abc":
        rows = [{"image": None, "question": f"{name}{n}", "answer": "A"} for n in range(2 * WINDOW)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", row_group_size=2)
    write_lines(tmp_path / "d.jsonl", map(row, range(3)))
    tables, mixed = (open_source(tmp_path / pattern, "vqa") for pattern in ("*.parquet", "*.[pj]*"))
    for source in (tables, mixed):
        expected = [f"{name}{n}" for name in "abc" for n in range(2 * WINDOW)]
        assert questions(source)[: len(expected)] == expected
        assert len(source.decoded) == WINDOW
    # The last group read is kept: the one asked for longest ago goes first.
    assert tables.row(6 * WINDOW - 1)["question"] == f"c{2 * WINDOW - 1}"
    assert len(tables.decoded) == WINDOW


def test_a_conversation_in_parquet_is_read_although_its_parts_are_filled_with_nulls(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    table = pa.Table.from_pylist([{"messages": turns, "images": [{"bytes": b"1", "path": None}]}])
    pq.write_table(table, tmp_path / "chats.parquet")

    sample = open_source(tmp_path / "chats.parquet", "messages").sample(0)

    assert [p.source if hasattr(p, "source") else p.text for p in sample.messages[0].parts] == [b"1", "Q"]


def test_a_broken_parquet_file_is_told_in_one_line(tmp_path):
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    for content in (b"", b"PAR1 and nothing else"):
        (tmp_path / "rows.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"rows.parquet: not a parquet file") as error:
            open_source(tmp_path / "rows.parquet", "vqa")
        assert "\n" not in str(error.value)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'tinymodal\[data\]'"):
        open_source(tmp_path / "rows.parquet", "vqa")
