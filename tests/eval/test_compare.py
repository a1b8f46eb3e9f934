"""The page that compares runs: complete, self-contained, safe, and right about what it says."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.eval import compare as comparing
from tinymodal.eval.compare import MAX_POINTS, compare, differences, finals, line, names, read
from tinymodal.eval.pages.runs import KNOWN, SECTIONS
from tinymodal.eval.pages.runs_script import SCRIPT

RECIPE = """name = "tiny"
seed = 0
[[stages]]
name = "align"
steps = 20
train = { connectors = 1e-3 }
[[stages]]
name = "chat"
steps = 10
"""


def steps(stage, count, loss=2.0, **more):
    return [
        {
            "stage": stage,
            "step": n,
            "loss": loss / n,
            "loss/captions": loss / n + 0.1,
            "lr": 1e-3,
            "grad_norm": 0.5,
            "tokens": 100,
            "tokens_per_s": 50.0,
            "padding": 0.25,
            "wait_share": 0.1,
            "peak_memory_bytes": 3 * 10**9,
            "seconds": 2.0 * n,
            **more,
        }
        for n in range(1, count + 1)
    ]


@pytest.fixture
def run(tmp_path):
    def make(name, rows, recipe=RECIPE, start=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if recipe is not None:
            (folder / "recipe.toml").write_text(recipe)
        known = {"commit": "abcdef0123456789", "time": "2026-01-01", "machine": {"cores": 2}} | (start or {})
        (folder / "run.json").write_text(json.dumps({"starts": [known]}))
        return folder

    return make


class Outline(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def outline(text):
    parsed = Outline()
    parsed.feed(text)
    assert parsed.open == []
    return parsed


def data(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_is_whole_and_refers_to_nothing_outside(run, tmp_path):
    rows = [*steps("align", 20), {"stage": "align", "step": 20, "held_out": 1.5}, *steps("chat", 10)]
    folders = [run("one", rows), run("other", steps("align", 25))]
    out = compare(folders, tmp_path / "made" / "compare.html")
    text = out.read_text()
    page = outline(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "href" in attrs]
    panels = [attrs["data-key"] for tag, attrs in page.tags if tag == "figure"]
    assert panels[:3] == ["loss", "held_out", "loss/captions"]
    assert set(panels) >= {"lr", "grad_norm", "tokens_per_s", "padding", "wait_share", "peak_memory_bytes"}
    # Without scripts there are curves too, each stage a line of its own, with a title for those who listen.
    assert sum(tag == "polyline" for tag, _ in page.tags) >= 3 * len(panels) - 5
    titles = [text for tag, text in page.texts if tag == "title"]
    assert "Held-out loss over steps" in titles
    assert all(attrs["role"] == "img" for tag, attrs in page.tags if tag == "svg")


def test_what_comes_from_a_run_cannot_become_markup(run, tmp_path):
    evil = "</script><script>alert(1)</script><b a='\"&"
    rows = steps(evil, 3, **{f"loss/{evil}": 1.0, evil: 2.0})
    folder = run(
        "x", rows, recipe=f"name = {json.dumps(evil)}\n", start={"machine": {evil: evil}, "commit": evil}
    )
    other = run("<i>y", steps("a", 2), recipe='name = "b"\n')
    text = compare([folder, other], tmp_path / "c.html").read_text()
    page = outline(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert not any(tag == "b" and attrs for tag, attrs in page.tags)
    assert f"loss/{evil}" in data(text)["panels"]


def test_stages_are_laid_end_to_end_over_steps_tokens_and_hours(run):
    rows = [*steps("align", 20), *steps("chat", 10)]
    rows.insert(25, {"stage": "chat", "step": 5, "held_out": 1.0})
    found = line(read(run("one", rows), "one"))
    assert found.stages == (("align", (0, 0, 0)), ("chat", (20, 2000, 40 / 3600)))
    steps_, held_out = found.grids
    assert steps_.at[-1] == pytest.approx((30, 3000, 60 / 3600))
    assert steps_.stages == (0,) * 20 + (1,) * 10
    assert held_out.at == (pytest.approx((25, 2500, 50 / 3600)),)
    assert held_out.series == {"held_out": (1.0,)}


def test_a_long_curve_is_brought_to_means_that_never_mix_stages(run):
    count = 3 * MAX_POINTS
    rows = [*steps("align", count, lr=1.0), *steps("chat", 5, lr=2.0)]
    rows[4]["loss"] = None  # a skipped step
    grid = line(read(run("one", rows), "one")).grids[0]
    assert grid.together == 4
    assert len(grid.at) == math.ceil(count / 4) + 2
    assert set(grid.series["lr"]) == {1.0, 2.0}
    assert grid.series["loss"][0] == pytest.approx((2 / 1 + 2 / 2 + 2 / 3 + 2 / 4) / 4)
    assert grid.series["loss"][1] == pytest.approx((2 / 6 + 2 / 7 + 2 / 8) / 3)
    assert grid.at[0][0] == 4


def test_recipes_are_compared_key_by_key_and_stages_by_name():
    one = {
        "seed": 0,
        "stages": [{"name": "a", "steps": 5, "data": [{"path": "x"}]}, {"name": "b", "steps": 1}],
    }
    two = {
        "seed": 0,
        "stages": [{"name": "a", "steps": 9, "data": [{"path": "y", "weight": 2}]}],
        "threads": 1,
    }
    assert differences([one, two]) == [
        ("stages.a.steps", ["5", "9"]),
        ("stages.a.data.0.path", ['"x"', '"y"']),
        ("stages.b", ["there", "–"]),
        ("stages.a.data.0.weight", ["–", "2"]),
        ("threads", ["–", "1"]),
    ]
    assert differences([one, one]) == []
    assert differences([one, None, two])[0] == ("stages.a.steps", ["5", "not known", "9"])


def test_numbers_at_the_end_are_those_of_the_rows(run):
    rows = [*steps("align", 40), {"stage": "align", "step": 20, "held_out": 1.25}]
    rows += [{"stage": "align", "step": 40, "held_out": 1.5}, *steps("chat", 2, mfu=0.4)]
    rows[5] |= {"loss": None, "skipped": "the loss is not a finite number"}
    runs = [read(run("one", rows), "one"), read(run("two", steps("chat", 4)), "two")]
    tables = {heading: dict(found) for heading, found in finals(runs)}
    align = tables["Stage align"]
    assert align["steps"] == ["40", "–"]
    assert align["loss, mean of the last 5%"] == [f"{(2 / 39 + 2 / 40) / 2:.4f}", "–"]
    assert align["held-out loss, last"] == ["1.5000", "–"]
    assert align["held-out loss, best"] == ["1.2500 at step 20", "–"]
    assert tables["Stage chat"]["steps"] == ["2", "4"]
    whole = tables["The whole run"]
    assert whole["tokens"] == ["4,200", "400"]
    assert whole["time in steps"] == ["1 min 24 s", "8 s"]
    assert whole["tokens per second"] == ["50", "50"]
    assert whole["share of the device's peak (MFU)"] == ["40.0 %", "–"]
    assert whole["peak memory"] == ["3.00 GB", "3.00 GB"]
    assert whole["skipped steps"] == ["1", "0"]


def test_a_curve_that_repeats_the_whole_is_not_drawn_twice(run, tmp_path):
    rows = [row | {"loss/captions": row["loss"], "loss/image": 9.0} for row in steps("align", 9)]
    text = compare([run("one", rows)], tmp_path / "c.html").read_text()
    assert "data-key='loss/image'" in text
    assert "data-key='loss/captions'" not in text


def test_keys_that_nobody_here_knows_are_drawn_too(run, tmp_path):
    text = compare([run("one", steps("align", 9, reward=1.0))], tmp_path / "c.html").read_text()
    assert text.index("<h2>More</h2>") < text.index("data-key='reward'")


def test_every_known_key_has_its_section():
    placed = [key for _, keys in SECTIONS for key in keys]
    assert set(KNOWN) <= set(placed)


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart(tmp_path):
    a, b, c = tmp_path / "x" / "demo", tmp_path / "y" / "demo", tmp_path / "x" / "other"
    assert names([a, c]) == ["demo", "other"]
    assert names([a, b, c]) == ["x/demo", "y/demo", "x/other"]
    assert names([a, a]) == ["demo", "demo (2)"]


def test_a_run_that_is_being_written_is_read_as_far_as_it_is(run):
    folder = run("one", steps("align", 3))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "align", "st')
    assert len(read(folder, "one").rows) == 3
    (folder / "recipe.toml").unlink()
    (folder / "run.json").unlink()
    assert (read(folder, "one").recipe, read(folder, "one").starts) == (None, ())


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("{", r"metrics\.jsonl:2: the line is no JSON object: '\{'"),
        ("[1]", r"metrics\.jsonl:2: the line is no JSON object"),
        ('{"stage": "a"}', r"metrics\.jsonl:2: the line lacks the key 'step'"),
        ('{"stage": "a", "step": "x"}', r"metrics\.jsonl:2: stage is 'a' and step 'x'"),
        ("\x00\x00", r"metrics\.jsonl:2: the line is no JSON object"),
    ],
)
def test_a_broken_line_is_named(run, broken, told):
    folder = run("one", steps("align", 1))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f"{broken}\n" + json.dumps(steps("align", 2)[1]) + "\n")
    with pytest.raises(DataError, match=told):
        read(folder, "one")


def test_what_is_no_run_is_named(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: is no folder; expected the folder of a run"):
        compare([tmp_path / "nowhere"], tmp_path / "c.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: holds no metrics\.jsonl"):
        compare([tmp_path / "empty"], tmp_path / "c.html")
    with pytest.raises(DataError, match=r"metrics\.jsonl: holds no step yet"):
        compare([run("new", [])], tmp_path / "c.html")
    folder = run("bad", steps("a", 1), recipe="name = ")
    with pytest.raises(RecipeError, match=r"recipe\.toml: not valid TOML"):
        compare([folder], tmp_path / "c.html")
    (folder / "recipe.toml").unlink()
    (folder / "run.json").write_text("[]")
    with pytest.raises(DataError, match=r"run\.json: not what a run writes"):
        compare([folder], tmp_path / "c.html")
    with pytest.raises(DataError, match="is a folder; give --out the name of a file"):
        compare([run("good", steps("a", 1))], tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        [{"stage": "a", "step": 1, "loss": None}],
        [{"stage": "a", "step": 0, "held_out": 2.0}],
        [{"stage": "a", "step": 1, "loss": 0.0, "lr": 0.0}],
        [{"stage": "a", "step": 1, "loss": -1e300}, {"stage": "a", "step": 2, "loss": 1e300}],
    ],
)
def test_odd_runs_are_drawn_without_a_number_that_is_none(run, tmp_path, rows):
    text = compare([run("one", rows, recipe=None)], tmp_path / "c.html").read_text()
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", text.replace(SCRIPT, ""))
    outline(text)


def test_the_script_is_one_that_a_browser_accepts(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node here")
    (tmp_path / "script.js").write_text(SCRIPT)
    subprocess.run([node, "--check", str(tmp_path / "script.js")], check=True, timeout=60)


def test_a_full_disk_leaves_the_page_that_was_there(run, tmp_path, monkeypatch):
    folder, out = run("one", steps("align", 3)), tmp_path / "pages" / "c.html"
    before = compare([folder], out).read_text()
    real = comparing.Path.write_text

    def full(self, text, **options):
        real(self, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(comparing.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        compare([folder, folder], out)
    assert out.read_text() == before
    assert [path.name for path in out.parent.iterdir()] == ["c.html"]


def test_only_three_files_of_a_run_are_read(run, tmp_path, monkeypatch):
    folder = run("one", steps("align", 3))
    (folder / "model").mkdir()
    opened = []
    real = comparing.Path.open

    def seen(self, *args, **kwargs):
        opened.append(self.name)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(comparing.Path, "open", seen)
    read(folder, "one")
    assert set(opened) == {"metrics.jsonl", "recipe.toml", "run.json"}
