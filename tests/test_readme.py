"""The pages: what they tell to type works, what they show is so, what they count is on record."""

import importlib.util
import io
import json
import re
import shlex
import sys
import tomllib
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from tinymodal.cli import main, parser
from tinymodal.compose.spec import ModelSpec, VisionSpec
from tinymodal.core.config import load
from tinymodal.core.lookup import find
from tinymodal.train.recipe import EvalEvery, Recipe, Stage

from .test_house import FLOORS, LIGHT
from .test_recipes import shipped, stand_in, write_my_data

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
COCO10 = ROOT.parent / "shared" / "data" / "media" / "coco10_llava_style"
NOT_RUN = ("make", "source", ".venv/bin/pytest", "tinymodal serve")
"""How commands begin that install or test, or that answer until they are stopped (tests/serve runs that one);
that what they name exists is checked."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", page.read_text(), re.M)
    return [Block(*one) for one in found]


def commands(page: Path) -> list[str]:
    return [
        line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines() if line
    ]


def files(page: Path) -> dict[str, str]:
    """Blocks whose title is a path: what the reader is told to write there."""
    return {block.title: block.text for block in blocks(page) if "/" in block.title}


def script(name: str) -> ModuleType:
    """A script of docs/, loaded as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# What can be told without running anything


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_of_a_page_is_one_that_exists(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands(page):
        words = shlex.split(command.rpartition(" | ")[2], comments=True)
        program, rest = words[0], words[1:]
        if program == "torchrun":
            program, rest = "tinymodal", words[words.index("tinymodal") + 1 :]
        if program.endswith("tinymodal"):
            assert parser().parse_args(rest).run, command
        elif program == "make":
            assert set(rest) <= set(targets), command
        elif program.endswith("pytest"):
            assert all((ROOT / word).exists() for word in rest), command
        else:
            assert program == "source", f"{command}: nothing here knows how to check it"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_toml_block_is_a_recipe_or_a_piece_of_one(page, tmp_path):
    for block in blocks(page):
        if block.language != "toml":
            continue
        # Under the title "pieces" each paragraph is one.
        for text in block.text.split("\n\n") if block.title == "pieces" else [block.text]:
            piece = tomllib.loads(text)
            stage = {"name": "s", "train": {"connectors": 1e-3}, "steps": 1, "data": [{"made": "scenes"}]}
            if "stages" in piece:
                (tmp_path / "block.toml").write_text(text)
                assert load(tmp_path / "block.toml", Recipe).stages
            elif "eval_every" in piece:
                assert EvalEvery.model_validate(piece["eval_every"]).on
            elif "model" in piece:
                assert ModelSpec.model_validate({"language": {"path": "an/llm"}, **piece["model"]})
            elif "config" in piece or "path" in piece:
                assert VisionSpec.model_validate(piece)
            else:
                assert Stage.model_validate({**stage, **piece}).data


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_of_a_page_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if target == "docs/answer.png" and not shipped("starter"):
            continue  # it shows the starter's answers
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_path_in_the_tree_of_the_readme_is_there():
    tree = next(block.text for block in blocks(README) if block.text.startswith("tinymodal/\n"))
    inside = False
    for line in tree.splitlines():
        name = line.split()[0]
        inside = line.startswith(" ")
        assert (ROOT / "tinymodal" / name if inside else ROOT / name).exists(), name
    rooms = {p.name + "/" for p in (ROOT / "tinymodal").iterdir() if p.is_dir() and p.name[0] not in "._"}
    assert rooms <= set(re.findall(r"^  ([\w.]+/)", tree, re.M))


def test_the_pages_say_what_the_source_says():
    """Keys of a recipe and files of the house; ``python docs/fill_pages.py`` writes them."""
    for path, text in script("fill_pages").pages().items():
        assert path.read_text() == text, f"{path.name} is stale; run python docs/fill_pages.py"


def test_the_house_is_described_with_the_floors_that_are_tested():
    page = (DOCS / "house.md").read_text()
    drawn = next(block.text for block in blocks(DOCS / "house.md") if block.title == "floors")
    told = {room: int(line.split()[1]) for line in drawn.splitlines() for room in line.split()[2:]}
    assert told == {room: floor for room, floor in FLOORS.items() if not room.startswith("__")}
    for path in LIGHT:
        assert f"`{path}`" in page
    for path in re.findall(r"`(\w+/\w+\.py)`", page):
        assert (ROOT / "tinymodal" / path).is_file(), path


def test_tests_that_a_page_names_exist():
    for page in PAGES:
        for name in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_every_dependency_is_explained_with_its_size():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (DOCS / "dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"^\| {name} \| \d+ \| .+ \|$", page, re.M), name
    for extra, members in project["optional-dependencies"].items():
        for requirement in members:
            name = re.match(r"[\w-]+", requirement)[0]
            assert re.search(rf"^\| `{extra}` \| {name} \| \d+ \| .+ \|$", page, re.M), name


# Data formats


ROWS = [block for block in blocks(DOCS / "data-formats.md") if block.language == "json"]


@pytest.mark.parametrize("block", ROWS, ids=lambda b: b.title)
def test_every_row_that_a_page_shows_is_converted(block, tmp_path, monkeypatch):
    from PIL import Image

    from tinymodal.core.types import Speech
    from tinymodal.data.convert import CONVERTERS
    from tinymodal.data.sources import open_source

    monkeypatch.chdir(tmp_path)
    for own in blocks(DOCS / "data-formats.md"):
        if own.language == "python":
            (tmp_path / own.title).write_text(own.text)
    for name in ("cat.jpg", "bus.jpg"):
        Image.new("RGB", (12, 9)).save(tmp_path / name)
    for name in ("rain.flac", "asked.flac", "said.wav"):
        (tmp_path / name).write_bytes(b"a sound")
    (tmp_path / "rows.jsonl").write_text(json.dumps(json.loads(block.text)) + "\n")

    sample = open_source("rows.jsonl", block.title).sample(0)

    assert find(block.title, CONVERTERS, "row format")
    assert sample.messages[-1].role == "assistant"
    # On the page what is heard is flac or base64, what is spoken wav.
    shown = re.findall(r'\w+\.(?:jpg|flac)|{"data"', block.text)
    assert len(list(sample.media())) == len(shown)
    spoken = [part for turn in sample.messages for part in turn.parts if isinstance(part, Speech)]
    assert len(spoken) == len(re.findall(r"\w+\.wav", block.text))


def test_every_format_has_a_row_on_the_page():
    from tinymodal.data.convert import CONVERTERS

    assert set(CONVERTERS) <= {block.title for block in ROWS}


# Numbers


SCORES = {
    "kinds": {
        "colour": {"new": 0.951, "unseen_pairs": 0.9, "shuffled": 0.2, "constant": 0.2, "n": 120},
        "number": {"new": 1.0, "unseen_pairs": None, "shuffled": 0.05, "constant": 0.04, "n": 120},
    },
    "mean": {"new": 0.9755, "unseen_pairs": 0.9, "shuffled": 0.125, "constant": 0.12},
}
MACHINE = {"processor": "Some CPU", "cores": 2}
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
SOUND = {
    "hear": {"wer_seen_voices": 0.011, "wer_unseen_voices": 0.023, "shuffled": 0.97},
    "spoken_questions": {"mean_new": 0.96, "mean_written": 0.98},
    "speak": {"wer": 0.021, "cer": 0.017, "first_sound_ms": 41.2, "real_time_factor": 0.31},
}
STARTER_RECORD = {
    "parts": {
        "ear": {"steps": 6000, "cpu_seconds": 860},
        "codec": {"steps": 1500, "held_out": {"2": {"mel_db": 3.12}}},
        "recogniser": {"parameters": 220511, "wer": {"speak whole": 0.0109}},
    },
    "bytes": {"language": 1_970_000, "model": 5_500_000},
    "whole": {"wer_unseen_voices": 0.08, "mean_new": 0.95},
    "recipes": {
        "starter": {
            "steps": 2500,
            "seconds": 4500,
            "commit": "a" * 40,
            "machine": MACHINE,
            "versions": VERSIONS,
        }
    },
    "scores": SCORES | SOUND,
    "seeds": {"test": 5},
}
DEMO_RECORD = {
    **SCORES,
    **SOUND,
    "stages": {name: {"mean_new": 0.5} for name in ("align", "instruct", "instruct_without_align")},
    "seconds": 480.0,
    "cpu_seconds": 900.4,
    "peak_memory_mb": 1234.5,
    "machine": MACHINE,
    "versions": VERSIONS,
    "commit": "b" * 40,
}


def test_the_numbers_of_the_readme_are_those_of_the_records():
    fill = script("fill_numbers")
    for record in (fill.STARTER, fill.DEMO):
        if not record.is_file():
            pytest.skip(f"no record yet: {record.relative_to(ROOT)}")
    page = README.read_text()
    assert fill.filled(page, fill.numbers(fill.read(fill.STARTER), fill.read(fill.DEMO))) == page


def test_numbers_are_taken_from_the_records_as_they_are():
    block = script("fill_numbers").numbers(STARTER_RECORD, DEMO_RECORD)
    assert block.count("| colour | 95.1 | 90.0 | 20.0 | 20.0 | 120 |") == 2
    assert "| number | 100.0 | – | 5.0 | 4.0 | 120 |" in block
    assert "| **mean** | **97.5** | **90.0** | **12.5** | **12.0** | 240 |" in block
    assert "| [starter](recipes/starter.toml) | 2,500 | 75 min | 2 cores of Some CPU |" in block
    assert "took 8.0 min (900 s of CPU)" in block
    assert block.count("| words heard wrongly, other voices | 2.3 % |") == 2
    assert block.count("| first sound after the first word | 41 ms |") == 2
    assert "All weights that ship: 7.47 MB." in block


def test_numbers_stand_between_their_marks_and_nothing_else_changes():
    fill = script("fill_numbers")
    page = README.read_text()
    once = fill.filled(page, "numbers")
    assert fill.filled(once, "numbers") == once
    assert once.split(fill.BEGIN)[0] == page.split(fill.BEGIN)[0]
    assert once.split(fill.END)[1] == page.split(fill.END)[1]


def test_a_missing_record_or_key_is_told_by_name(tmp_path):
    fill = script("fill_numbers")
    with pytest.raises(fill.RecordError, match=r"demo-report.json: no such record"):
        fill.read(tmp_path / "demo-report.json")
    with pytest.raises(fill.RecordError, match=r"lacks the key 'peak_memory_mb'"):
        fill.numbers(STARTER_RECORD, {k: v for k, v in DEMO_RECORD.items() if k != "peak_memory_mb"})
    with pytest.raises(fill.RecordError, match="once each"):
        fill.filled("a page without marks", "numbers")


def test_the_picture_of_answers_shows_one_question_of_every_kind():
    pytest.importorskip("sklearn")
    from tinymodal.data.synthetic import KINDS, questions

    picture = script("picture")
    cards = [picture.card(one, one.answer) for one in questions("val", picture.SEED, 1, False)]
    sheet = picture.draw(cards)
    assert len(cards) == len(KINDS)
    assert sheet.width == picture.COLUMNS * (picture.CARD_PX[0] + picture.GAP_PX) + picture.GAP_PX
    wrong = picture.draw([picture.card(one, "") for one in questions("val", picture.SEED, 1, False)])
    assert wrong.tobytes() != sheet.tobytes()


def test_the_scene_of_the_readme_is_the_one_the_script_draws():
    pytest.importorskip("sklearn")
    from PIL import Image

    assert Image.open(DOCS / "scene.png").convert("RGB").size == script("picture").scene().size


# What is typed. In this process: a process for each command would load torch a dozen times.


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Random parts that stand in for those that are not in the checkout."""
    return stand_in(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture
def desk(parts, tmp_path, monkeypatch) -> Path:
    """A newcomer's folder after ``make demo``, and the working directory."""
    pytest.importorskip("sklearn")
    from tinymodal.compose import pretrained

    for name, place in parts.items():
        if not shipped(name):
            monkeypatch.setitem(pretrained.SHIPPED, name, place)
    for name in ("recipes", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    (demo / "model").symlink_to(parts["starter"])
    (demo / "sample.png").symlink_to(DOCS / "scene.png")
    write_my_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(command: str, monkeypatch, capsys) -> str:
    """What ``tinymodal ...`` or ``echo ... | tinymodal ...`` prints."""
    before, _, last = command.rpartition(" | ")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(shlex.split(before)[1:])))
    code = main(shlex.split(last)[1:])
    out, err = capsys.readouterr()
    assert code == 0, f"{command}\n{out}\n{err}"
    return out


def briefly(command: str) -> str:
    """The same command; a training in two steps of one row a stage, a reply of a few words."""
    if "tinymodal chat" in command:
        return f"{command} --max-new-tokens 4"
    words = shlex.split(command)
    if words[:2] != ["tinymodal", "train"] or "--tiny" in words:
        return command
    short = ["threads=1"]
    for i, stage in enumerate(load(ROOT / words[2], Recipe).stages):
        short += [f"stages.{i}.steps=2", f"stages.{i}.batch_tokens={stage.seq_len}"]
    # Of two overrides of one key the later counts; they stand together, before the options.
    given = [word for word in words[3:] if "=" in word]
    return shlex.join([*words[:3], *given, *short, *words[3 + len(given) :]])


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, DOCS / "recipes.md"], ids=lambda p: p.name)
def test_the_commands_of_a_page_work_in_their_order(page, desk, monkeypatch, capsys):
    ran = [command for command in commands(page) if not command.startswith(NOT_RUN)]
    for command in ran:
        said = typed(briefly(command), monkeypatch, capsys)
        assert said.strip() or "chat" in command, f"{command} says nothing"
    assert len(ran) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, DOCS / "packing-and-labels.md"], ids=lambda p: p.name)
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(page, desk, capsys):
    shown = blocks(page)
    for block, following in zip_longest(shown, shown[1:]):
        if block.language != "python" or block.title:
            continue
        exec(compile(block.text, str(page), "exec"), {"__name__": page.stem})
        said = capsys.readouterr().out
        if (
            following is not None
            and following.language == "text"
            and not following.text.startswith("tinymodal/")
        ):
            assert said == following.text


@pytest.mark.slow
def test_ten_photographs_with_conversations_go_through_the_recipe_for_own_data(desk, monkeypatch, capsys):
    """The README's way with real input: as it came, previewed, trained (two steps), chatted about."""
    if not COCO10.is_dir():
        pytest.skip(f"optional data absent: {COCO10}")
    changes = shlex.join(
        [
            f"stages.learn.data.0.path={COCO10 / 'chats.json'}",
            f"stages.learn.data.0.images={COCO10 / 'images'}",
            "stages.learn.steps=2",
            "threads=1",
        ]
    )
    shown = typed(f"tinymodal preview recipes/own-data.toml {changes}", monkeypatch, capsys)
    assert "[image: 6x6 -> 9 tokens]" in shown
    assert shown.count("<|im_end|>»") >= 3, "the first conversation has at least three answers that train"
    typed(f"tinymodal train recipes/own-data.toml {changes} --out runs/coco", monkeypatch, capsys)
    assert not Path("runs/coco/skipped.jsonl").exists(), "a conversation was left out"
    picture = COCO10 / "images" / "000000052846.jpg"
    asked = f"echo What is this? | tinymodal chat runs/coco --max-new-tokens 4 --image {picture}"
    typed(asked, monkeypatch, capsys)
