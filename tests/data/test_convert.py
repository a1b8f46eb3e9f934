import base64
import io
import json
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.data.convert import CONVERTERS, Folders, caption, llava, messages, vqa
from tinymodal.data.sources import open_source

COCO10 = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "media" / "coco10_llava_style"
needs_coco10 = pytest.mark.skipif(not COCO10.is_dir(), reason=f"optional data absent: {COCO10}")

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYPhfDwAChAGAZsbZ0QAAAABJRU5ErkJggg=="
)
ID = "chats.jsonl:7"


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("a.png", "images/b.png", "images/deep/c.png"):
        (tmp_path / name).write_bytes(PNG)
    return Folders(tmp_path, tmp_path / "images")


def talk(*turns, **row):
    return row | {"conversations": [{"from": who, "value": words} for who, words in turns]}


def said(*turns, **row):
    return row | {"messages": [{"role": who, "content": words} for who, words in turns]}


def parts(sample):
    """Texts as they are, pictures as their file names."""
    return [
        [p.text if isinstance(p, Text) else Path(p.source).name for p in message.parts]
        for message in sample.messages
    ]


# Pictures are found


def test_a_picture_is_found_beside_the_data_file_then_in_the_images_folder_then_by_name(folders):
    assert folders.picture("a.png", ID) == Image(folders.beside / "a.png")
    assert folders.picture("deep/c.png", ID) == Image(folders.images / "deep" / "c.png")
    assert folders.picture("./somewhere/else/b.png", ID) == Image(folders.images / "b.png")
    assert folders.picture("C:\\pictures\\b.png", ID) == Image(folders.images / "b.png")
    assert folders.picture("/absolute/elsewhere/b.png", ID) == Image(folders.images / "b.png")
    assert folders.picture(str(folders.beside / "a.png"), ID) == Image(folders.beside / "a.png")
    assert folders.picture(f"file://{folders.beside / 'a.png'}", ID) == Image(folders.beside / "a.png")


def test_a_picture_may_be_bytes_or_a_data_url_or_a_parquet_struct_or_decoded(folders):
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    decoded = PIL.Image.open(io.BytesIO(PNG))

    assert folders.picture(PNG, ID) == Image(PNG)
    assert folders.picture(url, ID) == Image(PNG)
    assert folders.picture({"bytes": PNG, "path": "no such.png"}, ID) == Image(PNG)
    assert folders.picture({"bytes": None, "path": "a.png"}, ID) == Image(folders.beside / "a.png")
    assert folders.picture(decoded, ID) == Image(decoded)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("gone.png", ["'gone.png' not found", "images/gone.png", "put it there"]),
        ("", ["path is empty", "leave the key out"]),
        ("https://example.org/x.png", ["web address", "nothing is downloaded", "Download it"]),
        ("data:image/png;base64,@@", ["data: URL cannot be read"]),
        ("data:image/png,abc", ["data: URL cannot be read", "no ';base64,' part"]),
        ({"bytes": None, "path": None}, ["neither bytes nor path"]),
        (7, ["given as int", "expected a path"]),
        ("x" * 5000, ["not found"]),
        ("a\0b", ["not found"]),
    ],
)
def test_a_picture_that_cannot_be_had_is_told_in_one_line(folders, value, words):
    with pytest.raises(DataError) as error:
        folders.picture(value, ID)
    assert_one_line(error, *words)


def test_without_an_images_folder_the_error_says_how_to_name_one(tmp_path):
    with pytest.raises(DataError, match="name the pictures' folder in the source's images key"):
        Folders(tmp_path).picture("gone.png", ID)


# LLaVA


def test_llava_cuts_the_words_at_the_places_and_keeps_every_other_letter(folders):
    row = talk(
        ("system", "Be brief."),
        ("human", "<image>\nWhat is it?"),
        ("gpt", " A dot.\n"),
        ("human", "And <image> or <image>?"),
        ("gpt", "Dots."),
        id=33,
        image=["a.png", "b.png", "deep/c.png"],
    )
    sample = llava(row, row_id=ID, images=folders)

    assert parts(sample) == [
        ["Be brief."],
        ["a.png", "\nWhat is it?"],
        [" A dot.\n"],
        ["And ", "b.png", " or ", "c.png", "?"],
        ["Dots."],
    ]
    assert [m.role for m in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (sample.id, sample.meta) == (ID, {"id": "33"})


def test_llava_without_a_picture_is_words_only(folders):
    assert parts(llava(talk(("human", "Hi"), ("gpt", "Ho")), row_id=ID, images=folders)) == [["Hi"], ["Ho"]]


@settings(deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_characters="<"), max_size=8), min_size=1, max_size=6))
def test_llava_words_and_places_come_back_in_order(pieces):
    folders = Folders(Path("."))
    row = talk(("human", "?" + "<image>".join(pieces)), ("gpt", "x"), image=[PNG] * (len(pieces) - 1))
    sample = llava(row, row_id=ID, images=folders)
    back = "".join(p.text if isinstance(p, Text) else "<image>" for p in sample.messages[0].parts)
    assert back == row["conversations"][0]["value"]


