"""Write what the source says of itself into the pages: every key of a recipe, every file of the house.

    python docs/fill_pages.py            write docs/recipes.md and docs/house.md
    python docs/fill_pages.py --check    exit code 1 if they say something else

A key's sentence is the string below it in ``train/recipe.py`` or ``compose/spec.py``; a file's is the first
line of its docstring. Nothing is told twice, so nothing can drift.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tinymodal.compose.spec import AudioSpec, LanguageSpec, ModelSpec, SpeechSpec, VisionSpec
from tinymodal.eval.tasks.table import ON_DISK
from tinymodal.train.recipe import Augment, EvalEvery, Lora, Parallel, Recipe, Source, Stage, Teacher

ROOT = Path(__file__).resolve().parents[1]
TABLES: dict[type[BaseModel], str] = {
    Recipe: "top of the file",
    ModelSpec: "`[model]`",
    LanguageSpec: "`[model.language]`",
    VisionSpec: "`[model.vision]`",
    AudioSpec: "`[model.audio]`",
    SpeechSpec: "`[model.speech]`",
    Stage: "each `[[stages]]`",
    Lora: "a stage's `lora`",
    Source: "each member of a stage's `data` and `held_out`",
    Augment: "a source's `augment`",
    Teacher: "a stage's `teacher`",
    Parallel: "`[parallel]`",
    EvalEvery: "`[eval_every]`",
}
KINDS = {
    "str": "text",
    "Number": "whole number",
    "Count": "whole number > 0",
    "Natural": "whole number ≥ 0",
    "Rate": "number ≥ 0",
    "Fraction": "0 to 1",
    "Flag": "true, false",
    "ModelSpec": "table",
    "LanguageSpec": "table",
    "VisionSpec": "table",
    "AudioSpec": "table",
    "SpeechSpec": "table",
    "Augment": "table",
    "Lora": "table",
    "Parallel": "table",
    "EvalEvery": "table",
    "Teacher": "table",
    "dict[Loss, Rate]": "table",
    "str | tuple[str, ...]": "text or list of texts",
    "tuple[str, ...]": "list of texts",
    "Annotated[tuple[str, ...], Field(min_length=1)]": "list of texts",
    "dict[str, str]": "table",
    "dict[str, Any]": "table",
    "dict[str, Rate]": "table",
    "dict[str, bool | int | float | str]": "table",
    "Number | tuple[Number, ...]": "whole number or list",
    "tuple[Number, ...]": "list",
    "tuple[Factor, Factor]": "two numbers, 0.25 to 4",
    "tuple[Decibel, Decibel]": "two numbers, -60 to 100",
    "Annotated[float, Field(gt=0)]": "number > 0",
    "Annotated[int, Strict(), Field(ge=0)]": "whole number ≥ 0",
    "tuple[Count, Count]": "two whole numbers",
    "tuple[tuple[Count, Count], ...]": "list of pairs",
    "Annotated[bool, Strict()]": "true, false",
    "dict[Literal['vision', 'audio', 'language', 'speech'], str]": (
        "table: `vision`, `audio`, `language`, `speech`"
    ),
    "tuple[Stage, ...]": "list of tables",
    "tuple[Source, ...]": "list of tables",
    "tuple[Loss, ...]": "list of `text`, `cells`, `dpo`, `distill`, `speech`",
    "tuple[Count, ...]": "list of whole numbers",
    "tuple[Fraction, Fraction]": "two numbers",
    "Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]": "number > 0",
    "tuple[Literal['tensorboard', 'wandb', 'trackio'], ...]": "list of `tensorboard`, `wandb`, `trackio`",
}
ROOMS = {
    "core": "floor 1: words everyone speaks",
    "model": "floor 1: the artifact; flat, and its own remote code",
    "chat": "floor 2: conversation -> tokens",
    "compose": "floor 3: parts -> model",
    "data": "floor 3: files -> batches",
    "infer": "floor 4: sample -> reply",
    "train": "floor 4: batches -> weights",
    "port": "floor 4: checkpoints of other systems in, ours out, with proof",
    "eval": "floor 5: model -> numbers",
    "eval/rules": "",
    "eval/tasks": "",
    "eval/pages": "",
    "serve": "floor 5: a model that answers clients",
    "verbs": "floor 6: what the verbs do",
    "": "floors 6 and 7: the verbs",
}


def keys() -> str:
    """A table of keys for each part of a recipe."""
    blocks = []
    for model, place in TABLES.items():
        rows = [f"### {model.__name__}: {place}", "", "| key | value | default | |", "|---|---|---|---|"]
        for name, (annotation, sentence) in _fields(model).items():
            if not sentence:
                raise SystemExit(f"{model.__name__}.{name} has no sentence below it; write one there")
            cells = (f"`{name}`", _kind(annotation), _default(model, name), sentence)
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def tree() -> str:
    """Every file of the package with its first line."""
    package = ROOT / "tinymodal"
    found = {str(p.relative_to(package).parent).removeprefix(".") for p in package.rglob("*.py")}
    if unknown := sorted(found - set(ROOMS)):
        raise SystemExit(f"docs/fill_pages.py: no floor is known for {', '.join(unknown)}; add it to ROOMS")
    lines = ["```text"]
    for room, title in ROOMS.items():
        files = sorted((package / room).glob("*.py"))
        told = [(path.name, _first_line(path)) for path in files]
        lines.append(f"tinymodal/{room + '/' if room else '':<24}  {title}".rstrip())
        lines += [f"  {name:<32}  {says}" for name, says in told if says]
        lines.append("")
    return "\n".join([*lines[:-1], "```"])


def benchmarks() -> str:
    """A table of the benchmarks of the field."""
    rows = ["| `--on` | asks | source of its rules |", "|---|---|---|"]
    for task in ON_DISK.values():
        link = re.search(r"https?://[^\s,;)]+", task.source)
        source = f"[{link[0].split('/')[2]}]({link[0]})" if link else task.source
        rows.append(f"| `{task.name}` | {task.title} | {source} |")
    return "\n".join(rows)


def filled(page: str, name: str, block: str) -> str:
    """``page`` with ``block`` between ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, _, rest = page.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"expected '{begin}' and then '{end}' in the page")
    return f"{head}{begin}\n\n{block}\n\n{end}{tail}"


