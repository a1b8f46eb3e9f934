"""Rows that are heard or spoken become conversations, or an error that names file and row."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Image, Message, Sample, Speech, Text
from tinymodal.data.convert import CONVERTERS, Folders, alike, llava, messages, preference
from tinymodal.data.sound_rows import READ, TRANSCRIBE

ID = "clips.jsonl:3"
WAV = b"RIFF, a wav"
IN_BASE64 = base64.b64encode(WAV).decode()


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a.wav", "clips/b.flac", "x.png"):
        (tmp_path / name).write_bytes(WAV)
    return Folders(tmp_path, sounds=tmp_path / "clips")


def convert(form, folders, **row) -> Sample:
    return CONVERTERS[form](row, row_id=ID, images=folders)


def refused(form, folders, **row) -> str:
    with pytest.raises(DataError) as caught:
        convert(form, folders, **row)
    told = str(caught.value)
    assert told.startswith(ID)
    assert "\n" not in told
    return told


def asked(sample: Sample) -> tuple:
    return sample.messages[0].parts


def replied(sample: Sample) -> tuple:
    return sample.messages[-1].parts


# ---- finding


def test_a_sound_is_found_beside_the_data_file_then_in_the_sounds_folder_then_by_name(folders):
    assert folders.sound("a.wav", ID) == Audio(folders.beside / "a.wav")
    assert folders.sound("b.flac", ID) == Audio(folders.sounds / "b.flac")
    assert folders.sound("./elsewhere/b.flac", ID) == Audio(folders.sounds / "b.flac")
    assert folders.sound("C:\\speech\\b.flac", ID) == Audio(folders.sounds / "b.flac")


def test_a_sound_may_be_bytes_a_data_url_or_a_struct_of_parquet(folders):
    for value in (
        WAV,
        bytearray(WAV),
        f"data:audio/wav;base64,{IN_BASE64}",
        {"bytes": WAV, "path": "no.wav"},
    ):
        assert folders.sound(value, ID) == Audio(WAV)
    assert folders.sound({"bytes": None, "path": "a.wav"}, ID) == Audio(folders.beside / "a.wav")


def test_decoded_samples_keep_their_rate_and_become_single_precision(folders):
    for array in ([0.5, -0.5], np.array([0.5, -0.5]), np.array([0.5, -0.5], np.float32)):
        sound = folders.sound({"array": array, "sampling_rate": 8_000, "path": None}, ID)
        assert sound.rate_hz == 8_000
        assert torch.equal(sound.source, torch.tensor([0.5, -0.5]))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("gone.wav", ["sound 'gone.wav' not found", "clips/gone.wav", "put it there"]),
        ("", ["the sound's path is empty"]),
        ("https://example.org/x.wav", ["the sound is a web address", "nothing is downloaded"]),
        ("data:audio/wav;base64,@@", ["the sound's data: URL cannot be read", "data:audio/wav;base64"]),
        ({"bytes": None, "path": None}, ["a sound with neither bytes nor path"]),
        (7, ["a sound given as int", '{"array": samples']),
        ({"array": [0.0]}, ["samples with the sampling_rate None"]),
        ({"array": ["a"], "sampling_rate": 8_000}, ["array holds no samples"]),
    ],
)
def test_a_sound_that_cannot_be_had_is_told_in_one_line(folders, value, words):
    told = refused("asr", folders, audio=value, text="hello")
    assert all(word in told for word in words), told


def test_without_a_sounds_folder_the_error_says_how_to_name_one(tmp_path):
    with pytest.raises(DataError, match="name the sounds' folder in the source's sounds key"):
        Folders(tmp_path).sound("gone.wav", ID)


# ---- formats


@pytest.mark.parametrize("key", ["text", "transcript", "sentence", "transcription"])
def test_asr_asks_for_the_words_of_a_sound(folders, key):
    sample = convert("asr", folders, audio="a.wav", **{key: "HELLO world"}, id=4)
    assert asked(sample) == (Audio(folders.beside / "a.wav"), Text(TRANSCRIBE))
    assert replied(sample) == (Text("HELLO world"),)
    assert sample.id == ID
    assert sample.meta == {"id": "4"}
    asks = convert("asr", folders, audio="a.wav", text="x", question="Was sagt sie?")
    assert asked(asks)[1] == Text("Was sagt sie?")


def test_a_row_may_mean_a_stretch_of_its_file(folders):
    sample = convert("asr", folders, audio="a.wav", text="x", start_s=1, end_s=2.5)
    assert asked(sample)[0] == Audio(folders.beside / "a.wav", start_s=1.0, end_s=2.5)
    assert "start_s is '1'" not in refused("asr", folders, audio="a.wav", text="x", start_s="1")
    assert "expected seconds" in refused("asr", folders, audio="a.wav", text="x", start_s=-1)
    assert "end_s 1 is not behind start_s 2" in refused(
        "asr", folders, audio="a.wav", text="x", start_s=2, end_s=1
    )


def test_audio_qa_shows_the_picture_plays_the_sound_and_asks(folders):
    sample = convert(
        "audio_qa", folders, audio="a.wav", image="x.png", question="Who?", answers=["b", "a", "a"]
    )
    assert asked(sample) == (Image(folders.beside / "x.png"), Audio(folders.beside / "a.wav"), Text("Who?"))
    assert replied(sample) == (Text("a"),)
    assert replied(convert("audio_qa", folders, audio="a.wav", question="?", answer="b")) == (Text("b"),)
    assert "answers is empty" in refused("audio_qa", folders, audio="a.wav", question="?", answers=[])


@pytest.mark.parametrize("key", ["caption", "text"])
def test_an_audio_caption_describes_its_sound(folders, key):
    sample = convert("audio_caption", folders, audio="a.wav", **{key: "rain"})
    assert asked(sample) == (Audio(folders.beside / "a.wav"),)
    assert replied(sample) == (Text("rain"),)


def test_tts_is_the_words_and_how_they_are_spoken(folders):
    sample = convert("tts", folders, text="Good day", audio="a.wav", voice="anna", end_s=1.0)
    assert asked(sample) == (Text(READ.format(text="Good day")),)
    assert replied(sample) == (
        Text("Good day"),
        Speech(folders.beside / "a.wav", end_s=1.0, voice="anna"),
    )
    assert asked(convert("tts", folders, text="x", audio="a.wav", question="Hi")) == (Text("Hi"),)
    assert "voice is '7'" in refused("tts", folders, text="x", audio="a.wav", voice=7)
    assert "no audio in the row (it has text)" in refused("tts", folders, text="x")


def test_a_spoken_question_about_a_picture_needs_no_words(folders):
    sample = convert("spoken", folders, image="x.png", audio="a.wav", answer="red")
    assert asked(sample) == (Image(folders.beside / "x.png"), Audio(folders.beside / "a.wav"))
    assert replied(sample) == (Text("red"),)


def test_a_spoken_dialogue_has_turns_of_question_and_answer(folders):
    first = {"audio": "a.wav", "answer": "Hello.", "answer_audio": "b.flac", "voice": "anna"}
    sample = convert("spoken", folders, turns=[first, {"question": "And you?", "answer": "Fine."}])
    assert sample.messages == (
        Message("user", (Audio(folders.beside / "a.wav"),)),
        Message("assistant", (Text("Hello."), Speech(folders.sounds / "b.flac", voice="anna"))),
        Message("user", (Text("And you?"),)),
        Message("assistant", (Text("Fine."),)),
    )
    assert "turn 2: no audio" in refused("spoken", folders, turns=[first, {"answer": "Fine."}])
    assert "turn 1: no answer" in refused("spoken", folders, turns=[{"audio": "a.wav"}])


@pytest.mark.parametrize(
    ("form", "row", "word"),
    [
        ("asr", {"text": "x"}, "no audio in the row (it has text); expected a path"),
        ("asr", {"audio": "a.wav"}, "no text (found audio)"),
        ("asr", {"audio": "a.wav", "text": " "}, "text is empty"),
        ("asr", {"audio": ["a.wav", "a.wav"], "text": "x"}, "audio is a list; expected one sound"),
        ("audio_qa", {"audio": "a.wav", "answer": "x"}, "no question"),
        ("audio_caption", {"audio": "a.wav"}, "no caption"),
    ],
)
def test_a_row_that_lacks_something_says_what(folders, form, row, word):
    assert word in refused(form, folders, **row)


# ---- LLaVA's


def talk(*turns, **row):
    return row | {"conversations": [{"from": who, "value": words} for who, words in turns]}


def test_llava_places_sounds_and_pictures_each_in_their_order(folders):
    row = talk(
        ("human", "<audio>\nThen <image> and <audio>?"), ("gpt", "Yes"),
        image="x.png", audio=["a.wav", "b.flac"],
    )  # fmt: skip
    sample = llava(row, row_id=ID, images=folders)
    assert asked(sample) == (
        Audio(folders.beside / "a.wav"),
        Text("\nThen "),
        Image(folders.beside / "x.png"),
        Text(" and "),
        Audio(folders.sounds / "b.flac"),
        Text("?"),
    )


def test_llava_without_a_sound_keeps_the_word_audio_in_angle_brackets(folders):
    """It is html in many a conversation about code."""
    row = talk(("human", "What is <audio> in html?"), ("gpt", "A tag."))
    assert asked(llava(row, row_id=ID, images=folders)) == (Text("What is <audio> in html?"),)


def test_llava_with_more_or_fewer_sounds_than_places_says_so(folders):
    row = talk(("human", "<audio> and <audio>"), ("gpt", "Yes"), audio="a.wav")
    with pytest.raises(DataError, match=r"1 sound but 2 <audio> places in the words; .* a path in audio"):
        llava(row, row_id=ID, images=folders)


# ---- messages


def said(*turns, **row):
    return row | {"messages": [{"role": who, "content": content} for who, content in turns]}


def test_messages_hold_sounds_as_parts_of_every_kind(folders):
    row = said(
        (
            "user",
            [
                {"type": "audio", "audio": "a.wav", "start_s": 0.5},
                {"type": "input_audio", "input_audio": {"data": IN_BASE64, "format": "wav"}},
                {"type": "audio"},
                {"type": "audio", "end_s": 2},
                {"type": "text", "text": "What?"},
            ],
        ),
        (
            "assistant",
            [{"type": "text", "text": "Rain."}, {"type": "speech", "speech": "b.flac", "voice": "v"}],
        ),
        audios=["b.flac", "a.wav"],
    )
    sample = messages(row, row_id=ID, images=folders)
    assert asked(sample) == (
        Audio(folders.beside / "a.wav", start_s=0.5),
        Audio(WAV),
        Audio(folders.sounds / "b.flac"),
        Audio(folders.beside / "a.wav", end_s=2.0),
        Text("What?"),
    )
    assert replied(sample) == (Text("Rain."), Speech(folders.sounds / "b.flac", voice="v"))


A = ("assistant", "x")


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (said(("user", [{"type": "audio"}]), A), "more audio parts than sounds"),
        (said(("user", "x"), A, audios=["a.wav"]), "1 sound in audios but 0 audio parts"),
        (said(("user", [{"type": "input_audio"}]), A), "an input_audio part without data"),
        (
            said(("user", [{"type": "input_audio", "input_audio": {"data": "@@"}}]), A),
            "the sound's base64 cannot be read",
        ),
        (said(("user", [{"type": "speech", "speech": "a.wav"}]), A), "turn 1 (user) has a speech part"),
        (
            said(("user", "x"), ("assistant", [{"type": "speech", "speech": "a.wav"}])),
            "turn 2 (assistant) is empty",
        ),
        (
            said(
                ("user", "x"),
                ("assistant", [{"type": "text", "text": "y"}, *2 * [{"type": "speech", "speech": "a.wav"}]]),
            ),
            "has 2 speech parts; expected one",
        ),
        (
            said(("user", "x"), ("assistant", [{"type": "text", "text": "y"}, {"type": "speech"}])),
            "a speech part without a sound",
        ),
    ],
)
def test_messages_that_contradict_themselves_are_refused(folders, row, word):
    with pytest.raises(DataError) as caught:
        messages(row, row_id=ID, images=folders)
    assert word in str(caught.value)


# ---- two answers


def test_two_answers_to_a_sound_hear_the_same_sound(folders):
    row = {"question": "What?", "audio": "a.wav", "chosen": "rain", "rejected": "snow"}
    sample = preference(row, row_id=ID, images=folders)
    assert asked(sample) == (Audio(folders.beside / "a.wav"), Text("What?"))
    samples = {"array": [0.1, 0.2], "sampling_rate": 8_000}
    sample = preference({**row, "audio": samples}, row_id=ID, images=folders)
    assert sample.rejected[-1].parts == (Text("snow"),)
    with pytest.raises(DataError, match="are the same"):
        preference({**row, "audio": samples, "rejected": "rain"}, row_id=ID, images=folders)


def test_sounds_in_memory_are_alike_number_by_number():
    one, other = torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.3])
    assert alike([Audio(one, 8_000)], [Audio(one.clone(), 8_000)])
    assert not alike([Audio(one, 8_000)], [Audio(other, 8_000)])
    assert not alike([Audio(one, 8_000)], [Audio(one.clone(), 16_000)])
    assert not alike([Audio(Path("a"))], [])