Q, A = ("human", "Q"), ("gpt", "A")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            talk(("human", "<image> <image>"), A, image="a.png"),
            ["1 picture but 2 <image> places", "expected one"],
        ),
        (talk(("human", "<image>"), A), ["0 pictures but 1 <image> place in"]),
        (talk(Q, A, image="a.png"), ["1 picture but 0 <image> places", "Add or remove"]),
        (talk(("human", "<image>"), A, image="gone.png"), ["'gone.png' not found", "tried"]),
        (talk(), ["conversation is empty", "Remove the row"]),
        (talk(Q), ["ends with the user's turn", "Add the reply"]),
        (talk(Q, A, Q), ["ends with the user's turn"]),
        (talk(("system", "S")), ["ends with the system's turn"]),
        (talk(Q, A, A), ["turns 2 and 3 are both the assistant's", "Join them"]),
        (talk(Q, ("bard", "A")), ["turn 2 is from 'bard'", "human, gpt, system"]),
        (talk(Q, A, ("system", "S"), A), ["turn 3 is the system's", "Move it to the front"]),
        (talk(Q, ("gpt", "  ")), ["turn 2 (assistant) is empty"]),
        (talk(("human", ""), A), ["turn 1 (user) is empty"]),
        (talk(("human", 5), A), ["turn 1: value is a number (5)", "expected words"]),
        ({"conversations": [{"from": "human"}]}, ["turn 1: no value (found from)"]),
        ({"conversations": [{"value": "x"}]}, ["turn 1: no from (found value)"]),
        ({"conversations": ["hello"]}, ["turn 1 is words; expected an object"]),
        ({"conversations": "hello"}, ["conversations is words; expected a list"]),
        ({"id": 1, "messages": []}, ["no conversations", "it has id, messages", 'format = "messages"']),
        ({}, ["no conversations", "it has nothing"]),
    ],
)
def test_a_faulty_llava_row_is_told_in_one_line(folders, row, words):
    with pytest.raises(DataError) as error:
        llava(row, row_id=ID, images=folders)
    assert_one_line(error, *words)


# Messages


def test_messages_take_words_or_parts(folders):
    url = {"type": "image_url", "image_url": {"url": "elsewhere/b.png"}}
    row = said(
        ("system", "Be brief."),
        ("user", [url, {"type": "text", "text": "\nWhat?"}, {"type": "image", "image": "a.png"}]),
        ("assistant", "A dot."),
        ("user", [{"type": "image", "path": "a.png"}, {"type": "image_url", "image_url": "a.png"}]),
        ("assistant", [{"type": "text", "text": "Two."}, {"type": "text", "text": ""}]),
    )
    assert parts(messages(row, row_id=ID, images=folders)) == [
        ["Be brief."],
        ["b.png", "\nWhat?", "a.png"],
        ["A dot."],
        ["a.png", "a.png"],
        ["Two."],
    ]


def test_bare_image_parts_take_the_row_s_pictures_in_order(folders):
    bare = {"type": "image", "image": None, "text": None}  # as parquet fills what a part does not have
    row = said(
        ("user", [bare, {"type": "text", "text": "or"}, bare]), ("assistant", "?"), images=["b.png", "a.png"]
    )
    assert parts(messages(row, row_id=ID, images=folders))[0] == ["b.png", "or", "a.png"]


def test_a_message_may_say_that_it_does_not_train(folders):
    row = {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A", "train": False},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"},
        ]
    }
    assert [m.trains for m in messages(row, row_id=ID, images=folders).messages] == [
        False,
        False,
        False,
        True,
    ]


def test_an_empty_system_turn_is_left_out(folders):
    sample = messages(said(("system", ""), ("user", "Q"), ("assistant", "A")), row_id=ID, images=folders)
    assert [m.role for m in sample.messages] == ["user", "assistant"]


