"""``tinymodal eval``: score a model, two of them, or answers that were made elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.core.errors import DataError, RecipeError
from tinymodal.verbs.options import (
    STARTER,
    add_bits,
    add_device,
    first_process,
    load_model,
    positive,
    results_folder,
)

if TYPE_CHECKING:
    from tinymodal.eval.benchmark import Benchmark, Listener
    from tinymodal.eval.judge import Judge
    from tinymodal.eval.results import Result
    from tinymodal.train.world import World

SCENES = "scenes,scenes-unseen,scenes-shuffled"
PAGE = "eval.html"
DIFFERENCE = "difference.html"
"""In the second model's folder."""
KEY = "OPENAI_API_KEY"
ASKING = ("models", "limit", "batch", "aloud", "device", "bits")
"""Options of asking a model."""
NOT_WHERE = (
    *ASKING, "answers", "submission", "out", "listener", "voice", "judge", "judge_model", "judge_key",
    "judge_price",
)  # fmt: skip
ENDS = (".gz", ".tar", ".jsonl", ".json", ".xlsx", ".tsv", ".csv", ".txt", ".parquet")
"""Of files of answers; what else follows a dot belongs to a name, as in llava-v1.5."""
EXAMPLES = """\
examples:
  tinymodal eval runs/mine --on my_questions.jsonl --limit 200
  tinymodal eval --where --on pope,mme --data benchmarks/           what must lie where, and what does
  tinymodal eval runs/mine --on pope,mme --data benchmarks/         the field's benchmarks, scored officially
  tinymodal eval runs/a runs/b --on pope --data benchmarks/         two models on the same questions
  tinymodal eval --on pope --data benchmarks/ --answers a.jsonl     answers made elsewhere; no model is loaded
  torchrun --nproc-per-node 2 -m tinymodal eval runs/mine --on scenes
"""


def add_eval(verbs: Any) -> None:
    p = verbs.add_parser(
        "eval",
        help="score a model: tinymodal eval runs/mine --on my_questions.jsonl --limit 200",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"run folder, model folder or Hub name ({STARTER}); two are compared",
    )
    p.add_argument(
        "--on",
        metavar="NAMES",
        help=f"benchmarks, comma-separated: made scenes ({SCENES}; speech-roundtrip), those of the field "
        "that --where lists, a .jsonl of image or audio, question and answer, a folder that lies as "
        "LibriSpeech does, or my_bench.py:BENCHMARK",
    )
    p.add_argument(
        "--data", type=Path, metavar="FOLDER", help="where the files of the field's benchmarks are"
    )
    p.add_argument(
        "--where", action="store_true", help="list the files that benchmarks need, and what is missing"
    )
    p.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="score these answers to one benchmark: LLaVA's jsonl, official result files, ours; .gz too",
    )
    p.add_argument(
        "--submission",
        type=Path,
        metavar="FILE",
        help="write the file that a test server takes",
    )
    p.add_argument(
        "--limit", type=positive, metavar="N", help="the first N questions of each, for a quick look"
    )
    p.add_argument("--batch", type=positive, metavar="N", help="questions answered together (64)")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="where replies and results go (MODEL/eval)")
    p.add_argument(
        "--aloud",
        action="store_true",
        help="let it speak its replies, and count the words that a recogniser does not understand",
    )
    p.add_argument(
        "--listener",
        metavar="MODEL",
        help="with --aloud: a model that hears and transcribes (the built-in recogniser, for words of made "
        "scenes)",
    )
    p.add_argument("--voice", metavar="NAME", help="with --aloud: which voice speaks (the model's first)")
    judged = p.add_argument_group("benchmarks that a language model grades")
    judged.add_argument("--judge", metavar="URL", help="an OpenAI-compatible endpoint, with /v1 at its end")
    judged.add_argument(
        "--judge-model", default="", metavar="NAME", help="who grades (whom the official protocol names)"
    )
    judged.add_argument("--judge-key", metavar="VARIABLE", help=f"environment variable with the key ({KEY})")
    judged.add_argument(
        "--judge-price",
        type=price,
        metavar="IN,OUT",
        help="of a million tokens, to show the cost",
    )
    add_device(p)
    add_bits(p)
    p.set_defaults(run=run_eval)


