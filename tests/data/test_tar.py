import io
import json
import pickle
import tarfile

import pytest

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Image, Text
from tinymodal.data import index
from tinymodal.data.sources import open_source
from tinymodal.data.tar import BLOCK_BYTES, scan_tar


@pytest.fixture(autouse=True)
def everything_is_kept(monkeypatch):
    monkeypatch.setattr(index, "KEEP_FROM_BYTES", 0)


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    """Members by name, one behind the other, as any tool writes them; where each header lies."""
    places = {}
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
                continue
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            info.size = len(raw)
            places[name] = tar.offset
            tar.addfile(info, io.BytesIO(raw))
    return places


def captions(count):
    return [
        member
        for n in range(count)
        for member in ((f"{n:03}.jpg", b"picture %d" % n), (f"{n:03}.json", {"caption": f"number {n}"}))
    ]


def spoiled(path, at, raw):
    content = bytearray(path.read_bytes())
    content[at : at + len(raw)] = raw
    path.write_bytes(content)


def readable(source):
    """Captions of the rows that can be read, and what is said of the others."""
    good, bad = [], []
    for n in range(len(source)):
        try:
            good.append(source.sample(n).messages[1].parts[0].text)
        except DataError as error:
            bad.append(str(error))
    return good, bad


def test_sounds_beside_a_row_are_its_own_as_pictures_are(tmp_path):
    content = [{"type": "audio"}, {"type": "image"}, {"type": "audio", "audio": "b.flac"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    members = [
        ("0.json", {"text": "rain"}), ("0.flac", b"sound 0"),
        ("1.json", {"audio": "wav", "text": "snow"}), ("1.wav", b"sound 1"), ("1.mp3", b"another"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    first, second = (open_source(tmp_path / "a.tar", "asr").sample(n) for n in (0, 1))
    assert first.messages[0].parts[0] == Audio(b"sound 0")
    assert second.messages[0].parts[0] == Audio(b"sound 1")

    both = [("2.json", row), ("2.a.wav", b"a"), ("2.jpg", b"picture"), ("2.b.flac", b"b")]
    write_tar(tmp_path / "b.tar", both)
    with pytest.raises(DataError, match="2 sounds in audios but 1 audio part"):
        open_source(tmp_path / "b.tar", "messages").sample(0)
    content[2] = {"type": "audio"}
    write_tar(tmp_path / "b.tar", both)
    parts = open_source(tmp_path / "b.tar", "messages").sample(0).messages[0].parts
    assert parts == (Audio(b"a"), Image(b"picture"), Audio(b"b"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_one_name_are_a_sample_read_in_any_order(tmp_path, form):
    members = [("./", None), *captions(5), ("README", b"no extension"), ("__meta__.json", {})]
    write_tar(tmp_path / "a.tar", members, form)
    source = open_source(tmp_path / "a.tar", "caption")

    assert len(source) == 5
    for n in (4, 0, 2, 2, 1, 3):
        sample = source.sample(n)
        assert sample.id == source.row_id(n) == f"{tmp_path / 'a.tar'}:{n:03}"
        assert sample.messages[0].parts == (Image(b"picture %d" % n),)
        assert sample.messages[1].parts == (Text(f"number {n}"),)
    assert pickle.loads(pickle.dumps(source)).sample(3) == source.sample(3)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_a_header_holds_and_letters_of_any_script_are_read(tmp_path, form):
    key = "folder/" * 20 + "名前" * 20
    write_tar(tmp_path / "a.tar", [(f"{key}.png", b"1"), (f"{key}.json", {"caption": "c"})], form)
    source = open_source(tmp_path / "a.tar", "caption")
    assert source.row_id(0) == f"{tmp_path / 'a.tar'}:{key}"
    assert source.sample(0).messages[0].parts[0].source == b"1"


def test_a_sample_of_words_beside_a_picture_needs_no_json(tmp_path):
    write_tar(tmp_path / "a.tar", [("x/1.jpg", b"1"), ("x/1.txt", "ein Bär\n".encode()), ("x/1.cls", b"3")])
    sample = open_source(tmp_path / "a.tar", "caption").sample(0)
    assert [m.parts for m in sample.messages] == [(Image(b"1"),), (Text("ein Bär"),)]


@pytest.mark.parametrize("named", ["7.left.png", "left.png", ".LEFT.png", "elsewhere/7.left.png"])
def test_a_picture_is_named_by_its_file_or_its_extension(tmp_path, named):
    members = [("d/7.left.png", b"left"), ("d/7.right.png", b"right")]
    row = {"image": named.lower(), "question": "Q", "answer": "A"}
    write_tar(tmp_path / "a.tar", [*members, ("d/7.json", row)])
    assert next(open_source(tmp_path / "a.tar", "vqa").sample(0).media()).source == b"left"


def test_pictures_that_no_row_names_are_given_to_it_in_order(tmp_path):
    turns = [{"from": "human", "value": "<image> and <image>"}, {"from": "gpt", "value": "A"}]
    write_tar(
        tmp_path / "a.tar", [("1.0.png", b"a"), ("1.1.png", b"b"), ("1.json", {"conversations": turns})]
    )
    content = [{"type": "image"}, {"type": "text", "text": "Q"}]
    chat = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]}
    write_tar(tmp_path / "b.tar", [("1.png", b"a"), ("1.json", chat), ("2.json", {"messages": []})])

    assert [m.source for m in open_source(tmp_path / "a.tar", "llava").sample(0).media()] == [b"a", b"b"]
    assert [m.source for m in open_source(tmp_path / "b.tar", "messages").sample(0).media()] == [b"a"]


def test_a_picture_may_still_lie_in_the_folder_of_pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "p.jpg").write_bytes(b"p")
    write_tar(tmp_path / "a.tar", [("1.json", {"image": "p.jpg", "caption": "c"})])
    source = open_source(tmp_path / "a.tar", "caption", tmp_path / "pictures")
    assert source.sample(0).messages[0].parts == (Image(tmp_path / "pictures" / "p.jpg"),)
    with pytest.raises(DataError, match=r"a.tar:1: picture 'p.jpg' not found; tried the members .*1.json"):
        open_source(tmp_path / "a.tar", "caption").sample(0)


def test_shards_and_other_files_are_one_source(tmp_path):
    for name in ("b.tar", "a.tar"):
        write_tar(tmp_path / name, [(f"{name[0]}.json", {"image": None, "question": name, "answer": "A"})])
    row = {"image": None, "question": "c", "answer": "A"}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    source = open_source([tmp_path / "*.tar", tmp_path / "c.jsonl"], "vqa")
    assert [source.row(n)["question"] for n in range(3)] == ["a.tar", "b.tar", "c"]
    with pytest.raises(DataError, match=r"a.tar: named twice"):
        open_source([tmp_path / "*.tar", tmp_path / "a.*"], "vqa")
    with pytest.raises(DataError, match=r"a folder; expected files. Name them, for example .*\*.tar"):
        open_source(tmp_path, "vqa")


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", range(0, 12 * 2 * BLOCK_BYTES, 300))
def test_of_a_cut_shard_every_sample_is_read_or_named_and_none_is_half(tmp_path, left):
    path = tmp_path / "a.tar"
    write_tar(path, captions(6))
    path.write_bytes(path.read_bytes()[:left])
    try:
        good, bad = readable(open_source(path, "caption"))
    except DataError as error:  # nothing of it can be read
        good, bad = [], [str(error)]
    assert good == [f"number {n}" for n in range(len(good))]
    assert len(good) >= left // (4 * BLOCK_BYTES) - 1
    (told,) = bad
    assert "the shard is damaged at byte" in told
    assert "cut off" in told


def test_a_header_without_its_checksum_costs_its_sample_and_its_neighbour(tmp_path):
    path = tmp_path / "a.tar"
    places = write_tar(path, captions(6))
    spoiled(path, places["003.jpg"] + 5, b"X")
    source = open_source(path, "caption")
    good, bad = readable(source)

    # Whether 002 had another member, and 003.json another picture, nobody can know any more.
    assert good == [f"number {n}" for n in (0, 1, 4, 5)]
    assert [told.split(": ")[0] for told in bad] == [f"{path}:002", f"{path}:003"]
    assert f"damaged at byte {places['003.jpg']} (after 002.json): a header there does not have its" in bad[0]
    assert "the bytes before it are lost" in bad[1]


def test_lost_pages_in_the_middle_are_not_taken_for_the_end(tmp_path):
    path = tmp_path / "a.tar"
    places = write_tar(path, captions(6))
    spoiled(path, places["002.jpg"], bytes(4 * BLOCK_BYTES))
    good, bad = readable(open_source(path, "caption"))
    assert good == [f"number {n}" for n in (0, 4, 5)]
    assert f"damaged at byte {places['002.jpg']} (after 001.json): empty blocks" in bad[0]


def test_a_json_member_that_is_none_is_told_by_byte_and_key(tmp_path):
    path = tmp_path / "a.tar"
    members = [("1.json", b'{"caption": '), ("2.json", [1]), ("3.txt", b"\xff"), ("3.jpg", b"1")]
    places = write_tar(path, members)
    _, bad = readable(open_source(path, "caption"))
    assert bad[0].startswith(f"{path}:1: its json member at byte {places['1.json'] + 512} is not JSON")
    assert bad[1].startswith(f"{path}:2: the row is list")
    assert bad[2].startswith(f"{path}:3: its txt member at byte {places['3.txt'] + 512} is not UTF-8")
    assert all("\n" not in told for told in bad)


def test_two_members_of_one_name_are_refused(tmp_path):
    places = write_tar(tmp_path / "a.tar", [("1.json", {"a": 1}), ("1.json", {"a": 2}), ("2.json", {"a": 3})])
    source = open_source(tmp_path / "a.tar", "caption")
    with pytest.raises(DataError, match=f"a.tar:1: .* byte {places['1.json']} .*two members 1.json"):
        source.row(0)
    assert source.row(1) == {"a": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a.tar:byte 0: the shard is damaged at byte 0: the file ends"),
        (b"words " * 1000, "not a tar file"),
        (b"\x1f\x8b" + b"packed " * 1000, "not a tar file but a compressed one: unpack it"),
        (bytes(10240), "a.tar: no rows"),
    ],
)
def test_what_is_no_shard_is_told_when_it_is_opened(tmp_path, content, words):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError) as error:
        open_source(tmp_path / "a.tar", "caption")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shard_that_vanishes_or_changes_is_told_by_key_and_byte(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, captions(2))
    source = open_source(path, "caption")
    path.unlink()
    with pytest.raises(DataError, match=r"a.tar:001: member 001.json at byte 3584 cannot be read"):
        source.row(1)
    write_tar(path, captions(3))
    with pytest.raises(DataError, match=r"a.tar: written to since it was opened"):
        source.row(1)


def test_links_and_folders_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in {"1.d": tarfile.DIRTYPE, "2.l": tarfile.SYMTYPE, "3.h": tarfile.LNKTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "x", 700 if kind == tarfile.LNKTYPE else 0
            tar.addfile(info)
        info = tarfile.TarInfo("4.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    assert scan_tar(tmp_path / "a.tar")["names"].tobytes() == b"4.json"
