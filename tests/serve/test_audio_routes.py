"""Sounds become words and words become sounds, by the routes that OpenAI has for it."""

import io

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("sklearn")
pytest.importorskip("jiwer")

from tests.serve.live import NAME, wav  # noqa: E402
from tinymodal.data.sounds import spoken_words  # noqa: E402
from tinymodal.eval.rules.transcripts import count_errors  # noqa: E402
from tinymodal.eval.tasks import scenes, sounds  # noqa: E402
from tinymodal.model.audio import load_sound  # noqa: E402

SEED = 74


def clip(question, form="WAV"):
    part = next(question.sample.media())
    return (f"clip.{form.lower()}", io.BytesIO(wav(part.source, part.rate_hz, form)))


def test_transcripts_are_what_was_said(client):
    questions = sounds.heard("test", SEED, 12, "test")
    said = [client.audio.transcriptions.create(model=NAME, file=clip(q)).text for q in questions]
    texts = [
        [" ".join(spoken_words(text)) for text in each] for each in ([q.answer for q in questions], said)
    ]
    assert count_errors(*texts).wer < 0.15  # 3 % over many; these are some 30 words


def test_a_transcript_comes_as_json_as_text_and_with_its_length(client):
    question = sounds.heard("test", SEED, 1, "test")[0]
    ask = {"model": NAME, "language": "en", "prompt": "a hint"}
    plain = client.audio.transcriptions.create(file=clip(question), **ask).text
    text = client.audio.transcriptions.create(file=clip(question), response_format="text", **ask)
    told = client.audio.transcriptions.create(
        file=clip(question, "FLAC"), response_format="verbose_json", **ask
    )
    assert text.strip() == plain == told.text
    seconds = len(next(question.sample.media()).source) / 16_000
    assert told.duration == pytest.approx(seconds)
    assert (told.language, told.segments[0].text) == ("en", plain)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"response_format": "srt"}, "response_format"),
        ({"temperature": 9}, "temperature"),
        ({"file": ("a.wav", b"RIFF\0\0\0\0WAVEnothing")}, "file"),
        ({"file": ("a.wav", b"")}, "file"),
        ({"file": ("a.png", b"\x89PNG\r\n\x1a\n")}, "file"),
        ({"model": "another"}, "model"),
        ({"stream": True}, "stream"),
    ],
)
def test_what_is_wrong_with_a_form_is_told_by_its_field(client, given, param):
    ask = {"model": NAME, "file": ("a.wav", wav([0.0] * 1600)), **given}
    with pytest.raises(openai.APIStatusError) as refused:
        client.audio.transcriptions.create(**ask)
    assert refused.value.status_code in (400, 404)
    assert refused.value.param == param


def test_silence_has_some_transcript(client):
    assert isinstance(
        client.audio.transcriptions.create(model=NAME, file=("a.wav", wav([0.0] * 8000))).text, str
    )


def test_a_given_text_is_said_and_understood(client):
    """By the recogniser that ships, which never heard this model: words are those it knows."""
    from tinymodal.eval.speaking import built_in

    listener = built_in()
    texts = [q.answer for q in scenes.questions("test", SEED, 2, False)]
    heard = []
    for text in texts:
        said = client.audio.speech.create(model=NAME, input=text, voice="en-us+f1", response_format="wav")
        heard += listener.hear([load_sound(said.content, to_hz=16_000)], 16_000)
    assert count_errors([listener.written(text) for text in texts], heard).wer < 0.4


def test_a_text_of_several_sentences_lasts_as_long_as_they_do(client):
    def seconds(text: str) -> float:
        said = client.audio.speech.create(model=NAME, input=text, voice="en+m4", response_format="wav")
        return len(load_sound(said.content, to_hz=16_000)) / 16_000

    first, second = "There are seven circles.", "The ring is blue."
    assert seconds(f"{first} {second}\n\n") == pytest.approx(seconds(first) + seconds(second), abs=0.01)


@pytest.mark.parametrize("form", ["mp3", "flac", "wav", "pcm"])
def test_speech_comes_in_every_format(client, form):
    said = client.audio.speech.create(model=NAME, input="a red ring", voice="en-us+f1", response_format=form)
    kind = {"mp3": "audio/mpeg"}.get(form, f"audio/{form}")
    assert said.response.headers["content-type"] == kind
    samples = len(said.content) // 2 if form == "pcm" else len(load_sound(said.content))
    assert 0.3 < samples / (24_000 if form == "pcm" else 16_000) < 5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"voice": "alloy"}, "en-us+f1"),
        ({"input": ""}, "input"),
        ({"input": " \n "}, "no word"),
        ({"input": "<|im_end|>"}, "control token"),
        ({"input": "A ring. A circle. <|im_end|>"}, "control token"),
        ({"speed": 2.0}, "speed"),
        ({"response_format": "opus"}, "response_format"),
    ],
)
def test_what_cannot_be_said_is_told(client, given, words):
    with pytest.raises(openai.BadRequestError, match=words.replace("+", r"\+")):
        client.audio.speech.create(**{"model": NAME, "input": "red", "voice": "en-us+f1", **given})
