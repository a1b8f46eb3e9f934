from __future__ import annotations

import pytest
from pydantic import ValidationError

from tinymodal.core.config import dump, load
from tinymodal.core.errors import RecipeError
from tinymodal.train.recipe import Recipe, Source, Stage

RECIPE = """
name = "demo"

[model]
language = { path = "some/language" }
vision   = { path = "some/tower" }

[[stages]]
name  = "align"
train = { connectors = 1e-3 }
steps = 100
data  = [{ path = "captions.json", format = "llava", images = "pictures" }]

[[stages]]
name  = "instruct"
train = { connectors = 1e-4, language = 2e-5, vision = 0 }
steps = 200
data  = [{ made = "scenes", weight = 2, options = { form = "mixed" } }]
"""


def stage(**changes):
    given = {"name": "a", "train": {"language": 1e-3}, "steps": 10, "data": [{"made": "scenes"}]}
    return Stage.model_validate(given | changes)


def refused(**changes) -> str:
    with pytest.raises(ValidationError) as caught:
        stage(**changes)
    return str(caught.value)


def read(tmp_path, text: str) -> Recipe:
    path = tmp_path / "demo.toml"
    path.write_text(text)
    return load(path, Recipe)


def test_a_recipe_is_read_with_its_defaults_and_written_back(tmp_path):
    recipe = read(tmp_path, RECIPE)
    align, instruct = recipe.stages
    assert align.train == {"connectors": 1e-3}
    assert align.data[0] == Source(path="captions.json", format="llava", images="pictures")
    assert instruct.data[0].weight == 2
    assert (recipe.stage_seed(0), recipe.stage_seed(1)) == (0, 1)
    assert read(tmp_path, dump(recipe)) == recipe


def test_a_wrong_key_names_file_place_key_and_the_nearest_right_one(tmp_path):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, RECIPE.replace("steps = 200", "setps = 200"))
    told = str(caught.value)
    assert told.startswith(
        f"{tmp_path}/demo.toml: stages[1]: unknown key 'setps' in Stage; did you mean 'steps'?"
    )


@pytest.mark.parametrize("train", [{}, {"connectors": 0}, {"connectors": 0.0, "language": 0}])
def test_a_stage_that_trains_nothing_is_refused_with_its_key(tmp_path, train):
    text = "{ " + ", ".join(f"{k} = {v}" for k, v in train.items()) + " }"
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, RECIPE.replace("{ connectors = 1e-3 }", text))
    assert "stages[0].train: the stage trains nothing" in str(caught.value)


def test_an_unknown_group_lists_the_groups_and_the_nearest():
    told = refused(train={"visoin": 1e-3})
    assert "unknown group 'visoin'" in told
    assert "did you mean 'vision'?" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_tokens": 1000, "seq_len": 256}, "take 768 or 1024"),
        ({"batch_tokens": 100, "seq_len": 256}, "take 256"),
        ({"batch_tokens": 1024, "seq_len": 256, "micro_batch_tokens": 300}, "multiple of seq_len 256"),
        ({"batch_tokens": 1024, "seq_len": 256, "micro_batch_tokens": 768}, "divide batch_tokens 1024"),
        ({"schedule": "wsd", "warmup": 0.6, "decay": 0.5}, "together at most 1"),
        ({"schedule": "cosin"}, "'cosine', 'wsd' or 'constant'"),
        ({"loss": ["cells"], "train": {"vision": 1e-3}}, "needs 'cell_classes'"),
        ({"train": {"language": 1e-3, "heads": 1e-3}}, "for the cells loss"),
        (
            {"loss": ["cells"], "cell_classes": [2], "train": {"heads": 1.0, "language": 1.0}},
            "only the text loss trains it",
        ),
        ({"loss": []}, "is empty"),
        ({"data": []}, "is empty"),
        ({"name": "a b"}, "names a folder"),
        ({"steps": 0}, "greater than 0"),
        ({"steps": "10"}, "valid integer"),
        ({"train": {"language": -1.0}}, "greater than or equal to 0"),
        ({"train": {"language": float("nan")}}, "finite"),
        ({"clip": True}, "valid number"),
        ({"data": [{}]}, "either 'path' or 'made', found neither"),
        ({"data": [{"made": "scenes", "path": "a"}]}, "found both"),
        ({"data": [{"path": "a.json"}]}, "needs 'format'"),
        ({"data": [{"path": "a.json", "format": "llava", "options": {"a": 1}}]}, "for 'made' sources"),
        ({"data": [{"made": "scenes", "images": "x"}]}, "for 'path' sources"),
        ({"data": [{"made": "scenes", "weight": 0}]}, "greater than 0"),
    ],
)
def test_a_contradiction_in_a_stage_is_told(changes, told):
    assert told in refused(**changes)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('name  = "instruct"', 'name  = "align"', "stages: two stages are called 'align'"),
        (
            'vision   = { path = "some/tower" }',
            "",
            "stages[0].train.connectors has a rate, but the model has no",
        ),
        ('name = "demo"', 'name = "demo"\nparts = { audio = "x" }', "parts"),
        ('name = "demo"', 'name = "demo"\nseed = -1', "seed is -1"),
        ('language = { path = "some/language" }', "", "a model needs 'language'"),
    ],
)
def test_a_contradiction_between_parts_of_a_recipe_is_told(tmp_path, before, after, told):
    assert before in RECIPE
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, RECIPE.replace(before, after))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_micro_batches_fill_the_batch():
    assert stage(batch_tokens=2048, seq_len=256).micro_batches == 1
    assert stage(batch_tokens=2048, seq_len=256, micro_batch_tokens=512).micro_batches == 4
