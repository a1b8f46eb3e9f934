"""Rows with sounds, pictures, both and neither become one batch; and what is spoken is laid beside them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.test_hearing import RATE_HZ, build, hearing_config, hearing_tokenizer, sound
from tests.model.test_processing import noise
from tinymodal.chat.encode import Encoder
from tinymodal.chat.turns import Speaking
from tinymodal.core.errors import DataError
from tinymodal.core.types import (
    IGNORE,
    Audio,
    Encoded,
    Image,
    MediaItem,
    Message,
    Sample,
    Speech,
    SpeechItem,
    Text,
)
from tinymodal.data.bundle import bundle, unbundle
from tinymodal.data.collate import collate
from tinymodal.model.processing_tinymodal import TinyModalProcessor

PAD, IMAGE, AUDIO = 0, 1, 2
PICTURE_TOKENS = 4
FRAMES = {"a": 4, "b": 6}
"""Frames of a window of each kind of sound below; half as many tokens. ``c`` is windows of both."""


def document(spec: str, name: str = "d", source: int = 0, seen: bool = False) -> Encoded:
    """One position a letter: t trains, w does not, i is a picture, a, b and c are sounds."""
    ids, labels, media = [], [], []
    for n, letter in enumerate(spec):
        if letter in "iabc":
            if letter == "i":
                tiles, counts = (torch.full((3, 2, 2), float(n)),), (PICTURE_TOKENS,)
            else:
                lengths = [FRAMES[letter]] if letter in "ab" else [FRAMES["b"], FRAMES["a"]]
                tiles = tuple(torch.full((8, length), float(n) + w / 10) for w, length in enumerate(lengths))
                counts = tuple(length // 2 for length in lengths)
            kind, tokens = "image" if letter == "i" else "audio", sum(counts)
            order = torch.arange(tokens) if letter == "c" else None
            if seen:
                tiles = tuple(tile[:, 0].repeat(count, 1) for tile, count in zip(tiles, counts, strict=True))
            media.append(
                MediaItem(kind, tiles, (tokens,), tokens, 2 * tokens, None, counts, order, seen=seen)
            )
            ids += [IMAGE if letter == "i" else AUDIO] * tokens
            labels += [IGNORE] * tokens
        else:
            ids.append(10 + n)
            labels.append(10 + n if letter == "t" else IGNORE)
    return Encoded(torch.tensor(ids), torch.tensor(labels), tuple(media), name, source=source)


def laid(rows, **options):
    return collate(rows, PAD, IMAGE, audio_token_id=AUDIO, **options)


specs = st.text("wtiabc", min_size=1, max_size=8).map(lambda words: "w" + words)
rows_of_specs = st.lists(st.lists(specs, min_size=1, max_size=4), min_size=1, max_size=3)


@settings(deadline=None)
@given(rows_of_specs, st.integers(0, 5))
def test_every_place_of_either_kind_gets_its_own_embedding(rows, spare):
    """Embeddings told apart by their medium's value and place; found again at every position."""
    documents = [[document(spec, f"{r}.{n}") for n, spec in enumerate(row)] for r, row in enumerate(rows)]
    length = max(sum(map(len, row)) for row in documents) + spare
    batch = laid(documents, pad_to=length)
    for kind, place, values, take, put in (
        ("image", IMAGE, batch.pixel_values, batch.image_take, batch.image_put),
        ("audio", AUDIO, batch.audio_values, batch.audio_take, batch.audio_put),
    ):
        media = [item for row in documents for d in row for item in d.media if item.kind == kind]
        if not media:
            assert (values, take, put) == (None, None, None)
            continue
        stacks = (values,) if isinstance(values, torch.Tensor) else values
        per = {4: 2, 6: 3} if kind == "audio" else {2: PICTURE_TOKENS}
        bank = [
            (float(tile.flatten()[0]), s)
            for stack in stacks
            for tile in stack
            for s in range(per[tile.shape[-1]])
        ]
        expected = [
            (float(tile.flatten()[0]), s)
            for item in media
            for tile, count in zip(item.tiles, item.tile_tokens, strict=True)
            for s in range(count)
        ]
        assert [bank[i] for i in take.tolist()] == expected
        assert put.tolist() == (batch.input_ids.flatten() == place).nonzero().squeeze(1).tolist()
    owners = [d for row in documents for d in row]
    of = {d.sample_id: d for d in owners}
    assert batch.sample_ids == tuple(of)


