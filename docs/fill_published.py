"""Write the tables of docs/published-recipes.md from the recipes themselves.

    python docs/fill_published.py            write the page
    python docs/fill_published.py --check    exit code 1 if it says something else

Nothing is downloaded and no weight is read: how many tokens a picture takes follows from what
``tinymodal/compose/published.py`` knows of the parts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinymodal.compose.shrink import picture_tokens
from tinymodal.core.config import load
from tinymodal.train.recipe import Recipe, Stage

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "published-recipes.md"
FOLDER = ROOT / "recipes" / "published"
TINYLLAVA = ("base", "share", "lora", "qlora")
TOWERS = {"siglip": "SigLIP", "clip": "CLIP", "mof": "CLIP + DINOv2"}


def recipes() -> dict[str, Recipe]:
    """Name of each file -> what it says."""
    return {path.stem: load(path, Recipe) for path in sorted(FOLDER.glob("tinymodal-*.toml"))}


def parts_of(name: str) -> tuple[str, str, str]:
    """Recipe, vision and language of ``tinymodal-{recipe}-{vision}-{language}``."""
    _, recipe, vision, language = name.split("-", 3)
    return recipe, vision, language


def tinyllava() -> str:
    """A line for each language model; in its columns a link for each tower."""
    found = recipes()
    lines = [
        f"| language model | template | {' | '.join(TINYLLAVA)} |",
        "|---|---|" + "---|" * len(TINYLLAVA),
    ]
    models: dict[str, dict[str, list[str]]] = {}
    templates: dict[str, str] = {}
    for name, recipe in found.items():
        kind, vision, _ = parts_of(name)
        if kind not in TINYLLAVA or recipe.model.language is None:
            continue
        path = str(recipe.model.language.path)
        templates[path] = recipe.model.language.template
        models.setdefault(path, {}).setdefault(kind, []).append(f"[{TOWERS[vision]}]({link(name)})")
    for path in sorted(models, key=str.lower):
        cells = [", ".join(models[path].get(kind, ["–"])) for kind in TINYLLAVA]
        lines.append(f"| `{path}` | `{templates[path]}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def others() -> str:
    """A line for each recipe of the other systems."""
    lines = ["| recipe | reproduces | tokens a picture |", "|---|---|---|"]
    for name, recipe in recipes().items():
        if parts_of(name)[0] in TINYLLAVA or recipe.model.vision is None:
            continue
        title = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        tokens = picture_tokens(recipe.model.vision)
        lines.append(f"| [{name}]({link(name)}) | {title} | {tokens:,} |")
    return "\n".join(lines)


def stages() -> str:
    """What each recipe trains; of those that differ in their language model only, one."""
    lines = ["| recipe | stage | trains | steps | tokens a step | template |", "|---|---|---|---|---|---|"]
    for name, recipe in recipes().items():
        kind, _, language = parts_of(name)
        if (kind in TINYLLAVA and not name.endswith("-siglip-phi2")) or language.endswith("-13b"):
            continue
        assert recipe.model.language is not None
        for stage in recipe.stages:
            template = stage.template or recipe.model.language.template
            lines.append(
                f"| {kind} | {stage.name} | {trains(stage)} | {stage.steps:,} | {stage.batch_tokens:,} | "
                f"`{template}` |"
            )
    return "\n".join(lines)


def trains(stage: Stage) -> str:
    """``vision 2e-06 (from layer 12), adapters 0.0002 (rank 128)``."""
    told = []
    for group, rate in stage.train.items():
        more = stage.only.get(group, "")
        if group == "adapters" and stage.lora is not None:
            more = f"rank {stage.lora.rank}" + (f", {stage.bits} bits below" if stage.bits else "")
        told.append(f"{group} {rate:.0e}".replace("e-0", "e-") + (f" ({more})" if more else ""))
    return ", ".join(told)


def link(name: str) -> str:
    """Of a recipe, from docs/."""
    return f"../recipes/published/{name}.toml"


def page() -> str:
    """What the page should hold."""
    text = PAGE.read_text(encoding="utf-8")
    for name, block in (("tinyllava", tinyllava()), ("others", others()), ("stages", stages())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise SystemExit(f"expected '{begin}' and then '{end}' in {PAGE.name}")
        text = f"{head}{begin}\n\n{block}\n\n{end}{tail}"
    return text


def main() -> int:
    words = argparse.ArgumentParser(description="Write docs/published-recipes.md from recipes/published.")
    words.add_argument("--check", action="store_true", help="only tell whether it says it already")
    check, text = words.parse_args().check, page()
    if PAGE.read_text(encoding="utf-8") == text:
        return 0
    if check:
        print(f"error: {PAGE.name} is stale; run python docs/fill_published.py", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