def pages() -> dict[Path, str]:
    """What each page should hold."""
    recipes, house = ROOT / "docs" / "recipes.md", ROOT / "docs" / "house.md"
    field = ROOT / "docs" / "benchmarks.md"
    return {
        recipes: filled(recipes.read_text(encoding="utf-8"), "keys", keys()),
        field: filled(field.read_text(encoding="utf-8"), "benchmarks", benchmarks()),
        house: filled(house.read_text(encoding="utf-8"), "tree", tree()),
    }


def _fields(model: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Key -> annotation as it is written, and the string below it."""
    body = ast.parse(inspect.getsource(model)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, below in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            says = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                # In TOML there is no None: a key is left out.
                says = (
                    " ".join(str(below.value.value).split()).replace("``", "`").replace("None:", "left out:")
                )
            found[node.target.id] = ast.unparse(node.annotation), says
    assert found.keys() == model.model_fields.keys()
    return found


def _kind(annotation: str) -> str:
    plain = annotation.removesuffix(" | None")
    if plain in KINDS:
        return KINDS[plain]
    if choices := re.fullmatch(r"Literal\[([^\]]*)\]", plain):
        return ", ".join(f"`{word.strip(chr(39))}`" for word in choices[1].split(", "))
    several = plain.split(" | ")
    if len(several) == 1:
        raise SystemExit(f"docs/fill_pages.py: no words for a value of type {plain}; add them to KINDS")
    return " or ".join(map(_kind, several))


def _default(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    value: Any = field.default
    if value is None or value in ({}, ()):
        return "–"
    if isinstance(value, BaseModel):
        return ""  # its keys have defaults of their own
    return f"`{json.dumps(value)}`"


def _first_line(path: Path) -> str:
    says = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.sub(r":class:|`", "", says.split("\n\n")[0].replace("\n", " "))


def main() -> int:
    words = argparse.ArgumentParser(description="Write docs/recipes.md and docs/house.md from the source.")
    words.add_argument("--check", action="store_true", help="only tell whether they say it already")
    check = words.parse_args().check
    stale = []
    for path, text in pages().items():
        if path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(
            f"error: {', '.join(stale)} is not what the source says; run python docs/fill_pages.py",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
