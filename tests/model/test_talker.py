"""A speech head says while it is fed what it says of the whole, and learns what it is taught."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.model.delay import delay, delayed, pick, undelay
from tinymodal.model.speech_head import Answers, SpeechHead
from tinymodal.model.talker import IGNORE, Talker, build_speech_head, turns
from tinymodal.model.unit_decoder import UnitDecoder, collapsed

D, V = 12, 9


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head_of(design: str, books: int = 1, seed: int = 0, **options) -> SpeechHead:
    torch.manual_seed(seed)
    config = {"design": design, "books": books, "book_size": V, "width": 16, "heads": 2}
    return build_speech_head(config | options, D).eval()


def answers_of(tokens, frames, books: int = 1, seed: int = 0) -> Answers:
    chance = random(seed)
    states, words = torch.randn(2, sum(tokens), D, generator=chance)
    codes = torch.randint(V, (books, sum(frames)), generator=chance)
    return Answers(states, words, tuple(tokens), codes, tuple(frames), torch.zeros(len(tokens)).long())


def one_of(answers: Answers, z: int) -> Answers:
    token, frame = sum(answers.tokens[:z]), sum(answers.frames[:z])
    tokens, frames = answers.tokens[z], answers.frames[z]
    return Answers(
        answers.states_PD[token : token + tokens],
        answers.words_PD[token : token + tokens],
        (tokens,),
        answers.codes_QG[:, frame : frame + frames],
        (frames,),
        answers.voices_Z[z : z + 1],
    )


def spoken(head: SpeechHead, states, words, step: int = 1, **options) -> list[torch.Tensor]:
    """What comes at each handing over of ``step`` tokens, and at the end."""
    speaker = head.begin(**options)
    given = [speaker.feed(*both) for both in zip(states.split(step), words.split(step), strict=True)]
    return [*given, speaker.finish()]


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 25)), min_size=1, max_size=4)


# The delay


@given(books=st.integers(1, 6), frames=st.integers(1, 12), seed=st.integers(0, 99))
def test_what_is_delayed_comes_back(books, frames, seed):
    codes = torch.randint(V, (books, frames), generator=random(seed))
    columns = delay(codes, fill=-1)
    assert columns.shape == (books, frames + books - 1)
    assert torch.equal(undelay(columns), codes)
    for q in range(books):
        assert columns[q, :q].eq(-1).all()
        assert columns[q, q + frames :].eq(-1).all()


@given(lengths, st.integers(1, 4))
def test_delays_of_several_answers_are_those_of_each(sizes, books):
    frames = [length for _, length in sizes]
    columns = [length + books - 1 for length in frames]
    codes = torch.arange(books * sum(frames)).view(books, -1)
    alone = [delay(each, -7) for each in codes.split(frames, dim=1)]
    assert torch.equal(pick(codes, delayed(frames, columns, books), -7), torch.cat(alone, dim=1))


# The turns


@given(st.integers(1, 30), st.integers(1, 200), st.integers(1, 4), st.integers(1, 5), st.integers(1, 20))
def test_turns_never_write_ahead_of_what_was_read(tokens, frames, books, read, write):
    planned = turns(tokens, frames, books, read, write)
    assert len(planned.stretches) == len(planned.held) == tokens // read
    written = 0
    for number, (stretch, held) in enumerate(zip(planned.stretches, planned.held, strict=True), 1):
        written += stretch
        assert 0 <= stretch <= write
        assert held == (stretch < write)
        assert written / frames <= number * read / tokens
    assert written < planned.columns


def test_slow_speech_takes_turns_of_the_numbers_in_the_recipe():
    assert turns(tokens=6, frames=80, books=1, read=2, write=10) == ((10, 10, 10), (False,) * 3, 81)
    assert turns(tokens=5, frames=80, books=4, read=2, write=10) == ((10, 10), (False,) * 2, 83)
    assert turns(tokens=4, frames=12, books=1, read=2, write=10) == ((3, 6), (True, True), 13)


# Whole answers and answers that grow


@settings(deadline=None, max_examples=20)
@given(lengths, st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_packed_answers_are_taught_what_each_is_alone(sizes, books, read, write):
    tokens, frames = zip(*sizes, strict=True)
    answers = answers_of(tokens, frames, books)
    talker = head_of("talker", books, read=read, write=write)
    together, targets = talker.taught(answers)
    alone = [talker.taught(one_of(answers, z)) for z in range(len(tokens))]
    assert torch.equal(targets, torch.cat([each[1] for each in alone]))
    torch.testing.assert_close(together, torch.cat([each[0] for each in alone]), rtol=0, atol=2e-6)
    assert int((targets[:, 0] == talker.end).sum()) == len(tokens)
    # Every code is taught once.
    taught = targets[(targets != IGNORE) & (targets < V)]
    assert torch.equal(taught.sort().values, answers.codes_QG.flatten().sort().values)
    losses = [talker.loss(*one_of(answers, z))[0] for z in range(len(tokens))]
    torch.testing.assert_close(talker.loss(*answers)[0], torch.stack(losses).sum())
    assert talker.loss(*answers)[1] == books * sum(frames) + len(frames)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))
def test_teacher_forced_logits_are_those_of_speaking_step_by_step(tokens, frames, books, read, write):
    """A speaker that is made to say the true frames sees at each step what training saw."""
    answers = answers_of((tokens,), (frames,), books)
    talker = head_of("talker", books, read=read, write=write)
    taught, targets = talker.taught(answers)
    seen, told = [], iter(targets)

    def forced(logits, over):
        seen.append(logits.clone())
        target = next(told)
        if target[0] == talker.hold:
            return None
        speaker.frames = len(speaker.columns) if target[0] == talker.end else speaker.frames
        return target.masked_fill((target == IGNORE) | (target == talker.end), talker.nothing)

    speaker = talker.begin()
    speaker._choose = forced
    pairs = zip(answers.states_PD.split(1), answers.words_PD.split(1), strict=True)
    given = [speaker.feed(*both) for both in pairs]
    heard = torch.cat([*given, speaker.finish()], dim=1)
    assert torch.equal(heard, answers.codes_QG)
    assert next(told, None) is None
    torch.testing.assert_close(torch.stack(seen), taught, rtol=0, atol=2e-6)


@settings(deadline=None, max_examples=20)
@given(
    design=st.sampled_from(["talker", "units"]),
    num=st.integers(1, 7),
    step=st.integers(1, 7),
    books=st.integers(1, 3),
    seed=st.integers(0, 20),
)
def test_what_is_said_does_not_depend_on_how_tokens_are_handed_over(design, num, step, books, seed):
    head = head_of(design, 1 if design == "units" else books, seed, longest=8, upsample=4)
    states, words = torch.randn(2, num, D, generator=random(seed))
    whole = torch.cat(spoken(head, states, words, num), dim=1)
    assert torch.equal(torch.cat(spoken(head, states, words, step), dim=1), whole)
    assert whole.dtype == torch.int64
    assert whole.numel() == 0 or 0 <= whole.min() <= whole.max() < V


@settings(deadline=None, max_examples=20)
@given(num=st.integers(1, 6), seed=st.integers(0, 50), upsample=st.integers(1, 6))
def test_units_of_a_stream_are_the_greedy_path_of_the_whole(num, seed, upsample):
    head = head_of("units", seed=seed, upsample=upsample)
    answers = answers_of((num,), (1,), seed=seed)
    (logits,) = head.taught(answers)
    best = logits.argmax(-1)
    path = torch.unique_consecutive(best)
    stream = torch.cat(spoken(head, answers.states_PD, answers.words_PD), dim=1)[0]
    assert stream.tolist() == [unit for unit in path.tolist() if unit != V]
    assert torch.equal(best[collapsed(best, V)], stream)


def test_the_first_frames_come_before_the_text_is_over():
    talker = head_of("talker", 2, read=2, write=4)
    with torch.no_grad():
        talker.predict.bias.view(2, -1)[0, talker.hold] = -100
    states, words = torch.randn(2, 6, D, generator=random(0))
    counts = [given.shape[1] for given in spoken(talker, states, words)]
    # Four columns are three frames of two books.
    assert counts[:6] == [0, 3, 0, 4, 0, 4]


def test_speech_ends_even_where_the_head_never_ends_it_and_never_before_its_text():
    talker = head_of("talker", 3, read=1, write=2, longest=5)
    states, words = torch.randn(2, 4, D, generator=random(0))
    with torch.no_grad():
        talker.predict.bias.view(3, -1)[0, talker.end] = -100
    assert torch.cat(spoken(talker, states, words), dim=1).shape == (3, 20)
    with torch.no_grad():
        talker.predict.bias.view(3, -1)[0, talker.end] = 100
    # Two columns a token were written while END was no choice, whatever it weighed.
    hurried = torch.cat(spoken(talker, states, words), dim=1)
    assert 1 <= hurried.shape[1] <= 8


def test_a_choice_by_chance_repeats_with_its_seed():
    talker = head_of("talker", 2, longest=6)
    states, words = torch.randn(2, 4, D, generator=random(0))
    hot = [
        torch.cat(spoken(talker, states, words, temperature=3.0, seed=seed), dim=1).tolist()
        for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]
    sure = torch.cat(spoken(talker, states, words, temperature=3.0, top_k=1), dim=1)
    assert torch.equal(sure, torch.cat(spoken(talker, states, words), dim=1))
    with pytest.raises(ValueError, match="likeliest units only"):
        head_of("units").begin(temperature=1.0)


# CTC


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 14)), min_size=1, max_size=4), st.integers(0, 9))
def test_the_units_loss_is_torchs_ctc_of_each_answer_alone(sizes, seed):
    tokens, frames = zip(*sizes, strict=True)
    head, answers = head_of("units", seed=seed, upsample=3), answers_of(tokens, frames, seed=seed)
    expected, lost = torch.zeros(()), 0
    for z, (num, length) in enumerate(sizes):
        alone = one_of(answers, z)
        (logits,) = head.taught(alone)
        units = alone.codes_QG[0]
        log_probs = logits.log_softmax(-1)
        loss = F.ctc_loss(log_probs, units, torch.tensor(3 * num), torch.tensor(length), V, "sum")
        lost += length * bool(loss.isinf())
        expected = expected + (0 if loss.isinf() else loss)
    found, count, measures = head.loss(*answers)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert count == sum(frames)
    assert measures["speech_lost"] == lost


def test_answers_without_room_for_their_units_leave_a_finite_gradient():
    head, answers = head_of("units", upsample=2), answers_of((1, 4), (9, 3))
    loss, _, measures = head.loss(*answers)
    loss.backward()
    assert measures["speech_lost"] == 9
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    assert head.predict.weight.grad.abs().sum() > 0


# Learning


def lesson(chance: torch.Generator, table: torch.Tensor, books: int, num: int) -> Answers:
    """Each of eight words sounds for three frames, which tell it and the frame's place in it."""
    tokens = torch.randint(1, 6, (num,), generator=chance)
    said = torch.randint(8, (int(tokens.sum()),), generator=chance)
    codes = torch.stack([(3 * said[:, None] + torch.arange(3) + 5 * q).flatten() % 24 for q in range(books)])
    frames = tuple((3 * tokens).tolist())
    states = torch.randn(len(said), D, generator=chance)
    return Answers(states, table[said], tuple(tokens.tolist()), codes, frames, torch.zeros(num).long())


