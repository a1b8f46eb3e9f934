import json
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.core.types import IGNORE, Audio, Encoded, Image, MediaItem, Message, Sample, Text
from tinymodal.data.augment import Augment
from tinymodal.data.loader import HOPELESS, Loader
from tinymodal.data.sources import open_source

COCO10 = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "media" / "coco10_llava_style"

PAD, IMAGE = 0, 1


class Made:
    """Counts up; every fifth sample has a picture, lengths go from 3 to 22 tokens."""

    def sample(self, index):
        parts = (Image(b"%d" % index),) if index % 5 == 0 else ()
        return self.words(f"made {index} " + "w" * (index * 7 % 20), f"made {index}", parts)

    @staticmethod
    def words(words, name="words", parts=()):
        return Sample((Message("user", parts), Message("assistant", (Text(words),))), id=name)


def encode(sample):
    """A fake encoder: a token a letter, two a picture; words that begin with "bad" are refused."""
    ids, labels, media = [2], [IGNORE], []
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Image):
                seed = torch.Generator().manual_seed(int(part.source))
                values = torch.randn(3, 2, 2, generator=seed)
                media.append(MediaItem("image", (values,), (1, 2), 2, 4, torch.tensor([[1], [2]])))
                ids += [IMAGE] * 2
                labels += [IGNORE] * 2
            elif part.text.startswith("bad"):
                raise DataError(f"{sample.id}: {part.text}; expected better")
            else:
                ids += [ord(c) for c in part.text]
                labels += [ord(c) for c in part.text] if message.trains else [IGNORE] * len(part.text)
    return Encoded(torch.tensor(ids), torch.tensor(labels), tuple(media), sample.id)


def write_rows(folder, words, name="rows.jsonl"):
    rows = [{"image": None, "question": "Q", "answer": word} for word in words]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(folder / name, "vqa")


def make(sources, **options):
    settings = {"seq_len": 64, "batch_tokens": 128, "pad_id": PAD, "image_token_id": IMAGE, "open_rows": 4}
    return Loader(sources, encode, **(settings | options))


@pytest.fixture
def sources(tmp_path):
    """Made and written samples, one of them bad and one longer than a row."""
    return [Made(), write_rows(tmp_path, ["one", "two two", "bad three", "four" * 20, "five five"])]


MIXED = {"weights": [3, 1], "bad_rows": "skip", "seed": 7, "patches": 12}


def content(batch):
    """All of a batch, bit for bit."""
    values = [getattr(batch, field.name) for field in fields(batch)]
    return [(v.dtype, v.shape, v.numpy().tobytes()) if isinstance(v, torch.Tensor) else v for v in values]


def take(loader, count):
    return [content(batch) for batch in islice(loader, count)]


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_a_resumed_loader_gives_the_batches_that_would_have_come_bit_for_bit(sources, stop):
    whole = make(sources, **MIXED)
    expected = take(whole, 12)

    first = make(sources, **MIXED)
    take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))  # plain values, whatever stores them
    second = make(sources, **MIXED)
    take(second, 2)
    second.load_state_dict(state)

    assert take(second, 12 - stop) == expected[stop:]
    assert second.state_dict() == whole.state_dict()
    assert (second.skipped, second.dropped) == (whole.skipped, whole.dropped)
    assert (second.num_skipped, second.num_dropped) == (whole.num_skipped, whole.num_dropped)
    assert second.num_skipped > 1
    assert second.num_dropped > 1


class Sounds:
    """Ten sounds without end, each of which says its number."""

    def sample(self, index):
        return Sample(
            (Message("user", (Audio(b"%d" % (index % 10)),)), Message("assistant", (Text("w"),))), "s"
        )


def hear(sample):
    """A fake encoder that writes down the speed of the sound as tokens."""
    (sound,) = sample.media()
    speed = 1.0 if sound.change is None else sound.change.speed
    ids = torch.tensor([2, 3 + int(sound.source), round(speed * 1_000_000)])
    return Encoded(ids, torch.tensor([IGNORE, IGNORE, ids[2]]), (), sample.id)


