"""What was read before is found again where it is the same, and only there."""

import PIL.Image
import pytest
import torch

from tests.infer.test_engine import QUESTIONS, SHORT, picture, written
from tests.infer.test_scheduler import JOINED
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.types import Message, Sample, Text
from tinymodal.infer.engine import Engine, Sampling
from tinymodal.infer.kept import BLOCK, Kept, Names, name_of

PLACES = {"image": 5}


def turns(*words: str, seed: int = 1) -> Sample:
    """Questions and answers in turn, the first with a picture."""
    first = Message("user", (picture(seed), Text(words[0])))
    others = [
        Message("assistant" if n % 2 == 0 else "user", (Text(word),)) for n, word in enumerate(words[1:])
    ]
    return Sample((first, *others), "turns")


@pytest.mark.parametrize("language", JOINED)
def test_a_second_turn_reads_its_new_words_only_and_says_the_same(language):
    plain, keeps = Engine(tiny_model(language=language)), Engine(tiny_model(language=language), prefix_mb=8)
    how = Sampling(max_new_tokens=20)
    conversation = turns("how many red things are in the picture")
    for question in ("and how many blue things", "which of them is larger"):
        said = written(keeps.stream(conversation, how))
        assert said == plain.reply([conversation], how)[0].text
        conversation = Sample(
            (*conversation.messages, Message("assistant", (Text(said),)), Message("user", (Text(question),))),
            "turns",
        )
    before = keeps.language.num_read, keeps.language.num_perceived
    answer = keeps.answer(keeps.encode(conversation), how)
    keeps.open([answer], keeps.kept)
    assert answer.num_kept >= 2 * BLOCK
    assert keeps.language.num_read - before[0] == len(answer.encoded) - answer.num_kept
    assert keeps.language.num_perceived == before[1] == 1
    assert written(keeps.stream(conversation, how)) == plain.reply([conversation], how)[0].text


def test_another_picture_under_the_same_words_is_another_conversation():
    engine = Engine(tiny_model(), prefix_mb=8)
    words = ("how many red things are there in the picture", "three", "and how many blue ones are there")
    for seed in (1, 2, 1, 2):
        sample = turns(*words, seed=seed)
        assert written(engine.stream(sample, SHORT)) == engine.reply([sample], SHORT)[0].text
    names = [Names(engine.encode(turns(*words, seed=seed)), PLACES).found for seed in (1, 2)]
    assert len(names[0]) >= 2
    assert not set(names[0]) & set(names[1])


def test_names_are_the_same_however_a_conversation_grew():
    engine = Engine(tiny_model())
    encoded = engine.encode(QUESTIONS[2])
    grown = Names(encoded, PLACES)
    ids = list(range(10, 60))
    for n in range(0, 50, 7):
        grown.grow(ids[n : n + 7])
    at_once = Names(encoded, PLACES)
    at_once.grow(ids)
    assert grown.found == at_once.found
    assert len(grown.found) == (len(encoded) + 50) // BLOCK
    other = Names(encoded, PLACES)
    other.grow([11, *ids[1:]])
    same = len(encoded) // BLOCK
    assert other.found[:same] == grown.found[:same]
    assert not set(other.found[same:]) & set(grown.found[same:])


def test_a_block_that_ends_within_a_picture_is_gone_on_from():
    """Sixteen tokens end in the middle of nine placeholders: the rest of them still come from the picture."""
    engine = Engine(tiny_model(), prefix_mb=8)
    cut = []
    for text in ("a", "a b", "a b c", "a b c d", "a b c d e f"):
        for words in ("what is it", "where is it"):
            sample = Sample((Message("user", (Text(text), picture(3), Text(words))),), "cut")
            assert written(engine.stream(sample, SHORT)) == engine.reply([sample], SHORT)[0].text
            places = (engine.encode(sample).ids == PLACES["image"]).nonzero()[:, 0].tolist()
            cut.append(places[0] < BLOCK <= places[-1])
    assert any(cut)


def test_the_limit_holds_and_the_oldest_goes_first():
    kept = Kept(1)
    blocks = {n: torch.zeros(75_000) for n in range(5)}  # 0.3 MB each
    for n, block in blocks.items():
        kept.put(n, block, block.nbytes)
        kept.get(0)
    assert [n for n in blocks if kept.get(n) is not None] == [0, 3, 4]
    assert kept.bytes == 900_000
    kept.put("large", torch.zeros(1_000_000), 4_000_000)
    assert kept.get("large") is None
    kept.clear()
    assert (kept.bytes, len(kept)) == (0, 0)


def test_of_one_conversation_the_end_goes_first():
    kept = Kept(1)
    size = 1_000_000 // 4 // BLOCK // 4  # four blocks fill it

    def cut(first, last):
        return torch.zeros(last - first, size)

    kept.keep([b"a", b"b", b"c"], cut)
    kept.keep([b"x", b"y"], cut)
    assert len(kept.find([b"a", b"b", b"c"])) == 2
    assert len(kept.find([b"x", b"y"])) == 2


def test_nothing_is_kept_unless_asked():
    engine = Engine(tiny_model())
    assert written(engine.stream(QUESTIONS[0], SHORT))
    assert len(engine.kept) == 0
    keeps = Engine(tiny_model(), prefix_mb=8)
    assert written(keeps.stream(QUESTIONS[0], SHORT))
    assert keeps.kept.bytes > 0
    keeps.forget()
    assert len(keeps.kept) == 0


def test_changed_weights_are_asked_anew_once_the_engine_forgot():
    engine = Engine(tiny_model(), prefix_mb=8)
    sample = turns("how many red things are in the picture")
    before = written(engine.stream(sample, SHORT))
    with torch.no_grad():
        for parameter in engine.model.model.language_model.parameters():
            parameter.mul_(-1.5)
    engine.forget()
    assert written(engine.stream(sample, SHORT)) == engine.reply([sample], SHORT)[0].text != before


def test_sources_are_told_apart_without_decoding_them(tmp_path):
    one, two = picture(1).source, picture(2).source
    assert name_of(one) == name_of(one.copy()) != name_of(two)
    assert name_of(one) != name_of(one.resize((12, 48)))
    turned = one.copy()
    turned.info["exif"] = b"turned"
    assert name_of(turned) != name_of(one)
    assert name_of(one.convert("P")) is None
    path = tmp_path / "a.png"
    assert name_of(path) is None
    one.save(path)
    first = name_of(path)
    two.save(path)
    assert first != name_of(path) is not None
    wave = torch.randn(10)
    assert name_of(wave) == name_of(wave.clone()) != name_of(wave.view(2, 5))
    assert name_of(b"a") != name_of(b"b")
    assert PIL.Image.open(path).info == {}
