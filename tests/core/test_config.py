from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, field_validator

from tinymodal.core.config import differences, dump, load
from tinymodal.core.errors import RecipeError


class Strictly(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Leaf(Strictly):
    path: str
    weight: float = 1.0
    options: dict[str, Any] = {}


class Step(Strictly):
    name: str
    steps: int = 1
    schedule: Literal["cosine", "constant"] = "cosine"
    data: tuple[Leaf, ...] = ()
    note: str | None = None

    @field_validator("steps")
    @classmethod
    def _some(cls, steps: int) -> int:
        if steps < 1:
            raise ValueError(f"steps is {steps}; a stage takes at least 1")
        return steps


class Plan(Strictly):
    name: str
    seed: int = 0
    model: Leaf | None = None
    stages: tuple[Step, ...]


GOOD = """
name = "demo"

[model]
path = "some/model"

[[stages]]
name = "align"
data = [{ path = "a.json" }, { path = "b.json", weight = 2 }]

[[stages]]
name = "instruct"
steps = 20
"""


@pytest.fixture
def write(tmp_path):
    def to(text: str, name: str = "demo.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return to


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path, Plan, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{path.parent}/", "")


def test_a_file_becomes_a_typed_value(write):
    plan = load(write(GOOD), Plan)
    assert plan.stages[0].data[1] == Leaf(path="b.json", weight=2.0)
    assert plan.stages[1].steps == 20


def test_an_unknown_key_is_told_with_file_place_and_the_nearest_right_one(write):
    path = write(GOOD.replace("steps = 20", 'shedule = "cosine"'))
    assert refusal(path) == "demo.toml: stages[1]: unknown key 'shedule' in Step; did you mean 'schedule'?"


def test_an_unknown_key_deep_inside_names_its_place(write):
    path = write(GOOD.replace("weight = 2", "wieght = 2"))
    assert (
        refusal(path) == "demo.toml: stages[0].data[1]: unknown key 'wieght' in Leaf; did you mean 'weight'?"
    )


def test_an_unknown_key_that_resembles_nothing_lists_the_known_ones(write):
    told = refusal(write("zzz = 1\n" + GOOD))
    assert told == "demo.toml: unknown key 'zzz' in Plan; known keys: name, seed, model, stages"


def test_a_misspelt_key_is_told_before_the_key_it_should_have_been(write):
    told = refusal(write(GOOD.replace('name = "align"', 'nmae = "align"')))
    assert told.startswith("demo.toml: stages[0]: unknown key 'nmae' in Step; did you mean 'name'?")


def test_a_missing_key_is_named(write):
    assert refusal(write("name = 'x'\n")) == "demo.toml: missing key 'stages' in Plan"


def test_a_wrong_word_gets_the_nearest_right_one(write):
    told = refusal(write(GOOD.replace("steps = 20", 'schedule = "cosin"')))
    assert told.startswith("demo.toml: stages[1].schedule is 'cosin'; input should be 'cosine' or 'constant'")
    assert told.endswith("did you mean 'cosine'?")


def test_a_contradiction_is_told_in_its_own_words(write):
    told = refusal(write(GOOD.replace("steps = 20", "steps = 0")))
    assert told == "demo.toml: stages[1].steps: steps is 0; a stage takes at least 1"


def test_broken_toml_names_the_line(write):
    told = refusal(write("name = \n"))
    assert told.startswith("demo.toml: not valid TOML:")
    assert "line 1" in told


def test_a_file_that_is_not_there_hints_at_its_neighbour(write, tmp_path):
    write(GOOD)
    assert refusal(tmp_path / "dmeo.toml") == "dmeo.toml: there is no such file; did you mean 'demo.toml'?"
    assert "is a folder" in refusal(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "demo.toml"
    path.write_bytes(b"name = '\xff'")
    assert "not UTF-8" in refusal(path)


def test_overrides_change_values_by_number_and_by_name(write):
    overrides = [
        "stages.0.steps=10",
        "stages.instruct.steps=30",
        "seed=7",
        "name=two words",
        "model.weight=0.5",
    ]
    plan = load(write(GOOD), Plan, overrides)
    assert [stage.steps for stage in plan.stages] == [10, 30]
    assert (plan.seed, plan.name, plan.model.weight) == (7, "two words", 0.5)


def test_an_override_makes_the_table_it_needs(write):
    plan = load(
        write('name = "x"\nstages = []\n'), Plan, ["model.path=some/model", "model.options={ a = 1 }"]
    )
    assert plan.model == Leaf(path="some/model", options={"a": 1})


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.0.stepz=1", "override 'stages.0.stepz=1': stages[0]: unknown key 'stepz' in Step"),
        ("stages.0.steps=many", "override 'stages.0.steps=many': stages[0].steps is 'many'"),
        ("stages.7.steps=1", "there is no [7]; the list has 2"),
        ("stages.instrct.steps=1", "did you mean 'instruct'?"),
        ("seed.deep=1", "'seed' is 1, not a table"),
        ("seed", "expected dotted.path=value"),
        ("=3", "expected dotted.path=value"),
    ],
)
def test_a_wrong_override_is_quoted(write, override, told):
    text = "seed = 1\n" + GOOD
    assert told in refusal(write(text), override)


def test_a_function_in_a_python_file_gives_the_value(write):
    code = f"from {__name__} import Plan, Step\npoint = lambda: Plan(name='made', stages=[Step(name='a')])\n"
    path = write(code, "my_runs.py")
    plan = load(f"{path}:point", Plan, ["stages.a.steps=5"])
    assert (plan.name, plan.stages[0].steps) == ("made", 5)


def test_a_python_file_that_gives_something_else_is_refused(write):
    path = write("def point():\n    return 3\n", "other_runs.py")
    with pytest.raises(RecipeError, match="gave a int; expected a Plan"):
        load(f"{path}:point", Plan)


def test_what_is_dumped_loads_back_equal(write):
    plan = load(write(GOOD), Plan)
    assert load(write(dump(plan)), Plan) == plan
    assert dump(plan) == dump(load(write(dump(plan)), Plan))


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(name=words, options=st.dictionaries(words, values, max_size=4), weight=st.floats(allow_nan=False))
def test_any_value_survives_being_written(name, options, weight):
    leaf = Leaf(path=name, weight=weight, options=options)
    plan = Plan(name=name, model=leaf, stages=(Step(name=name, data=(leaf, leaf)),))
    assert Plan.model_validate(tomllib.loads(dump(plan))) == plan


def test_a_none_that_toml_cannot_write_is_refused():
    with pytest.raises(RecipeError, match="None"):
        dump(Plan(name="x", model=Leaf(path="p", options={"a": None}), stages=()))


def test_differences_name_the_place_and_both_values(write):
    one = load(write(GOOD), Plan)
    other = load(write(GOOD), Plan, ["stages.1.steps=7", "stages.0.data.0.path=c.json"])
    assert differences(one, other) == [
        "stages.0.data.0.path: 'a.json' and 'c.json'",
        "stages.1.steps: 20 and 7",
    ]
    assert differences(one, one) == []


def test_reading_a_recipe_does_not_import_torch_and_takes_milliseconds(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text('nmae = "x"\n')
    code = (
        "import sys\nfrom tinymodal.core.config import load\nfrom tinymodal.train.recipe import Recipe\n"
        "try:\n    load(sys.argv[1], Recipe)\nexcept Exception as error:\n    print(error)\n"
        "assert not {'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules), 'slow imports'\n"
        "import time\nprint('seconds', time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unknown key 'nmae' in Recipe; did you mean 'name'?" in done.stdout
    # CPU seconds, the interpreter's start included: 0.35 measured, 0.5 promised, the rest for a busy machine.
    assert float(done.stdout.split()[-1]) < 1
