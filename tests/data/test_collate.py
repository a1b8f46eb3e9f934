from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import IGNORE, Encoded, MediaItem
from tinymodal.data.collate import collate
from tinymodal.train.packed import reach

PAD, IMAGE, TOKENS = 0, 1, 4


def picture(value=0.0, targets=None):
    return MediaItem("image", (torch.full((3, 2, 2), value),), (2, 2), TOKENS, 4, targets)


def document(spec, name="d", targets=None):
    """One position for each letter: t trains, w does not, i is a picture of four placeholders."""
    ids, labels, media = [], [], []
    for n, letter in enumerate(spec):
        if letter == "i":
            media.append(picture(float(n), targets))
            ids += [IMAGE] * TOKENS
            labels += [IGNORE] * TOKENS
        else:
            ids.append(10 + n)
            labels.append(10 + n if letter == "t" else IGNORE)
    return Encoded(torch.tensor(ids), torch.tensor(labels), tuple(media), name)


specs = st.text("wti", min_size=1, max_size=8).map(lambda words: "w" + words)
rows_of_specs = st.lists(st.lists(specs, min_size=1, max_size=4), min_size=1, max_size=3)


@settings(deadline=None)
@given(rows_of_specs, st.integers(0, 5))
def test_a_batch_holds_every_document_at_its_place(rows, spare):
    """Everything is computed a second time, one position after the other."""
    documents = [[document(spec, f"{r}.{n}") for n, spec in enumerate(row)] for r, row in enumerate(rows)]
    length = max(sum(map(len, row)) for row in documents) + spare
    batch = collate(documents, PAD, IMAGE, pad_to=length)

    assert batch.input_ids.shape == (len(rows), length)
    ids, labels, positions, puts, targets = [], [], [], [], []
    for row in documents:
        for d in row:
            for t in range(len(d)):
                if d.ids[t] == IMAGE:
                    puts.append(len(ids))
                if d.labels[t] != IGNORE:
                    targets.append((len(ids) - 1, int(d.ids[t])))
                ids.append(int(d.ids[t]))
                labels.append(int(d.labels[t]))
                positions.append(t)
        tail = -len(ids) % length
        ids += [PAD] * tail
        labels += [IGNORE] * tail
        positions += range(tail)
    assert batch.input_ids.flatten().tolist() == ids
    assert batch.labels.flatten().tolist() == labels
    assert batch.position_ids.flatten().tolist() == positions
    assert list(zip(batch.target_index.tolist(), batch.target_ids.tolist(), strict=True)) == targets
    assert batch.num_targets == len(targets)
    assert batch.num_tokens == sum(len(d) for row in documents for d in row)
    assert batch.sample_ids == tuple(d.sample_id for row in documents for d in row)

    pictures = [item.tiles[0] for row in documents for d in row for item in d.media]
    if pictures:
        assert torch.equal(batch.pixel_values, torch.stack(pictures))
        assert batch.image_put.tolist() == puts
        assert batch.image_take.tolist() == list(range(TOKENS * len(pictures)))
    else:
        assert (batch.pixel_values, batch.image_put, batch.image_take) == (None, None, None)


@settings(deadline=None)
@given(rows_of_specs)
def test_no_document_is_taken_for_the_continuation_of_another(rows):
    """A border is where positions do not go up by one, which is how transformers finds it."""
    documents = [[document(spec) for spec in row] for row in rows]
    batch = collate(documents, PAD, IMAGE)
    for row, positions in zip(documents, batch.position_ids, strict=True):
        used, tail = sum(map(len, row)), len(positions) - sum(map(len, row))
        borders = 1 + (positions.diff() != 1).sum()
        assert borders == len(row) + (tail > 0)
        assert positions[used:].tolist() == list(range(tail))


def test_shapes_and_dtypes_are_those_of_the_batch():
    targets = torch.zeros(TOKENS, 2, dtype=torch.int64)
    batch = collate([[document("wit", targets=targets)], [document("wtt")]], PAD, IMAGE, pad_to=8)

    assert {name: (list(v.shape), v.dtype) for name, v in batch.inputs().items()} == {
        "input_ids": ([2, 8], torch.int64),
        "position_ids": ([2, 8], torch.int64),
        "pixel_values": ([1, 3, 2, 2], torch.float32),
        "image_take": ([4], torch.int64),
        "image_put": ([4], torch.int64),
    }
    assert batch.image_targets.shape == (1, TOKENS, 2)
    assert batch.target_index.dtype == batch.target_ids.dtype == torch.int64


