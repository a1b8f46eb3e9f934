"""The verbs of the command line.

Each imports its room only when it is called, so ``--help`` and a misspelt recipe answer at once.

Exit codes: 0 done; 1 something the user can put right, told in one line; 2 a bug, with its traceback; 130
stopped with Ctrl-C. ``TINYMODAL_DEBUG=1`` shows the traceback of the second kind as well.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tinymodal import __version__
from tinymodal.core.errors import RecipeError, TinyModalError
from tinymodal.core.types import Medium
from tinymodal.verbs.evaluate import add_eval
from tinymodal.verbs.explain import add_explain
from tinymodal.verbs.export import add_export
from tinymodal.verbs.options import (
    STARTER,
    add_bits,
    add_device,
    check_media,
    first_process,
    load_model,
    natural,
    picture,
    positive,
    sound,
)
from tinymodal.verbs.serve import add_serve

if TYPE_CHECKING:
    from tinymodal.train.recipe import Recipe

    Verbs = argparse._SubParsersAction["Parser"]

USERS_FAULT = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT)
"""System errors that are no bug of ours: a full disk, a folder one may not write to."""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument exits with 1 as every other fault of the user does."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"error: {message}; see '{self.prog} --help'\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog="tinymodal",
        description="A factory for small multimodal models.",
        epilog="Docs: docs/ in the repository.",
    )
    top.add_argument("--version", action="store_true", help="print the version and leave")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", parser_class=Parser)
    for add in (
        add_demo, add_train, add_preview, add_cache, add_shard, add_compare, add_eval, add_chat, add_explain,
        add_serve, add_adopt, add_export,
    ):  # fmt: skip
        add(verbs)
    return top


def add_demo(verbs: Verbs) -> None:
    p = verbs.add_parser("demo", help="train a small model on made pictures, score it, say how to talk to it")
    p.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="run folder (%(default)s)"
    )
    p.add_argument(
        "--recipe", type=Path, metavar="FILE", help="another recipe with stages align and instruct"
    )
    p.add_argument("--seed", type=int, help="seed of the test questions; a fresh one if not given")
    p.set_defaults(run=run_demo, saves=True)


def add_train(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "train", help="run a recipe's stages: tinymodal train recipes/demo.toml stages.align.steps=50"
    )
    add_recipe(p)
    p.add_argument(
        "--out", type=Path, metavar="FOLDER", help="run folder; runs/NAME of the recipe if not given"
    )
    p.set_defaults(run=run_train, saves=True)


def add_preview(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "preview", help="parameters, tokens, memory and one packed row in colour; trains nothing"
    )
    add_recipe(p)
    p.set_defaults(run=run_preview)


def add_cache(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "cache",
        help="keep what frozen towers say of pictures and sounds, ahead of training: tinymodal cache my.toml",
    )
    add_recipe(p, tiny=False)
    p.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="processes that decode pictures (%(default)s)"
    )
    p.set_defaults(run=run_cache)


def add_shard(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "shard",
        help="write data as tar shards: tinymodal shard chats.jsonl shards --format messages --images photos",
    )
    p.add_argument("source", help="a file or a pattern: .json, .jsonl, .parquet, .tar; or a made source")
    p.add_argument(
        "out", type=Path, nargs="?", help="folder of the shards; those that are whole already are kept"
    )
    p.add_argument(
        "--format", metavar="F", help="of the rows: llava, messages, caption, vqa, ...; made: none"
    )
    p.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures")
    p.add_argument("--sounds", type=Path, metavar="DIR", help="folder of the sounds")
    p.add_argument("--max-mb", type=positive, default=256, metavar="N", help="largest shard (%(default)s)")
    p.add_argument("--samples", type=positive, metavar="N", help="so many samples; needed for a made source")
    p.add_argument(
        "--bad-rows",
        default="raise",
        metavar="HOW",
        help="rows that cannot be read: raise, skip, or how many may be left out (%(default)s)",
    )
    p.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="processes that read (%(default)s)"
    )
    p.add_argument("--check", action="store_true", help="compare the shards of a folder with their checksums")
    p.set_defaults(run=run_shard)


def add_compare(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "compare", help="draw the curves of runs into one page: tinymodal compare runs/a runs/b"
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, finished or not")
    p.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page (%(default)s)"
    )
    p.set_defaults(run=run_compare)


def add_chat(verbs: Verbs) -> None:
    p = verbs.add_parser("chat", help="talk to a model: tinymodal chat runs/demo/model --image cat.png")
    p.add_argument(
        "model", nargs="?", default=STARTER, help="run folder, model folder or Hub name (%(default)s)"
    )
    # One list of both, in the order in which they are given.
    p.add_argument(
        "--image",
        type=picture,
        action="append",
        dest="media",
        default=[],
        metavar="FILE",
        help="show a picture first; may be repeated",
    )
    p.add_argument(
        "--audio",
        type=sound,
        action="append",
        dest="media",
        metavar="FILE",
        help="play a sound first; may be repeated. Without a question it is the question",
    )
    p.add_argument(
        "--speak",
        type=Path,
        metavar="OUT.wav",
        help="say the reply aloud too, into this file; the next into OUT-2",
    )
    p.add_argument(
        "--voice", metavar="NAME", help="which voice speaks: its name, or a file with a clip of one"
    )
    p.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="longest reply (%(default)s)"
    )
    p.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest word (%(default)s)"
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="choose among the likeliest words that make up P",
    )
    p.add_argument("--seed", type=int, default=0, help="of the choice, where temperature is above 0")
    add_device(p)
    add_bits(p)
    p.set_defaults(run=run_chat)


def add_adopt(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "adopt",
        help="another system's checkpoint becomes ours, with proof: tinymodal adopt llava-v1.5-7b runs/llava",
    )
    p.add_argument("checkpoint", type=Path, help="its folder; for TinyGPT-V and MiniGPT-4 the .pth file")
    p.add_argument("out", type=Path, help="folder to write; appears whole or not at all")
    parts = {
        "language": "folder of the language model that a projector or an adapter was trained over",
        "vision": "folder of the tower, where the checkpoint does not hold it; timm's may be a file",
        "tokenizer": "folder of the tokenizer, where the checkpoint does not hold it",
        "qformer": "BLIP-2's .pth file, for TinyGPT-V and MiniGPT-4",
    }
    for name, what in parts.items():
        p.add_argument(f"--{name}", type=Path, metavar="PATH", help=what)
    p.add_argument("--template", metavar="NAME", help="the chat template; guessed if not given")
    p.add_argument(
        "--tensors-only",
        action="store_true",
        help="compare tensors but no logits, for a model that does not fit into memory in float32",
    )
    p.set_defaults(run=run_adopt)


def add_recipe(p: argparse.ArgumentParser, tiny: bool = True) -> None:
    p.add_argument("recipe", help="a TOML file, or my_runs.py:function")
    p.add_argument("overrides", nargs="*", metavar="dotted.path=value", help="change a value of the recipe")
    if tiny:
        p.add_argument(
            "--tiny",
            action="store_true",
            help="small random parts of the same kinds, made data, two steps a stage: does the recipe run?",
        )


def run_demo(args: argparse.Namespace) -> None:
    from tinymodal.demo import demo

    demo(args.out, recipe=args.recipe, seed=args.seed)


def run_train(args: argparse.Namespace) -> None:
    from tinymodal.core.config import load
    from tinymodal.core.log import program
    from tinymodal.train.recipe import Recipe

    recipe = load(args.recipe, Recipe, args.overrides)
    if args.tiny:
        train_tiny(args, recipe)
        return
    folder = args.out or Path("runs") / recipe.name

    from tinymodal.train.loop import run

    if recipe.eval_every is None or not first_process():
        run(recipe, folder)
    else:
        from tinymodal.eval.during import Evaluations

        evaluations = Evaluations(folder, recipe.eval_every)
        try:
            run(recipe, folder, after_save=evaluations.saved)
            evaluations.finish()
        except BaseException:
            evaluations.stop()
            raise
    if first_process():
        model = folder / "model"
        print(f"\nThe model is in {model}. Talk to it:\n\n  {program()} chat {shlex.quote(str(model))}\n")


def run_preview(args: argparse.Namespace) -> None:
    from tinymodal.core.config import load
    from tinymodal.train.recipe import Recipe

    recipe = load(args.recipe, Recipe, args.overrides)

    from tinymodal.train.preview import preview

    with tempfile.TemporaryDirectory() as made:
        preview(tiny(args, recipe, Path(made)) if args.tiny else recipe)


def run_cache(args: argparse.Namespace) -> None:
    from tinymodal.core.config import load
    from tinymodal.train.recipe import Recipe

    recipe = load(args.recipe, Recipe, args.overrides)

    from tinymodal.train.fill import fill

    for stage, done in fill(recipe, args.workers).items():
        print(
            f"stage {stage}: {done.num_pictures:,} media of {done.num_rows:,} rows, {done.num_new:,} new, "
            f"{done.num_hits:,} kept before; {done.num_bytes / 1e6:,.0f} MB"
        )
        for name, why in done.bad:
            print(f"  left out: {name}: {why}")
        for name in done.endless:
            print(f"  {name} has no end and cannot be kept ahead; it is kept while the stage trains")


def run_shard(args: argparse.Namespace) -> int:
    from tinymodal.data.shard import check_shards, shard

    if args.check:
        wrong = check_shards(args.out or args.source)
        for line in wrong:
            print(line)
        told = (
            "these are not as they were written; delete them and write the folder again: what is whole stays"
        )
        print(told if wrong else "all shards are as they were written")
        return 1 if wrong else 0
    if args.out is None:
        raise RecipeError("shard: the folder of the shards is missing; tinymodal shard SOURCE OUT")
    if args.bad_rows not in ("raise", "skip") and not args.bad_rows.isdecimal():
        raise RecipeError(f"--bad-rows {args.bad_rows}: expected raise, skip, or how many may be left out")
    bad_rows = int(args.bad_rows) if args.bad_rows.isdecimal() else args.bad_rows
    made = args.format is None
    if made and (args.images is not None or args.sounds is not None):
        raise RecipeError("--images and --sounds are for rows of files; a made source has its own")

    from tinymodal.train.pieces import Source
    from tinymodal.train.stage_data import open_data

    try:
        spec = (
            Source(made=args.source)
            if made
            else Source(
                path=args.source,
                format=args.format,
                images=str(args.images) if args.images else None,
                sounds=str(args.sounds) if args.sounds else None,
            )
        )
    except ValueError as error:
        raise RecipeError(f"shard: {error}") from error
    done = shard(
        open_data(spec, "SOURCE"),
        args.out,
        name=f"{args.source} as {args.format or 'made'}",
        max_mb=args.max_mb,
        samples=args.samples,
        bad_rows=bad_rows,
        workers=args.workers,
    )
    kept = f", {done.num_kept} of them were there already" if done.num_kept else ""
    print(
        f"{done.num_samples:,} samples in {len(done.shards)} shards of {done.folder}{kept}: "
        f"{done.num_bytes / 1e6:,.1f} MB"
    )
    for row in done.skipped:
        print(f"  left out: {row.reason if row.reason.startswith(row.row_id) else ': '.join(row)}")
    print(f'\nIn a recipe:\n\n  data = [{{ path = "{done.folder}/*.tar", format = "messages" }}]\n')
    return 0


def run_compare(args: argparse.Namespace) -> None:
    from tinymodal.eval.compare import compare

    page = compare(args.runs, args.out)
    print(f"The curves are in {page}; open it in a browser.")


def train_tiny(args: argparse.Namespace, recipe: Recipe) -> None:
    """Run the recipe's stand-in; leave nothing behind unless told where."""
    with tempfile.TemporaryDirectory() as made:
        folder = args.out or Path(made)
        small = tiny(args, recipe, folder / "toy")

        from tinymodal.train.loop import run

        run(small, folder)
    kept = f"The toy model is in {folder / 'model'}." if args.out else "Nothing is kept."
    ran = "The stage runs" if len(recipe.stages) == 1 else f"All {len(recipe.stages)} stages run"
    print(f"\n{ran}. Nothing real was trained. {kept}\n")


