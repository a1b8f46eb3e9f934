"""Spoken answers reach the batch at the places of their own tokens, or are refused by name."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Encoded, SpeechItem
from tinymodal.data.collate import collate
from tinymodal.data.spoken import lay_speech

PAD, IMAGE = 0, 1


def sample_of(name: str, spans, num: int, books: int = 2, silent=()) -> Encoded:
    """Tokens that tell where they stand; the spans train, and those that are not ``silent`` are spoken."""
    ids = torch.arange(num) + 10
    labels = torch.full((num,), IGNORE)
    items = []
    for n, (first, last) in enumerate(spans):
        labels[first:last] = ids[first:last]
        if n not in silent:
            codes = torch.arange(books * (last - first)).view(books, -1) % 7
            items.append(SpeechItem(first, last, None, codes, voice=n))
    return Encoded(ids, labels, (), name, speech=tuple(items))


def draws():
    """Answers of 1 to 3 tokens behind questions of 1 to 4."""
    turn = st.tuples(st.integers(1, 4), st.integers(1, 3))
    return st.lists(st.lists(turn, min_size=1, max_size=3), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(turns=draws(), width=st.integers(1, 3), silent=st.sets(st.integers(0, 2)))
def test_every_spoken_token_is_found_among_the_targets(turns, width, silent):
    samples = []
    for n, sizes in enumerate(turns):
        spans, at = [], 0
        for asked, answered in sizes:
            spans.append((at + asked, at + asked + answered))
            at += asked + answered
        samples.append(sample_of(f"s{n}", spans, at, silent=silent))
    rows = [samples[i : i + width] for i in range(0, len(samples), width)]
    batch = collate(rows, PAD, IMAGE)
    spoken = [(sample, item) for sample in samples for item in sample.speech]
    if not spoken:
        assert batch.speech_codes is None
        assert batch.speech_take is None
        return
    assert batch.speech_tokens == tuple(item.last - item.first for _, item in spoken)
    assert batch.speech_frames == tuple(item.codes.shape[1] for _, item in spoken)
    assert torch.equal(batch.speech_codes, torch.cat([item.codes for _, item in spoken], 1))
    assert batch.speech_voices.tolist() == [item.voice for _, item in spoken]
    said = torch.cat([sample.ids[item.first : item.last] for sample, item in spoken])
    assert torch.equal(batch.target_ids[batch.speech_take], said)
    # The state that is read is the one before the token, in the same row.
    assert torch.equal(batch.input_ids.flatten()[batch.target_index[batch.speech_take] + 1], said)


def test_two_answers_of_the_same_words_keep_their_own_places():
    one = sample_of("one", [(2, 4)], 4)
    batch = collate([[one, one], [one]], PAD, IMAGE)
    assert batch.speech_take.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.target_index[batch.speech_take].tolist() == [1, 2, 5, 6, 9, 10]


def test_rows_without_speech_say_nothing():
    assert lay_speech([[sample_of("quiet", [(1, 2)], 3, silent={0})]], 3, torch.tensor([False] * 3)) == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"codes": None}, "has not become codes"),
        ({"codes": torch.zeros(2, 0, dtype=torch.long)}, r"codes of shape \[2, 0\]"),
        ({"codes": torch.zeros(4, dtype=torch.long)}, r"codes of shape \[4\]"),
        ({"codes": torch.zeros(3, 5, dtype=torch.long)}, r"3 codebooks in a batch with 2 \(first\)"),
        ({"last": 6}, "token 5 belongs to a spoken answer and does not train"),
        ({"first": 2}, "token 2 belongs to a spoken answer and does not train"),
        ({"last": 9}, "tokens 3 to 9 of 7"),
        ({"first": 0}, "tokens 0 to 5 of 7"),
        ({"first": 5}, "tokens 5 to 5 of 7"),
    ],
)
def test_an_answer_that_cannot_be_learned_is_refused_with_its_sample(change, told):
    good, bad = sample_of("first", [(3, 5)], 7), sample_of("second", [(3, 5)], 7)
    (item,) = bad.speech
    bad = dataclasses.replace(bad, speech=(dataclasses.replace(item, **change),))
    with pytest.raises(DataError, match=rf"^second: .*{told}"):
        collate([[good, bad]], PAD, IMAGE)