U, V = ("user", "Q"), ("assistant", "A")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (said(), ["conversation is empty"]),
        (said(U), ["ends with the user's turn"]),
        (said(U, V, V), ["turns 2 and 3 are both the assistant's"]),
        (said(("robot", "Q"), V), ["turn 1 has the role 'robot'", "system, user, assistant"]),
        (said(("user", "see <image>"), V), ["turn 1: the words contain <image>", "part of its own"]),
        (said(("user", [{"type": "image"}]), V), ["turn 1: more image parts than pictures"]),
        (said(U, V, images=["a.png"]), ["1 picture in images but 0 image parts", "Add a part"]),
        (said(("user", [{"type": "image_url", "image_url": {}}]), V), ["image_url part without url"]),
        (
            said(("user", [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]), V),
            ["web address (http://x/y.png)"],
        ),
        (
            said(("user", [{"type": "video"}]), V),
            ["part of type 'video'", "text, image, image_url, audio, input_audio or speech"],
        ),
        (said(("user", [{"type": "text"}]), V), ["turn 1: no text (found type)"]),
        (said(("user", ["Q"]), V), ["a part is words"]),
        (said(("user", None), V), ["content is nothing; expected words or a list of parts"]),
        (said(("user", 3), V), ["content is a number (3)"]),
        ({"messages": [{"role": "user", "content": "Q", "train": "no"}]}, ["train is 'no'", "true, false"]),
        (talk(Q, A), ["no messages", 'format = "llava"']),
    ],
)
def test_a_faulty_messages_row_is_told_in_one_line(folders, row, words):
    with pytest.raises(DataError) as error:
        messages(row, row_id=ID, images=folders)
    assert_one_line(error, *words)


# Captions and questions


def test_a_caption_is_the_reply_to_its_picture(folders):
    for key in ("caption", "text"):
        sample = caption({"image": "a.png", key: "A dot."}, row_id=ID, images=folders)
        assert parts(sample) == [["a.png"], ["A dot."]]


def test_a_question_takes_the_most_frequent_answer_and_the_first_of_equals(folders):
    def answer(**row):
        return parts(vqa({"image": "a.png", "question": "Q?"} | row, row_id=ID, images=folders))

    assert answer(answer="yes") == [["a.png", "Q?"], ["yes"]]
    assert answer(answers=["no", "yes", "yes"])[1] == ["yes"]
    assert answer(answers=["b", "a", "a", "b"])[1] == ["b"]
    assert answer(answers=[{"answer": "no"}, {"answer": "no"}])[1] == ["no"]
    assert answer(image=None, answer="yes")[0] == ["Q?"]


@pytest.mark.parametrize(
    ("convert", "row", "words"),
    [
        (caption, {"caption": "x"}, ["no image in the row (it has caption)"]),
        (caption, {"image": None, "caption": "x"}, ["a caption without a picture"]),
        (caption, {"image": "a.png"}, ["no caption (found image)"]),
        (caption, {"image": "a.png", "caption": " "}, ["caption is empty"]),
        (caption, {"image": "a.png", "caption": ["x"]}, ["caption is a list"]),
        (caption, {"image": "a.png", "caption": "an <image> of"}, ["the words contain <image>"]),
        (vqa, {"image": "a.png", "question": "Q"}, ["no answer"]),
        (vqa, {"image": "a.png", "question": "Q", "answers": []}, ["answers is empty"]),
        (vqa, {"image": "a.png", "question": "Q", "answers": [3]}, ["answers is a number (3)"]),
        (vqa, {"image": "a.png", "answer": "A"}, ["no question"]),
        (vqa, {"question": "Q", "answer": "A"}, ["no image in the row"]),
    ],
)
def test_a_faulty_caption_or_question_is_told_in_one_line(folders, convert, row, words):
    with pytest.raises(DataError) as error:
        convert(row, row_id=ID, images=folders)
    assert_one_line(error, *words)


# Whatever comes

words = st.sampled_from(
    ["", " ", "Q", "<image>", "user", "human", "assistant", "gpt", "system", "text", "image"]
)
inner_keys = [
    "from",
    "value",
    "role",
    "content",
    "type",
    "text",
    "image",
    "url",
    "image_url",
    "path",
    "train",
]
anything = st.recursive(
    words | st.sampled_from([None, True, 7, 0.5]) | st.just(PNG),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(inner_keys), inner, max_size=4)
    ),
    max_leaves=12,
)
keys = st.sampled_from(
    ["image", "images", "conversations", "messages", "caption", "text", "question", "answer", "answers", "id"]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(CONVERTERS)), st.dictionaries(keys, anything, max_size=5))
