"""The official client asks the starter model, and gets what the engine says to the same alone."""

import base64
import io
import json

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("sklearn")

from tests.serve.live import NAME, asked, chat, heard, png, seen, wav  # noqa: E402
from tinymodal.core.types import Audio, Image, Message, Sample, Text  # noqa: E402
from tinymodal.eval.tasks import scenes, sounds  # noqa: E402
from tinymodal.infer.engine import Engine, Sampling  # noqa: E402

SEED = 73


@pytest.fixture(scope="module")
def alone(starter):
    """The engine itself, without a server or a scheduler."""
    return Engine(starter)


def of_sample(sample) -> list[dict]:
    """A conversation as a client sends it."""

    def part(each):
        if isinstance(each, Image):
            return seen(png(each.source))
        if isinstance(each, Audio):
            return heard(wav(each.source, each.rate_hz))
        return {"type": "text", "text": each.text}

    return [{"role": m.role, "content": [part(each) for each in m.parts]} for m in sample.messages]


QUESTIONS = scenes.questions("test", SEED, 1, False)[:4] + sounds.asked("test", SEED, 1)[:2]


@pytest.mark.parametrize(
    "question", [*QUESTIONS, *sounds.heard("test", SEED, 2, "test")], ids=lambda q: q.sample.id
)
def test_an_answer_is_that_of_the_engine_alone(client, alone, question):
    said = client.chat.completions.create(model=NAME, messages=of_sample(question.sample))
    (expected,) = alone.reply([question.sample])
    (choice,) = said.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == "stop"
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (
        expected.tokens_in,
        expected.tokens_out,
    )
    assert said._request_id.startswith("req_")