@pytest.mark.parametrize(("design", "books"), [("talker", 2), ("units", 1)])
def test_a_head_learns_in_seconds_what_words_sound_like_and_says_it_back(design, books):
    torch.manual_seed(0)
    chance, table = random(1), torch.randn(8, D)
    head = head_of(design, books, book_size=24, read=1, write=3, upsample=6, width=48)
    steps = 100
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        loss, count, measures = head.loss(*lesson(chance, table, books, 16))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert {name.partition("_")[0] for name in measures} == {"speech"}
    asked = lesson(random(2), table, books, 30)
    answers = [one_of(asked, z) for z in range(30)]
    said = [torch.cat(spoken(head, one.states_PD, one.words_PD), dim=1) for one in answers]
    right = [
        heard.shape == one.codes_QG.shape and bool((heard == one.codes_QG).all())
        for heard, one in zip(said, answers, strict=True)
    ]
    assert sum(right) >= 29


# Voices


def test_voices_and_clips_begin_an_answer_differently():
    talker = head_of("talker", 2, voices=("ann", "bob"), reference=4, longest=6)
    states, words = torch.randn(2, 3, D, generator=random(0))
    clip = torch.randint(V, (2, 7), generator=random(3))
    ann, bob, heard = (talker.voice_of(voice) for voice in (0, 1, clip))
    assert not torch.allclose(ann, bob)
    assert not torch.allclose(ann, heard)
    # The order of a clip's frames is not heard, only which there are.
    torch.testing.assert_close(talker.voice_of(clip.flip(1)), heard)
    logits = [talker.begin(voice) for voice in (0, 1, clip)]
    first = [speaker.memory.run(torch.cat(speaker.waiting)) for speaker in logits]
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first[0], first[2])
    with pytest.raises(ValueError, match="voice 2 of a speech head with 2"):
        talker.begin(2)
    with pytest.raises(ValueError, match="voices by name only"):
        head_of("talker").begin(clip[:1])
    assert torch.cat(spoken(talker, states, words, voice=clip), dim=1).shape[1] >= 1


