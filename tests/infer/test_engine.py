"""Replies are what the model says, whatever the batch, the cache and the way they are asked for."""

from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.test_codec import TINY
from tests.model.test_hearing import RATE_HZ, build, hearing_config, hearing_tokenizer, sound
from tinymodal.chat.encode import Encoder
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, DataError
from tinymodal.core.types import Audio, Image, Message, Sample, Text
from tinymodal.infer.engine import GREEDY, AudioDelta, Engine, Sampling, TextDelta
from tinymodal.model.codec import open_codec
from tinymodal.model.processing_tinymodal import TinyModalProcessor
from tinymodal.model.talker import build_speech_head

SHORT = Sampling(max_new_tokens=8)
LANGUAGES = ("llama", "gpt2", "gemma2", "qwen3")
IMAGE_ID = 5
"""Of the tiny tokenizer."""


def picture(seed: int) -> Image:
    values = torch.randint(
        0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image(PIL.Image.fromarray(values.numpy()))


def ask(text: str, *pictures: int, name: str = "test") -> Sample:
    return Sample((Message("user", (*map(picture, pictures), Text(text))),), name)


def states(engine: Engine, *samples: Sample) -> torch.Tensor:
    """The last states of prompts that are read together."""
    return engine.open([engine.answer(engine.encode(sample), SHORT) for sample in samples]).step.states_BD


def written(stream) -> str:
    return "".join(delta.text for delta in stream if isinstance(delta, TextDelta))


QUESTIONS = [
    ask("what is it", 1),
    ask("what is it", 2),
    ask("how many red things are there in the picture", 3, 4),
    ask("yes or no"),
    ask("which one", 5),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model())


@pytest.fixture
def scripted(engine, monkeypatch):
    """An engine whose model writes a given text."""

    def make(text: str) -> Engine:
        ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        steps = iter(ids)
        monkeypatch.setattr(engine, "_choose", lambda logits, *_: torch.full((len(logits),), next(steps)))
        return engine

    return make


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_batch_equals_its_members_one_by_one(language):
    engine = Engine(tiny_model(language=language))
    together = engine.reply(QUESTIONS, SHORT)
    alone = [engine.reply([question], SHORT)[0] for question in QUESTIONS]
    assert together == alone
    assert len({reply.text for reply in together}) > 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_greedy_with_a_cache_equals_naive_decoding(language):
    engine = Engine(tiny_model(language=language))
    for question in QUESTIONS:
        encoded = engine.encode(question)
        ids = encoded.ids[None]
        pictures = torch.stack([item.tiles[0] for item in encoded.media]) if encoded.media else None
        written = []
        with torch.inference_mode():
            for _ in range(SHORT.max_new_tokens):
                logits = engine.model(input_ids=ids, pixel_values=pictures, use_cache=False).logits[0, -1]
                logits[IMAGE_ID] = -torch.inf
                written.append(int(logits.argmax()))
                if written[-1] in engine.stop_ids:
                    break
                ids = torch.cat((ids, torch.tensor([written[-1:]])), 1)
        reply = engine.reply([question], SHORT)[0]
        kept = written[:-1] if written[-1] in engine.stop_ids else written
        assert reply.text == engine.tokenizer.decode(kept, skip_special_tokens=True).strip()
        assert reply.tokens_out == len(written)


def test_our_greedy_equals_the_librarys_generate(engine):
    for question in QUESTIONS:
        encoded = engine.encode(question)
        pictures = torch.stack([item.tiles[0] for item in encoded.media]) if encoded.media else None
        whole = engine.model.generate(
            input_ids=encoded.ids[None],
            attention_mask=torch.ones(1, len(encoded), dtype=torch.long),
            pixel_values=pictures,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=sorted(engine.stop_ids),
            pad_token_id=0,
            suppress_tokens=[IMAGE_ID],
        )
        text = engine.tokenizer.decode(whole[0, len(encoded) :], skip_special_tokens=True).strip()
        assert engine.reply([question], SHORT)[0].text == text


@pytest.mark.parametrize("sampling", [SHORT, Sampling(max_new_tokens=8, temperature=1.5, seed=3)])
def test_a_stream_joins_to_the_reply(engine, sampling):
    for question in QUESTIONS:
        assert written(engine.stream(question, sampling)) == engine.reply([question], sampling)[0].text


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**31), batch_size=st.integers(1, 6))
def test_replies_come_in_the_order_of_the_questions_whatever_the_batch(engine, seed, batch_size):
    order = torch.randperm(len(QUESTIONS), generator=torch.Generator().manual_seed(seed)).tolist()
    sampling = Sampling(max_new_tokens=3)
    mixed = engine.reply([QUESTIONS[i] for i in order], sampling, batch_size)
    assert mixed == [engine.reply([QUESTIONS[i]], sampling)[0] for i in order]