def test_a_stream_joins_to_the_whole_answer_and_ends_with_its_cost(client):
    messages = of_sample(QUESTIONS[0].sample)
    whole = client.chat.completions.create(model=NAME, messages=messages)
    stream = client.chat.completions.create(
        model=NAME, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_the_events_of_a_stream_have_the_fields_of_openai_and_no_others(server):
    """Clients other than the official one look for null, for absent fields and for ``[DONE]``."""
    status, headers, body = server.send("POST", "/v1/chat/completions", chat(asked("Hello!"), stream=True))
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    lines = [line for line in unchunked(body).decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all(set(event) == {"id", "object", "created", "model", "choices"} for event in events)
    assert events[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert events[-1]["choices"][0]["delta"] == {}
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        whole += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return whole


def test_a_second_turn_remembers_the_picture_of_the_first(client, alone):
    sample = next(
        q.sample for q in scenes.questions("test", SEED, 2, False) if len(list(q.sample.media())) == 1
    )
    (picture,) = sample.media()
    turns = [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [seen(png(picture.source)), {"type": "text", "text": "What do you see?"}],
        },
        {"role": "assistant", "content": "A picture."},
        {"role": "user", "content": "Describe the picture."},
    ]
    said = client.chat.completions.create(model=NAME, messages=turns)
    same = Sample(
        (
            Message("system", (Text("Answer briefly."),)),
            Message("user", (picture, Text("What do you see?"))),
            Message("assistant", (Text("A picture."),)),
            Message("user", (Text("Describe the picture."),)),
        ),
        "same",
    )
    assert said.choices[0].message.content == alone.reply([same])[0].text


def test_several_choices_are_several_draws_and_a_seed_repeats_them(client):
    messages = asked("What do you see?")
    ask = {"model": NAME, "messages": messages, "n": 4, "temperature": 2.0, "max_tokens": 8}
    first, again = (client.chat.completions.create(seed=7, **ask) for _ in range(2))
    other = client.chat.completions.create(seed=8, **ask)
    texts = [[choice.message.content for choice in said.choices] for said in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    streamed = {i: "" for i in range(4)}
    for chunk in client.chat.completions.create(seed=7, stream=True, **ask):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts[0]


def test_without_a_seed_two_draws_differ(client):
    ask = {"model": NAME, "messages": asked("What do you see?"), "temperature": 2.0, "max_tokens": 12}
    assert len({client.chat.completions.create(**ask).choices[0].message.content for _ in range(4)}) > 1


def test_a_reply_ends_at_the_length_and_before_a_stop(client):
    messages = of_sample(QUESTIONS[0].sample)[:1]
    messages[0]["content"][-1] = {"type": "text", "text": "Describe the picture."}
    ask = {"model": NAME, "messages": messages}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    short = client.chat.completions.create(max_tokens=2, **ask)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2
    assert whole.startswith(short.choices[0].message.content)
    word = whole.split()[2]
    stopped = client.chat.completions.create(stop=[word], **ask).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(word)].rstrip(), "stop")


def test_logprobs_are_those_of_the_words_and_the_likeliest_comes_first(client, alone):
    messages = of_sample(QUESTIONS[0].sample)
    ask = {"model": NAME, "messages": messages, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**ask).choices[0]
    told = choice.logprobs.content
    assert b"".join(bytes(each.bytes) for each in told).decode().strip() == choice.message.content
    for each in told:
        values = [top.logprob for top in each.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert (each.token, each.logprob) == (each.top_logprobs[0].token, values[0])
    (expected,) = alone.reply([QUESTIONS[0].sample], Sampling(num_logprobs=3))
    assert [each.logprob for each in told] == pytest.approx(
        [each.logprob for each in expected.logprobs], abs=1e-5
    )
    streamed = [
        each
        for chunk in client.chat.completions.create(stream=True, **ask)
        for each in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [each.token for each in streamed] == [each.token for each in told]


def test_questions_that_come_in_two_turns_are_one(client):
    picture, question = of_sample(QUESTIONS[0].sample)[0]["content"]
    apart = [{"role": "user", "content": [picture]}, {"role": "user", "content": [question]}]
    together = asked(picture, "\n" + question["text"])
    said = [
        client.chat.completions.create(model=NAME, messages=m).choices[0].message.content
        for m in (apart, together)
    ]
    assert said[0] == said[1]


def test_models_are_listed_by_the_name_that_requests_use(client):
    (card,) = client.models.list().data
    assert (card.id, card.modalities) == (NAME, ["text", "image", "audio", "speech"])
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="another", messages=asked("Hello!"))
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("form", ["wav", "pcm16", "flac", "mp3"])
def test_a_spoken_reply_is_the_engines_in_every_format(client, alone, form):
    sample = QUESTIONS[0].sample
    (expected,) = alone.reply([sample], speak=True, voice="en+m4")
    ask = {
        "model": NAME, "messages": of_sample(sample), "modalities": ["text", "audio"],
        "audio": {"voice": "en+m4", "format": form},
    }  # fmt: skip
    message = client.chat.completions.create(**ask).choices[0].message
    assert message.content is None
    assert message.audio.transcript == expected.text
    check_sound(base64.b64decode(message.audio.data), expected.audio.numpy(), form)

    data, words = b"", ""
    for chunk in client.chat.completions.create(stream=True, **ask):
        piece = chunk.choices[0].delta.audio if chunk.choices else None
        if piece is not None:
            data, words = data + base64.b64decode(piece.data or ""), words + (piece.transcript or "")
    assert words == expected.text
    check_sound(data, expected.audio.numpy(), form, streamed=True)


def check_sound(data: bytes, expected, form: str, streamed: bool = False) -> None:
    """The samples of a file are those of the reply, as closely as the format can tell."""
    import numpy as np
    import soxr

    from tinymodal.model.audio import load_sound

    if form == "pcm16":
        found = np.frombuffer(data, "<i2") / 32767
        expected = soxr.resample(expected, 16_000, 24_000)
    else:
        found = load_sound(data, to_hz=16_000).numpy()
    if form == "mp3" and streamed:
        # Frames of 576 samples; a stream's header cannot say how many of the first and the last to leave out.
        assert 0 <= len(found) - len(expected) < 4 * 576
        assert np.sum(found**2) == pytest.approx(np.sum(expected**2), rel=0.1)
        return
    assert abs(len(found) - len(expected)) <= (1152 if form == "mp3" else 1)
    least = min(len(found), len(expected))
    off = np.sqrt(np.mean((found[:least] - expected[:least]) ** 2) / np.mean(expected**2))
    assert off < {"mp3": 0.2, "pcm16": 0.01}.get(form, 0.001), off


def test_a_sound_may_come_in_several_formats(client, alone):
    question = sounds.heard("test", SEED, 1, "test")[0]
    clip = next(question.sample.media())
    for form in ("FLAC", "MP3", "OGG"):
        data = wav(clip.source, clip.rate_hz, form)
        said = client.chat.completions.create(
            model=NAME, messages=asked(heard(data, form.lower()), "Repeat what you hear.")
        )
        same = Sample((Message("user", (Audio(data), Text("Repeat what you hear."))),), "same")
        assert said.choices[0].message.content == alone.reply([same])[0].text


def test_a_picture_may_come_as_jpeg_and_is_seen_as_by_the_engine(client, alone):
    picture = next(QUESTIONS[0].sample.media()).source
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    said = client.chat.completions.create(
        model=NAME, messages=asked(seen(file.getvalue()), "Describe the picture.")
    )
    same = Sample((Message("user", (Image(file.getvalue()), Text("Describe the picture."))),), "same")
    assert said.choices[0].message.content == alone.reply([same])[0].text
