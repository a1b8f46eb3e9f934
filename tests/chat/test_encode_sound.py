"""Sounds among the words, and how answers sound."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.test_hearing import RATE_HZ, hearing_config, hearing_tokenizer, sound
from tests.model.test_processing import noise
from tinymodal.chat.encode import Encoder
from tinymodal.chat.template import TEMPLATES, template_for
from tinymodal.chat.turns import Speaking
from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Audio, Image, Message, Sample, Speech, Text
from tinymodal.model.processing_tinymodal import TinyModalProcessor

JINJA = (
    "{% for m in messages %}{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def processor() -> TinyModalProcessor:
    return TinyModalProcessor.of(hearing_config(), hearing_tokenizer())


@pytest.fixture(scope="module")
def encoder(processor) -> Encoder:
    return Encoder(processor, "chatml")


def clip(seconds: float = 1.0, seed: int = 0) -> Audio:
    return Audio(sound(seconds, seed), RATE_HZ)


def spoken(seconds: float = 1.0, **known: object) -> Speech:
    return Speech(sound(seconds, 9), RATE_HZ, **known)


def ask(*parts: object, answer: tuple = (Text("it is a circle"),), id: str = "chats.jsonl:3") -> Sample:
    return Sample((Message("user", parts), Message("assistant", answer)), id)


@functools.cache
def anyone() -> TinyModalProcessor:
    """For hypothesis, which takes no fixtures; with Llama 3's control words."""
    tokenizer = hearing_tokenizer()
    words = sorted({*TEMPLATES["llama_3"].control, *TEMPLATES["llama_3"].required})
    tokenizer.add_special_tokens({"extra_special_tokens": words})
    return TinyModalProcessor.of(hearing_config(), tokenizer)


# ---- placeholders


PART = st.sampled_from(["image", "audio", "text"])
TURN = st.lists(PART, min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(TURN, min_size=1, max_size=3), template=st.sampled_from(["chatml", "vicuna_v1", "llama_3"])
)
def test_media_stand_anywhere_and_each_takes_its_own_tokens(turns, template):
    """Counted a second time: every place in reading order, kind by kind, as long as it takes."""
    processor = anyone()
    seeds = iter(range(100))
    messages = []
    for turn in turns:
        parts = [
            {
                "image": lambda: Image(noise(seed=next(seeds))),
                "audio": lambda: clip(0.3 + 0.7 * (next(seeds) % 3), 1),
                "text": lambda: Text(" the circle"),
            }[part]()
            for part in turn
        ]
        messages += [Message("user", tuple(parts)), Message("assistant", (Text("yes"),))]
    sample = Sample(tuple(messages), "x:1")
    encoded = Encoder(processor, template_for(template, processor.tokenizer))(sample)

    kinds = [part for turn in turns for part in turn if part != "text"]
    assert [item.kind for item in encoded.media] == kinds
    places = {processor.image_token_id: "image", processor.audio_token_id: "audio"}
    found = [places[i] for i in encoded.ids.tolist() if i in places]
    assert found == [item.kind for item in encoded.media for _ in range(item.tokens)]
    media = [part for message in messages for part in message.parts if not isinstance(part, Text)]
    for part, item in zip(media, encoded.media, strict=True):
        alone = processor.prepare(part.source) if item.kind == "image" else processor.prepare_sound(
            part.source, RATE_HZ
        )  # fmt: skip
        assert item.tokens == alone.tokens
        assert all(torch.equal(a, b) for a, b in zip(item.tiles, alone.tiles, strict=True))
    trained = encoded.ids[encoded.labels != IGNORE].tolist()
    assert not set(trained) & set(places)
    assert processor.tokenizer.decode(trained).count("yes") == len(turns)


def test_a_call_of_the_processor_equals_the_encoder(processor, encoder):
    turn = Message("user", (clip(0.7), Text("before "), Image(noise()), Text(" after "), clip(1.6, 2)))
    sample = Sample((turn,), "x:1")
    encoded = encoder(sample, reply=True)
    written = encoder.template.render(sample.messages, iter(["<audio>", "<image>", "<audio>"]), reply=True)
    clips = [sound(0.7), sound(1.6, 2)]
    called = processor(text=written.text, images=noise(), audio=clips, sampling_rate=RATE_HZ)
    assert called["input_ids"][0].tolist() == encoded.ids.tolist()
    for values, item in zip(called["audio_values"], (encoded.media[0], encoded.media[2]), strict=True):
        assert torch.equal(values[0], item.tiles[0])
    assert torch.equal(called["pixel_values"][0], encoded.media[1].tiles[0])


