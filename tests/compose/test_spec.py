import subprocess
import sys

import pytest
from pydantic import ValidationError

from tinymodal.compose.spec import LanguageSpec, ModelSpec, VisionSpec

LANGUAGE = {"path": "org/llm"}
BAD = {
    "nothing": ({}, "a model needs 'language'"),
    "vision alone": ({"vision": {"path": "a/b"}}, "a model needs 'language'"),
    "whole and parts": (
        {"path": "starter", "language": LANGUAGE, "vision": {"path": "a/b"}},
        "'path' names a whole composed model, so 'language' and 'vision' must go",
    ),
    "language without origin": (
        {"language": {}},
        "language has either 'path' .* or 'config' .* found neither",
    ),
    "language with two": (
        {"language": {"path": "x", "config": {"model_type": "llama"}}},
        "language has either .* found both",
    ),
    "new without tokenizer": ({"language": {"config": {"model_type": "llama"}}}, "name one with 'tokenizer'"),
    "no family": (
        {"language": LANGUAGE, "vision": {"config": {"hidden_size": 8}}},
        "vision.config needs 'model_type'",
    ),
    "typo": (
        {"language": LANGUAGE, "vision": {"path": "a/b", "conector": "mlp"}},
        "Extra inputs are not permitted",
    ),
    "layer as text": (
        {"language": LANGUAGE, "vision": {"path": "a/b", "feature_layer": "-2"}},
        "valid integer",
    ),
    "no pixels": ({"language": LANGUAGE, "vision": {"path": "a/b", "size_px": 0}}, "greater than 0"),
    "resize": ({"language": LANGUAGE, "vision": {"path": "a/b", "resize": "fit"}}, "'square', 'crop'"),
    "one of two towers": ({"language": LANGUAGE, "vision": {"path": ["a/b"]}}, "1 towers; give one name"),
    "normalise of one": (
        {"language": LANGUAGE, "vision": {"path": "a/b", "normalise": "first"}},
        "'normalise' is for two towers",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_contradiction_names_its_keys(name):
    data, words = BAD[name]
    with pytest.raises(ValidationError, match=words):
        ModelSpec.model_validate(data)


def test_parts_default_to_what_llava_does():
    spec = ModelSpec(language=LanguageSpec(path="org/llm"), vision=VisionSpec(path="org/tower"))
    assert (spec.vision.connector, spec.vision.feature_layer, spec.vision.resize) == ("mlp", -2, "square")
    assert spec.language.template == "chatml"


def test_values_are_frozen_and_compare():
    one, other = ModelSpec(path="starter"), ModelSpec(path="starter")
    assert one == other
    with pytest.raises(ValidationError):
        one.path = "x"


def test_specs_do_not_import_torch():
    code = "import sys, tinymodal.compose.spec; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