def test_sounds_are_changed_by_seed_and_draw_for_any_number_of_workers_and_over_a_resume():
    def drawn(count=6, state=None, **options):
        settings = {"seq_len": 24, "batch_tokens": 24, "pad_id": PAD, "image_token_id": IMAGE, "open_rows": 2}
        settings["changes"] = [Augment(speed=(0.5, 2.0))]
        loader = Loader([Sounds()], hear, **(settings | options))
        if state is not None:
            loader.load_state_dict(state)
        batches = [batch.input_ids.flatten().tolist() for batch in islice(loader, count)]
        return batches, loader.state_dict()

    whole, _ = drawn(6)
    speeds = [ids[2::3] for ids in whole]
    assert len({speed for row in speeds for speed in row}) == 48
    assert all(500_000 <= speed <= 2_000_000 for row in speeds for speed in row)
    assert drawn(6, workers=2)[0] == whole
    first, state = drawn(2)
    assert first + drawn(4, state)[0] == whole
    assert drawn(6, seed=1)[0] != whole
    plain, _ = drawn(6, changes=None)
    assert {speed for ids in plain for speed in ids[2::3]} == {1_000_000}


def test_a_row_that_waits_for_its_batch_is_not_lost_over_a_resume(tmp_path):
    """A sample that fills a row closes the one before it too; with one row a batch the second has to wait."""
    rows = write_rows(tmp_path, ["w" * 62, "short"])
    settings = {"open_rows": 1, "batch_tokens": 64}
    expected = take(make([rows], **settings), 12)
    waited = 0
    for stop in range(8):
        first, second = make([rows], **settings), make([rows], **settings)
        take(first, stop)
        state = first.state_dict()
        waited += len(state["ready"])
        second.load_state_dict(state)
        assert take(second, 12 - stop) == expected[stop:]
    assert waited > 0


def test_the_number_of_workers_changes_nothing_not_even_across_a_resume(sources):
    whole = make(sources, **MIXED)
    expected, end = take(whole, 10), whole.state_dict()

    for before, after in ((2, 0), (1, 2)):
        first = make(sources, **MIXED, workers=before)
        batches = take(first, 4)
        state = first.state_dict()
        first.close()
        second = make(sources, **MIXED, workers=after)
        second.load_state_dict(state)
        batches += take(second, 6)
        second.close()
        assert batches == expected
        assert second.state_dict() == end


def test_all_of_a_sample_comes_through_a_worker_unchanged():
    """Fields too that only some encoders fill, and tiles of any number format."""

    def tile(dtype):
        return (torch.arange(6) / 7).view(1, 2, 3).to(dtype)

    def rich(sample):
        number = int(sample.id.split()[1])
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8)[number % 5]
        media = (
            MediaItem(
                "image",
                (tile(dtype), tile(torch.float32)),
                (1, 1),
                1,
                4,
                None,
                (1, 1),
                torch.tensor([-1, 0]),
                number % 2 == 0,
                f"key {number}",
            ),
        )
        plain = encode(sample)
        return Encoded(plain.ids, plain.labels, media[: number % 3], sample.id, (1, len(plain) - 1))

    here, there = (
        [
            *islice(
                Loader(
                    [Made(), Made()],
                    rich,
                    seq_len=64,
                    batch_tokens=64,
                    pad_id=PAD,
                    image_token_id=IMAGE,
                    workers=workers,
                )._open_stream(range(40)),
                40,
            )
        ]
        for workers in (0, 1)
    )
    assert {sample.source for sample in here} == {0, 1}
    for one, other in zip(here, there, strict=True):
        assert flat(one) == flat(other)