def test_swapping_two_pictures_swaps_nothing_else(engine):
    """Each row sees its own pictures, in their order."""
    one, other = ask("which one", 1, 2), ask("which one", 2, 1)
    encoded = [engine.encode(one), engine.encode(other)]
    assert torch.equal(encoded[0].media[0].tiles[0], encoded[1].media[1].tiles[0])
    assert torch.equal(encoded[0].ids, encoded[1].ids)
    first, second = states(engine, one, other)
    assert not torch.allclose(first, second, atol=1e-4)


def test_a_reply_ends_at_the_stop_and_does_not_show_it(scripted):
    reply = scripted("a red circle<|im_end|>blue blue").reply([QUESTIONS[0]], Sampling(max_new_tokens=20))[0]
    assert (reply.text, reply.stopped_by) == ("a red circle", "stop")
    assert written(scripted("a red circle<|im_end|>blue").stream(QUESTIONS[0])) == "a red circle"


def test_a_reply_that_is_not_done_says_so(scripted):
    reply = scripted("red red red red red").reply([QUESTIONS[0]], Sampling(max_new_tokens=3))[0]
    assert (reply.stopped_by, reply.tokens_out) == ("length", 3)


def test_a_stop_of_several_tokens_ends_a_reply_and_never_shows(scripted, monkeypatch):
    text = "a red thing ## and ### blue blue blue"
    engine = scripted(text)
    monkeypatch.setattr(engine, "stop_words", ("###",))
    reply = engine.reply([QUESTIONS[0]], Sampling(max_new_tokens=40))[0]
    assert (reply.text, reply.stopped_by) == ("a red thing ## and", "stop")
    engine = scripted(text)
    monkeypatch.setattr(engine, "stop_words", ("###",))
    assert written(engine.stream(QUESTIONS[0])) == "a red thing ## and"


@settings(deadline=None, max_examples=25)
@given(text=st.text(alphabet="aé€😀 \n", min_size=1, max_size=12))
def test_characters_of_several_tokens_are_streamed_whole(engine, text):
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"] + [engine.tokenizer.eos_token_id]
    steps = iter(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_choose", lambda logits, *_: torch.full((len(logits),), next(steps)))
        pieces = [delta.text for delta in engine.stream(QUESTIONS[3], Sampling(max_new_tokens=100))]
    assert "".join(pieces) == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_row_that_has_stopped_does_not_hold_up_or_change_the_others(engine, monkeypatch):
    """Row 0 stops after one token; the rest go on in a smaller batch and still say what they say alone."""
    alone = [engine.reply([question], SHORT)[0].text for question in QUESTIONS[1:]]
    sizes = []
    own = Engine._choose

    def choose(self, logits, *rest):
        sizes.append(len(logits))
        chosen = own(self, logits, *rest)
        if len(sizes) == 1:
            # Rows are sorted by length: the shortest question is the text-only one.
            chosen[0] = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        return chosen

    monkeypatch.setattr(Engine, "_choose", choose)
    replies = engine.reply([ask("no"), *QUESTIONS[1:]], SHORT)
    assert replies[0].text == ""
    assert [reply.text for reply in replies[1:]] == alone
    assert sizes[0] == len(QUESTIONS)
    assert sizes[1] == len(QUESTIONS) - 1


def test_a_placeholder_is_never_a_word_of_the_reply(engine):
    logits = torch.zeros(2, len(engine.tokenizer))
    logits[:, IMAGE_ID] = 100.0
    encoded = engine.encode(QUESTIONS[0])
    for how in (GREEDY, *(Sampling(temperature=2.0, seed=seed) for seed in range(20))):
        answers = [engine.answer(encoded, how), engine.answer(encoded, how)]
        assert IMAGE_ID not in engine._choose(logits.clone(), answers).tolist()


def test_sampling_repeats_with_its_seed_and_top_k_one_is_greedy(engine):
    hot = Sampling(max_new_tokens=8, temperature=2.0, seed=1)
    assert engine.reply(QUESTIONS, hot) == engine.reply(QUESTIONS, hot)
    other = Sampling(max_new_tokens=8, temperature=2.0, seed=2)
    assert engine.reply(QUESTIONS, hot) != engine.reply(QUESTIONS, other)
    sure = Sampling(max_new_tokens=8, temperature=2.0, top_k=1)
    assert engine.reply(QUESTIONS, sure) == engine.reply(QUESTIONS, SHORT)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_sampling_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError):
        Sampling(**wrong)


