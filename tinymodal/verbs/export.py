"""``tinymodal export``: a model for other programs, with proof that it computes the same there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tinymodal.verbs.options import positive

FORMS = "hub, llava, gguf, onnx"


def add_export(verbs: Any) -> None:
    p = verbs.add_parser(
        "export", help="a model for other programs, with proof: tinymodal export runs/demo --to hub shipped"
    )
    p.add_argument("model", help="run folder, model folder, Hub name, or starter")
    p.add_argument("out", type=Path, help="folder to write; appears only if it computes the same")
    p.add_argument(
        "--to", required=True, dest="target", metavar="FORM", help=f"{FORMS}; or your_file.py:function"
    )
    p.add_argument(
        "--without",
        default="",
        metavar="PARTS",
        help="llava, gguf, onnx: leave out what the form has no place for: vision, audio, speech",
    )
    p.add_argument(
        "--dtype", metavar="TYPE", help="hub, llava: float32, bfloat16 or float16 (as it was saved)"
    )
    p.add_argument(
        "--type",
        default="f32",
        dest="weights",
        metavar="TYPE",
        help="gguf: f32, f16, q8_0 or q4_0 (%(default)s)",
    )
    p.add_argument(
        "--lora",
        choices=("merged", "apart"),
        default="merged",
        help="hub: the last stage's adapter inside its matrices, or beside the model (%(default)s)",
    )
    p.add_argument(
        "--prompts", type=positive, default=8, metavar="N", help="prompts that are compared (%(default)s)"
    )
    p.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    from rich.console import Console

    from tinymodal.port.export import REPORT, export, lines, tables
    from tinymodal.port.proof import Options

    options = Options(
        dtype=args.dtype,
        lora=args.lora,
        weights=args.weights.lower(),
        without=tuple(part for part in args.without.split(",") if part),
        num_prompts=args.prompts,
    )
    exported = export(args.model, args.target, args.out, options)
    console = Console()
    for table in tables(exported):
        console.print(table)
    for line in lines(exported):
        print(line)
    report = exported.out / REPORT
    if not exported.passed:
        print(f"It does not compute the same. What was written lies in {exported.out}; the report: {report}")
        return 1
    print(f"{exported.out} is written; the report: {report}")
    return 0