def flat(value):
    """All of a dataclass, bit for bit, as plain values."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, tuple):
        return [flat(part) for part in value]
    return [flat(getattr(value, f.name)) for f in fields(value)] if is_dataclass(value) else value


def test_batches_know_the_source_of_every_target(sources):
    loader = make(sources, **MIXED)
    for batch in islice(loader, 8):
        assert batch.num_sources == 2
        made = torch.tensor([name.startswith("made") for name in batch.sample_ids])
        of_document = iter((~made).int().tolist())
        ends = torch.tensor(batch.lengths).cumsum(0)
        # Documents of samples in order; tails have no targets.
        groups = {int(d): int(g) for d, g in zip(batch.target_document, batch.target_group, strict=True)}
        assert [groups[d] // 4 for d in sorted(groups)] == list(of_document)
        assert int(ends[-1]) == batch.input_ids.numel()


def test_rows_may_be_completed_right_before_they_become_a_batch(sources):
    def tower(rows):
        for row in rows:
            row.samples = [
                replace(s, media=tuple(replace(m, tiles=(m.tiles[0].half(),), seen=True) for m in s.media))
                for s in row.samples
            ]
        return rows

    plain, completed = make(sources, **MIXED), make(sources, **MIXED, complete=tower)
    num_pictures = 0
    for one, other in zip(islice(plain, 6), islice(completed, 6), strict=True):
        assert one.sample_ids == other.sample_ids
        assert other.pixel_values is None
        if one.pixel_values is not None:
            assert torch.equal(other.image_features, one.pixel_values.half())
            num_pictures += len(one.pixel_values)
    assert num_pictures > 5


def test_drawing_leaves_the_global_random_numbers_alone(sources):
    """Or a resumed run, which opens its workers once more, would see other dropout than one never stopped."""
    before = torch.get_rng_state()
    for workers in (0, 1):
        loader = make(sources, **MIXED, workers=workers)
        next(loader)
        loader.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_sample_arrives_once_and_whole():
    loader = make([Made()], seq_len=40, batch_tokens=120)
    batches = list(islice(loader, 30))

    came = sorted(int(name.split()[1]) for batch in batches for name in batch.sample_ids)
    waiting = sorted(n for row in loader.state_dict()["open"] + loader.state_dict()["ready"] for n in row)
    assert sorted(came + waiting) == list(range(loader.draws))
    assert len(came) > 3 * len(waiting)
    for batch in batches:
        assert batch.input_ids.shape[0] == 3
        assert batch.input_ids.shape[1] <= 40
        assert batch.num_tokens == sum(
            len(encode(Made().sample(int(n.split()[1])))) for n in batch.sample_ids
        )


@pytest.mark.skipif(not COCO10.is_dir(), reason=f"optional data absent: {COCO10}")
def test_ten_photographs_come_through_the_real_encoder_and_a_worker_unchanged():
    composed = tiny_model()
    rows = open_source(COCO10 / "chats.json", "messages", COCO10 / "images")
    settings = {"seq_len": 1024, "batch_tokens": 2048, "pad_id": PAD, "open_rows": 2}
    settings["image_token_id"] = composed.model.config.image_token_id

    here = Loader([rows], composed.encoder, **settings)
    there = Loader([rows], composed.encoder, **settings, workers=1)
    expected = take(here, 3)

    assert take(there, 3) == expected
    there.close()
    assert here.draws >= 10
    assert len({name for batch in expected for name in batch[9]}) >= 8


def test_a_bad_row_stops_the_training_in_its_own_words(tmp_path):
    rows = write_rows(tmp_path, ["fine", "bad row"])
    for workers in (0, 1):
        loader = make([rows], workers=workers)
        with pytest.raises(DataError, match=r"rows.jsonl:2: bad row; expected better"):
            take(loader, 50)
        with pytest.raises(DataError, match=r"rows.jsonl:2: bad row"):  # and again: it is not passed over
            take(loader, 50)
        loader.close()


def test_bad_rows_are_skipped_counted_and_named_once_if_the_recipe_says_so(tmp_path):
    rows = write_rows(tmp_path, ["fine words", "bad row", "x" * 99])
    loader = make([rows], bad_rows="skip")
    batches = list(islice(loader, 10))

    assert {name for batch in batches for name in batch.sample_ids} == {f"{tmp_path}/rows.jsonl:1"}
    assert loader.skipped == [
        (f"{tmp_path}/rows.jsonl:2", f"{tmp_path}/rows.jsonl:2: bad row; expected better")
    ]
    assert [gone.sample_id for gone in loader.dropped] == [f"{tmp_path}/rows.jsonl:3"]
    assert "101 tokens; a row holds 64" in loader.dropped[0].reason
    assert loader.num_skipped > 10
    assert loader.num_dropped > 10


def test_a_broken_line_and_a_missing_picture_are_bad_rows_too(tmp_path):
    rows = write_rows(tmp_path, ["fine words", "x"])
    text = (
        tmp_path / "rows.jsonl"
    ).read_text() + '{"image": "gone.png", "question": "Q", "answer": "A"}\n{broken\n'
    (tmp_path / "rows.jsonl").write_text(text)
    rows = open_source(tmp_path / "rows.jsonl", "vqa")
    loader = make([rows], bad_rows="skip")
    take(loader, 5)

    reasons = {row.sample_id.rpartition(":")[2]: row.reason for row in loader.skipped}
    assert sorted(reasons) == ["3", "4"]
    assert "'gone.png' not found" in reasons["3"]
    assert "not JSON" in reasons["4"]


@pytest.mark.parametrize("words", [["bad", "bad as well"], ["x" * 99, "y" * 99], ["bad", "x" * 99]])
def test_data_of_which_nothing_can_be_used_ends_with_an_error(tmp_path, words):
    loader = make([write_rows(tmp_path, words)], bad_rows="skip")
    with pytest.raises(
        DataError, match=f"the last of {HOPELESS} samples in a row that cannot be used"
    ) as error:
        next(loader)
    assert "\n" not in str(error.value)
    assert loader.num_skipped + loader.num_dropped == HOPELESS


def test_after_an_error_the_saved_position_is_still_that_of_the_last_batch(tmp_path):
    loader = make([write_rows(tmp_path, [f"fine {n}" for n in range(400)] + ["bad"])])
    states = [loader.state_dict()]

    def read():
        for _ in loader:
            states.append(loader.state_dict())

    with pytest.raises(DataError, match="bad"):
        read()
    assert len(states) > 3
    assert loader.state_dict() == states[-1]


def test_a_fault_in_the_encoder_is_not_taken_for_a_bad_row_or_the_end_of_the_data():
    def faulty(sample):
        return encode(sample) if sample.id != "made 3" else {}[sample.id]

    loader = Loader(
        [Made()], faulty, seq_len=64, batch_tokens=640, pad_id=PAD, image_token_id=IMAGE, bad_rows="skip"
    )
    for _ in range(2):
        with pytest.raises(KeyError):
            next(loader)


def test_a_position_in_other_data_is_refused(sources, tmp_path):
    loader = make(sources, **MIXED)
    take(loader, 1)
    state = loader.state_dict()
    more = [Made(), write_rows(tmp_path, ["one more"] * 6)]
    for other, words in (
        (make(sources, **(MIXED | {"seed": 8})), "seed was 7 .* and is 8 now"),
        (make(sources, **MIXED, seq_len=32), "seq_len was 64"),
        (make(more, **MIXED), r"rows of each source was \[None, 5\] .* and is \[None, 6\] now"),
        (make(sources, **(MIXED | {"weights": [1, 1]})), "share of each source"),
    ):
        with pytest.raises(CheckpointError, match=words):
            other.load_state_dict(state)


def test_settings_that_cannot_work_are_refused():
    for options, words in (
        ({"batch_tokens": 63}, "batch_tokens 63 is less than one row of seq_len 64"),
        ({"bad_rows": "ignore"}, "bad_rows: 'ignore'; expected raise, skip, or how many"),
        ({"bad_rows": -1}, "bad_rows: -1; expected 0 or more"),
        ({"bad_rows": True}, "bad_rows: True; expected raise, skip"),
        ({"batching": "random"}, "batching: 'random'; expected pack or grouped"),
        ({"ends": "later"}, "ends: 'later'; expected repeat, stop or drop"),
        ({"ends": "stop", "epochs": [0]}, r"epochs \[0\] of 1 sources; expected 1 or more"),
        ({"ends": "stop", "epochs": [1, 1]}, r"epochs \[1, 1\] of 1 sources"),
        ({"workers": -1}, "workers: -1"),
        ({"weights": [0]}, "weight: 0"),
    ):
        with pytest.raises(RecipeError, match=words):
            make([Made()], **options)