def tiny(args: argparse.Namespace, recipe: Recipe, folder: Path) -> Recipe:
    """The recipe's stand-in, and what it is; its tokenizer and data go to ``folder``."""
    from tinymodal.core.log import say
    from tinymodal.train.shrink import STEPS, shrink_recipe

    small, toy = shrink_recipe(recipe, folder, Path(args.recipe).parent)
    say(
        f"--tiny: parts are small and random, pictures and conversations made, each stage takes {STEPS} "
        f"steps; nothing real is trained"
    )
    for line in toy.lines:
        say(f"  {line}")
    return small


def run_chat(args: argparse.Namespace) -> int:
    media: list[Medium] = args.media
    check_media(media)
    if args.voice is not None and args.speak is None and not sys.stdin.isatty():
        raise RecipeError("--voice says how --speak sounds; give --speak OUT.wav as well, or leave it out")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise RecipeError(
            f"--temperature {args.temperature} must be at least 0, "
            f"and --top-p {args.top_p} above 0 and at most 1."
        )
    if args.speak is not None:
        from tinymodal.infer.recording import check_place

        check_place(args.speak)
    composed = load_model(args)

    from tinymodal.infer.engine import Engine, Sampling
    from tinymodal.infer.repl import chat

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    errors = chat(Engine(composed, prefix_mb=256), media, sampling, speech=args.speak, voice=args.voice)
    return 1 if errors and not sys.stdin.isatty() else 0


