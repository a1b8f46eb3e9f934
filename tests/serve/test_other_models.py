"""Models that lack an eye, an ear or a mouth say so, and serve what they have."""

import json

import PIL.Image
import pytest
import torch

from tests.serve.live import NAME, asked, chat, fault, heard, live, png, seen, wav
from tinymodal.compose.tiny import tiny_model
from tinymodal.serve.sound_out import SoundOut, written

CHAT = "/v1/chat/completions"
PICTURE = seen(png(PIL.Image.new("RGB", (24, 24), "blue")))
SOUND = heard(wav([0.1] * 8000))


@pytest.fixture(scope="module")
def sighted():
    with live(tiny_model()) as running:
        yield running


@pytest.fixture(scope="module")
def blind():
    with live(tiny_model(vision=None)) as running:
        yield running


def test_a_model_lists_what_it_perceives(sighted, blind):
    def card(server):
        return json.loads(server.send("GET", "/v1/models")[2])["data"][0]

    assert (card(sighted)["modalities"], card(sighted)["voices"]) == (["text", "image"], [])
    assert "image" not in card(blind)["modalities"] or card(blind)["modalities"] == ["text", "image"]


def test_it_answers_what_it_can(sighted, blind):
    assert sighted.send("POST", CHAT, chat(asked(PICTURE, "what is it"), max_tokens=4))[0] == 200
    assert blind.send("POST", CHAT, chat(asked("what is it"), max_tokens=4))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_sound_for_a_model_that_does_not_hear_is_refused(sighted, stream):
    status, _, body = sighted.send("POST", CHAT, chat(asked(SOUND, "what is it"), stream=stream))
    assert status == 400
    assert "no audio tower" in fault(body)["message"]


def test_a_picture_for_a_model_that_does_not_see_is_refused(blind):
    status, _, body = blind.send("POST", CHAT, chat(asked(PICTURE, "what is it")))
    assert status == 400
    assert "see" in fault(body)["message"] or "picture" in fault(body)["message"]


def test_a_model_without_a_mouth_does_not_speak(sighted):
    status, _, body = sighted.send("POST", CHAT, chat(asked("what is it"), modalities=["text", "audio"]))
    assert (status, "does not speak" in fault(body)["message"]) == (400, True)
    said = json.dumps({"model": NAME, "input": "red", "voice": "a"}).encode()
    status, _, body = sighted.send("POST", "/v1/audio/speech", said)
    assert (status, "does not speak" in fault(body)["message"]) == (400, True)


def test_a_transcript_of_a_model_that_does_not_hear_is_refused(sighted):
    body = b"".join(
        b'--x\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % part
        for part in ((b"model", b"", NAME.encode()), (b"file", b'; filename="a.wav"', wav([0.1] * 8000)))
    )
    status, _, answer = sighted.send(
        "POST",
        "/v1/audio/transcriptions",
        body + b"--x--\r\n",
        content_type="multipart/form-data; boundary=x",
    )
    assert status == 400, answer
    fault(answer)


@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "pcm16"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_reply_of_no_words_is_a_file_of_no_samples(form, streamed):
    out = SoundOut(form, 16_000, streamed=streamed)
    assert isinstance(out.feed(torch.zeros(0)) + out.finish(), bytes)
    out.close()
    assert isinstance(written(torch.zeros(0), 16_000, form), bytes)