def price(text: str) -> tuple[float, float]:
    parts = text.split(",")
    try:
        read, written = (float(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two numbers, e.g. 2.5,10") from None
    return read, written


def run_eval(args: argparse.Namespace) -> None:
    names = named(args.on)
    if args.where:
        refuse(args, "--where lists files and asks nothing", NOT_WHERE)
        show_places(names, args.data)
        return
    for option in ("listener", "voice"):
        if getattr(args, option) is not None and not args.aloud:
            raise RecipeError(f"--{option} belongs to --aloud; give that as well, or leave it out")
    if args.judge is None:
        refuse(
            args, "no --judge is given, an address that grades", ("judge_model", "judge_key", "judge_price")
        )
    if args.answers is not None:
        if first_process():  # there is nothing to share: no model is asked
            score_elsewhere(args, names)
        return
    if args.aloud:
        refuse(args, "--aloud scores what is heard", ("judge", "submission"))
    names = names or SCENES.split(",")
    models = args.models or [STARTER]
    if len(models) > 2:
        raise RecipeError(f"{len(models)} models given; expected one, or two to compare")
    if len(models) == 2 and args.submission is not None:
        raise RecipeError("--submission is of one model; leave the other out")
    from tinymodal.eval.names import benchmarks

    folders = places_of(models, args.out)
    check(args, benchmarks(names, args.data), folders)
    from tinymodal.compose.device import device_of
    from tinymodal.train.recipe import Parallel
    from tinymodal.train.world import open_world

    with open_world(Parallel(), device_of(args.device)) as world:
        for model, folder in zip(models, folders, strict=True):
            results = evaluate_one(args, model, names, folder, world)
    if len(models) == 2 and results:  # of several processes only the first has them
        show_difference(folders, results)


def named(on: str | None) -> list[str]:
    """The names of ``--on``; none where it is not given."""
    names = [name.strip() for name in (on or "").split(",") if name.strip()]
    if on is not None and not names:
        raise RecipeError(f"--on {on!r}: names no benchmark; expected names such as scenes, or leave it out")
    return names


def refuse(args: argparse.Namespace, why: str, options: Sequence[str]) -> None:
    """Refuse those of ``options`` that are given: what would have no effect is a mistake."""
    for option in options:
        value = getattr(args, option)
        if value not in (None, False, [], "", "auto"):
            shown = value[0] if option == "models" else f"--{option.replace('_', '-')}"
            raise RecipeError(f"{why}; leave {shown} out")


def check(args: argparse.Namespace, asked: Sequence[Benchmark], folders: Sequence[Path]) -> None:
    """Tell now what would fail, or be of no use, when all is scored."""
    from tinymodal.eval.folder import LOCK, RESULTS, replies_path
    from tinymodal.eval.judge import VERDICTS
    from tinymodal.eval.own import checked
    from tinymodal.eval.submission import check_submission, file_above

    for benchmark in asked:
        checked(benchmark)
    if args.judge is not None and all(benchmark.judge is None for benchmark in asked):
        shown = ", ".join(benchmark.name for benchmark in asked)
        raise RecipeError(f"--judge: no language model grades {shown}; leave it out")
    for folder in folders:
        if (blocked := file_above(folder / PAGE)) is not None:
            raise RecipeError(f"{blocked}: is a file; expected a folder for replies and results, see --out")
        judge_of(args, folder)
    if args.submission is not None:
        check_submission(asked, args.submission)
        own = {folder.resolve() / name for folder in folders for name in (PAGE, RESULTS, VERDICTS, LOCK)}
        own |= {replies_path(folder.resolve(), benchmark.name) for folder in folders for benchmark in asked}
        if args.submission.resolve() in own:
            raise RecipeError(
                f"--submission {args.submission}: eval writes this file itself; give another name"
            )


def places_of(models: Sequence[str], out: Path | None) -> list[Path]:
    """Where each model's replies go; with ``--out`` two models get folders of their own in it."""
    if out is None:
        folders = [results_folder(model) for model in models]
        if len(set(folders)) < len(folders):
            raise RecipeError(f"{models[0]} is given twice; expected two models")
        return folders
    return [out] if len(models) == 1 else [out / letter for letter in ("a", "b")]


def evaluate_one(
    args: argparse.Namespace, model: str, names: Sequence[str], folder: Path, world: World
) -> list[Result]:
    from tinymodal.eval.run import BATCH_SIZE, evaluate

    composed: Any = load_model(argparse.Namespace(model=model, device=args.device, bits=args.bits))
    if world.size > 1:
        composed.model.to(world.device)
    spoken: dict[str, Any] = {"spoken": args.aloud, "voice": args.voice}
    if args.listener is not None:
        spoken["listener"] = lambda: listening(args)
    results = evaluate(
        composed,
        names,
        folder=folder,
        data=args.data,
        limit=args.limit,
        batch_size=args.batch or BATCH_SIZE,
        judge=judge_of(args, folder),
        world=world,
        **spoken,
    )
    if world.main:
        show(results, folder, model)
        submit(results, args.submission)
    return results


def listening(args: argparse.Namespace) -> Listener:
    """The model of ``--listener`` on ``--device``."""
    from tinymodal.eval.speaking import of_model

    return of_model(load_model(argparse.Namespace(model=args.listener, device=args.device)), args.listener)


def judge_of(args: argparse.Namespace, folder: Path) -> Judge | None:
    if args.judge is None:
        return None
    from tinymodal.eval.judge import Judge

    key = KEY if args.judge_key is None else args.judge_key
    return Judge(args.judge, args.judge_model, folder=folder, key_from=key, price=args.judge_price)


def score_elsewhere(args: argparse.Namespace, names: Sequence[str]) -> None:
    """``--answers``: no model is loaded."""
    from tinymodal.core.lookup import find
    from tinymodal.eval.names import benchmark, opened
    from tinymodal.eval.score import folder_for, score_answers, without_collector
    from tinymodal.eval.tasks.table import ON_DISK

    if len(names) != 1:
        raise RecipeError(
            f"--answers are to one benchmark; --on names {len(names)}. Give its name with --on."
        )
    refuse(args, "--answers were made elsewhere and are all scored", ASKING)
    name = names[0]
    if name in ON_DISK:
        asked = opened(find(name, ON_DISK, "benchmark"), args.data)
    else:
        asked = benchmark(name, args.data)
    usual = Path("runs") / "answers" / plain_name(args.answers)
    folder = args.out or folder_for(args.answers, asked.name, usual)
    check(args, [asked], [folder])
    with without_collector():  # the page looks at as many rows
        result = score_answers(asked, args.answers, folder, judge=judge_of(args, folder))
        show([result], folder, args.answers.name)
        submit([result], args.submission)


def plain_name(answers: Path) -> str:
    """The name of a file of answers without its endings, of which there may be several."""
    name = answers.resolve().name
    while (end := next((end for end in ENDS if name.endswith(end)), "")) and name != end:
        name = name.removesuffix(end)
    return name


def show(results: Sequence[Result], folder: Path, title: str) -> None:
    """The tables, what is incomplete, and the page to look at."""
    from rich.console import Console

    from tinymodal.eval.folder import RESULTS, read_summaries
    from tinymodal.eval.pages.answers import write_page
    from tinymodal.eval.results import problem_lines, tables

    console = Console()
    for table in tables(results):
        console.print(table)
    for result in results:
        for line in problem_lines(result):
            print(line)
        if (timing := result.timing) is not None:
            print(
                f"{result.benchmark.name}: first sound {timing.first_sound_ms:,.0f} ms after the first word "
                f"(median of {timing.replies} replies, {timing.slowest_first_sound_ms:,.0f} ms at most); "
                f"{timing.real_time_factor:.2f} s to say a second"
            )
    asked = {result.benchmark.name for result in results}
    told = read_summaries(folder / RESULTS).items()
    earlier = {name: summary for name, summary in told if name not in asked}
    write_page(folder / PAGE, results, title=title, earlier=earlier)
    print(f"Every prompt, reply and score: {folder}; to look at: {folder / PAGE}")


def submit(results: Sequence[Result], path: Path | None) -> None:
    """``--submission``: the file for a test server."""
    if path is None:
        return
    from tinymodal.eval.submission import write_submission

    print(write_submission(results, path))


def show_difference(folders: Sequence[Path], results: Sequence[Result]) -> None:
    """Two models on the same questions; ``results`` are those of the second."""
    from rich.console import Console

    from tinymodal.eval.pages.pair import samples_of, write_pair_page
    from tinymodal.eval.pair import compare_folders, pair_tables

    pairs = compare_folders(folders[0], folders[1], [result.benchmark.name for result in results])
    for table in pair_tables(pairs):
        Console().print(table)
    page = folders[1] / DIFFERENCE
    write_pair_page(page, pairs, samples_of(results))
    print(f"Where they differ: {page}")


def show_places(names: Sequence[str], data: Path | None) -> None:
    """``--where``: what must lie on disk, and what does."""
    from rich.console import Console
    from rich.markup import escape

    from tinymodal.eval.names import places

    if data is not None and not data.is_dir():
        raise DataError(f"{data}: no such folder; expected the benchmarks' files in it, see --data")
    console = Console(soft_wrap=True, highlight=False)
    for place in places(names, data):
        console.print(f"[bold]{place.task.name}[/]: {escape(place.task.title)}")
        for file, found in zip(place.task.files, place.found, strict=True):
            name = escape(" or ".join(file.patterns))
            if found is not None and place.folder is not None:
                console.print(f"  [green]there[/]    {name}: {escape(str(found))}")
                continue
            state = "[dim]optional[/]" if file.optional else "[red]missing[/] " if data else "needed  "
            console.print(f"  {state} {name}: {escape(file.what)}; from {escape(file.origin)}")
    where = (
        f"looked in {data}, in a folder of the benchmark's name or in itself" if data else "--data says where"
    )
    print(f"{where}. Nothing is downloaded.")
