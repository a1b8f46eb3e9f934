import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.data import scan
from tinymodal.data.scan import scan_json, scan_jsonl

ROWS = st.lists(
    st.dictionaries(st.text(max_size=5), st.text(max_size=40) | st.integers() | st.floats(allow_nan=False))
)


def plain(raw):
    """Lines and rows the slow way."""
    at, found = 0, []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            found.append((number, at, at + len(line)))
        at += len(line) + 1
    return found


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b"\n", b"\r\n", b" ", b"\t", b"\xef\xbb\xbf", b"{}", b"words", b"\xc3\xa4"])),
    st.integers(1, 9),
)
def test_lines_are_found_as_by_splitting_wherever_the_chunks_end(tmp_path_factory, pieces, chunk):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(b"".join(pieces))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK_BYTES", chunk)
        found = scan_jsonl(path)
    expected = plain(b"".join(pieces))
    assert found["spans"].tolist() == [[start, end] for _, start, end in expected]
    lines = found.get("lines", range(1, len(expected) + 1))
    assert list(lines) == [number for number, _, _ in expected]


@settings(deadline=None)
@given(
    ROWS | st.lists(st.integers() | st.text() | st.none()), st.integers(1, 40), st.booleans(), st.booleans()
)
def test_members_of_a_list_are_found_wherever_the_chunks_end(tmp_path_factory, rows, chunk, escape, spread):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    raw = json.dumps(rows, ensure_ascii=escape, indent=1 if spread else None).encode("utf-8", "surrogatepass")
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK_BYTES", chunk)
        spans = scan_json(path)["spans"].tolist()
    assert [json.loads(raw[start:end]) for start, end in spans] == rows


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[\n{"a": 1},\n {"a": ]', "broken JSON at line 3: Expecting value"),
        (b'[\n{"a": 1}\n {"a": 2}]', "broken JSON at line 3: expected , or ]"),
        (b'[{"a": "x\n"}]', "broken JSON at line 1: Invalid control character"),
        (b'[{"a": "x"},\n{"b": "never ends}]', "broken JSON at line 2: Unterminated string"),
        (b'[{"a": "\\q"}]', "broken JSON at line 1: Invalid \\escape"),
        (b"[1, 2\n\n", "broken JSON at line 3: the list has no end"),
        (b"[1, \xc3]", "not UTF-8 at byte 4"),
        (b"[1, \xc3", "not UTF-8 at byte 4"),
    ],
)
def test_an_error_says_the_same_wherever_the_chunks_end(tmp_path, monkeypatch, content, words, chunk):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    monkeypatch.setattr(scan, "CHUNK_BYTES", chunk)
    with pytest.raises(DataError) as error:
        scan_json(path)
    assert str(error.value).startswith(f"{path}: {words}")


def test_a_mistake_at_the_front_is_told_before_the_rest_is_read(tmp_path, monkeypatch):
    """It is not taken for a row that the end of a chunk cuts off."""
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": nothing}, ' + b'{"b": 1}, ' * 1000 + b"\xff]")
    monkeypatch.setattr(scan, "CHUNK_BYTES", 64)
    with pytest.raises(DataError, match="line 1: Expecting value"):
        scan_json(path)