def test_picture_targets_are_there_only_if_every_picture_has_them():
    targets = torch.arange(2 * TOKENS).view(TOKENS, 2)
    some = [document("wi", targets=targets), document("wi")]
    assert collate([some], PAD, IMAGE).image_targets is None
    assert torch.equal(collate([some[:1] * 2], PAD, IMAGE).image_targets, torch.stack([targets, targets]))


def broken(spec="wtit", **changes):
    return replace(document(spec, name="chats.jsonl:9"), **changes)


def with_label(at, value):
    labels = document("wtit").labels.clone()
    labels[at] = value
    return labels


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (broken(media=()), "4 placeholders for 0 pictures of 0 tokens in all; expected as many"),
        (broken(media=(picture(), picture())), "4 placeholders for 2 pictures of 8 tokens"),
        (broken("wt", media=(picture(),)), "0 placeholders for 1 pictures of 4 tokens"),
        (broken(labels=with_label(0, 10)), "the first position trains, though nothing comes before it"),
        (broken(labels=with_label(1, 12)), "position 1 has the label 12 but the id 11"),
        (broken(labels=with_label(3, IMAGE)), "position 3 is a picture's placeholder and trains"),
        (broken(labels=torch.tensor([IGNORE])), "7 ids but 1 labels; expected one label for each id"),
        (broken(parts=(3, 3)), "parts of [3, 3] positions but 7 ids; expected parts"),
        (broken(parts=(7, 0)), "parts of [7, 0] positions but 7 ids; expected parts"),
        (broken(parts=(3, 4)), "1 placeholders for 1 pictures of 4 tokens"),
        (broken("wttt", media=(), parts=(2, 2)), "the first position trains"),
        (broken(ids=torch.tensor([]), labels=torch.tensor([])), "no tokens; expected at least one"),
        (
            broken("wi", media=(replace(picture(), tile_tokens=(3,)),)),
            "a tile of [3, 2, 2] and 3 tokens in a",
        ),
    ],
)
def test_a_sample_that_contradicts_itself_is_named(sample, words):
    """Wherever in the batch it is."""
    fine = [document("wt", "fine"), document("wit", "fine too")]
    with pytest.raises(DataError) as error:
        collate([fine, [fine[0], sample]], PAD, IMAGE, pad_to=16)
    assert str(error.value).startswith(f"chats.jsonl:9: {words}")
    assert "\n" not in str(error.value)


def test_two_wrongs_in_a_row_do_not_make_a_right():
    """One placeholder too many here and one too few there leave the sum of the row correct."""
    short, long = broken("wi"), document("wi")
    short = replace(short, ids=short.ids[:-1], labels=short.labels[:-1])
    long = replace(
        long, ids=torch.cat([long.ids, long.ids[-1:]]), labels=torch.cat([long.labels, long.labels[-1:]])
    )
    with pytest.raises(DataError, match="3 placeholders for 1 pictures"):
        collate([[short, long]], PAD, IMAGE)


@settings(deadline=None)
@given(rows_of_specs, st.integers(0, 3), st.data())
def test_documents_are_told_by_their_lengths_and_targets_by_document_source_and_modality(rows, spare, data):
    """The same as the borders that positions show, in plain integers; with samples of several parts too."""
    samples = [
        [
            replace(together(specs), sample_id=f"{r}.{n}", source=data.draw(st.integers(0, 2)))
            for n, specs in enumerate(data.draw(st.lists(same_pictures(row), min_size=1, max_size=3)))
        ]
        for r, row in enumerate(rows)
    ]
    length = max(sum(map(len, row)) for row in samples) + spare
    batch = collate(samples, PAD, IMAGE, pad_to=length, num_sources=3)

    owners, lengths = [], []
    for row in samples:
        for sample in row:
            lengths += sample.parts or (len(sample),)
            owners += [sample] * (len(sample.parts) or 1)
        if sum(map(len, row)) < length:
            lengths.append(length - sum(map(len, row)))
            owners.append(None)
    assert batch.lengths == tuple(lengths)
    assert batch.position_ids.flatten().tolist() == [t for size in lengths for t in range(size)]
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    for at, which, group in zip(batch.target_index, batch.target_document, batch.target_group, strict=True):
        assert starts[which] <= at < starts[which] + lengths[which]
        assert group == 4 * owners[which].source + bool(owners[which].media)
    assert batch.num_sources == 3
    assert batch.reach == reach(batch)

    pictures = [item.tiles[0] for row in samples for sample in row for item in sample.media]
    if pictures:
        assert torch.equal(batch.pixel_values, torch.stack(pictures))  # once, however many parts show them
        first, takes = 0, []
        for row in samples:
            for sample in row:
                own = range(first, first + TOKENS * len(sample.media))
                takes += [*own] * (len(sample.parts) or 1)
                first = own.stop
        assert batch.image_take.tolist() == takes
        assert len(batch.image_put) == len(takes)


