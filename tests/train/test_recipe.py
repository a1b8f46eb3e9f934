from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from tinymodal.core.config import dump, load
from tinymodal.core.errors import RecipeError
from tinymodal.train.recipe import Choice, Recipe, Source, Stage, read_choice

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


ADAPTERS = {"train": {"adapters": 1e-3}, "lora": {"rank": 4}}


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
        ({"data": [{}]}, "either 'path', 'hub' or 'made', found none of them"),
        ({"data": [{"made": "scenes", "path": "a"}]}, "found 'path' and 'made'"),
        ({"data": [{"hub": "org/set"}]}, "'hub' needs 'format'"),
        ({"loss": ["distill"]}, "'distill' and the key 'teacher' go together"),
        ({"teacher": {"path": "x"}}, "'distill' and the key 'teacher' go together"),
        ({"loss": ["distill"], "teacher": {"path": "x", "cached": True}}, "give top_k"),
        ({"loss": ["dpo", "text"]}, "give each its own stage"),
        ({"loss_weights": {"distill": 0.5}}, "loss_weights.distill has a weight, but"),
        ({"beta": 0.0}, "greater than 0"),
        ({"steps": None}, "missing key 'steps' in Stage; or let the data end it"),
        ({"recompute": 0}, "greater than 0"),
        ({"recompute": "some"}, "'none' or 'full'"),
        ({"bad_rows": -1}, "greater than or equal to 0"),
        ({"micro_batch_tokens": "all"}, "'auto'"),
        ({"cache": True, "train": {"vision": 1e-5}}, "'cache' keeps what the towers say"),
        (
            ADAPTERS | {"cache": True, "lora": {"rank": 4, "parts": ["vision"]}},
            "'cache' keeps what the towers say",
        ),
        ({"data": [{"path": "a.json"}]}, "needs 'format'"),
        ({"data": [{"path": "a.json", "format": "llava", "options": {"a": 1}}]}, "for 'made' sources"),
        ({"data": [{"made": "scenes", "images": "x"}]}, "for 'path' and 'hub' sources"),
        ({"data": [{"made": "scenes", "weight": 0}]}, "greater than 0"),
        ({"only": {"language": "norm"}}, "language: 'norm' chooses nothing; take 'from layer K', 'norms', "),
        ({"only": {"language": "from layer -1"}}, "chooses nothing"),
        ({"only": {"language": "named"}}, "chooses nothing"),
        ({"only": {"visoin": "norms"}}, "did you mean 'vision'?"),
        ({"only": {"embeddings": "norms"}}, "'embeddings' trains as a whole"),
        ({"only": {"vision": "norms"}}, "'only.vision' says what trains, but 'train.vision' has no rate"),
        ({"train": {"adapters": 1e-3}}, "there are none; add lora = { rank = 64 }"),
        ({"lora": {"rank": 4}}, "'lora' has no rate; add it to 'train'"),
        (ADAPTERS | {"lora": {"rank": 0}}, "greater than 0"),
        (ADAPTERS | {"lora": {"rank": 4, "dropout": 1.0}}, "leaves every input out"),
        (ADAPTERS | {"lora": {"rank": 4, "parts": []}}, "is empty"),
        (ADAPTERS | {"lora": {"rank": 4, "parts": ["lm_head"]}}, "unknown part 'lm_head'"),
        (ADAPTERS | {"lora": {"rank": 4, "parts": ["langauge"]}}, "did you mean 'language'?"),
        (ADAPTERS | {"lora": {"rank": 4, "targets": "q_proj"}}, "names stand in a list: ['q_proj']"),
        (ADAPTERS | {"lora": {"rank": 4, "targets": []}}, "is empty; take 'linear'"),
        (ADAPTERS | {"lora": {"rank": 4, "kind": "dorra"}}, "'lora', 'dora' or 'rslora'"),
        (
            {"train": {"adapters": 1e-3, "language": 1e-3}, "lora": {"rank": 4}},
            "'train.language' trains the matrices that lora.parts keeps frozen below its adapters",
        ),
        ({"bits": 4}, "bits = 4 stores the language model's matrices rounded, which cannot train"),
        ({"bits": 8, "train": {"vision": 1e-3}}, "bits = 8 is for adapters on the language model"),
        (
            ADAPTERS | {"bits": 4, "lora": {"rank": 4, "parts": ["vision"]}},
            "bits = 4 is for adapters on the language model",
        ),
        (ADAPTERS | {"bits": 2}, "4 or 8"),
        (
            ADAPTERS | {"bits": 8, "lora": {"rank": 4, "kind": "dora"}},
            "bits = 8 does not go with kind = 'dora'",
        ),
        (
            {
                "loss": ["cells"],
                "cell_classes": [2],
                "train": {"heads": 1.0, "adapters": 1.0},
                "lora": {"rank": 4},
            },
            "'train.adapters' has a rate, but only the text loss trains it",
        ),
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
        ('name = "demo"', 'name = "demo"\nparallel = { offload = true }', "'offload' is for kind = 'fsdp'"),
        ('name = "demo"', 'name = "demo"\nparallel = { kind = "zero" }', "parallel.kind"),
        ('name = "demo"', 'name = "demo"\ntrackers = ["tensorbord"]', "did you mean 'tensorboard'?"),
        ("steps = 200", "steps = 200\nbits = 4", "stages[1]: bits = 4 stores the language model's matrices"),
        (
            "steps = 200",
            "steps = 200\nlora = { ranks = 4 }",
            "unknown key 'ranks' in Lora; did you mean 'rank'?",
        ),
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


