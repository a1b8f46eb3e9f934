"""Replies are what the model says, whatever the batch, the cache and the way they are asked for."""

import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.infer.engine import GREEDY, Engine, Sampling

SHORT = Sampling(max_new_tokens=8)
LANGUAGES = ("llama", "gpt2", "gemma2", "qwen3")


def picture(seed: int) -> Image:
    values = torch.randint(
        0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image(PIL.Image.fromarray(values.numpy()))


def ask(text: str, *pictures: int, name: str = "test") -> Sample:
    return Sample((Message("user", (*map(picture, pictures), Text(text))),), name)


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
                logits[engine.image_token_id] = -torch.inf
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
            suppress_tokens=[engine.image_token_id],
        )
        text = engine.tokenizer.decode(whole[0, len(encoded) :], skip_special_tokens=True).strip()
        assert engine.reply([question], SHORT)[0].text == text


@pytest.mark.parametrize("sampling", [SHORT, Sampling(max_new_tokens=8, temperature=1.5, seed=3)])
def test_a_stream_joins_to_the_reply(engine, sampling):
    for question in QUESTIONS:
        assert "".join(engine.stream(question, sampling)) == engine.reply([question], sampling)[0].text


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
    inputs = engine._prompts([engine.encode(one), engine.encode(other)], torch.device("cpu"))
    (pictures,) = inputs["pixel_values"]
    first, second = pictures.chunk(2)
    assert torch.equal(first, second.flip(0))
    with torch.inference_mode():
        logits = engine.model(**inputs).logits[:, -1]
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


def test_a_reply_ends_at_the_stop_and_does_not_show_it(scripted):
    reply = scripted("a red circle<|im_end|>blue blue").reply([QUESTIONS[0]], Sampling(max_new_tokens=20))[0]
    assert (reply.text, reply.stopped_by) == ("a red circle", "stop")
    assert "".join(scripted("a red circle<|im_end|>blue").stream(QUESTIONS[0])) == "a red circle"


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
    assert "".join(engine.stream(QUESTIONS[0])) == "a red thing ## and"


@settings(deadline=None, max_examples=25)
@given(text=st.text(alphabet="aé€😀 \n", min_size=1, max_size=12))
def test_characters_of_several_tokens_are_streamed_whole(engine, text):
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"] + [engine.tokenizer.eos_token_id]
    steps = iter(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_choose", lambda logits, *_: torch.full((len(logits),), next(steps)))
        pieces = list(engine.stream(QUESTIONS[3], Sampling(max_new_tokens=100)))
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
    logits[:, engine.image_token_id] = 100.0
    assert engine.image_token_id not in engine._choose(logits.clone(), GREEDY, torch.Generator()).tolist()
    hot = Sampling(temperature=2.0)
    for _ in range(20):
        assert engine.image_token_id not in engine._choose(logits.clone(), hot, torch.Generator()).tolist()


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.1, 3.0),
)
def test_only_tokens_within_top_k_and_top_p_are_chosen(engine, seed, top_k, top_p, temperature):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 50, generator=random)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    chosen = int(engine._choose(logits.clone(), sampling, random))
    logits[:, engine.image_token_id] = -torch.inf
    scaled = (logits / temperature)[0]
    better = scaled > scaled[chosen]
    if top_k:
        assert int(better.sum()) < top_k
        scaled = scaled.masked_fill(scaled < scaled.topk(min(top_k, 50)).values[-1], -torch.inf)
    assert float(scaled.softmax(-1)[better].sum()) < top_p + 1e-5


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

        def batch(rows, sampling):
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
