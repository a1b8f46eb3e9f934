from __future__ import annotations

import pytest
import torch
from PIL import Image as Pictures

from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Image, Message, Text
from tinymodal.data.collate import collate
from tinymodal.data.convert import Folders, preference

WORDS = ("what", "colour", "is", "it", "red", "blue", "no", "yes")


@pytest.fixture
def folders(tmp_path):
    Pictures.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    return Folders(tmp_path)


def read(row, folders):
    return preference(row, row_id="pairs.jsonl:1", images=folders)


def turns(*words):
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, words, strict=False)
    ]


PLAIN = {"image": "red.png", "question": "what is it", "chosen": "red", "rejected": "blue"}


def test_a_question_with_two_answers_becomes_a_conversation_and_a_worse_one(folders):
    sample = read(PLAIN, folders)
    shown = Image(folders.beside / "red.png")
    assert sample.messages == (
        Message("user", (shown, Text("what is it"))),
        Message("assistant", (Text("red"),)),
    )
    assert sample.rejected == (sample.messages[0], Message("assistant", (Text("blue"),)))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": turns("it is"), "chosen": turns("", "red")[1:], "rejected": turns("", "blue")[1:]},
        {"messages": turns("it is"), "chosen": "red", "rejected": "blue"},
        {"prompt": "it is", "chosen": {"role": "assistant", "content": "red"}, "rejected": "blue"},
        {"chosen": turns("it is", "red"), "rejected": turns("it is", "blue")},
    ],
)
def test_turns_in_any_of_the_usual_places_say_the_same(row, folders):
    sample = read(row, folders)
    assert [m.parts for m in sample.messages] == [(Text("it is"),), (Text("red"),)]
    assert [m.parts for m in sample.rejected] == [(Text("it is"),), (Text("blue"),)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rejected": None}, "no rejected answer in the row"),
        ({"rejected": "red"}, "are the same; remove the row"),
        ({"question": None}, "chosen is words, but nothing was asked"),
        ({"chosen": ""}, "pairs.jsonl:1: chosen: turn 2"),
        ({"question": 3}, "expected words or a list of turns"),
        ({"image": "gone.png"}, "picture 'gone.png' not found"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_row(changes, told, folders):
    with pytest.raises(DataError, match=r"^pairs\.jsonl:1: ") as caught:
        read(PLAIN | changes, folders)
    assert told in str(caught.value)


def test_both_answers_are_encoded_as_documents_that_share_their_pictures(folders):
    composed = tiny_model(words=WORDS)
    chosen = read(PLAIN, folders)
    both = composed.encoder(chosen)
    alone = [
        composed.encoder(read(row, folders)) for row in (PLAIN, PLAIN | {"chosen": "blue", "rejected": "red"})
    ]
    assert both.parts == tuple(len(one.ids) - sum(one.parts[1:]) for one in alone)
    first = both.ids[: both.parts[0]], both.labels[: both.parts[0]]
    assert torch.equal(first[0], alone[0].ids[: both.parts[0]])
    assert torch.equal(both.ids[both.parts[0] :], alone[1].ids[: both.parts[1]])
    assert both.labels[both.parts[0]] == IGNORE
    assert len(both.media) == 1

    image_id = int(composed.model.config.image_token_id)
    batch = collate([[both], [alone[1]]], composed.tokenizer.pad_token_id, image_id)
    documents = [length for length in batch.lengths if length in both.parts]
    assert len(documents) >= 4
    assert batch.pairs.tolist()[0] == [0, 1]
    assert len(batch.pixel_values) == 2, "one picture a sample, though four documents show it"
    assert len(batch.image_take) == 4 * both.media[0].tokens
    assert batch.position_ids.flatten()[both.parts[0]] == 0


def test_a_batch_without_pairs_names_none(folders):
    composed = tiny_model(words=WORDS)
    sample = composed.encoder(read(PLAIN, folders))
    single = type(sample)(sample.ids[: sample.parts[0]], sample.labels[: sample.parts[0]], sample.media, "a")
    assert collate([[single]], 0, int(composed.model.config.image_token_id)).pairs is None