def test_a_conversation_beyond_the_models_reach_is_refused_by_name():
    engine = Engine(tiny_model(max_position_embeddings=24))
    with pytest.raises(DataError, match="too-long"):
        engine.reply([ask("what " * 30, 1, name="too-long")])
    reply = engine.reply([ask("what is it", 1)], Sampling(max_new_tokens=500))[0]
    assert reply.tokens_in + reply.tokens_out <= 24
    # A longer neighbour does not shorten it.
    assert (
        engine.reply([ask("what is it", 1), ask("what is it what is it")], Sampling(max_new_tokens=500))[0]
        == reply
    )


def test_the_prompt_is_told_with_pictures_as_words(engine):
    reply = engine.reply([QUESTIONS[2]], Sampling(max_new_tokens=1))[0]
    assert reply.prompt.startswith(
        "<|im_start|>user\n[image: 9 tokens][image: 9 tokens]\nhow many red things"
    )
    assert "<image>" not in reply.prompt


def test_an_engine_may_borrow_a_model_that_is_training(engine):
    engine.model.train()
    try:
        before = engine.reply([QUESTIONS[0]], SHORT)
        assert engine.model.training
        assert all(p.grad is None for p in engine.model.parameters())
    finally:
        engine.model.eval()
    assert engine.reply([QUESTIONS[0]], SHORT) == before


def test_every_part_of_a_borrowed_model_gets_its_own_mode_back(engine):
    """A stage trains some parts and keeps the others, and the whole, in eval mode."""
    model = engine.model
    model.eval()
    model.model.connectors.train()
    before = [module.training for module in model.modules()]
    try:
        engine.reply([QUESTIONS[0]], SHORT)
        assert [module.training for module in model.modules()] == before
        next(iter(engine.stream(QUESTIONS[0], SHORT)))
        assert [module.training for module in model.modules()] == before
    finally:
        model.eval()


def test_large_pictures_are_encoded_a_batch_at_a_time(engine, monkeypatch):
    """A window holds whole batches: at least one, and no further one once its pictures are large enough."""
    monkeypatch.setattr("tinymodal.infer.engine.WINDOW", 4)
    told = []

    def sizes(pixels: int) -> list[int]:
        told.clear()
        monkeypatch.setattr("tinymodal.infer.engine.WINDOW_PIXELS", pixels)
        monkeypatch.setattr(
            engine, "encode", lambda sample: told.append(sample) or Engine.encode(engine, sample)
        )
        waiting = []

        def batch(rows, sampling, say):
            waiting.append(len(told))
            return [f"reply to {row.sample_id}" for row in rows]

        monkeypatch.setattr(engine, "_reply_batch", batch)
        samples = [ask("what", 1, name=str(i)) for i in range(18)]
        assert engine.reply(samples, SHORT, 2) == [f"reply to {i}" for i in range(18)]
        return waiting

    a_picture = 24 * 24
    assert sizes(1) == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert sizes(3 * a_picture) == [4, 4, 8, 8, 12, 12, 16, 16, 18]
    assert sizes(100 * a_picture) == [8, 8, 8, 8, 16, 16, 16, 16, 18]


def test_done_is_told_of_every_reply(engine):
    told = []
    engine.reply(QUESTIONS, Sampling(max_new_tokens=1), batch_size=2, done=told.append)
    assert told == [2, 2, 1]