def test_targets_are_grouped_by_source_and_by_what_is_seen_and_heard():
    row = [document(spec, spec, source) for source, spec in enumerate(["wt", "wit", "wat", "wiat"])]
    batch = laid([row], num_sources=4)
    assert batch.target_group.tolist() == [0, 4 + 1, 8 + 2, 12 + 3]


def test_a_batch_without_sounds_is_the_one_it_was():
    rows = [[document("wit"), document("wtt")], [document("wi")]]
    with_ears, without = laid(rows), collate(rows, PAD, IMAGE)
    assert without.audio_values is None
    assert without.inputs().keys() == with_ears.inputs().keys()
    for key, value in without.inputs().items():
        assert torch.equal(value, with_ears.inputs()[key])


def test_features_from_the_cache_take_the_place_of_windows():
    batch = laid([[document("wabt", seen=True)], [document("wt")]])
    assert batch.audio_values is None
    assert [tuple(x.shape) for x in batch.audio_features] == [(1, 2, 8), (1, 3, 8)]
    # A kind is one way or the other; two kinds need not be the same.
    mixed = laid([[document("wat", seen=True), document("wit")]])
    assert mixed.pixel_values is not None
    assert mixed.audio_values is None
    with pytest.raises(DataError, match="samples of a sound in a batch with a tower's features"):
        laid([[document("wat", "one"), document("wat", "two", seen=True)]])


def test_sounds_of_two_answers_go_through_the_tower_once():
    one = document("wabt")
    both = replace(
        one, ids=one.ids.repeat(2), labels=one.labels.repeat(2), parts=(len(one), len(one)), sample_id="p"
    )
    batch = laid([[document("wct"), both]])
    assert [len(values) for values in batch.audio_values] == [2, 2]
    take = batch.audio_take[5:].tolist()
    assert take[: len(take) // 2] == take[len(take) // 2 :]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ([replace(document("wat", "x:1"), media=())], "x:1: 2 placeholders for 0 sounds of 0 tokens"),
        (
            [replace(document("wt", "x:1"), media=document("a").media)],
            "x:1: 0 placeholders for 1 sounds of 2 tokens",
        ),
        (
            [replace(document("wit", "x:1"), media=document("a").media)],
            "x:1: 4 placeholders for 0 pictures",
        ),
        (
            [
                replace(
                    document("wat", "x:1"),
                    labels=torch.tensor([IGNORE, AUDIO, IGNORE, 12]),
                )
            ],
            "position 1 is a sound's placeholder and trains",
        ),
    ],
)
def test_sounds_and_places_that_contradict_each_other_are_refused_by_name(row, found):
    with pytest.raises(DataError, match=found):
        laid([row])


def test_a_sound_for_a_model_without_ears_and_padding_that_is_a_place_are_refused():
    with pytest.raises(DataError, match=r"x:1: a sound, but this model has no audio tower.*\[model.audio\]"):
        collate([[document("wat", "x:1")]], PAD, IMAGE)
    with pytest.raises(ValueError, match=r"pad_id and audio_token_id are both 2; padding .* for sounds"):
        collate([[document("wt")]], AUDIO, IMAGE, audio_token_id=AUDIO)


# ---- speech


def spoken(spec: str, name: str, first: int, last: int, frames: int, voice: int = 0) -> Encoded:
    codes = torch.full((2, frames), frames)
    return replace(document(spec, name), speech=(SpeechItem(first, last, None, codes, voice),))


def test_spoken_answers_know_their_targets_and_frames():
    rows = [
        [spoken("wwtt", "one", 2, 4, frames=5), document("wtt")],
        [document("wat"), spoken("wittt", "two", 6, 8, frames=3, voice=1)],
    ]
    batch = laid(rows)
    assert batch.speech_codes.shape == (2, 8)
    assert (batch.speech_frames, batch.speech_tokens) == ((5, 3), (2, 2))
    assert batch.speech_voices.tolist() == [0, 1]
    starts = {"one": 0, "two": batch.input_ids.shape[1] + 4}
    expected = [starts["one"] + 2, starts["one"] + 3, starts["two"] + 6, starts["two"] + 7]
    # The state of a token is the one that predicts it, a position before.
    assert (batch.target_index[batch.speech_take] + 1).tolist() == expected
    silent = laid([[document("wt")]])
    assert silent.speech_codes is None
    assert silent.speech_take is None