def run_adopt(args: argparse.Namespace) -> None:
    from tinymodal.port.adopt import REPORT, adopt, tables
    from tinymodal.port.source import Extras

    extras = Extras(
        language=args.language,
        vision=args.vision,
        tokenizer=args.tokenizer,
        qformer=args.qformer,
        template=args.template,
    )
    report = adopt(args.checkpoint, args.out, extras, forward=not args.tensors_only)

    from rich.console import Console

    from tinymodal.core.log import program

    console = Console()
    for table in tables(report):
        console.print(table)
    for note in report.notes:
        print(f"note: {note}")
    how = "as you said" if args.template else "guessed; --template NAME overrules it"
    print(f"template: {report.template} ({how})")
    print(f"Every tensor and comparison: {args.out / REPORT}\n\nTalk to it:\n")
    print(f"  {program()} chat {args.out} --image PICTURE\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    set_environment()
    args, rest = parser().parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes a list of words only in one piece; overrides may stand after options as well
        args.overrides += rest
    if args.version:
        print(f"tinymodal {__version__}")
        return 0
    if not hasattr(args, "run"):
        parser().print_help()
        return 0
    try:
        return args.run(args) or 0
    except TinyModalError as error:
        return told(str(error))
    except KeyboardInterrupt:
        saves = getattr(args, "saves", False)
        goes_on = "; the same command goes on from the last save, if there is one" if saves else ""
        print(f"\nstopped{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (| head). Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in USERS_FAULT:
            return told(f"{error.filename or 'the disk'}: {error.strerror}")
        return bug()
    except Exception:
        return bug()


def told(message: str) -> int:
    """Say what the user can put right."""
    if os.environ.get("TINYMODAL_DEBUG") == "1":
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def bug() -> int:
    """Show what we have to put right."""
    traceback.print_exc()
    print("This is a bug in TinyModal, not in what you did. Please report the lines above.", file=sys.stderr)
    return 2


def set_environment() -> None:
    """What libraries read from the environment, unless the user has set it. Done here and nowhere else."""
    cores = str(usable_cores())
    for name, value in {
        "OMP_NUM_THREADS": cores,
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        os.environ.setdefault(name, value)


def usable_cores() -> int:
    """Cores this process may use: a container's share, where torch would count the whole machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


if __name__ == "__main__":
    sys.exit(main())