def test_no_samples_no_replies(engine):
    assert engine.reply([]) == []


# Sounds


@pytest.fixture(scope="module")
def listener() -> Engine:
    """Sees and hears."""
    config = hearing_config()
    encoder = Encoder(TinyModalProcessor.of(config, hearing_tokenizer()), "chatml")
    return Engine(SimpleNamespace(model=build(config), encoder=encoder))


def play(text: str, *media: float | int) -> Sample:
    """A question with sounds of so many seconds (1.5) and pictures (of a seed) before it."""
    parts = [Audio(sound(m, 7), RATE_HZ) if isinstance(m, float) else picture(m) for m in media]
    return Sample((Message("user", (*parts, Text(text))),), "test")


HEARD = [
    play("what is it", 1.0),
    play("what is it", 2.0),
    play("which one", 3, 0.5, 1.0),
    play("which one", 0.5, 4),
    play("yes or no"),
    play("what", 5),
]


def test_a_batch_of_any_media_equals_its_members_one_by_one(listener):
    together = listener.reply(HEARD, SHORT)
    assert together == [listener.reply([question], SHORT)[0] for question in HEARD]
    assert len({reply.text for reply in together}) > 2


def test_swapping_two_sounds_is_heard_and_their_lengths_are_told(listener):
    one, other = play("which one", 0.5, 1.0), play("which one", 1.0, 0.5)
    first, second = states(listener, one, other)
    assert not torch.allclose(first, second, atol=1e-4)
    prompts = [reply.prompt for reply in listener.reply([one, other, HEARD[2]], Sampling(max_new_tokens=1))]
    short, long = (item.tokens for item in listener.encode(one).media)
    assert long > short
    assert f"[audio: {short} tokens][audio: {long} tokens]" in prompts[0]
    assert f"[audio: {long} tokens][audio: {short} tokens]" in prompts[1]
    assert "[image: " in prompts[2]
    assert "<audio>" not in "".join(prompts)


def test_a_sound_is_no_word_of_a_reply(listener):
    place = listener.model.config.audio_token_id
    logits = torch.zeros(2, len(listener.tokenizer))
    logits[:, place] = 100.0
    answers = [listener.answer(listener.encode(HEARD[0]), GREEDY) for _ in range(2)]
    assert place not in listener._choose(logits, answers).tolist()


def test_a_model_without_ears_given_a_sound_says_what_is_missing(engine):
    with pytest.raises(DataError, match=r"no audio tower.*\[model\.audio\]"):
        engine.reply([HEARD[0]], SHORT)


# Speech


