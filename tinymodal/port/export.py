"""A model of ours for other programs, with proof: ``tinymodal export MODEL OUT --to TARGET``.

A composition that the target has no place for is refused before anything is written. What is written lies
beside OUT until it is proved; only then does OUT appear. Otherwise it stays as ``OUT.failed``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinymodal.compose.build import load
from tinymodal.compose.pretrained import read_json
from tinymodal.compose.targets import PARTS, Verdict, judge, verdicts
from tinymodal.compose.whole import model_folder
from tinymodal.core.errors import CheckpointError, ExportError, RecipeError
from tinymodal.core.lookup import find
from tinymodal.port import gguf_files, hub, onnx_graphs, to_llava
from tinymodal.port.gguf_types import check_type
from tinymodal.port.parity import Parity, record
from tinymodal.port.parity import judge as compare
from tinymodal.port.proof import DTYPES, Job, Options, Proof, sizes

if TYPE_CHECKING:
    from rich.table import Table

    from tinymodal.compose.build import Composed

REPORT = "parity.json"
"""The report's name in OUT."""


class Target(NamedTuple):
    """One form that a model is written in."""

    write: Callable[[Job, Path], None]
    prove: Callable[[Job, Path], Proof]
    needs: tuple[str, ...] = ()
    """Packages of the extra ``export``."""


WRITERS: dict[str, Target] = {
    "hub": Target(hub.write, hub.prove),
    "llava": Target(to_llava.write, to_llava.prove),
    "gguf": Target(gguf_files.write, gguf_files.prove, ("gguf", "accelerate")),
    "onnx": Target(onnx_graphs.write, onnx_graphs.prove, ("onnx", "onnxruntime", "onnxscript")),
}


DTYPED = ("hub", "llava")
"""Targets whose weights have the type they were saved in, or the one that is asked for; others: float32."""


@dataclass(slots=True)
class Exported:
    """What was written, and the proof."""

    model: str
    target: str
    out: Path
    """Where it lies: OUT, or beside it with ``.failed`` behind its name."""
    proof: Proof
    notes: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of every file."""

    @property
    def passed(self) -> bool:
        return self.proof.passed

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; what ``parity.json`` holds."""
        parity = self.proof.parity
        return {
            "model": self.model,
            "target": self.target,
            "passed": self.passed,
            "max_logit_difference": None if parity is None else parity.largest,
            "prompts": 0 if parity is None else len(parity.rows),
            "prompts_with_equal_greedy_text": 0 if parity is None else sum(row.greedy for row in parity.rows),
            "checks": [check._asdict() for check in self.proof.checks],
            "notes": [*self.notes, *self.proof.notes],
            "files": self.files,
            "parity": None if parity is None else parity.to_dict(),
        }


def export(model: str, target: str, out: Path, options: Options | None = None) -> Exported:
    """Write a model in another form, and compare.

    Args:
        model: its folder, its run's, a Hub name, or ``starter``.
        target: a key of :data:`WRITERS`, or ``my_export.py:run``, a function that is called with the model
            (``Composed``) and the folder to write. It returns what to compare with
            (``port.parity.Reference``), or None.
        out: the folder to write; must not exist yet, or be empty.
        options: how.

    Raises:
        ExportError: the target has no place for a part of the model; it is named, and nothing was written.
        RecipeError: nobody knows the target, or an option is not one of its own.
        CheckpointError: there is no such model, or OUT holds something.
    """
    options = options or Options()
    own = target not in WRITERS
    writer = _own(target) if own else WRITERS[target]
    _check_options(target, options, writer)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; name a new folder")
    job = _job(model, options, as_saved=target in DTYPED)
    notes: list[str] = []
    if not own:
        verdict = judge(target, job.composed)
        if (why := verdict.refused(options.without)) is not None:
            raise ExportError(f"{model} cannot become {target}: {why}{_way_out(verdict, job.composed)}")
        notes += verdict.notes if target in ("llava", "gguf") else ()
    final = out.resolve()
    staged = final.with_name(f".{final.name}.exporting")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        writer.write(job, staged)
        exported = Exported(model, target, out, writer.prove(job, staged), notes, sizes(staged))
        place = final
        if not exported.passed:
            place = final.with_name(f"{final.name}.failed")
            exported.out = out.with_name(place.name)
            shutil.rmtree(place, ignore_errors=True)
        text = json.dumps(exported.to_dict(), indent=2, ensure_ascii=False)
        (staged / REPORT).write_text(text + "\n", encoding="utf-8")
        if final.exists() and exported.passed:
            final.rmdir()
        staged.rename(place)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return exported


