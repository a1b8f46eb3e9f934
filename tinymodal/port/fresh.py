"""Answers of a saved folder in a process that cannot see our package: only transformers and what lies there.

The process is given texts, pictures and sounds as files, reads the folder through transformers' Auto classes
and its own processor, and hands back ids, tiles, logits and the greedy text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tinymodal.core.errors import ExportError
from tinymodal.port.parity import NUM_NEW_TOKENS, RATE_HZ, Case, Recorded

HIDE = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tinymodal":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
"""Put first: where our package is installed, importing it fails as if it were not."""

SCRIPT = """
import json, sys
import numpy, PIL.Image, torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

job = json.load(open(sys.argv[1]))
torch.set_num_threads(job["threads"])
known = {"trust_remote_code": True} if job["remote_code"] else {}
model, info = AutoModelForImageTextToText.from_pretrained(
    job["folder"], dtype=getattr(torch, job["dtype"]), output_loading_info=True, **known
)
lost = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
if job["adapter"]:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, job["adapter"])
model.eval()
processor = AutoProcessor.from_pretrained(job["folder"], **known)
if not job["remote_code"]:
    # Resizing must not depend on whether torchvision is installed.
    processor.image_processor = AutoImageProcessor.from_pretrained(job["folder"], backend="pil")
answers = []
for case in job["cases"]:
    heard = {}
    if case["sounds"]:
        heard = {"audio": [torch.from_numpy(numpy.load(f)) for f in case["sounds"]],
                 "sampling_rate": job["rate_hz"]}
    shown = [PIL.Image.open(f).convert("RGB") for f in case["pictures"]] or None
    inputs = dict(processor(images=shown, text=case["text"], return_tensors="pt", **heard))
    step, mask, cache, ids = dict(inputs), inputs["attention_mask"], None, []
    with torch.no_grad():
        logits = model(**inputs).logits[0].float()
        for _ in range(job["num_new_tokens"]):
            out = model(**step, past_key_values=cache, use_cache=True)
            ids.append(int(out.logits[0, -1].argmax()))
            cache, mask = out.past_key_values, torch.cat((mask, mask.new_ones(1, 1)), 1)
            step = {"input_ids": torch.tensor([[ids[-1]]]), "attention_mask": mask}
    answers.append({"inputs": inputs, "logits": logits, "ids": ids})
chats = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
         for chat in job["chats"]]
torch.save({"answers": answers, "lost": lost, "chats": chats, "class": type(model).__name__}, job["out"])
"""


class Elsewhere(NamedTuple):
    """What came back."""

    recorded: list[Recorded]
    lost: dict[str, list[str]]
    """Names of tensors that are missing, not expected or misshapen, by which of these."""
    chats: list[str]
    """The conversations, as the folder's own chat template writes them."""
    model_class: str


def answers(
    folder: Path,
    over: Sequence[Case],
    *,
    dtype: str,
    remote_code: bool,
    chats: Sequence[Any] = (),
    adapter: Path | None = None,
    num_new_tokens: int = NUM_NEW_TOKENS,
) -> Elsewhere:
    """Run a folder over some cases in a new process.

    Args:
        folder: model and processor, loaded with ``from_pretrained``.
        over: what it is asked.
        dtype: what it computes in.
        remote_code: the folder brings its own code, which is trusted.
        chats: conversations for its chat template, as transformers takes them.
        adapter: a folder of peft's, put onto the model.
        num_new_tokens: length of the greedy text.

    Raises:
        ExportError: the process ended with an error, of which the last line is told.
    """
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        job = {
            "folder": str(folder.resolve()),
            "adapter": None if adapter is None else str(adapter.resolve()),
            "dtype": dtype,
            "remote_code": remote_code,
            "threads": torch.get_num_threads(),
            "num_new_tokens": num_new_tokens,
            "rate_hz": RATE_HZ,
            "cases": [_on_disk(case, home / str(number)) for number, case in enumerate(over)],
            "chats": list(chats),
            "out": str(home / "answers.pt"),
        }
        (home / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(home)
        found = torch.load(home / "answers.pt", weights_only=True)
    recorded = [
        Recorded(case, answer["inputs"], answer["logits"], answer["ids"])
        for case, answer in zip(over, found["answers"], strict=True)
    ]
    return Elsewhere(recorded, found["lost"], found["chats"], found["class"])


def _on_disk(case: Case, stem: Path) -> dict[str, Any]:
    pictures, sounds = [], []
    for number, picture in enumerate(case.pictures):
        pictures.append(f"{stem}-{number}.png")
        picture.save(pictures[-1])
    for number, samples in enumerate(case.sounds):
        sounds.append(f"{stem}-{number}.npy")
        np.save(sounds[-1], samples.numpy())
    return {"text": case.text, "pictures": pictures, "sounds": sounds}


def _run(home: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    # Code that travels with a folder is unpacked into a cache; this one is thrown away.
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    # -P: the folder it is started in is not searched.
    done = subprocess.run(
        [sys.executable, "-P", "-c", HIDE + SCRIPT, str(home / "job.json")],
        cwd=home,
        env=kept | own | {"TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
        raise ExportError(f"what was written does not run in a process of its own: {last[-1].strip()}")