class Hum:
    """A codec whose frames are heard as four samples, each one frame late: a sound depends on two frames."""

    rate_hz, frames_per_s, books, book_size, device = 1000, 250.0, 2, 7, torch.device("cpu")

    def decode(self, codes):
        stream = self.stream()
        return torch.cat([stream.feed(codes), stream.finish()])

    def encode(self, wave):
        return wave[: len(wave) // 4 * 4 : 4].mul(6).long().clamp(0, 6).expand(2, -1).contiguous()

    def stream(self):
        last = torch.zeros(2, 1)

        def feed(codes):
            nonlocal last
            assert codes.shape[0] == 2
            both = torch.cat([last, codes.float()], dim=1)
            last = both[:, -1:]
            return (both[:, :-1] + 10 * both[:, 1:]).sum(0).repeat_interleave(4)

        return SimpleNamespace(feed=feed, finish=lambda: last.sum(0).repeat_interleave(4))


def speaking(language: str = "llama", design: str = "talker", **options) -> Engine:
    """An engine of a model that says whatever comes."""
    composed = tiny_model(language=language)
    torch.manual_seed(3)
    books = 2 if design == "talker" else 1
    config = {"design": design, "books": books, "book_size": 7, "width": 16, "longest": 9, "upsample": 5}
    composed.model.speech_head = build_speech_head(config | options, 32).eval()
    codec = Hum()
    codec.books = books
    return Engine(SimpleNamespace(model=composed.model, encoder=composed.encoder, codec=codec))


def heard(stream) -> torch.Tensor:
    return torch.cat([delta.samples for delta in stream if isinstance(delta, AudioDelta)])


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_text_is_the_same_whether_it_is_spoken_or_not(language):
    mute, loud = Engine(tiny_model(language=language)), speaking(language)
    for sampling in (SHORT, Sampling(max_new_tokens=8, temperature=1.5, seed=3)):
        plain = mute.reply(QUESTIONS, sampling)
        aloud = loud.reply(QUESTIONS, sampling, speak=True)
        assert [(r.text, r.tokens_out) for r in aloud] == [(r.text, r.tokens_out) for r in plain]
        for question in QUESTIONS:
            (alone,) = mute.reply([question], sampling)
            assert written(loud.stream(question, sampling, speak=True)) == alone.text
    # To the last bit, not only to the likeliest word.
    assert torch.equal(states(mute, *QUESTIONS), states(loud, *QUESTIONS))


def test_a_streams_sound_joins_to_that_of_the_reply():
    engine = speaking()
    for question in QUESTIONS:
        deltas = list(engine.stream(question, SHORT, speak=True))
        (reply,) = engine.reply([question], SHORT, speak=True)
        assert reply.rate_hz == 1000
        assert len(reply.audio) > 4
        torch.testing.assert_close(heard(deltas), reply.audio)
        assert {delta.rate_hz for delta in deltas if isinstance(delta, AudioDelta)} == {1000}
    together = engine.reply(QUESTIONS, SHORT, speak=True)
    for question, reply in zip(QUESTIONS, together, strict=True):
        torch.testing.assert_close(reply.audio, engine.reply([question], SHORT, speak=True)[0].audio)


@pytest.mark.parametrize("kind", ["tinymodal_codec", "tinymodal_units"])
def test_a_streams_sound_joins_without_a_seam_with_our_own_codecs(kind):
    torch.manual_seed(0)
    codec = open_codec({"model_type": kind, **TINY[kind]})
    design = "units" if kind == "tinymodal_units" else "talker"
    engine = speaking(design=design, books=codec.books, book_size=codec.book_size)
    engine.composed.codec = codec
    for question in QUESTIONS[:2]:
        sound_of_stream = heard(engine.stream(question, SHORT, speak=True))
        (reply,) = engine.reply([question], SHORT, speak=True)
        assert len(reply.audio) > 100
        torch.testing.assert_close(sound_of_stream, reply.audio, rtol=0, atol=1e-5)


def test_what_is_said_is_read_off_the_states_that_chose_the_words():
    """Against the whole conversation run at once, without a cache, as training runs it."""
    engine = speaking()
    question = QUESTIONS[0]
    encoded, ids = engine.encode(question), []
    for step in engine._decode([engine.answer(encoded, SHORT)]):
        ids.append(int(step.tokens_B[0]))
    whole = torch.cat([encoded.ids, torch.tensor(ids)])[None]
    model = engine.model
    with torch.inference_mode():
        out = model.model(input_ids=whole, pixel_values=encoded.media[0].tiles[0][None])
        states = out.last_hidden_state[0, len(encoded) - 1 : -1]
        speaker = model.speech_head.begin()
        begun = speaker.feed(states, model.get_input_embeddings()(torch.tensor(ids)))
        codes = torch.cat([begun, speaker.finish()], dim=1)
    torch.testing.assert_close(heard(engine.stream(question, SHORT, speak=True)), Hum().decode(codes))


@pytest.mark.parametrize("design", ["talker", "units"])
def test_the_first_sound_comes_before_the_text_is_over(monkeypatch, design):
    engine = speaking(design=design, read=1, write=3)
    if design == "units":
        # Of one codebook; and untrained, so it is made to say something at every place.
        monkeypatch.setattr(engine.composed.codec, "stream", units_stream)
        engine.model.speech_head.predict.bias.data[-1] = -100
    else:
        engine.model.speech_head.predict.bias.data.view(2, -1)[0, -1] = -100
    ids = engine.tokenizer("a red circle and a blue star<|im_end|>", add_special_tokens=False)["input_ids"]
    steps = iter(ids)
    monkeypatch.setattr(engine, "_choose", lambda logits, *_: torch.full((len(logits),), next(steps)))
    kinds = [type(delta) for delta in engine.stream(QUESTIONS[0], speak=True)]
    assert kinds[0] is TextDelta
    first_sound, last_text = kinds.index(AudioDelta), len(kinds) - 1 - kinds[::-1].index(TextDelta)
    assert first_sound < last_text
    assert kinds.count(TextDelta) == 7


def units_stream():
    return SimpleNamespace(feed=lambda codes: codes[0].float(), finish=lambda: torch.zeros(0))


def test_a_reply_without_words_is_silent(monkeypatch):
    engine = speaking()
    stop = engine.tokenizer.convert_tokens_to_ids("<|im_end|>")
    monkeypatch.setattr(engine, "_choose", lambda logits, *_: torch.full((len(logits),), stop))
    assert list(engine.stream(QUESTIONS[0], speak=True)) == []
    (reply,) = engine.reply([QUESTIONS[0]], speak=True)
    assert (reply.text, len(reply.audio), reply.rate_hz) == ("", 0, 1000)


def test_nothing_is_said_that_was_not_asked_for(engine):
    (reply,) = engine.reply([QUESTIONS[0]], SHORT)
    assert (reply.audio, reply.rate_hz) == (None, None)


def test_speech_asked_of_a_model_without_a_mouth_names_the_part_and_the_recipe(engine):
    for ask_aloud in (
        lambda: engine.reply([QUESTIONS[0]], SHORT, speak=True),
        lambda: list(engine.stream(QUESTIONS[0], SHORT, speak=True)),
    ):
        with pytest.raises(CheckpointError, match=r"no speech head.*\[model\.speech\]"):
            ask_aloud()
    mouth = speaking()
    mouth.composed.codec = None
    with pytest.raises(CheckpointError, match="no codec"):
        mouth.reply([QUESTIONS[0]], SHORT, speak=True)


def test_voices_are_named_or_heard_from_a_clip():
    engine = speaking(voices=("ann", "bob"), reference=4)
    clip = torch.randint(7, (2, 9), generator=torch.Generator().manual_seed(0))
    said = {
        voice if isinstance(voice, str | int) else str(voice is None): engine.reply(
            [QUESTIONS[0]], SHORT, speak=True, voice=voice
        )[0].audio.tolist()
        for voice in (None, "ann", 1, "bob", clip)
    }
    assert said["True"] == said["ann"]
    assert said[1] == said["bob"]
    with pytest.raises(DataError, match=r"voice 'eve' is not one of this model's, which has ann, bob"):
        engine.reply([QUESTIONS[0]], SHORT, speak=True, voice="eve")
    with pytest.raises(DataError, match="voice 2 of a speech head with 2"):
        list(engine.stream(QUESTIONS[0], SHORT, speak=True, voice=2))
    with pytest.raises(DataError, match="voices by name only"):
        speaking().reply([QUESTIONS[0]], SHORT, speak=True, voice=clip)


def test_a_clip_on_disk_is_a_voice_too(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "ann.wav"
    soundfile.write(path, torch.linspace(-1, 1, 400).numpy(), 1000, "FLOAT")
    engine = speaking(reference=4)
    codes = engine.mouth.known(path)
    assert torch.equal(codes, Hum().encode(torch.linspace(-1, 1, 400)))
    assert len(engine.reply([QUESTIONS[0]], SHORT, speak=True, voice=path)[0].audio)
    with pytest.raises(DataError, match="nobody"):
        engine.reply([QUESTIONS[0]], SHORT, speak=True, voice=tmp_path / "nobody.wav")


def test_speech_by_chance_repeats_with_its_seed_and_leaves_the_text_alone():
    engine = speaking()

    def said(seed, temperature=3.0):
        sampling = Sampling(max_new_tokens=8, seed=seed, speech_temperature=temperature)
        (reply,) = engine.reply([QUESTIONS[0]], sampling, speak=True)
        return reply.text, reply.audio.tolist()

    assert said(1) == said(1)
    assert said(1)[0] == said(2)[0]
    assert said(1)[1] != said(2)[1]
    assert said(1, 0.0) == said(2, 0.0)
    with pytest.raises(DataError, match="likeliest units only"):
        speaking(design="units").reply([QUESTIONS[0]], Sampling(speech_temperature=1.0), speak=True)
    with pytest.raises(ValueError, match="speech_top_k must not be negative"):
        Sampling(speech_top_k=-1)
