"""The model card of a ``hub`` folder, written from what the run wrote down; nothing is made up.

What no file says is left open and says so: the licence is the user's to state.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from tinymodal.compose.build import parameter_report
from tinymodal.port.proof import Job

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

PARTS = {
    "vision": "vision tower",
    "audio": "audio tower",
    "connectors": "connectors",
    "language": "language model",
    "embeddings": "word embeddings",
    "head": "language head",
    "speech": "speech head",
}


def model_card(job: Job) -> str:
    """The whole ``README.md``."""
    recipe = read_recipe(job.run)
    name = str(recipe.get("name") or job.name)
    sections = [
        _front_matter(job, recipe),
        f"# {name}",
        _what_it_is(job),
        _how_to_use(job),
        _training(job, recipe),
        _scores(job),
        _licence(recipe),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def read_recipe(run: Path | None) -> dict[str, Any]:
    """The run's recipe as plain values; empty where there is none."""
    file = None if run is None else run / "recipe.toml"
    if file is None or not file.is_file():
        return {}
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _front_matter(job: Job, recipe: Mapping[str, Any]) -> str:
    config = job.composed.model.config
    sees, hears = config.vision_config is not None, config.audio_config is not None
    does = {
        (True, False): "image-text-to-text",
        (False, True): "audio-text-to-text",
        (True, True): "any-to-any",
        (False, False): "text-generation",
    }[sees, hears]
    lines = ["---", "library_name: transformers", f"pipeline_tag: {does}"]
    lines += ["# license: state it here; see the end of this page"]
    if bases := sorted(set(_hub_names(recipe.get("model", {})))):
        lines += ["base_model:", *(f"  - {name}" for name in bases)]
    if sets := sorted(set(_data_sets(recipe))):
        lines += ["datasets:", *(f"  - {name}" for name in sets)]
    lines += ["tags:", *(f"  - {tag}" for tag in ("tinymodal", "multimodal", "custom_code")), "---"]
    return "\n".join(lines)


def _what_it_is(job: Job) -> str:
    config = job.composed.model.config
    can = ["reads"]
    can += ["sees"] if config.vision_config is not None else []
    can += ["hears"] if config.audio_config is not None else []
    can += ["speaks"] if config.speech is not None else []
    rows = parameter_report(job.composed.model)
    total = sum(row.parameters for row in rows)
    kinds = {
        "vision": getattr(config.vision_config, "model_type", ""),
        "audio": getattr(config.audio_config, "model_type", ""),
        "language": config.text_config.model_type,
        "connectors": ", ".join(f"{kind}: {chosen['name']}" for kind, chosen in config.connectors.items()),
        "speech": (config.speech or {}).get("design", ""),
    }
    table = ["| part | kind | parameters |", "|---|---|---|"]
    table += [
        f"| {PARTS.get(row.part, row.part)} | {kinds.get(row.part, '')} | {row.parameters:,} |"
        for row in rows
    ]
    table.append(f"| all | | {total:,} |")
    said = f"A small model that {_joined(can)}, composed and trained with TinyModal."
    return "\n".join([said, "", *table])


