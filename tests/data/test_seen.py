"""What comes from the cache is what the tower says, and nothing is found that another tower said."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from tinymodal.compose.build import Composed
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.data import cache as files
from tinymodal.data import seen as module
from tinymodal.data.cache import FeatureCache
from tinymodal.data.loader import Loader
from tinymodal.data.pack import Row
from tinymodal.data.seen import Kept, keep, tower_name, warm
from tinymodal.data.sources import open_source

SIGHTS: dict[str, dict[str, Any]] = {
    "square": {},
    "square-newline": {"marks": ("newline",)},
    "anyres": {"resize": "anyres", "merge": "spatial_unpad", "marks": ("newline",)},
    "slices": {
        "resize": "slices",
        "max_tiles": 4,
        "marks": ("start", "end", "tile_start", "tile_end", "tile_newline", "id"),
    },
    "tiles": {"resize": "tiles", "max_tiles": 4},
    "native": {"resize": "native", "fit_pixels": (144, 2304)},
}
SIZES = ((24, 24), (30, 50), (90, 31), (8, 100), (48, 48), (61, 60))
"""Width and height of the pictures."""


def noise(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    noise(width, height, seed).save(file, "JPEG")
    return file.getvalue()


def asked(*pictures: Any, name: str = "made") -> Sample:
    parts = [picture if isinstance(picture, Image) else Image(picture) for picture in pictures]
    user = Message("user", (*parts, Text("what is it")))
    return Sample((user, Message("assistant", (Text("noise"),))), name)


def frozen(sight: str = "square") -> Composed:
    composed = tiny_model(sight=SIGHTS[sight])
    composed.model.requires_grad_(False)
    composed.model.eval()
    return composed


@pytest.fixture(scope="module")
def composed() -> Composed:
    return frozen()


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "features")


def joined(composed: Composed, cache: FeatureCache) -> Kept:
    return keep(composed.model, composed.processor.image_processor, cache)


def row(*samples: Any) -> Row:
    made = Row()
    for n, sample in enumerate(samples):
        made.append(sample, n)
    return made


def features(rows: list[Row]) -> list[torch.Tensor]:
    return [tile for each in rows for sample in each for item in sample.media for tile in item.tiles]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- a hit


@pytest.mark.parametrize("sight", SIGHTS)
def test_a_hit_neither_decodes_nor_resizes_and_is_laid_out_as_the_pixels_were(sight, cache, monkeypatch):
    composed = frozen(sight)
    kept = joined(composed, cache)
    encoder = composed.encoder.using(prepare=kept.prepare)
    sample = asked(*[jpeg(*size, seed=n) for n, size in enumerate(SIZES)])
    plain, missed = composed.encoder(sample), encoder(sample)
    assert not any(item.seen for item in missed.media)
    assert same(features([row(plain)]), features([row(missed)]))
    made = kept.complete([row(missed)])

    monkeypatch.setattr(PIL.Image, "open", None)
    monkeypatch.setattr("tinymodal.model.processing_tinymodal.cut", None)
    hit = encoder(sample)
    assert all(item.seen and item.key for item in hit.media)
    assert torch.equal(hit.ids, plain.ids)
    assert torch.equal(hit.labels, plain.labels)
    for one, other in zip(hit.media, plain.media, strict=True):
        assert (one.grid, one.tokens, one.patches) == (other.grid, other.tokens, other.patches)
        assert one.tile_tokens == other.tile_tokens
        assert (one.order is None) == (other.order is None)
        assert one.order is None or torch.equal(one.order, other.order)
    assert same(features([row(hit)]), features(made))
    assert kept.complete([row(hit)])[0].samples == [hit]
    assert (kept.complete.num_new, kept.complete.num_hits) == (len(SIZES), len(SIZES))


@pytest.mark.parametrize("sight", SIGHTS)
def test_features_are_the_towers_own_rounded_once(sight, cache):
    composed = frozen(sight)
    kept = joined(composed, cache)
    missed = composed.encoder.using(prepare=kept.prepare)(asked(noise(61, 60), noise(30, 50)))
    tower = composed.model.model.towers["image"]
    with torch.no_grad():
        seen = [tower(tile[None]) for item in missed.media for tile in item.tiles]
    expected = [each.values[0].to(torch.bfloat16).unflatten(0, each.grid) for each in seen]
    assert same(features(kept.complete([row(missed)])), expected)


def test_the_model_makes_of_features_what_it_makes_of_pixels(composed, cache):
    kept = joined(composed, cache)
    document = composed.encoder.using(prepare=kept.prepare)(asked(noise(30, 50)))
    (pixels,), (x,) = document.media[0].tiles, kept.complete([row(document)])[0][0].media[0].tiles
    with torch.no_grad():
        (expected,) = composed.model.model.perceive("image", pixels[None])
        (ours,) = composed.model.model.connect("image", x[None])
    assert ours.shape == expected.shape
    # bfloat16 keeps 8 bits.
    assert (ours - expected).norm() < 0.01 * expected.norm()


def test_features_are_the_same_filled_ahead_in_another_order_in_another_batch_or_hit(composed, tmp_path):
    samples = [asked(jpeg(*size, seed=n), name=str(n)) for n, size in enumerate(SIZES)]

    class Listed:
        def __len__(self):
            return len(samples)

        def sample(self, n):
            return samples[n]

    def run(order, batch, *, ahead=False, again=False):
        kept = joined(composed, FeatureCache(tmp_path / f"{order}{batch}{ahead}"))
        encode = composed.encoder.using(prepare=kept.prepare)
        if ahead:
            assert warm({"listed": Listed()}, kept, shown=False).num_new == len(samples)
        found = {}
        for begin in range(0, len(order), batch):
            documents = [encode(samples[n]) for n in order[begin : begin + batch]]
            for document in kept.complete([row(*documents)])[0]:
                found[document.sample_id] = document.media[0].tiles[0]
        return run(order, batch, ahead=ahead) if again else [found[str(n)] for n in range(len(samples))]

    one = run([0, 1, 2, 3, 4, 5], 6)
    assert same(one, run([5, 2, 4, 0, 1, 3], 2))
    assert same(one, run([3, 4, 5, 0, 1, 2], 1, again=True))
    assert same(one, run([0, 1, 2, 3, 4, 5], 3, ahead=True))


def test_several_tiles_at_once_give_what_one_gives_alone_up_to_rounding(cache, tmp_path):
    composed = frozen("native")
    sample = asked(*[noise(*size, seed=n) for n, size in enumerate((*SIZES, *SIZES))])
    alone, together = joined(composed, cache), joined(composed, FeatureCache(tmp_path / "other"))
    together.complete.at_once = 5
    found = []
    for kept in (alone, together):
        document = composed.encoder.using(prepare=kept.prepare)(sample)
        found.append(features(kept.complete([row(document)])))
    for one, other in zip(*found, strict=True):
        assert (one.float() - other.float()).norm() < 0.01 * one.float().norm()


def test_a_picture_that_comes_twice_is_seen_once_and_text_is_left_alone(composed, cache, monkeypatch):
    kept = joined(composed, cache)
    encode = composed.encoder.using(prepare=kept.prepare)
    tower, calls = kept.complete.towers["image"], []
    handle = tower.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    words = asked()
    rows = [
        row(encode(asked(noise(9, 9), noise(8, 8), name="a")), encode(words)),
        row(encode(asked(noise(9, 9), name="b"))),
    ]
    done = kept.complete(rows)
    handle.remove()
    assert sum(calls) == 2
    assert [sample.sample_id for each in done for sample in each] == ["a", "made", "b"]
    assert done[0].indices == [0, 1]
    assert (done[0].tokens, done[0].patches) == (rows[0].tokens, rows[0].patches)
    assert torch.equal(done[0][0].media[0].tiles[0], done[1][0].media[0].tiles[0])
    assert kept.complete([row(encode(words))])[0][0].media == ()


def test_a_picture_without_a_key_is_seen_too_and_kept_nowhere(composed, cache):
    kept = joined(composed, cache)
    document = composed.encoder(asked(noise(9, 9)))
    again = composed.encoder.using(prepare=kept.prepare)(asked(noise(9, 9)))
    assert same(features(kept.complete([row(document)])), features(kept.complete([row(again)])))
    assert len(list(cache.folder.glob("??/*"))) == 1


def test_the_tower_is_run_in_eval_mode_and_left_as_it_was(cache):
    composed = frozen()
    kept = joined(composed, cache)
    tower, modes = kept.complete.towers["image"], []
    tower.train()
    tower.register_forward_hook(lambda *_: modes.append(tower.training))
    kept.complete([row(composed.encoder(asked(noise(9, 9))))])
    assert modes == [False]
    assert tower.training


def test_numbers_of_pictures_do_not_part_what_is_one_picture(cache):
    """With the mark ``id`` the second picture is laid out otherwise, of the same features."""
    composed = frozen("slices")
    kept = joined(composed, cache)
    encode = composed.encoder.using(prepare=kept.prepare)
    kept.complete([row(encode(asked(noise(60, 90))))])
    first, second = encode(asked(noise(60, 90), noise(60, 90))).media
    assert first.seen
    assert second.seen
    assert not torch.equal(first.order, second.order)
    plain = composed.encoder(asked(noise(60, 90), noise(60, 90))).media
    assert torch.equal(second.order, plain[1].order)


# ---- keys


def test_a_key_changes_with_everything_that_decides_the_features(tmp_path):
    composed = frozen()
    images = composed.processor.image_processor
    picture = jpeg(30, 50)

    def name(model=composed.model, dtype="bfloat16", precision="float32", source=picture, **limits):
        prepare = keep(model, images, FeatureCache(tmp_path, dtype), precision).prepare
        return prepare.find(source, **limits).key

    keys = [name()]
    assert name() == keys[0]
    keys += [name(dtype="float8"), name(precision="bfloat16")]
    keys += [name(source=picture + b"\0"), name(source=noise(30, 50)), name(source=noise(30, 50, 1))]
    keys += [name(source=noise(50, 30))]
    how = images.preparation
    others = [{"resize": "pad"}, {"mean": (0.5, 0.5, 0.4)}, {"resample": "bilinear"}, {"resizer": "pillow"}]
    for other in others:
        images.preparation = replace(how, **other)
        keys.append(name())
    images.preparation = how

    tower = composed.model.model.towers["image"]
    first = next(tower.parameters())
    kept = first.data.clone()
    flat = first.data.flatten()
    flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1)  # by the last bit of one weight
    first.data.copy_(flat.view_as(first))
    keys.append(name())
    first.data = kept.to(torch.bfloat16)
    keys.append(name())
    first.data = kept
    assert name() == keys[0]
    assert len(set(keys)) == len(keys)


def test_limits_of_one_picture_are_part_of_its_key(cache):
    composed = frozen("tiles")
    kept = joined(composed, cache)
    picture = noise(90, 31)
    encode = composed.encoder.using(prepare=kept.prepare)
    kept.complete([row(encode(asked(picture)))])
    few = encode(asked(Image(picture, max_tiles=1))).media[0]
    assert not few.seen
    assert len(few.tiles) == 1
    assert encode(asked(picture)).media[0].seen


def test_towers_with_the_same_weights_but_other_configs_differ(composed):
    tower = composed.model.model.towers["image"]
    assert tower_name(tower, ()) == tower_name(tower, ())
    assert tower_name(tower, (-1,)) != tower_name(tower, (-2,))
    eps = tower.config.layer_norm_eps
    before = tower_name(tower, ())
    tower.config.layer_norm_eps = 2 * eps
    try:
        assert tower_name(tower, ()) != before
    finally:
        tower.config.layer_norm_eps = eps


def test_what_comes_after_the_tower_is_no_part_of_a_key(tmp_path):
    """Features of a first stage serve a model with another connector, other marks and other words."""
    one, other = frozen("square"), frozen("square-newline")
    other.model.model.towers["image"].load_state_dict(one.model.model.towers["image"].state_dict())
    with torch.no_grad():
        next(other.model.model.connectors["image"].parameters()).mul_(2)
    first, second = joined(one, FeatureCache(tmp_path)), joined(other, FeatureCache(tmp_path))
    made = first.complete([row(one.encoder.using(prepare=first.prepare)(asked(noise(30, 50))))])
    hit = other.encoder.using(prepare=second.prepare)(asked(noise(30, 50)))
    assert hit.media[0].seen
    assert hit.media[0].order is not None
    assert same(features([row(hit)]), features(made))


def test_a_decoded_picture_and_its_kin_share_a_key_if_they_show_the_same(composed, cache):
    find = joined(composed, cache).prepare.find
    picture = noise(30, 50)
    lossless = io.BytesIO()
    picture.save(lossless, "PNG")
    opened = PIL.Image.open(io.BytesIO(lossless.getvalue()))
    assert find(opened).key == find(picture).key == find(picture.convert("RGBA")).key
    grey = picture.convert("L")
    assert find(grey).key == find(grey.convert("RGB")).key != find(picture).key


# ---- refusals and faults


def test_a_tower_that_trains_is_refused_when_it_is_joined_and_when_it_is_run(cache):
    composed = frozen()
    kept = joined(composed, cache)
    tower = composed.model.model.towers["image"]
    next(tower.parameters()).requires_grad_(True)
    with pytest.raises(RecipeError, match=r"^stages\.align: 'cache' keeps .* but 1 of its tensors train"):
        keep(composed.model, composed.processor.image_processor, cache, place="stages.align")
    with pytest.raises(RecipeError, match="1 of its tensors train"):
        kept.complete([row(composed.encoder(asked(noise(9, 9))))])
    composed.model.requires_grad_(False)
    tower.adapter = torch.nn.Linear(2, 2)  # as LoRA puts them in
    with pytest.raises(RecipeError, match=r"2 of its tensors train .*adapter\.weight, adapter\.bias"):
        joined(composed, cache)
    del tower.adapter
    del composed.model.model.towers["image"]
    with pytest.raises(RecipeError, match="this model has none"):
        joined(composed, cache)


def test_a_picture_that_cannot_be_read_is_refused_with_the_same_words(composed, cache, tmp_path):
    encode = composed.encoder.using(prepare=joined(composed, cache).prepare)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "half.jpg").write_bytes(jpeg(90, 90)[:1500])
    sources = [tmp_path / f"{name}.jpg" for name in ("empty", "text", "half", "missing")]
    for source in [*sources, tmp_path, b"", b"no picture", jpeg(90, 90)[:1500], 7]:
        with pytest.raises(DataError) as plain:
            composed.encoder(asked(source))
        with pytest.raises(DataError) as ours:
            encode(asked(source))
        assert str(ours.value) == str(plain.value)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "another"])
def test_a_broken_file_is_encoded_again_and_written_anew(fault, composed, cache):
    kept = joined(composed, cache)
    encode = composed.encoder.using(prepare=kept.prepare)
    made = kept.complete([row(encode(asked(noise(30, 50))))])
    (path,) = cache.folder.glob("??/*")
    whole = bytearray(path.read_bytes())
    if fault == "truncated":
        path.write_bytes(whole[:-7])
    elif fault == "flipped":
        whole[-7] ^= 4
        path.write_bytes(whole)
    else:
        # Features of another shape under this key: whole, and yet not this picture's.
        cache.put(path.name, (50, 30), [torch.zeros(2, 2, 4)])
    missed = encode(asked(noise(30, 50)))
    assert not missed.media[0].seen
    assert same(features(kept.complete([row(missed)])), features(made))
    assert cache.num_broken == (fault != "another")
    assert encode(asked(noise(30, 50))).media[0].seen


def test_on_a_full_disk_training_sees_the_same_features(composed, cache, tmp_path, monkeypatch):
    rows = [row(*[composed.encoder(asked(noise(*size, seed=n))) for n, size in enumerate(SIZES)])]
    expected = features(joined(composed, cache).complete(rows))
    lines: list[str] = []
    monkeypatch.setattr(files, "say", lines.append)
    full = FeatureCache(tmp_path / "full")

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureCache, "_write", fails)
    kept = joined(composed, full)
    encode = composed.encoder.using(prepare=kept.prepare)
    for _ in range(2):
        documents = [encode(asked(noise(*size, seed=n))) for n, size in enumerate(SIZES)]
        assert same(features(kept.complete([row(*documents)])), expected)
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert kept.complete.num_new == 2 * len(SIZES)


# ---- in the loader


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Rows with pictures, text alone, one picture twice and one that is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for n, size in enumerate(SIZES):
        (folder / f"{n}.jpg").write_bytes(jpeg(*size, seed=n))
        rows.append({"image": f"{n}.jpg", "question": "what", "answer": f"noise {n}"})
    rows.append({"image": "0.jpg", "question": "what again", "answer": "noise 0"})
    rows.append({"image": None, "question": "without", "answer": "words"})
    (folder / "broken.jpg").write_bytes(jpeg(90, 90)[:1500])
    rows.append({"image": "broken.jpg", "question": "what", "answer": "nothing"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder / "rows.jsonl"


def loader(composed: Composed, kept: Kept, pictures: Any, **options: Any) -> Loader:
    return Loader(
        [open_source(pictures, "vqa")],
        composed.encoder.using(prepare=kept.prepare),
        seq_len=96,
        batch_tokens=192,
        pad_id=composed.tokenizer.pad_token_id,
        image_token_id=composed.model.config.image_token_id,
        bad_rows="skip",
        open_rows=2,
        complete=kept.complete,
        **options,
    )


def test_batches_hold_features_and_are_the_same_in_every_epoch_process_and_run(composed, pictures, tmp_path):
    def batches(cache, workers=0):
        kept = joined(composed, cache)
        made = loader(composed, kept, pictures, workers=workers)
        try:
            return list(islice(made, 8)), kept.complete
        finally:
            made.close()

    cache = FeatureCache(tmp_path / "one")
    first, complete = batches(cache)
    assert complete.num_new == len(SIZES)
    assert complete.num_hits > 20
    assert any(batch.image_features is not None for batch in first)
    again, complete = batches(cache)
    assert complete.num_new == 0
    fresh, complete = batches(FeatureCache(tmp_path / "two"), workers=2)
    assert complete.num_new == len(SIZES)
    hit, complete = batches(cache, workers=2)
    assert complete.num_new == 0
    for other in (again, fresh, hit):
        for one, two in zip(first, other, strict=True):
            assert one.pixel_values is None
            assert two.pixel_values is None
            assert one.sample_ids == two.sample_ids
            assert torch.equal(one.input_ids, two.input_ids)
            if one.image_features is not None:
                assert torch.equal(one.image_features, two.image_features)


def test_an_encoder_with_a_cache_can_be_pickled_and_does_not_carry_the_tower(composed, cache):
    kept = joined(composed, cache)
    encode = composed.encoder.using(prepare=kept.prepare)
    kept.complete([row(encode(asked(noise(9, 9))))])
    size = len(pickle.dumps(kept.prepare))
    assert size < 100_000
    assert pickle.loads(pickle.dumps(kept.prepare))(noise(9, 9)).seen


# ---- filled ahead


class Endless:
    def sample(self, n):
        return asked(noise(9, 9, n))


@pytest.mark.parametrize("workers", [0, 2])
def test_filling_ahead_sees_every_picture_once_and_names_what_cannot_be_read(
    workers, composed, pictures, cache
):
    kept = joined(composed, cache)
    sources = {"rows": open_source(pictures, "vqa"), "made": Endless()}
    done = warm(sources, kept, workers=workers, shown=False)
    assert (done.num_rows, done.num_pictures, done.num_hits, done.num_new) == (9, 6, 0, 6)
    assert [sample_id for sample_id, _ in done.bad] == [f"{pictures}:9"]
    assert "broken.jpg: broken or cut short" in done.bad[0][1]
    assert done.endless == ("made",)
    assert done.num_bytes == sum(path.stat().st_size for path in cache.folder.glob("??/*"))
    again = warm(sources, kept, workers=workers, shown=False)
    assert (again.num_pictures, again.num_hits, again.num_new) == (6, 6, 0)
    assert again.num_bytes == done.num_bytes
    encode = composed.encoder.using(prepare=kept.prepare)
    source = sources["rows"]
    assert all(item.seen for n in range(8) for item in encode(source.sample(n)).media)


def test_filling_ahead_mends_what_is_cut_short(composed, pictures, cache):
    kept = joined(composed, cache)
    source = {"rows": open_source(pictures, "vqa")}
    warm(source, kept, shown=False)
    path = next(iter(cache.folder.glob("??/*")))
    path.write_bytes(path.read_bytes()[:-1])
    again = warm(source, kept, shown=False)
    assert (again.num_hits, again.num_new) == (5, 1)
    assert cache.num_broken == 1


def test_filling_ahead_ends_where_nothing_can_be_kept(composed, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "say", lambda _: None)
    monkeypatch.setattr(module, "CHUNK", 2)
    source = {"rows": open_source(pictures, "vqa")}
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"taken: cannot be written after \d pictures; make room"):
        warm(source, joined(composed, FeatureCache(tmp_path / "taken")), shown=False)
    small = FeatureCache(tmp_path / "small", max_bytes=9_000)
    with pytest.raises(RecipeError, match=r"cache_gb: \d of 9 rows fill the 9e-06 GB of .*Raise cache_gb"):
        warm(source, joined(composed, small), shown=False)


def _fill(composed, pictures, folder, wrong):
    torch.set_num_threads(1)
    done = warm({"rows": open_source(pictures, "vqa")}, joined(composed, FeatureCache(folder)), shown=False)
    if done.num_hits + done.num_new != 6 or len(done.bad) != 1:
        wrong.put(done)


def test_several_processes_fill_one_cache(composed, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1)
    context = multiprocessing.get_context("fork")
    wrong = context.Queue()
    processes = [
        context.Process(target=_fill, args=(composed, pictures, tmp_path / "shared", wrong)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert wrong.empty()
    assert len(list((tmp_path / "shared").glob("??/*"))) == 6