def test_processes_share_a_step_in_whole_micro_batches():
    whole = stage(batch_tokens=2048, seq_len=256)
    assert (whole.split(1), whole.split(2), whole.split(8)) == ((2048, 1), (1024, 1), (256, 1))
    parts = stage(batch_tokens=2048, seq_len=256, micro_batch_tokens=512)
    assert (parts.split(2), parts.split(1, 256)) == ((512, 2), (256, 8))
    with pytest.raises(RecipeError, match="which 3 processes cannot share"):
        whole.split(3)
    with pytest.raises(RecipeError, match="take a multiple of 4096"):
        parts.split(8)


def test_yes_and_no_are_understood_where_blocks_are_recomputed():
    assert [stage(recompute=value).recompute for value in (True, False, 3)] == ["full", "none", 3]


def test_a_stage_may_end_with_its_data_in_place_of_steps():
    assert stage(steps=None, ends="drop").steps is None


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ({"path": "data/chats-*.jsonl", "format": "messages"}, "chats-*"),
        ({"hub": "org/photos", "format": "caption"}, "photos"),
        ({"made": "my_data.py:Make"}, "Make"),
        ({"made": "scenes", "name": "drawn"}, "drawn"),
    ],
)
def test_a_source_is_called_by_its_name_or_by_what_it_is(source, label):
    assert stage(data=[source]).data[0].label == label


CHOICES = """
[[stages]]
name  = "last"
train = { adapters = 2e-4, connectors = 2e-5, vision = 2e-6, language = 1e-5 }
only  = { vision = "from layer 12", language = "norms with biases" }
lora  = { rank = 128, alpha = 256, parts = ["language"], targets = ["q_proj", "v_proj"], kind = "rslora" }
bits  = 4
steps = 10
data  = [{ made = "scenes" }]
"""


def test_what_trains_is_said_on_one_screen_and_written_back(tmp_path):
    recipe = read(tmp_path, RECIPE + CHOICES)
    last = recipe.stages[2]
    assert last.choice("vision") == Choice(layer=12)
    assert last.choice("language") == Choice(norms=True, biases=True)
    assert last.choice("connectors") == Choice()
    assert read_choice("named proj, layers.1") == Choice(names=("proj", "layers.1"))
    assert (last.lora.rank, last.lora.alpha, last.lora.dropout, last.bits) == (128, 256, 0.05, 4)
    assert last.lora.targets == ("q_proj", "v_proj")
    assert recipe.stages[0].lora is None
    assert read(tmp_path, dump(recipe)) == recipe


def test_an_adapter_in_a_tower_that_is_not_there_is_refused(tmp_path):
    text = (RECIPE + CHOICES).replace('vision   = { path = "some/tower" }', "")
    text = text.replace("connectors = 1e-3", "language = 1e-3").replace("connectors = 1e-4, ", "")
    text = text.replace(" connectors = 2e-5, vision = 2e-6,", "").replace('vision = "from layer 12", ', "")
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text.replace('["language"]', '["language", "vision"]'))
    assert "stages[2].lora.parts names vision, but the model has no vision part" in str(caught.value)


def test_every_example_of_the_page_on_trainability_is_a_stage():
    page = (Path(__file__).parents[2] / "docs" / "trainability.md").read_text()
    examples = re.search(r"```toml pieces\n(.*?)```", page, re.DOTALL)[1].split("\n\n")
    shown = re.findall(r"`((?:train|only|lora) = \{.*?\}|bits = \d)`", page)
    assert len(examples) == 5
    for text in examples:
        assert stage(**tomllib.loads(text)).train
    for text in shown:  # of the table of choices, each alone
        assert tomllib.loads(text)