def test_a_sound_that_has_not_become_codes_is_refused():
    row = replace(document("wtt", "x:1"), speech=(SpeechItem(1, 3, torch.zeros(9)),))
    with pytest.raises(DataError, match="x:1: a spoken answer whose sound has not become codes"):
        laid([[row]])


@settings(deadline=None, max_examples=30)
@given(st.lists(specs, min_size=1, max_size=4), st.sampled_from(["wave", "codes", "nothing"]))
def test_what_is_heard_and_spoken_comes_whole_out_of_a_worker(row, said):
    """Through the bytes of one tensor and back."""
    items = {
        "wave": (SpeechItem(1, 2, torch.arange(5.0), voice=2), SpeechItem(3, 4, torch.zeros(1))),
        "codes": (SpeechItem(1, 2, None, torch.arange(6).view(2, 3), key="k"),),
        "nothing": (),
    }[said]
    chunk = [replace(document(spec, f"x:{n}"), speech=items) for n, spec in enumerate(row)]
    for before, after in zip(chunk, unbundle(bundle(chunk)), strict=True):
        assert flat(after) == flat(before)


def flat(value):
    """Tensors as numbers, so that two samples can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, tuple):
        return [flat(part) for part in value]
    return [flat(getattr(value, f.name)) for f in fields(value)] if is_dataclass(value) else value


# ---- from conversations to logits


def test_rows_of_every_mix_packed_equal_each_alone():
    """Pictures and sounds, sounds, pictures and words alone, in two rows."""
    model = build(hearing_config())
    encoder = Encoder(
        TinyModalProcessor.of(model.config, hearing_tokenizer()), "chatml", speech=Speaking(rate_hz=8_000)
    )
    pad = encoder.tokenizer.pad_token_id

    def clip(seconds: float, seed: int) -> Audio:
        return Audio(sound(seconds, seed), RATE_HZ)

    asked = [
        (clip(0.7, 1), Image(noise(seed=1)), Text("which?")),
        (Text("hear "), clip(2.1, 2), Text(" and "), clip(0.7, 3)),
        (Image(noise(seed=2)), Text("what?")),
        (Text("how many are there?"),),
        (clip(1.0, 4),),
    ]
    encoded = [
        encoder(Sample((Message("user", parts), Message("assistant", (Text("a star"),))), f"x:{n}"))
        for n, parts in enumerate(asked)
    ]

    def states(rows):
        batch = collate(rows, pad, model.config.image_token_id, audio_token_id=model.config.audio_token_id)
        with torch.no_grad():
            return model(**batch.inputs()).logits

    packed = states([encoded[:3], encoded[3:]])
    for r, row in enumerate((encoded[:3], encoded[3:])):
        start = 0
        for sample in row:
            alone = states([[sample]])[0]
            there = packed[r, start : start + len(sample)]
            torch.testing.assert_close(there, alone, rtol=0, atol=1e-5)
            start += len(sample)


def test_rows_of_words_alone_run_no_tower():
    model = build(hearing_config())
    for tower in model.model.towers.values():
        tower.forward = lambda *_: pytest.fail("a tower ran for words")
    batch = laid([[document("wtt")]])
    model.train()
    model(**batch.inputs()).logits.sum().backward()


def test_a_spoken_row_from_files_to_batch(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    file = tmp_path / "answer.flac"
    soundfile.write(file, sound(0.8).numpy(), RATE_HZ)
    processor = TinyModalProcessor.of(hearing_config(), hearing_tokenizer())
    encoder = Encoder(processor, "chatml", speech=Speaking(rate_hz=24_000))
    answer = Message("assistant", (Text("a star"), Speech(file)))
    sample = encoder(Sample((Message("user", (Text("what?"),)), answer), "x:1"))
    assert sample.speech[0].wave.shape == (19_200,)
    coded = replace(sample, speech=(replace(sample.speech[0], wave=None, codes=torch.zeros(2, 10).long()),))
    batch = collate(
        [[coded]],
        encoder.tokenizer.pad_token_id,
        processor.image_token_id,
        audio_token_id=processor.audio_token_id,
    )
    words = batch.target_ids[batch.speech_take]
    assert encoder.tokenizer.decode(words) == "a star<|im_end|>"