def test_any_row_gives_a_sample_or_a_data_error_of_one_line(name, row):
    told = None
    try:
        sample = CONVERTERS[name](row, row_id=ID, images=Folders(Path("/nowhere")))
    except DataError as error:
        told = str(error)
    if told is None:
        assert isinstance(sample, Sample)
        assert sample.messages[-1].role == "assistant"
    else:
        assert told.startswith(ID)
        assert "\n" not in told


# Real data


@needs_coco10
def test_ten_photographs_with_paths_that_point_elsewhere_are_found_by_name():
    rows = open_source(COCO10 / "chats.json", "messages", COCO10 / "images")
    raw = json.loads((COCO10 / "chats.json").read_text())

    samples = [rows.sample(n) for n in range(len(rows))]

    assert len(samples) == len(raw) == 10
    assert [s.meta["id"] for s in samples] == [r["id"] for r in raw]
    assert samples[0].id == f"{COCO10 / 'chats.json'}:1"
    for sample, row in zip(samples, raw, strict=True):
        pictures = [image.source for image in sample.media()]
        assert [path.name for path in pictures] == [f"{row['id']}.jpg"]
        assert all(path.parent == COCO10 / "images" for path in pictures)
        words = [p["text"] for m in row["messages"] for p in m["content"] if p["type"] == "text"]
        assert [p.text for m in sample.messages for p in m.parts if isinstance(p, Text)] == words


@needs_coco10
def test_the_same_conversations_as_llava_rows_are_the_same_samples(tmp_path):
    speakers = {"user": "human", "assistant": "gpt"}
    rows = []
    for row in json.loads((COCO10 / "chats.json").read_text()):
        places = {"image_url": lambda p: "<image>", "text": lambda p: p["text"]}
        turns = [
            (speakers[m["role"]], "".join(places[p["type"]](p) for p in m["content"]))
            for m in row["messages"]
        ]
        rows.append(talk(*turns, id=row["id"], image=f"{row['id']}.jpg"))
    (tmp_path / "llava.json").write_text(json.dumps(rows))

    ours = open_source(tmp_path / "llava.json", "llava", COCO10 / "images")
    theirs = open_source(COCO10 / "chats.json", "messages", COCO10 / "images")

    assert [ours.sample(n).messages for n in range(10)] == [theirs.sample(n).messages for n in range(10)]
    assert isinstance(ours.sample(0).messages[0], Message)


def assert_one_line(error, *words):
    told = str(error.value)
    assert told.startswith(ID)
    assert "\n" not in told
    for word in words:
        assert word in told


def test_an_image_part_says_how_its_picture_is_cut_and_a_row_keeps_notes(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    part = {
        "type": "image",
        "image": "a.png",
        "max_tiles": 3,
        "fit_pixels": [4, 900],
        "targets": [[1, 2], [3]],
    }
    row = {
        "id": 7,
        "meta": {"kind": "toy", "id": "not this", "number": 3},
        "messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A"}],
    }
    sample = messages(row, row_id="r", images=Folders(tmp_path))
    assert list(sample.media()) == [Image(tmp_path / "a.png", ((1, 2), (3,)), 3, (4, 900))]
    assert sample.meta == {"kind": "toy", "id": "7"}
    nothing = {"max_tiles": None, "fit_pixels": None, "targets": None}  # as parquet fills them
    row["messages"][0]["content"] = [{"type": "image", "image": "a.png", **nothing}]
    assert list(messages(row, row_id="r", images=Folders(tmp_path)).media()) == [Image(tmp_path / "a.png")]


@pytest.mark.parametrize(
    "said",
    [
        {"max_tiles": 0},
        {"max_tiles": "3"},
        {"max_tiles": True},
        {"fit_pixels": [1]},
        {"fit_pixels": 3},
        {"targets": [1]},
        {"targets": 3},
    ],
)
def test_what_an_image_part_says_wrongly_is_told_with_its_turn(said):
    part = {"type": "image", "image": "data:image/png;base64,YQ==", **said}
    row = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A"}]}
    (key,) = said
    with pytest.raises(DataError, match=f"r: turn 1: {key} is"):
        messages(row, row_id="r", images=Folders(Path()))


def test_what_travels_with_a_row_comes_before_any_folder(tmp_path):
    class Inside:
        def find(self, written):
            return b"inside" if written == "a.png" else None

        def names(self):
            return "a.png"

    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"outside")
    images = Folders(tmp_path, None, Inside())
    assert images.picture("a.png", "r") == Image(b"inside")
    assert images.picture("b.png", "r") == Image(tmp_path / "b.png")
    with pytest.raises(
        DataError, match=r"r: picture 'c.png' not found; tried the members of the sample \(a.png"
    ):
        images.picture("c.png", "r")
