"""The folder of an evaluation: what lies in it, whose it is, and who may write there.

``NAME.replies.jsonl`` holds a row per question, ``results.json`` the numbers. A row carries the mark of the
run that wrote it (:func:`fingerprint`) and the digest of its question (:func:`digest`): what either of them
no longer fits is not used again. A file of these names that holds anything else is somebody's own; it is left
alone, with a sentence. One process at a time writes into a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymodal.chat.template import TokenizerTemplate
from tinymodal.core.errors import DataError
from tinymodal.core.log import say
from tinymodal.core.types import Audio, Part, Speech, Text
from tinymodal.eval.benchmark import Question

if TYPE_CHECKING:
    from tinymodal.infer.engine import Engine

RESULTS = "results.json"
LOCK = ".eval.lock"
"""Empty; held by the process that writes into the folder."""
ROW = ("id", "prompt", "reply", "stopped_by", "answer", "parsed", "score", "meta", "digest", "run")
"""What a row of replies holds, in this order: ours are known by it."""
SUMMARY = ("metric", "metrics", "n", "complete", "protocol", "run")
"""What the results tell of each benchmark: ours are known by it."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into ``folder``: two would lose each other's rows.

    Raises:
        DataError: another one is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{folder}: another process writes its replies there; expected to be alone. Wait for it, or "
                f"give another folder with --out."
            ) from error
        except OSError:
            say(f"{folder}: this file system has no locks; let one process at a time write there")
        yield


def replies_path(folder: Path, name: str) -> Path:
    """Where the replies to the benchmark called ``name`` go; never the file that its questions are in."""
    return folder / f"{name}.replies.jsonl"


_WRITTEN = json.JSONEncoder(ensure_ascii=False).encode


def line(row: Mapping[str, Any]) -> str:
    return _WRITTEN(row) + "\n"


def rank_path(path: Path, rank: int | None) -> Path:
    """Where one of several processes writes its rows until all are done; of any of them, as a pattern."""
    return path.with_name(f"{path.name}.rank-{'*' if rank is None else format(rank, '05d')}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of earlier runs, without the half line that a kill leaves; none where there is no file.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists():
        return []
    # Not splitlines(): a reply may hold one of the rarer line ends that it cuts at. And a kill may cut inside
    # a character.
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [_json_object(text) for text in lines]
    if whole := _json_object(last):
        rows.append(whole)
    begun = f'{{"{ROW[0]}": '
    half_is_ours = bool(whole) or last[: len(begun)] == begun[: len(last)]
    if not half_is_ours or not all(row.keys() >= set(ROW) for row in rows):
        raise _not_ours(path, "replies")
    return rows


def read_summaries(path: Path) -> dict[str, dict[str, Any]]:
    """What ``results.json`` tells of each benchmark, by name; nothing where there is no file.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists():
        return {}
    told = _json_object(path.read_text(encoding="utf-8", errors="replace"))
    if not told or not all(isinstance(one, dict) and one.keys() >= set(SUMMARY) for one in told.values()):
        raise _not_ours(path, "results")
    return told


def _not_ours(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: holds something of somebody's own; expected {what} of an earlier run, to go on with. Move "
        f"it away, or give another folder with --out."
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """The whole text, or its pieces, or nothing: a kill leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    # Half a character, which json may hold and utf-8 not, becomes a question mark.
    with draft.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines([text] if isinstance(text, str) else text)
    os.replace(draft, path)


def fingerprint(engine: Engine) -> str:
    """16 hex digits that change with the weights and with how conversations, pictures, sounds are prepared.

    Every tensor is sampled at up to 64 places: any step of training changes nearly all of them, and a model
    of several gigabytes is read in a moment. Speech head and codec count as well.
    """
    template = engine.encoder.template
    # One that is data tells all of itself; the tokenizer's own is known by its source.
    written = template.to_jinja() if isinstance(template, TokenizerTemplate) else repr(template)
    seen = engine.encoder.processor.image_processor.to_dict()
    # The tower is in the weights; its config also names versions, and folders of one machine.
    seen = {key: value for key, value in seen.items() if key not in ("auto_map", "vision_config")}
    seen["feature_layer"] = engine.model.config.feature_layer
    found = hashlib.sha256(f"{written}\n{json.dumps(seen, sort_keys=True)}\n".encode())
    # Models that neither hear nor speak keep the marks they always had.
    config, ear = engine.model.config, engine.encoder.processor.feature_extractor
    if ear is not None:
        heard = {k: v for k, v in ear.to_dict().items() if k not in ("auto_map", "audio_config")}
        heard["feature_layer"] = config.audio_feature_layer
        found.update(f"heard {json.dumps(heard, sort_keys=True)}\n".encode())
    if config.speech is not None:
        found.update(f"speech {json.dumps(config.speech, sort_keys=True)}\n".encode())
    _sample(found, engine.model)
    codec = getattr(engine.composed, "codec", None)
    if codec is not None:
        found.update(f"codec {codec.books} {codec.rate_hz}\n".encode())
        _sample(found, codec)
    return found.hexdigest()[:16]


def _sample(found: hashlib._Hash, module: Any) -> None:
    """Feed every tensor's name and some of its numbers."""
    import torch

    for name, tensor in module.state_dict().items():
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(64, len(flat)), dtype=torch.float64).long()
        found.update(name.encode() + flat[places.to(flat.device)].double().cpu().numpy().tobytes())


def digest(question: Question) -> str:
    """16 hex digits that change with what a question says, shows and plays, not the names of files.

    Raises:
        DataError: a picture or a sound that cannot be read.
    """
    found = hashlib.sha256()
    for message in question.sample.messages:
        found.update(f"{message.role} {len(message.parts)}\n".encode())
        for part in message.parts:
            try:
                kind, content = _content(part)
            except (OSError, ValueError) as error:
                raise DataError(f"{question.sample.id}: {error}") from error
            found.update(f"{kind} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]


def _content(part: Part) -> tuple[str, bytes]:
    """What a part is, and its bytes: those of words, of a file, of pixels or of samples."""
    from tinymodal.model.picture_file import load_image

    if isinstance(part, Text):
        return "text", part.text.encode("utf-8", "surrogatepass")
    if isinstance(part, Audio | Speech):
        stretch = f"{type(part).__name__.lower()} {part.rate_hz} {part.start_s} {part.end_s}"
        if isinstance(part.source, Path):
            return stretch, part.source.read_bytes()
        if isinstance(part.source, bytes):
            return stretch, part.source
        return f"{stretch} samples", part.source.cpu().contiguous().numpy().tobytes()
    limits = f"{part.max_tiles} {part.fit_pixels}"
    if isinstance(part.source, Path):
        return f"file {limits}", part.source.read_bytes()
    if isinstance(part.source, bytes):
        return f"file {limits}", part.source
    upright = load_image(part.source)
    return f"pixels {upright.size} {limits}", upright.tobytes()
