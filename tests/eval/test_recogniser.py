"""The recogniser: its paths are the best, no clip matters to another, and it hears voices it never met."""

import difflib
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.data.sounds import Heard, joined, spoken_words
from tinymodal.data.voices import RATE_HZ, clips, shipped
from tinymodal.eval.recogniser import (
    FOLDER,
    OTHER,
    POSITIONS_PER_S,
    SILENCE,
    Recogniser,
    decode,
    mel_bands,
    place_classes,
    recogniser,
)

WORDS = ("red", "ring", OTHER)
shipped_recogniser = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="the recogniser's weights are not in this checkout"
)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Recogniser(WORDS, width=16, dilations=(1, 2)).eval()


def log_probs(rng, num_positions, num_words):
    return torch.tensor(rng.normal(0, 2, (num_positions, 1 + 2 * num_words))).log_softmax(-1).float().numpy()


def every_path(num_positions, num_words):
    """All ways through silence and words: (classes, words that were entered)."""
    for classes in itertools.product(range(1 + 2 * num_words), repeat=num_positions):
        words, before, good = [], SILENCE, True
        for one in classes:
            if one in (SILENCE, before):
                pass
            elif one % 2:  # a beginning: another word, or the same one again after its end or silence
                words.append((one - 1) // 2)
            elif before != one - 1:  # an end without its beginning
                good = False
                break
            before = one
        if good:
            yield classes, words


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 2), st.sampled_from([0.0, 0.5, 3.0]))
@settings(max_examples=40, deadline=None)
def test_what_is_decoded_is_the_best_of_all_paths(seed, num_positions, num_words, cost):
    found = log_probs(np.random.default_rng(seed), num_positions, num_words)

    def worth(classes, words):
        return sum(found[s, c] for s, c in enumerate(classes)) - cost * len(words)

    _, best = max(every_path(num_positions, num_words), key=lambda path: worth(*path))
    assert decode(found, cost) == best


def test_classes_of_known_places():
    classes = place_classes([1, 0], [(0.2, 0.6), (0.7, 0.8)], 10, 10.0)
    assert classes.tolist() == [0, 0, 3, 3, 4, 4, 0, 1, 0, 0]
    assert decode(np.log(np.eye(5, dtype=np.float32)[classes] + 1e-6), 1.0) == [1, 0]
    assert place_classes([0], [(0.95, 0.96)], 10, 10.0).tolist()[-1] == 1


def test_a_clip_does_not_depend_on_its_neighbours(net):
    waves = torch.randn(3, 8000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1.0], [1e-3]]
    )
    together = net(net.mel(waves))
    for wave, logits in zip(waves, together, strict=True):
        torch.testing.assert_close(net(net.mel(wave[None]))[0], logits, rtol=0, atol=1e-5)


def test_loudness_does_not_matter(net):
    wave = torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net.mel(wave), net.mel(wave * 0.03), rtol=0, atol=1e-4)


def test_bands_cover_all_that_is_spoken_and_each_hears_something():
    bands = mel_bands(40, 400, 16_000)
    assert bands.shape == (40, 201)
    assert (bands.amax(1) > 0).all()
    middles = bands.argmax(1)
    assert (middles[1:] >= middles[:-1]).all()


def test_silence_and_next_to_nothing_hold_no_word(net):
    assert net.hear(torch.zeros(16_000)) == ()
    assert net.hear(torch.zeros(0)) == ()
    assert net.hear(torch.ones(10)) == ()


@pytest.mark.parametrize("wave", [torch.full((9000,), torch.nan), torch.zeros(2, 9000)])
def test_what_is_no_clip_is_refused(net, wave):
    with pytest.raises(DataError, match="the recogniser was given"):
        net.hear(wave)


def test_a_recogniser_is_kept_and_read_again(net, tmp_path):
    net.save(tmp_path / "one")
    again = recogniser(tmp_path / "one")
    wave = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(2))
    assert again.words == WORDS
    torch.testing.assert_close(again(again.mel(wave)), net(net.mel(wave)), rtol=0, atol=2e-2)


def test_a_folder_without_one_is_refused(tmp_path):
    with pytest.raises(DataError, match="no recogniser of speech"):
        recogniser(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"words": WORDS, "ears": 2}))
    with pytest.raises(DataError, match="no recogniser of speech"):
        recogniser(tmp_path)


@pytest.mark.slow
def test_it_learns_to_tell_two_words_apart():
    """A hundred steps on two words of four voices, tested on a voice of another split."""
    torch.manual_seed(0)
    small = Recogniser(("circle", "six"), width=24, dilations=(1, 2))
    optimizer = torch.optim.AdamW(small.parameters(), 1e-2)
    names = shipped().of("train")[:4]
    rng = np.random.default_rng(0)
    for _ in range(100):
        said = [
            joined(rng.choice(["circle", "six"], 1 + i % 3).tolist(), names[i % 4], [0.1, 0.1], (0.1, 0.1))
            for i in range(8)
        ]
        longest = max(len(one.wave) for one in said)
        waves = np.stack([np.pad(one.wave, (0, longest - len(one.wave))) for one in said])
        logits = small(small.mel(torch.from_numpy(waves)))
        targets = [
            place_classes(
                [small.words.index(word) for word in one.words],
                [(start / RATE_HZ, end / RATE_HZ) for start, end in one.places],
                logits.shape[1],
                POSITIONS_PER_S,
            )
            for one in said
        ]
        targets_NS = torch.from_numpy(np.concatenate(targets))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_NS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    small.eval()
    for words in (("circle",), ("six", "circle"), ("circle", "six", "six")):
        clip = joined(words, "en+sandro", [0.1] * (len(words) - 1), (0.1, 0.1))
        assert small.hear(clip.wave) == words


@shipped_recogniser
def test_the_shipped_recogniser_hears_voices_that_it_never_met():
    net = recogniser()
    wrong = total = 0
    for split in ("test", "speak"):
        source = Heard("test", seed=11, speaker="shipped", voices=split)
        for index in range(30):
            said = source.said(index)
            heard = net.hear(said.wave)
            same = difflib.SequenceMatcher(None, said.words, heard, autojunk=False).get_matching_blocks()
            wrong += max(len(said.words), len(heard)) - sum(block.size for block in same)
            total += len(said.words)
    assert wrong / total < 0.06


@shipped_recogniser
def test_the_shipped_recogniser_knows_every_word_that_can_be_said():
    assert set(shipped().words) | {OTHER} == set(recogniser().words)
    assert (FOLDER / "model.safetensors").stat().st_size < 1_000_000


@shipped_recogniser
def test_the_shipped_recogniser_does_not_hear_words_in_noise_or_in_words_played_backwards():
    net = recogniser()
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    assert len(net.hear(noise)) <= 1
    words = [word for word in clips("en-us+f2") if len(clips("en-us+f2")[word]) > 5000][:20]
    backwards = [net.hear(np.ascontiguousarray(clips("en-us+f2")[word][::-1])) for word in words]
    assert sum(heard == (word,) for heard, word in zip(backwards, words, strict=True)) <= 4
    assert spoken_words("red") == net.hear(np.pad(clips("en-us+f2")["red"], 3200))