def _how_to_use(job: Job) -> str:
    config = job.composed.model.config
    parts = []
    given = ""
    if config.vision_config is not None:
        parts.append('{"type": "image"}')
        given += ', images=[Image.open("picture.png")]'
    elif config.audio_config is not None:
        parts.append('{"type": "audio"}')
        given += ', audio=["sound.wav"]'
    parts.append('{"type": "text", "text": "What is this?"}')
    pil = ["from PIL import Image"] if config.vision_config is not None else []
    code = [
        *pil,
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'folder = "."  # or its name on the Hub',
        "model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)",
        "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)",
        f'chat = [{{"role": "user", "content": [{", ".join(parts)}]}}]',
        "text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)",
        f"inputs = processor(text=text{given})",
        "made = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'print(processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]
    said = (
        "The folder brings its own code: `trust_remote_code=True` runs the `.py` files in it, so read them "
        "or pin a revision."
    )
    return "\n".join(["## Use", "", said, "", "```python", *code, "```"])


def _training(job: Job, recipe: Mapping[str, Any]) -> str:
    if not recipe:
        record = job.folder.parent / "record.json"
        if record.is_file():
            return _record(json.loads(record.read_text(encoding="utf-8")))
        return "## Training\n\nNot recorded: this model was exported without the folder of its run."
    assert job.run is not None
    last = _last_rows(job.run / "metrics.jsonl")
    table = ["| stage | steps | tokens | trains | last loss |", "|---|---|---|---|---|"]
    for stage in recipe.get("stages", ()):
        row = last.get(stage["name"], {})
        steps = row.get("step", stage.get("steps", ""))
        tokens = row.get("all_tokens")
        trains = ", ".join(stage.get("train", {})) or ("adapters" if stage.get("lora") else "")
        if stage.get("lora"):
            trains += f" (LoRA of rank {stage['lora'].get('rank', '?')})"
        loss = f"{row['loss']:.4f}" if isinstance(row.get("loss"), float) else ""
        told = f"{tokens:,}" if tokens else ""
        table.append(f"| {stage['name']} | {steps} | {told} | {trains} | {loss} |")
    said = ["## Training", "", *table, ""]
    if sources := _sources(recipe):
        said += ["Data:", "", *(f"* {source}" for source in sources), ""]
    if made := _made_on(job.run / "run.json"):
        said += [made, ""]
    said += [
        "<details><summary>The whole recipe</summary>",
        "",
        "```toml",
        _shown(job.run),
        "```",
        "</details>",
    ]
    return "\n".join(said)


def _record(record: Mapping[str, Any]) -> str:
    """The starter model's own record."""
    table = ["| recipe | steps | seconds | commit |", "|---|---|---|---|"]
    for name, run in record.get("recipes", {}).items():
        seconds = run.get("seconds", run.get("cpu_seconds", ""))
        table.append(f"| {name} | {run.get('steps', '')} | {seconds} | {str(run.get('commit', ''))[:12]} |")
    return "\n".join(["## Training", "", *table])


def _scores(job: Job) -> str:
    rows = []
    folders = [job.folder / "eval", *([] if job.run is None else [job.run / "eval"])]
    for file in (folder / "results.json" for folder in folders):
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            rows = [row for name, task in found.items() for row in _score_rows(name, task)]
            break
    if not rows:
        return "## Scores\n\nNone are recorded with this model."
    return "\n".join(
        ["## Scores", "", "| benchmark | number | questions | complete |", "|---|---|---|---|", *rows]
    )


def _score_rows(name: str, task: Mapping[str, Any]) -> Iterator[str]:
    """One line: the number that the benchmark is known by, or its mean."""
    metrics = task.get("metrics", {})
    keys = [key for key in (task.get("headline"), "mean", *metrics) if key in metrics]
    number: Any = metrics[keys[0]] if keys else None
    if not isinstance(number, int | float):
        return
    between = task.get("interval_95")
    told = f"{number:.4g}" + (f" ({between[0]:.4g} to {between[1]:.4g})" if between else "")
    complete = "yes" if task.get("complete") else "no"
    yield f"| {name} ({task.get('metric', keys[0])}) | {told} | {task.get('n', '')} | {complete} |"


def _licence(recipe: Mapping[str, Any]) -> str:
    parts = sorted(set(_hub_names(recipe.get("model", {}))) | set(_data_sets(recipe)))
    of = f" It must suit those of what it was made from: {', '.join(parts)}." if parts else ""
    return (
        "## Licence\n\nNot stated. Whoever publishes this model chooses one, in the `license` line at the "
        f"top of this page.{of}"
    )


def _hub_names(value: Any) -> Iterator[str]:
    """Every ``org/name`` under a ``path`` or ``codec`` key."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            if key in ("path", "codec", "tokenizer", "connector_path") and not isinstance(inside, Mapping):
                names = inside if isinstance(inside, list) else [inside]
                yield from (n for n in names if _is_hub_name(n))
            else:
                yield from _hub_names(inside)


def _is_hub_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and HUB_NAME.fullmatch(name) is not None
        and not name.startswith(("starter/", "runs/", "./", "../"))
        and not Path(name).exists()
    )


def _data_sets(recipe: Mapping[str, Any]) -> Iterator[str]:
    for stage in recipe.get("stages", ()):
        for source in stage.get("data", ()):
            if _is_hub_name(source.get("hub")):
                yield source["hub"]


def _sources(recipe: Mapping[str, Any]) -> list[str]:
    """Each source once: what it is and its form, with no folder of the machine that trained."""
    found: dict[str, None] = {}
    for stage in recipe.get("stages", ()):
        for source in stage.get("data", ()):
            for key in ("hub", "path", "made"):
                if source.get(key):
                    form = f", rows of format `{source['format']}`" if source.get("format") else ""
                    what = {"hub": "from the Hub", "path": "a file", "made": "made while training"}[key]
                    found[f"`{_short(str(source[key]))}` ({what}{form})"] = None
    return list(found)


def _made_on(file: Path) -> str:
    if not file.is_file():
        return ""
    starts = json.loads(file.read_text(encoding="utf-8")).get("starts", ())
    if not starts:
        return ""
    start = starts[-1]
    machine, versions = start.get("machine", {}), start.get("versions", {})
    on = machine.get("gpu") or f"{machine.get('cores', '?')} cores of {machine.get('processor', 'a CPU')}"
    with_ = ", ".join(
        f"{name} {versions[name]}" for name in ("tinymodal", "torch", "transformers") if versions.get(name)
    )
    return f"Trained on {on} with {with_}; last started {start.get('time', '')[:10]}."


def _last_rows(metrics: Path) -> dict[str, dict[str, Any]]:
    """The last row of every stage, with the tokens of all its rows."""
    found: dict[str, dict[str, Any]] = {}
    tokens: dict[str, int] = {}
    if not metrics.is_file():
        return found
    with metrics.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if "step" in row and "loss" in row and "tokens" in row:
                tokens[row["stage"]] = tokens.get(row["stage"], 0) + int(row["tokens"])
                found[row["stage"]] = row
    return {stage: row | {"all_tokens": tokens[stage]} for stage, row in found.items()}


def _shown(run: Path) -> str:
    """The recipe's text, each absolute path by its last name alone."""
    text = (run / "recipe.toml").read_text(encoding="utf-8").strip()
    return re.sub(r'"((?:/|~|[A-Za-z]:\\)[^"]*)"', lambda found: f'"{_short(found[1])}"', text)


def _short(path: str) -> str:
    return PurePath(path).name if path.startswith(("/", "~")) or re.match(r"[A-Za-z]:\\", path) else path


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
