"""Parts out of composed models: the same weights and the same preparation as in the model they come from."""

import json

import pytest
import torch

from tinymodal.compose.build import build, save
from tinymodal.compose.spec import AudioSpec, LanguageSpec, ModelSpec, VisionSpec
from tinymodal.compose.tiny import tiny_language, tiny_model, tiny_tokenizer
from tinymodal.core.errors import CheckpointError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def compose(tokenizer, vision=None, audio=None):
    rows = len(tiny_tokenizer()) + 1  # with <audio>
    language = LanguageSpec(
        config=tiny_language(vocab_size=rows), tokenizer=str(tokenizer), template="chatml"
    )
    return build(ModelSpec(language=language, vision=vision, audio=audio), seed=5)


def states(composed, kind):
    return composed.model.model.towers[kind].state_dict()


@pytest.mark.parametrize("kind", ["siglip_vision_model", "tinymodal_tower", "dinov2"])
def test_a_vision_tower_goes_on_in_another_model(kind, tokenizer, tmp_path):
    first = tiny_model(kind, seed=3, feature_layer=-1)
    save(first, tmp_path / "run" / "model")
    for place in ("run", "run/model"):
        vision = VisionSpec(path=str(tmp_path / place), connector="mlp", feature_layer=-1)
        second = compose(tokenizer, vision)
        theirs, ours = states(first, "image"), states(second, "image")
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_two_towers_at_once_go_on_together(tokenizer, tmp_path):
    from tinymodal.compose.tiny import tiny_vision

    kinds = [tiny_vision("dinov2"), tiny_vision("tinymodal_tower")]
    pair = VisionSpec(
        config={"model_type": "tinymodal_pair", "towers": kinds}, connector="mlp", feature_layer=-1
    )
    first = compose(tokenizer, pair)
    torch.nn.init.normal_(next(first.model.model.towers["image"].parameters()))
    save(first, tmp_path)
    second = compose(tokenizer, VisionSpec(path=str(tmp_path), connector="mlp", feature_layer=-1))
    theirs, ours = states(first, "image"), states(second, "image")
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_pictures_are_prepared_as_they_were(tokenizer, tmp_path):
    save(tiny_model(seed=3), tmp_path)
    file = tmp_path / "processor_config.json"
    document = json.loads(file.read_text())
    own = document["image_processor"]["preparation"]
    own |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resample": "lanczos"}
    file.write_text(json.dumps(document))
    how = compose(tokenizer, VisionSpec(path=str(tmp_path))).processor.image_processor.preparation
    assert (how.mean, how.std, how.resample) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "lanczos")


@pytest.mark.parametrize("kind", ["tinymodal_ear", "wav2vec2", "whisper"])
def test_an_audio_tower_goes_on_in_another_model(kind, tokenizer, tmp_path):
    first = tiny_model(None, audio=kind, seed=3)
    save(first, tmp_path)
    second = compose(tokenizer, audio=AudioSpec(path=str(tmp_path)))
    theirs, ours = states(first, "audio"), states(second, "audio")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert second.processor.feature_extractor.hearing == first.processor.feature_extractor.hearing


def test_a_model_that_lacks_the_part_is_told(tokenizer, tmp_path):
    save(tiny_model(), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.audio\.path: .*has no audio tower"):
        compose(tokenizer, audio=AudioSpec(path=str(tmp_path)))


def test_a_later_layer_than_the_model_kept_is_told(tokenizer, tmp_path):
    save(tiny_model(feature_layer=1), tmp_path)
    with pytest.raises(CheckpointError, match="weights are not in the checkpoint"):
        compose(tokenizer, VisionSpec(path=str(tmp_path), feature_layer=-1))
