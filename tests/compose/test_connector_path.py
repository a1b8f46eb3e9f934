"""``model.vision.connector_path``: a connector that begins where another one ended."""

import pytest
import torch

from tinymodal.compose import build
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError

QFORMER = {"num_queries": 4, "depth": 2, "width": 32, "num_heads": 4}


@pytest.fixture
def other(tmp_path):
    """A run folder with another model, of a narrower language model."""
    made = tiny_model("clip_vision_model", "qformer", options=QFORMER, seed=7, sight={"marks": ("start",)})
    build.save(made, tmp_path / "run" / "model")
    return made.model, str(tmp_path / "run")


def joined(path, **more):
    sight = {"marks": ("start",), "connector_path": path, **more.pop("sight", {})}
    return tiny_model("clip_vision_model", "qformer", **{"options": QFORMER, "sight": sight, **more}).model


def parts(model):
    return {n: w for n, w in model.state_dict().items() if ".connectors." in n or ".marks." in n}


def test_connector_and_marks_begin_with_those_of_the_other_model(other):
    theirs, path = other
    ours = joined(path)
    assert parts(ours).keys() == parts(theirs).keys()
    assert all(torch.equal(weight, parts(theirs)[name]) for name, weight in parts(ours).items())
    alone = joined(None)
    rest = [n for n in ours.state_dict() if n not in parts(ours)]
    assert all(torch.equal(ours.state_dict()[n], alone.state_dict()[n]) for n in rest), "nothing else moved"


def test_what_the_other_one_lacks_begins_new(other):
    """As TinyGPT-V's second projection does over MiniGPT-4's Q-Former and first projection."""
    theirs, path = other
    ours = parts(joined(path, options={**QFORMER, "middle": 32}))
    new = ours.keys() - parts(theirs).keys()
    assert new == {f"model.connectors.image.proj.1.{kind}" for kind in ("weight", "bias")}
    assert all(torch.equal(ours[name], weight) for name, weight in parts(theirs).items())


def test_a_connector_of_another_shape_is_refused_with_both(other):
    _, path = other
    with pytest.raises(CheckpointError, match=r"connector_path: .* has num_queries = 4, here it is 8"):
        joined(path, options={**QFORMER, "num_queries": 8})
    with pytest.raises(CheckpointError, match=r"layer\.1\..* is not in this model's connector"):
        joined(path, options={**QFORMER, "depth": 1})


def test_a_folder_without_a_connector_is_refused(tmp_path):
    build.save(tiny_model(None), tmp_path / "blind")
    with pytest.raises(CheckpointError, match="has no connector"):
        joined(str(tmp_path / "blind"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="holds a model of type 'llama', not a composed one"):
        joined(str(tmp_path))


def test_marks_of_another_meaning_are_refused_though_their_shapes_fit(other):
    _, path = other
    with pytest.raises(CheckpointError, match=r"its marks are \['start'\], here they are \['end'\]"):
        tiny_model(
            "clip_vision_model", "qformer", options=QFORMER, sight={"connector_path": path, "marks": ("end",)}
        )
