"""``--to hub``: a folder with its own code, for the Hub and for whoever has transformers alone.

What a checkpoint of ours is already, and a model card of the run's record. An adapter that the last stage
trained is merged into its matrices, or lies in ``adapter/`` beside the model that it was trained on.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

from tinymodal.compose.build import load, save
from tinymodal.compose.targets import not_in_vllm
from tinymodal.core.errors import ExportError
from tinymodal.port import fresh
from tinymodal.port.model_card import model_card
from tinymodal.port.parity import TOLERANCE, judge
from tinymodal.port.proof import DTYPES, Check, Job, Proof, chat_text

ADAPTER = "adapter"
"""Folder of an adapter that lies apart."""

CHAT = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "What is this?"}],
    }
]


def write(job: Job, folder: Path) -> None:
    """Write the folder.

    Raises:
        ExportError: an adapter is wanted apart, and the run has none or no longer what it was trained on.
    """
    composed = job.composed
    if job.options.lora == "apart":
        adapter, begun_with = _adapter(job)
        composed = load(begun_with, dtype=DTYPES[dtype_of(job)])
        save(composed, folder)
        shutil.copytree(adapter, folder / ADAPTER)
        _forget_paths(folder / ADAPTER / "adapter_config.json")
    else:
        save(composed, folder)
    (folder / "README.md").write_text(model_card(job), encoding="utf-8")


def prove(job: Job, folder: Path) -> Proof:
    """Logits to the bit, the same greedy text and the same chat template, where our package is not seen."""
    apart = job.options.lora == "apart"
    over, left_out = job.prompts()
    chat = conversation(job.sees, job.hears)
    there = fresh.answers(
        folder,
        over,
        dtype=dtype_of(job),
        remote_code=True,
        chats=[chat],
        adapter=folder / ADAPTER if apart else None,
    )
    # Merging rounds: an adapter apart computes the same up to that.
    parity = judge(
        job.composed, there.recorded, "transformers without our package", TOLERANCE if apart else 0.0
    )
    parity.left_out = left_out
    notes = ["the adapter is apart: peft.PeftModel.from_pretrained(model, 'adapter')"] if apart else []
    if (why := not_in_vllm(job.composed)) is not None:
        notes.append(f"vLLM's Transformers backend does not take this composition: {why}")
    return Proof(parity, [weights_check(there), chat_check(job, there)], notes)


def conversation(sees: bool, hears: bool) -> list[dict[str, Any]]:
    """A question over one of each medium that a model has, as transformers takes it."""
    kinds = {"image": sees, "audio": hears, "text": True}
    (turn,) = CHAT
    parts: Any = turn["content"]
    return [{"role": "user", "content": [part for part in parts if kinds[part["type"]]]}]


def weights_check(there: fresh.Elsewhere) -> Check:
    """That a loaded folder missed nothing and found nothing that it does not know."""
    odd = [
        f"{len(names)} {what.replace('_', ' ')}, first {names[0]}"
        for what, names in there.lost.items()
        if names
    ]
    return Check("every weight has its place", not odd, "; ".join(odd) or f"as {there.model_class}")


def chat_check(job: Job, there: fresh.Elsewhere) -> Check:
    """That the folder's chat template writes what training wrote."""
    ours = chat_text(job.composed, "What is this?", int(job.sees), int(job.hears))
    return Check("the chat template writes the same", there.chats[0] == ours, repr(there.chats[0][:60]))


def dtype_of(job: Job) -> str:
    """Data type that is written."""
    return str(job.composed.model.dtype).removeprefix("torch.")


def _adapter(job: Job) -> tuple[Path, str]:
    """The adapter's folder, and the model that its stage began with.

    Raises:
        ExportError: the run has none, or what the stage began with is not kept.
    """
    if job.run is None or not (job.run / ADAPTER / "adapter_config.json").is_file():
        where = job.run or job.folder
        raise ExportError(
            f"{where}: no adapter lies in {where / ADAPTER}; --lora apart is for a run whose last stage had "
            f"'lora'. Leave the option out: the model holds it merged"
        )
    recipe = tomllib.loads((job.run / "recipe.toml").read_text(encoding="utf-8"))
    stages = [stage["name"] for stage in recipe["stages"]]
    if len(stages) > 1:
        begun_with = job.run / "stages" / stages[-2]
        if (begun_with / "config.json").is_file():
            return job.run / ADAPTER, str(begun_with)
    elif (path := recipe["model"].get("path")) is not None:
        return job.run / ADAPTER, path
    raise ExportError(
        f"{job.run}: what stage '{stages[-1]}' began with is not kept as a folder, so its adapter has "
        f"nothing to stand on; export it merged (leave --lora out)"
    )


def _forget_paths(file: Path) -> None:
    """Take out where the adapter's model lay on the machine that trained it."""
    said = json.loads(file.read_text(encoding="utf-8"))
    said["base_model_name_or_path"] = None
    file.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