def _job(model: str, options: Options, as_saved: bool = True) -> Job:
    """Load the model, in the type it was saved in or in float32."""
    folder = model_folder(model, "")
    run = next((place for place in (folder.parent, folder) if (place / "recipe.toml").is_file()), None)
    saved = read_json(folder / "config.json", str(folder)).get("dtype") if as_saved else None
    dtype = DTYPES.get(options.dtype or str(saved), DTYPES["float32"])
    return Job(model, folder, run, load(folder, dtype=dtype), options)


def _own(target: str) -> Target:
    """A function of the user's own as a target."""
    run = find(target, WRITERS, "target")
    made: list[Any] = []

    def write(job: Job, folder: Path) -> None:
        folder.mkdir(parents=True)
        made.append(run(job.composed, folder))

    def prove(job: Job, folder: Path) -> Proof:
        reference = made.pop()
        if reference is None:
            return Proof(None, notes=[f"{target} returned nothing to compare with"])
        if isinstance(reference, Parity):
            return Proof(reference)
        over, left_out = job.prompts()
        theirs, longer = record(reference, over, job.composed)
        parity = compare(job.composed, theirs, reference.name)
        parity.left_out = left_out + longer
        return Proof(parity)

    return Target(write, prove)


def _check_options(target: str, options: Options, writer: Target) -> None:
    """Refuse options that are another target's, and say what is not installed."""
    default = Options()
    belongs = {
        "dtype": DTYPED,
        "lora": ("hub",),
        "weights": ("gguf",),
        "without": tuple(name for name, parts in PARTS.items() if parts),
    }
    for name, targets in belongs.items():
        if getattr(options, name) != getattr(default, name) and target not in targets:
            shown = "type" if name == "weights" else name
            raise RecipeError(f"--{shown} belongs to --to {' or '.join(targets)}; leave it out for {target}")
    if odd := [part for part in options.without if part not in PARTS[target]]:
        raise RecipeError(f"--without {odd[0]}: of {target} may be left out: {', '.join(PARTS[target])}")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise RecipeError(f"--dtype {options.dtype}: known: {', '.join(DTYPES)}")
    if missing := [package for package in writer.needs if find_spec(package) is None]:
        raise RecipeError(
            f"--to {target} needs {' and '.join(missing)}, not installed; pip install 'tinymodal[export]'"
        )
    if target == "gguf":
        check_type(options.weights)


def _way_out(verdict: Verdict, composed: Composed) -> str:
    """What to do about a refusal."""
    if verdict.way_out:
        return f". Leave it out: --without {','.join(verdict.way_out)}"
    fits = [found.target for found in verdicts(composed) if found.refused() is None]
    return f". It fits {' and '.join(fits)}" if fits else ""


def tables(exported: Exported) -> list[Table]:
    """The report for the terminal: files, and the comparison."""
    from rich.table import Table

    title = f"{exported.target}: {exported.out}"
    # rich breaks a title where its table ends, and this one is narrow.
    files = Table(title=title, title_justify="left", min_width=min(len(title), 80))
    files.add_column("file")
    files.add_column("MB", justify="right")
    code = {name: size for name, size in exported.files.items() if name.endswith(".py")}
    for name, size in exported.files.items():
        if name not in code:
            files.add_row(name, f"{size / 1e6:,.3f}")
    if code:
        files.add_row(f"{len(code)} files of code", f"{sum(code.values()) / 1e6:,.3f}")
    parity = exported.proof.parity
    if parity is None:
        return [files]
    title = f"largest differences from {parity.reference}"
    compared = Table(title=title, title_justify="left", min_width=min(len(title), 80))
    for column in ("prompt", "tokens", "pixels", "logits", "same greedy text"):
        compared.add_column(column, justify="left" if column.startswith(("prompt", "same")) else "right")
    for row in parity.rows:
        said = "yes" if row.greedy else "no"
        compared.add_row(row.case, str(row.tokens), f"{row.pixels:.1e}", f"{row.logits:.1e}", said)
    return [files, compared]


def lines(exported: Exported) -> list[str]:
    """What the tables do not say, ending with the verdict."""
    proof, parity = exported.proof, exported.proof.parity
    told = [f"{'yes' if check.passed else 'NO '}  {check.name}: {check.found}" for check in proof.checks]
    told += [f"note: {note}" for note in (*exported.notes, *proof.notes)]
    if parity is not None:
        told += [f"left out: {name}" for name in parity.left_out]
        greedy = sum(row.greedy for row in parity.rows)
        told.append(
            f"max |logit difference| {parity.largest:.2g} (at most {parity.tolerance:.2g} allowed), equal "
            f"greedy text on {greedy} of {len(parity.rows)} prompts"
        )
    elif not proof.checks:
        told.append("not compared with anything")
    return told