def test_sounds_that_open_a_message_are_parted_from_its_words_by_a_newline(encoder, processor):
    text = encoder.template.render(ask(clip(), Text("what?")).messages, iter(["<audio>"])).text
    assert "<audio>\nwhat?" in text
    text = encoder.template.render(ask(Text("what is "), clip(), Text("?")).messages, iter(["<audio>"])).text
    assert "what is <audio>?" in text
    # A question that is only heard needs no words.
    assert len(encoder(ask(Image(noise()), clip())).media) == 2


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_jinja_of_every_template_writes_sounds_as_the_template_does(name):
    tokenizer = hearing_tokenizer()
    special = sorted({*TEMPLATES[name].control, *TEMPLATES[name].required} - {"{eos}", "{bos}"})
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    template = template_for(name, tokenizer)
    parts = (Image(b""), Audio(b""), Text("see "), Audio(b""), Text(" it"))
    sample = ask(*parts, answer=(Text("a star"), Speech(b"")))
    ours = template.render(sample.messages, iter(["<image>", "<audio>", "<audio>"])).text
    content = [
        {"type": type(part).__name__.lower(), **({"text": part.text} if isinstance(part, Text) else {})}
        for part in parts
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a star"}]
    assert ours == tokenizer.apply_chat_template(
        messages, chat_template=template.to_jinja("<image>", "<audio>"), tokenize=False
    )


def test_a_tokenizers_own_template_takes_sounds():
    tokenizer = hearing_tokenizer(chat_template=JINJA)
    processor = TinyModalProcessor.of(hearing_config(), tokenizer)
    encoded = Encoder(processor, "tokenizer")(ask(clip(), Text("what?"), answer=(Text("one"), spoken())))
    assert int((encoded.ids == processor.audio_token_id).sum()) == encoded.media[0].tokens
    assert tokenizer.decode(encoded.ids[encoded.labels != IGNORE]).strip() == "one</s>"


def test_everything_but_the_places_trains_where_all_is_asked_for(processor):
    encoded = Encoder(processor, "chatml", train_on="all")(ask(clip(), Image(noise()), Text("what?")))
    places = (encoded.ids == processor.audio_token_id) | (encoded.ids == processor.image_token_id)
    assert (encoded.labels == IGNORE).tolist() == [bool(p) or i == 0 for i, p in enumerate(places)]


def test_only_the_stretch_asked_for_is_heard_and_changes_are_made(processor, encoder):
    class Louder:
        def wave(self, samples, rate_hz):
            return torch.cat([samples, samples])  # twice as long

        def mel(self, mel, *known):
            return mel + 1

    whole = sound(3.0, 2)
    part = encoder(ask(Audio(whole, RATE_HZ, 1.0, 2.5))).media[0]
    assert torch.equal(part.tiles[0], processor.prepare_sound(whole[16_000:40_000], RATE_HZ).tiles[0])
    changed = encoder(ask(Audio(whole[:16_000], RATE_HZ, change=Louder()))).media[0]
    assert torch.equal(
        changed.tiles[0], processor.prepare_sound(whole[:16_000].repeat(2), RATE_HZ).tiles[0] + 1
    )
    assert changed.tokens == processor.feature_extractor.layout(32_000).tokens


def test_sounds_may_come_from_another_place(encoder, processor):
    asked = []

    def remembered(source, rate_hz, **stretch):
        asked.append((rate_hz, stretch))
        return processor.prepare_sound(source, rate_hz, **stretch)

    there = encoder.using(prepare_sound=remembered)
    assert torch.equal(there(ask(clip())).ids, encoder(ask(clip())).ids)
    assert asked == [(RATE_HZ, {"start_s": None, "end_s": None, "change": None})]
    assert there.using(train_on="all").prepare_sound is remembered


def test_the_eye_is_shown_seconds_positions_and_tokens(encoder):
    pieces = encoder.explain(ask(Image(noise()), clip(2.0), Text("what?")))
    shown = [piece.text for piece in pieces if piece.text.startswith("[")]
    assert shown == ["[image: 6x6 -> 9 tokens]", "[audio: 2.0 s, 50 positions -> 13 tokens]"]
    assert not any(piece.trains for piece in pieces if piece.text.startswith("["))


def test_the_eye_is_shown_that_the_first_token_never_trains(processor):
    sample = ask(clip(2.0), Text("what?"))
    encoder = Encoder(processor, template_for("chatml", processor.tokenizer), train_on="all")
    assert encoder(sample).labels[0] == IGNORE
    assert [piece.trains for piece in encoder.explain(sample)][:2] == [False, True]


# ---- refusals


def test_what_cannot_be_heard_is_refused_by_sample_and_sound(encoder, processor):
    with pytest.raises(DataError, match=r"chats.jsonl:3: sound 2: .*: the file is empty"):
        encoder(ask(clip(), Image(noise()), Audio(b"")))
    with pytest.raises(DataError, match=r"sound 1: .* samples do not say their rate"):
        encoder(ask(Audio(sound())))
    broken = sound()
    broken[5] = torch.nan
    with pytest.raises(DataError, match=r"sound 1: .* not a number"):
        encoder(ask(Audio(broken, RATE_HZ)))
    with pytest.raises(DataError, match="picture 1: "):
        encoder(ask(clip(), Image(b"no picture")))


def test_a_model_without_ears_says_so_and_reads_the_word_as_a_word():
    tokenizer = hearing_tokenizer()
    deaf = TinyModalProcessor.of(hearing_config(audio=None), tokenizer)
    with pytest.raises(DataError, match=r"sound 1: .* no audio tower; \[model.audio\] in a recipe"):
        Encoder(deaf, "chatml")(ask(clip()))


def test_a_place_written_as_text_is_refused(encoder):
    with pytest.raises(DataError, match=r"message 1 \(user\) contains '<audio>'. Sounds are Audio"):
        encoder(ask(Text("hear <audio> here")))
    with pytest.raises(DataError, match="Pictures are Image"):
        encoder(ask(Text("see <image> here")))
    # Speech is not written, so it keeps nothing apart.
    with pytest.raises(DataError, match="contains '<audio>'"):
        encoder(ask(Text("a"), answer=(Text("<aud"), spoken(), Text("io>"))))


def test_two_answers_that_play_other_sounds_are_refused(encoder):
    sample = ask(clip())
    worse = (Message("user", (clip(), clip())), sample.messages[1])
    with pytest.raises(DataError, match="show 1 and 2 pictures and sounds"):
        encoder(replace(sample, rejected=worse))


# ---- speech


SPEAKING = Speaking(rate_hz=8_000, voices=("ann", "bob"))


def test_a_spoken_answer_is_listed_with_its_tokens_and_its_sound(encoder, processor):
    sample = Sample(
        (
            Message("user", (clip(0.7), Text("first"))),
            Message("assistant", (Text("a star"),)),
            Message("user", (Image(noise()), clip(1.6, 2))),
            Message("assistant", (spoken(1.5, voice="bob"), Text("two stars"))),
        ),
        "x:1",
    )
    encoded = encoder.using(speech=SPEAKING)(sample)
    silent = encoder(sample)
    assert silent.speech == ()
    assert torch.equal(silent.ids, encoded.ids)
    (item,) = encoded.speech
    assert processor.tokenizer.decode(encoded.ids[item.first : item.last]) == "two stars<|im_end|>"
    assert bool((encoded.labels[item.first : item.last] != IGNORE).all())
    assert (item.wave.shape, item.wave.dtype, item.voice) == ((12_000,), torch.float32, 1)
    assert item.codes is None


def test_speech_is_neither_written_nor_read_where_nobody_asks(encoder):
    broken = Speech(b"no sound at all")
    mute = ask(clip(), answer=(Text("yes"), broken))
    assert torch.equal(encoder(mute).ids, encoder(ask(clip(), answer=(Text("yes"),))).ids)
    speaks = encoder.using(speech=SPEAKING)
    with pytest.raises(DataError, match=r"x:9: speech of message 2: .* not a sound"):
        speaks(replace(mute, id="x:9"))
    # What came before is history, and what does not train is not learned.
    assert speaks(Sample((*mute.messages, Message("user", (Text("and?"),))), "x:1"), reply=True).speech == ()
    quiet = replace(mute.messages[1], train=False)
    more = (Message("user", (Text("and?"),)), Message("assistant", (Text("no"),)))
    assert speaks(Sample((mute.messages[0], quiet, *more), "x:1")).speech == ()


@pytest.mark.parametrize("template", ["chatml", "plain", "vicuna_v1"])
@pytest.mark.parametrize("train_on", ["answers", "all"])
def test_every_token_of_a_spoken_answer_trains(processor, template, train_on):
    speaks = Encoder(processor, template, train_on=train_on, speech=SPEAKING)
    encoded = speaks(ask(clip(), answer=(Text("it is a circle"), spoken())))
    (item,) = encoded.speech
    assert 0 < item.first < item.last <= len(encoded)
    assert bool((encoded.labels[item.first : item.last] != IGNORE).all())
    words = processor.tokenizer.decode(encoded.ids[item.first : item.last], skip_special_tokens=True)
    assert words.strip() == "it is a circle"


def test_only_the_better_of_two_answers_is_spoken(encoder):
    sample = ask(clip(), answer=(Text("yes"), spoken()))
    worse = (sample.messages[0], Message("assistant", (Text("no"), spoken())))
    encoded = encoder.using(speech=SPEAKING)(replace(sample, rejected=worse))
    (item,) = encoded.speech
    assert item.last <= encoded.parts[0]


def test_speech_in_the_wrong_place_is_refused(encoder):
    speaks = encoder.using(speech=SPEAKING)
    with pytest.raises(DataError, match=r"turn 1 \(user\) has a speech.* is an audio"):
        encoder(ask(spoken(), Text("what?")))
    with pytest.raises(DataError, match="turn 2 has 2 speech parts"):
        encoder(ask(Text("what?"), answer=(Text("a"), spoken(), spoken())))
    with pytest.raises(DataError, match="the answer has no words"):
        encoder(ask(Text("what?"), answer=(spoken(),)))
    with pytest.raises(DataError, match="a spoken answer shows or plays something itself"):
        speaks(ask(Text("what?"), answer=(Text("a"), clip(), Text("b"), spoken())))
    with pytest.raises(DataError, match="which has ann, bob"):
        speaks(ask(Text("what?"), answer=(Text("a"), spoken(voice="eve"))))
    with pytest.raises(DataError, match=r"the limit is 0.5 s"):
        encoder.using(speech=replace(SPEAKING, max_s=0.5))(ask(Text("?"), answer=(Text("a"), spoken())))