def same_pictures(row):
    """Parts of one sample: specs with as many pictures, here the first of ``row`` and others without."""
    words = st.text("wt", min_size=0, max_size=3)
    return st.lists(words, min_size=1, max_size=3).map(lambda tails: [row[0] + tail for tail in tails])


def together(specs):
    """One sample of a document for each spec; of one spec, without parts."""
    documents = [document(spec) for spec in specs]
    return replace(
        documents[0],
        ids=torch.cat([d.ids for d in documents]),
        labels=torch.cat([d.labels for d in documents]),
        parts=tuple(map(len, documents)) if len(documents) > 1 else (),
    )


def seen(value=0.0, width=6):
    return replace(picture(), tiles=(torch.full((2, 2, width), value, dtype=torch.bfloat16),), seen=True)


def test_features_of_a_tower_stand_in_for_pixels():
    batch = collate([[replace(document("wit"), media=(seen(n),)) for n in (1, 2)]], PAD, IMAGE)
    assert batch.pixel_values is None
    assert batch.image_features.dtype == torch.bfloat16
    assert torch.equal(batch.image_features, torch.stack([seen(1).tiles[0], seen(2).tiles[0]]))
    assert batch.image_take.tolist() == list(range(2 * TOKENS))
    pixels = collate([[document("wit"), document("wit")]], PAD, IMAGE)
    assert torch.equal(batch.image_put, pixels.image_put)

    wide = replace(document("wit"), media=(seen(3, width=8),))
    features = collate([[wide], [replace(document("wit"), media=(seen(4),))]], PAD, IMAGE).image_features
    assert [list(one.shape) for one in features] == [[1, 2, 2, 8], [1, 2, 2, 6]]


def test_pixels_beside_features_are_refused_by_name():
    with pytest.raises(DataError, match=r"chats.jsonl:9: pixels of a picture in a batch with a tower's"):
        collate([[replace(document("wit"), media=(seen(),))], [broken()]], PAD, IMAGE, pad_to=7)


def test_no_rows_are_one_position_of_padding():
    batch = collate([], PAD, IMAGE, num_sources=2)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.position_ids.tolist() == [[0]]
    assert (batch.lengths, batch.sample_ids, batch.num_tokens, batch.num_targets) == ((1,), (), 0, 0)
    assert batch.reach == ((0, 0),)
    assert len(batch.target_index) == len(batch.target_document) == len(batch.target_group) == 0
    assert batch.pixel_values is batch.image_features is batch.image_take is batch.image_put is None
    assert collate([], PAD, IMAGE, pad_to=8).lengths == (8,)


def test_a_source_that_the_stage_does_not_have_is_refused():
    with pytest.raises(ValueError, match="source 1 of a stage with 1"):
        collate([[replace(document("wt"), source=1)]], PAD, IMAGE)


def test_rows_that_were_packed_wrongly_are_refused():
    with pytest.raises(ValueError, match="a row holds 5 tokens, more than the 4"):
        collate([[document("wt"), document("wtt")]], PAD, IMAGE, pad_to=4)
    with pytest.raises(ValueError, match="rows of at least one sample"):
        collate([[document("wt")], []], PAD, IMAGE)
    with pytest.raises(ValueError, match="padding would be taken for pictures"):
        collate([[document("wt")]], IMAGE, IMAGE)


def test_picture_targets_need_tiles_of_one_size():
    """8 x 2 and 2 x 8 px may take equally many tokens, but their embeddings lie size by size."""
    targets = torch.zeros(TOKENS, 2, dtype=torch.int64)
    wide, tall = (document("wit", f"{h}x{w}", targets) for h, w in ((2, 8), (8, 2)))
    wide, tall = (
        replace(one, media=(replace(one.media[0], tiles=(torch.zeros(3, h, w),)),))
        for one, (h, w) in ((wide, (2, 8)), (tall, (8, 2)))
    )
    assert collate([[wide, wide]], PAD, IMAGE).image_targets.shape == (2, TOKENS, 2)
    batch = collate([[wide, tall]], PAD, IMAGE)
    assert batch.image_targets is None
    assert [list(tiles.shape) for tiles in batch.pixel_values] == [[1, 3, 2, 8], [1, 3, 8, 2]]