@pytest.mark.parametrize("design", ["talker", "units"])
@pytest.mark.parametrize(
    ("clip", "told"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), r"at least one frame; got int64 \[1, 0\]"),
        (torch.zeros(5, dtype=torch.int64), r"got int64 \[5\]"),
        (torch.zeros(1, 5), r"got float32 \[1, 5\]"),
        (torch.tensor([[0, V]]), f"codes 0 to {V} for a speech head of {V}"),
        (torch.tensor([[-1, 2]]), "codes -1 to 2"),
    ],
)
def test_a_clip_that_says_nothing_of_a_voice_is_refused(design, clip, told):
    with pytest.raises(ValueError, match=told):
        head_of(design, reference=4).begin(clip)


def test_half_of_the_answers_train_the_voices_of_clips():
    talker = head_of("talker", voices=("ann", "bob"), reference=4)
    answers = answers_of((2, 2, 2), (5, 6, 8))._replace(voices_Z=torch.tensor([1, 0, 1]))
    begun = talker.voices_of(answers)
    assert torch.equal(begun[1:], talker.voice.weight[:2])
    torch.testing.assert_close(begun[:1], talker.voice_of(answers.codes_QG[:, :5]))


# What does not fit


def test_a_codec_of_more_books_is_spoken_in_part_and_one_of_fewer_refused():
    talker = head_of("talker", 2)
    answers = answers_of((3,), (7,), books=4)
    cut = talker.loss(*answers._replace(codes_QG=answers.codes_QG[:2]))
    assert torch.equal(talker.loss(*answers)[0], cut[0])
    with pytest.raises(ValueError, match="codes of 1 books for a speech head that speaks 2"):
        talker.loss(*answers._replace(codes_QG=answers.codes_QG[:1]))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"design": "mime"}, "unknown design 'mime'"),
        ({"design": "units", "books": 2}, "one codebook"),
        ({"width": 18, "heads": 6}, "expected an even part"),
        ({"reed": 2}, "unknown key 'reed'"),
        ({"book_size": None}, "needs 'book_size'"),
        ({"read": 0}, "at least 1"),
        ({"layers": 0}, "0 layers"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        build_speech_head({"books": 1, "book_size": V, "width": 16} | wrong, D)


def test_a_recipes_keys_of_both_designs_build_either():
    config = {
        "books": 1,
        "book_size": V,
        "codec": "codec",
        "read": 3,
        "write": 4,
        "upsample": 7,
        "width": None,
    }
    assert isinstance(build_speech_head(config, D), Talker)
    units = build_speech_head(config | {"design": "units"}, D)
    assert isinstance(units, UnitDecoder)
    assert (units.upsample, units.width) == (7, D)


@pytest.mark.parametrize("design", ["talker", "units"])
def test_a_head_of_half_precision_trains_and_speaks(design):
    head = head_of(design, longest=4).to(torch.bfloat16)
    answers = answers_of((2, 3), (4, 6))
    loss, count, _ = head.loss(*answers)
    assert loss.dtype == torch.float32
    exact = head.float().loss(*answers)[0]
    assert abs(loss - exact).item() / count < 0.1
    assert (
        head.to(torch.bfloat16).begin().feed(answers.states_PD[:2], answers.words_PD[:2]).dtype == torch.int64
    )
