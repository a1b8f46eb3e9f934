"""tinymodal serve: an OpenAI-compatible server, and the web chat."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tinymodal.core.errors import RecipeError
from tinymodal.verbs.options import STARTER, add_bits, add_device, load_model, positive

if TYPE_CHECKING:
    from tinymodal.serve.limits import Limits

    Verbs = argparse._SubParsersAction[Any]

EXTRA = "pip install 'tinymodal[serve]'"


def add_serve(verbs: Verbs) -> None:
    from tinymodal.serve.limits import Limits

    p = verbs.add_parser("serve", help="answer OpenAI clients: tinymodal serve runs/demo/model --port 8000")
    p.add_argument(
        "model", nargs="?", default=STARTER, help="run folder, model folder or Hub name (%(default)s)"
    )
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where it listens (%(default)s)")
    p.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free (%(default)s)")
    p.add_argument(
        "--api-key",
        metavar="VARIABLE",
        help="callers must know it: an environment variable that holds the key, or the key itself",
    )
    p.add_argument(
        "--without-key", action="store_true", help="listen to other computers although there is no key"
    )
    p.add_argument("--name", metavar="NAME", help="what clients call the model (its folder's name)")
    p.add_argument(
        "--transcribe-with",
        metavar="TEXT",
        help="what the model is asked for a transcript (as its recipe has it)",
    )
    p.add_argument(
        "--read-with",
        metavar="TEXT",
        help="what it is asked before a text that it shall say; {text} is the text",
    )
    p.add_argument("--web", action="store_true", help="a page to chat with it as well")
    p.add_argument(
        "--prefix-mb", type=positive, default=256, metavar="N", help="of conversations that are kept"
    )
    limits = p.add_argument_group("limits")
    for each in fields(Limits):
        add_limit(limits, each.name, each.default, each.metadata["help"])
    add_device(p)
    add_bits(p)
    p.set_defaults(run=run_serve)


def add_limit(group: argparse._ArgumentGroup, name: str, default: Any, sentence: str) -> None:
    """An option of a limit, called as it: ``--max-pictures``; of a list and of ``rows`` without the max."""
    many = isinstance(default, tuple)
    if many:
        shown = ",".join(default) or "none"
    else:
        shown = f"{default:,}" if isinstance(default, int) else f"{default:g}"
    group.add_argument(
        f"--{'' if many or name == 'rows' else 'max-'}{name.replace('_', '-')}",
        dest=name,
        type=names if many else type(default),
        default=default,
        metavar="LIST" if many else "N",
        help=f"{sentence} ({shown})",
    )


def names(text: str) -> tuple[str, ...]:
    """A list with commas."""
    return tuple(name for name in text.split(",") if name)


def limits_of(args: argparse.Namespace) -> Limits:
    from tinymodal.serve.limits import Limits

    try:
        return Limits(**{each.name: getattr(args, each.name) for each in fields(Limits)})
    except ValueError as error:
        raise RecipeError(f"serve: {error}") from error


def run_serve(args: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401 - told here, before a model is loaded
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"serve needs {error.name}, which is not installed; {EXTRA}") from error
    from tinymodal.serve.run import check_address, key_of, listening, name_of, run

    limits, key = limits_of(args), key_of(args.api_key)
    check_address(args.host, key, args.without_key)
    bound = listening(args.host, args.port)
    try:
        from tinymodal.core.threads import apart, on_one_core

        composed = apart(lambda: load_model(args))

        from tinymodal.infer.engine import Engine
        from tinymodal.infer.scheduler import Scheduler
        from tinymodal.serve.app import create_app
        from tinymodal.serve.asking import Asking, asking_of
        from tinymodal.serve.gate import Key, hosts_of
        from tinymodal.serve.served import Served

        engine, usual = Engine(composed), asking_of(args.model)
        scheduler = Scheduler(
            engine, max_rows=limits.rows, max_waiting=limits.waiting, prefix_mb=args.prefix_mb
        )
        on_one_core()  # the scheduler's thread has them all
        served = Served(
            engine,
            scheduler,
            args.name or name_of(args.model),
            limits=limits,
            key=None if key is None else Key.of(key),
            # Who has the key is no page that came in through a name of its own.
            hosts=hosts_of(args.host) if key is None else None,
            asking=Asking(args.transcribe_with or usual.transcribe, args.read_with or usual.read),
        )
        app = create_app(served)
        if args.web:
            from tinymodal.serve.web import mount

            mount(app, served)
    except BaseException:
        bound.close()
        raise
    run(app, served, bound, args.web)
