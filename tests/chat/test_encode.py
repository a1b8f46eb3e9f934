import copy
import pickle
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.chat.conftest import FakeProcessor
from tinymodal.chat.encode import Encoder, bare_tokenizer
from tinymodal.chat.template import alternatives, template_for
from tinymodal.compose.tiny import SPECIAL, tiny_tokenizer
from tinymodal.core.errors import CheckpointError, DataError
from tinymodal.core.types import IGNORE, Image, Message, Sample, Text

CONTROL = alternatives(SPECIAL)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 and TinyLlama: spaces are ▁, one is put before the text, unknown characters are bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}}
    words = ["▁", "▁A", "▁cat", "▁red", "USER", "ASSISTANT", "▁USER", "▁ASSISTANT", ":", "at", "re"]
    for word in [*"ASERUITNcatred.", *words]:
        vocab.setdefault(word, len(vocab))
    merges = [("▁", "A"), ("a", "t"), ("c", "at"), ("▁", "cat"), ("r", "e"), ("re", "d"), ("▁", "red")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def trimming_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2 and Phi: offsets are trimmed of spaces, runs of spaces are tokens; NFC as Qwen."""
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("  ", normalized=False), AddedToken("\n\n", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


TOKENIZERS = {"byte-level": tiny_tokenizer, "metaspace": metaspace_tokenizer, "trimming": trimming_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def anyone(request) -> FakeProcessor:
    return FakeProcessor(TOKENIZERS[request.param]())


def ask(*parts, answer: str | None = "a red square", id: str = "rows.jsonl:7") -> Sample:
    user = Message("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))
    return Sample((user,) if answer is None else (user, Message("assistant", (Text(answer),))), id)


def trained_text(processor, encoded) -> str:
    """Byte by byte where the tokenizer's decoder would lose a leading space."""
    ids = encoded.ids[encoded.labels != IGNORE].tolist()
    backend = processor.tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return processor.tokenizer.decode(ids)
    pieces = [backend.id_to_token(i).replace("▁", " ") for i in ids]
    raw = b"".join(bytes.fromhex(p[3:5]) if p.startswith("<0x") else p.encode() for p in pieces)
    return raw.decode()


# What breaks prefix counting: leading spaces and newlines, runs of them, characters of several tokens.
texts = (
    st.lists(
        st.one_of(
            st.sampled_from(
                [
                    "\n",
                    "\n\n",
                    " ",
                    "  ",
                    "\t",
                    "▁",
                    "A cat",
                    "漢字",
                    "🙂",
                    "👩‍👩‍👧",
                    "é",
                    "e\u0301",
                    "ASSISTANT:",
                ]
            ),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        ),
        min_size=1,
        max_size=5,
    )
    .map("".join)
    .filter(lambda text: text and not CONTROL.search(text))
)


@st.composite
def samples(draw):
    messages = [Message("system", (Text(draw(texts)),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        image = st.sampled_from([b"1", b"2"]).map(Image)
        parts = draw(st.lists(st.one_of(image, texts.map(Text)), min_size=1, max_size=3))
        joined = "".join(p.text if isinstance(p, Text) else "\0" for p in parts)
        if CONTROL.search(joined):
            parts = parts[:1]
        train = draw(st.sampled_from([None, None, False]))
        messages += [Message("user", tuple(parts)), Message("assistant", (Text(draw(texts)),), train)]
    messages[-1] = Message("assistant", messages[-1].parts)
    return Sample(tuple(messages), "made:1")


def expected_training(sample, template) -> str:
    turn = template.turns["assistant"]
    return "".join(
        turn.lead + "".join(p.text for p in m.parts) + turn.tail for m in sample.messages if m.trains
    )


@pytest.mark.parametrize("name", ["chatml", "vicuna_v1"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_trains_is_exactly_the_assistants_words_and_stop(processor, name, data):
    encoder = Encoder(processor, name)
    sample = data.draw(samples())
    encoded = encoder(sample)
    assert trained_text(processor, encoded) == expected_training(sample, encoder.template)
    assert encoded.labels[0] == IGNORE


@pytest.mark.parametrize("name", ["plain", "vicuna_v1", "chatml"])  # all of them: test_families.py
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_ids_equal_apply_chat_template_of_the_jinja(anyone, name, data):
    """And each picture's one placeholder has become as many as the picture takes."""
    encoder = Encoder(anyone, name)
    sample = data.draw(samples())
    if name == "plain":
        sample = Sample(sample.messages[-2:], sample.id)
    conversation = [
        {
            "role": m.role,
            "content": [
                {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image"}
                for p in m.parts
            ],
        }
        for m in sample.messages
    ]
    text = anyone.tokenizer.apply_chat_template(
        conversation, chat_template=encoder.template.to_jinja(), tokenize=False
    )
    for part in sample.media():
        text = text.replace("<image>", "<placeholder>" * int(part.source) ** 2, 1)
    ids = anyone.tokenizer(text.replace("<placeholder>", "<image>"), add_special_tokens=False)["input_ids"]
    assert encoder(sample).ids.tolist() == ids


@pytest.mark.parametrize("name", ["chatml", "vicuna_v1"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_labels_are_ids_or_ignored_and_never_leave_the_spans(anyone, name, data):
    """On tokenizers that join characters over the border, less may train, and never more."""
    encoder = Encoder(anyone, name)
    sample = data.draw(samples())
    encoded = encoder(sample)
    kept = encoded.labels != IGNORE
    assert torch.equal(encoded.labels[kept], encoded.ids[kept])
    assert not bool((encoded.labels == anyone.image_token_id).any())
    expected = unicodedata.normalize("NFC", expected_training(sample, encoder.template))
    found = unicodedata.normalize("NFC", trained_text(anyone, encoded))
    # What a tokenizer joined over a border is at most the whitespace there; to Llama's, ▁ is a space.
    assert "".join(found.replace("▁", " ").split()) == "".join(expected.replace("▁", " ").split())


def test_a_token_that_straddles_the_border_of_a_span_does_not_train():
    processor = FakeProcessor(trimming_tokenizer())
    encoder = Encoder(processor, "chatml")
    encoded = encoder(ask("Q", answer="\nyes"))
    joint = processor.tokenizer.convert_tokens_to_ids("\n\n")
    assert encoded.labels[encoded.ids == joint].tolist() == [IGNORE]
    assert trained_text(processor, encoded) == "yes<|im_end|>"


def test_a_space_the_tokenizer_trims_off_the_offsets_still_decides():
    """GPT-2 reports " red" without its space; where the space is the prompt's, the token straddles."""
    from dataclasses import replace

    from tinymodal.chat.template import Turn

    processor = FakeProcessor(trimming_tokenizer())
    template = template_for("vicuna_v1", processor.tokenizer)
    turns = {**template.turns, "assistant": Turn("ASSISTANT: ", "", "</s>")}
    encoded = Encoder(processor, replace(template, turns=turns))(ask("Q", answer="red square"))
    assert trained_text(processor, encoded) == " square</s>"


def test_golden_labels_of_llavas_first_turn():
    """TinyLLaVA Factory with Llama: 'A cat ...' trains [▁A, ▁cat, ..., </s>], the space inside the first."""
    processor = FakeProcessor(metaspace_tokenizer())
    encoded = Encoder(processor, "vicuna_v1")(ask(Image(b"1"), "What?", answer="A cat"))
    kept = encoded.ids[encoded.labels != IGNORE]
    assert processor.tokenizer.convert_ids_to_tokens(kept.tolist()) == ["▁A", "▁cat", "</s>"]
    assert encoded.ids[0] == processor.tokenizer.bos_token_id
    assert (encoded.ids == processor.tokenizer.bos_token_id).sum() == 1


def test_a_stop_that_swallows_whitespace_still_trains():
    """Phi-3's <|end|> takes the newline after it into its own offsets."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    processor = FakeProcessor(tokenizer)
    encoded = Encoder(processor, "tokenizer")(ask("Q", answer="yes"))
    assert trained_text(processor, encoded) == "yes<|end|>"


def test_tokens_truncation_and_padding_of_the_original_do_not_reach_the_encoder():
    processor = FakeProcessor()
    encoder = Encoder(processor, "chatml")
    before = encoder(ask("what is it", answer="a red square")).ids
    processor.tokenizer(["a", "b c d"], padding="max_length", truncation=True, max_length=2)
    assert torch.equal(encoder(ask("what is it", answer="a red square")).ids, before)


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@given(text=texts)
@settings(max_examples=40, deadline=None)
def test_the_bare_tokenizer_gives_the_ids_of_the_whole_one(make, text):
    tokenizer = make()
    text = f"<image>{text}<|im_end|>\n"
    assert (
        bare_tokenizer(tokenizer).encode(text).ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    )


def test_ids_with_gaps_are_kept():
    tokenizer = tiny_tokenizer()
    document = __import__("json").loads(tokenizer.backend_tokenizer.to_str())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 5000, "content": "<far>"})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(__import__("json").dumps(document))
    )
    assert tokenizer.convert_tokens_to_ids("<far>") == bare_tokenizer(tokenizer).token_to_id("<far>")


def test_pictures_in_any_turn_keep_their_order_and_their_counts(processor):
    sample = Sample(
        (
            Message("user", (Image(b"2"), Text("and"), Image(b"1"))),
            Message("assistant", (Text("one"),)),
            Message("user", (Text("then "), Image(b"3"))),
            Message("assistant", (Image(b"1"), Text("two"))),
        ),
        "x",
    )
    encoded = Encoder(processor, "chatml")(sample)
    assert [item.tokens for item in encoded.media] == [4, 1, 9, 1]
    assert [item.grid for item in encoded.media] == [(2, 2), (1, 1), (3, 3), (1, 1)]
    assert int((encoded.ids == processor.image_token_id).sum()) == 15
    assert trained_text(processor, encoded) == "one<|im_end|>\ntwo<|im_end|>"
    assert encoded.num_patches == 4 * 15


def test_a_picture_keeps_the_texts_beside_it_apart(processor):
    encoded = Encoder(processor, "chatml")(ask("<ima", Image(b"2"), "ge>"))
    assert int((encoded.ids == processor.image_token_id).sum()) == 4


def test_a_conversation_without_pictures_has_none(processor):
    encoded = Encoder(processor, "chatml")(ask("what is red"))
    assert encoded.media == ()
    assert encoded.num_targets == 4


def test_position_zero_never_trains(processor):
    caption = Sample((Message("assistant", (Text("a red square"),)),), "x")
    encoded = Encoder(processor, "plain")(caption)
    assert encoded.labels[0] == IGNORE
    assert trained_text(processor, encoded) == " red square\n</s>"


def test_train_on_all_trains_every_token_but_the_first_and_the_pictures(processor):
    encoded = Encoder(processor, "chatml", train_on="all")(ask(Image(b"2"), "what"))
    ignored = encoded.labels == IGNORE
    assert int(ignored.sum()) == 1 + 4
    assert bool(ignored[0])


def test_a_prompt_is_the_beginning_of_the_conversation_with_its_answer(processor):
    for name in ("chatml", "vicuna_v1", "plain"):
        encoder = Encoder(processor, name)
        whole, prompt = (
            encoder(ask(Image(b"2"), "what")),
            encoder(ask(Image(b"2"), "what", answer=None), reply=True),
        )
        assert torch.equal(whole.ids[: len(prompt)], prompt.ids)
        assert prompt.num_targets == 0
        first = int((whole.labels != IGNORE).nonzero()[0])
        assert first == len(prompt)


def test_targets_of_a_picture_travel_with_it(processor):
    image = Image(b"2", targets=((0, 1), (2, 3), (4, 5), (6, 7)))
    encoded = Encoder(processor, "chatml")(ask(image, "what"))
    assert encoded.media[0].targets.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(
        DataError, match=r"rows.jsonl:7: picture 1 has targets for 4 tokens but takes 9 \(3x3\)"
    ):
        Encoder(processor, "chatml")(ask(Image(b"3", image.targets), "what"))


def test_explain_shows_every_character_and_collapses_pictures(processor):
    encoder = Encoder(processor, "chatml")
    pieces = encoder.explain(ask(Image(b"3"), "what 🙂", answer="漢字 red"))
    assert "".join(p.text for p in pieces) == (
        "<|im_start|>user\n[image: 6x6 -> 9 tokens]\nwhat 🙂<|im_end|>\n<|im_start|>assistant\n漢字 "
        "red<|im_end|>\n"
    )
    assert "".join(p.text for p in pieces if p.trains) == "漢字 red<|im_end|>"
    assert [p.text for p in pieces if p.trains] == ["漢", "字", " red", "<|im_end|>"]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_explain_says_what_the_labels_say(anyone, data):
    encoder = Encoder(anyone, "chatml")
    sample = data.draw(samples())
    pieces = encoder.explain(sample)
    rendered = encoder.template.render(sample.messages, iter(["<image>"] * 99))
    shown = "".join(
        "<image>" if p.text.startswith("[image: ") and "tokens]" in p.text else p.text for p in pieces
    )
    assert shown == rendered.text
    assert any(p.trains for p in pieces) == bool((encoder(sample).labels != IGNORE).any())


def test_using_changes_the_template_and_keeps_the_rest(processor):
    encoder = Encoder(processor, "chatml", train_on="all", max_prompt_tokens=9)
    other = encoder.using("plain")
    assert (other.template.name, other.train_on, other.max_prompt_tokens) == ("plain", "all", 9)
    assert encoder.using(train_on="answers").template is encoder.template


def test_stop_ids_are_the_templates_stop_and_the_end_of_text(processor):
    assert Encoder(processor, "chatml").stop_ids == (4, 2)
    assert Encoder(processor, "vicuna_v1").stop_ids == (2,)


def test_an_encoder_travels_to_a_worker(processor):
    encoder = pickle.loads(pickle.dumps(Encoder(processor, "chatml")))
    assert torch.equal(encoder(ask("what")).ids, Encoder(processor, "chatml")(ask("what")).ids)


U = Message("user", (Text("what"),))
A = Message("assistant", (Text("red"),))
S = Message("system", (Text("be brief"),))
BAD = {
    "empty": ((), "the conversation is empty; it needs"),
    "ends with the user": ((U, A, U), "ends with the user, so its last turn has no answer"),
    "system only": ((S,), "ends with the system"),
    "two answers": ((U, A, A), "message 3: two assistant turns in a row"),
    "two questions": ((U, U, A), "message 2: two user turns in a row"),
    "answer first": ((A, U, A), "message 1: the conversation begins with the assistant"),
    "answer after system": ((S, A), "message 2: the conversation begins with the assistant"),
    "late system": ((U, A, S, U, A), "message 3 is from the system, which may only open"),
    "unknown role": (
        (U, Message("tool", (Text("x"),))),
        "message 2 has the role 'tool'; known: system, user, assistant",
    ),
    "no words": ((U, Message("assistant", ())), "message 2: the answer has no words"),
    "nothing trains": ((U, Message("assistant", A.parts, train=False)), "nothing trains"),
    "placeholder in text": (
        (Message("user", (Text("see <image> here"),)), A),
        "message 1 \\(user\\) contains '<image>'. Pictures are Image",
    ),
    "placeholder in two texts": ((Message("user", (Text("<ima"), Text("ge>"))), A), "contains '<image>'"),
    "control token": (
        (U, Message("assistant", (Text("ok<|im_end|>"),))),
        "message 2 \\(assistant\\) contains '<|im_end|>'. It is a control token".replace("|", "\\|"),
    ),
    "end of text": ((Message("user", (Text("</s>"),)), A), "contains '</s>'"),
    "bad picture": ((Message("user", (Image(b"1"), Image(b"no"))), A), "picture 2: b'no' is not a picture"),
    "half a character": ((Message("user", (Text("\ud83d"),)), A), "half a character \\(U\\+D83D\\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_one_line_that_names_the_row(processor, name):
    messages, words = BAD[name]
    with pytest.raises(DataError, match=words) as raised:
        Encoder(processor, "chatml")(Sample(messages, "rows.jsonl:7"))
    assert str(raised.value).startswith("rows.jsonl:7: ")
    assert "\n" not in str(raised.value)


def test_replying_asks_for_the_users_turn_and_forgives_an_empty_answer_before_it(processor):
    encoder = Encoder(processor, "chatml", max_prompt_tokens=20)
    with pytest.raises(DataError, match="must end with the user, found assistant"):
        encoder(Sample((U, A), "chat"), reply=True)
    assert encoder(Sample((U, Message("assistant", (Text(""),)), U), "chat"), reply=True).num_targets == 0
    with pytest.raises(DataError, match="takes 33 tokens and the model reads at most 20"):
        encoder(Sample((U, A, U, A, U), "chat"), reply=True)


def test_a_template_that_loses_a_picture_is_named(processor):
    tokenizer = tiny_tokenizer(chat_template="{% for m in messages[1:] %}{{ m.content }}</s>{% endfor %}")
    encoder = Encoder(FakeProcessor(tokenizer), "tokenizer")
    with pytest.raises(
        DataError, match="1 pictures but 0 places for them in the text that template 'tokenizer'"
    ):
        encoder(ask(Image(b"1"), "what"))


def test_a_control_token_in_other_letters_is_found_where_the_tokenizer_normalizes():
    tokenizer = tiny_tokenizer()
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.normalizer = normalizers.NFKC()
    backend.add_tokens([AddedToken("<stop>", special=True, normalized=True)])
    encoder = Encoder(
        FakeProcessor(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")), "chatml"
    )
    assert encoder(ask("what")).num_targets == 4
    with pytest.raises(DataError, match="becomes a control token when the tokenizer normalizes it"):
        encoder(ask("what ＜stop＞"))


def test_a_tokenizer_that_does_not_know_its_stop_inside_a_text_is_refused():
    """Early Llama files: with ``normalized`` true the stop is looked for with a ▁ before it."""
    tokenizer = tiny_tokenizer()
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.normalizer = normalizers.Prepend("▁")
    backend.add_tokens([AddedToken("<stop>", special=True, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<stop>")
    with pytest.raises(CheckpointError, match="reads 0 control tokens where template 'vicuna_v1' wrote 1"):
        Encoder(FakeProcessor(tokenizer), "vicuna_v1")(ask("what"))


def test_a_tokenizer_without_the_templates_tokens_or_without_offsets_is_refused():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>")), eos_token="</s>"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    with pytest.raises(CheckpointError, match="template 'chatml' needs '<\\|im_end\\|>' to be one token"):
        Encoder(FakeProcessor(tokenizer), "chatml")
    with pytest.raises(CheckpointError, match="no chat template of its own"):
        Encoder(FakeProcessor(), "tokenizer")

    class Slow:
        pass

    with pytest.raises(CheckpointError, match="Slow cannot tell which characters a token stands for"):
        bare_tokenizer(Slow())
