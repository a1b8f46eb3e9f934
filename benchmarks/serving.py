"""Many clients at one server: is every answer the right one, is nothing lost, does memory stay where it is?

    python -m benchmarks.serving --json benchmarks/records/serving.json

``tinymodal serve`` runs as a process of its own; clients of this one ask it for a minute, each one question
after the other, mixed: pictures, sounds, both, and words alone; half of the answers are streamed. One in ten
hangs up in the middle of its answer. Before, the engine answers each question alone, greedily, in float32:
that is what every client must be told, letter for letter.

Exit code 1 where an answer is wrong, a request fails otherwise than by 429 or 503, a place stays taken, or
the server's memory grows by more than 5 % after the first ten seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure

CLIENTS = 64
SECONDS, SETTLED_S = 60.0, 10.0
QUICK_SECONDS, QUICK_SETTLED_S = 15.0, 6.0
HANGS_UP = 0.1
"""Share of requests whose client goes in the middle."""
GROWTH = 0.05
MAX_NEW_TOKENS = 32
SEED = 79
"""Of the questions; none that the starter was chosen or scored with."""
BUSY = (429, 503)
SAMPLED_S = 0.25


class Asked(NamedTuple):
    """A question, and what the engine says to it alone."""

    kind: str
    messages: list[dict[str, Any]]
    answer: str


@dataclass
class Told:
    """What came of all requests."""

    right: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    """Kind, what was expected, what came."""
    crossed: int = 0
    """Wrong answers that are another question's."""
    hung_up: int = 0
    busy: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = measure.words(__doc__)
    parser.add_argument("--model", default="starter", help="who answers (%(default)s)")
    parser.add_argument("--clients", type=int, default=CLIENTS, metavar="N", help="at once (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help=f"for so long ({SECONDS:g}; quick {QUICK_SECONDS:g})"
    )
    given = measure.begin(parser, argv)
    seconds = given.seconds or (QUICK_SECONDS if given.quick else SECONDS)
    settled_s = min(QUICK_SETTLED_S if given.quick else SETTLED_S, seconds / 2)
    pool = questions(given.model, 4 if given.quick else 12)
    with serving(given) as (process, url):
        told, memory_mb = asyncio.run(ask_all(pool, url, process.pid, given.clients, seconds))
        left = leaked(url)
        process.send_signal(signal.SIGTERM)
        ended = process.wait(60)
    return report(given, told, memory_mb, left, ended, seconds, settled_s)


# Questions


def questions(model: str, per_kind: int) -> list[Asked]:
    """Questions of all kinds, answered by the engine alone, one by one."""
    from tinymodal.compose.build import load
    from tinymodal.core.types import Message, Sample, Text
    from tinymodal.eval.tasks import scenes, sounds
    from tinymodal.infer.engine import Engine, Sampling

    engine, sampling = Engine(load(model)), Sampling(max_new_tokens=MAX_NEW_TOKENS)
    hello = ("Hello!", "What can you do?", "Who are you?", "Thank you.", "What do you see?", "What is two?")
    of_kind = {
        "picture": [q.sample for q in scenes.questions("test", SEED, max(1, per_kind // 4), False)],
        "picture and sound": [q.sample for q in sounds.asked("test", SEED, max(1, per_kind // 4))],
        "sound": [q.sample for q in sounds.heard("test", SEED, 2 * per_kind, "test")],
        "words": [Sample((Message("user", (Text(text),)),), text) for text in hello],
    }
    return [
        Asked(kind, [message(turn) for turn in sample.messages], engine.reply([sample], sampling)[0].text)
        for kind, samples in of_kind.items()
        for sample in samples
    ]


def message(turn: Any) -> dict[str, Any]:
    """A turn as OpenAI has it; nothing is lost on the way."""
    from tinymodal.core.types import Audio, Image

    parts: list[dict[str, Any]] = []
    for part in turn.parts:
        file = io.BytesIO()
        if isinstance(part, Image):
            assert not isinstance(part.source, bytes | Path)
            part.source.save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        elif isinstance(part, Audio):
            import soundfile

            soundfile.write(file, part.source.numpy(), part.rate_hz, format="WAV", subtype="FLOAT")
            data = base64.b64encode(file.getvalue()).decode()
            parts.append({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
        else:
            parts.append({"type": "text", "text": part.text})
    return {"role": turn.role, "content": parts}


# The server


@contextlib.contextmanager
def serving(given: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``tinymodal serve`` in a process of its own, and its address."""
    command = [sys.executable, "-m", "tinymodal", "serve", given.model, "--port", "0", "--name", "model"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(given.threads)},
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "http://" in line:
                url = next(word for word in line.split() if word.startswith("http://"))
                yield process, url.removesuffix("/v1")
                return
        raise SystemExit(f"the server did not start: {''.join(lines)}")
    finally:
        process.kill()
        process.wait()


def counted(url: str) -> dict[str, float]:
    """What the server tells of itself."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def leaked(url: str, within_s: float = 10.0) -> dict[str, float]:
    """What is still taken although nobody asks any more; empty: nothing."""
    end = time.monotonic() + within_s
    while True:
        now = counted(url)
        taken = {
            "rows": now["tinymodal_rows"],
            "waiting": now["tinymodal_waiting"],
            "requests": now["tinymodal_requests_in_flight"] - 1,  # this one
        }
        left = {key: value for key, value in taken.items() if value}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def resident_mb(pid: int) -> float:
    """Memory of a process, in 10^6 bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# The clients


async def ask_all(
    pool: list[Asked], url: str, pid: int, clients: int, seconds: float
) -> tuple[Told, list[tuple[float, float]]]:
    """Ask for so long; what came of it, and the server's memory as (second, 10^6 bytes)."""
    told, memory = Told(), []
    host, _, port = url.removeprefix("http://").rpartition(":")
    others = Counter(asked.answer for asked in pool)
    began = time.monotonic()
    end = began + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            asked = rng.choice(pool)
            await one(asked, rng.random() < 0.5, rng.random() < HANGS_UP, rng)

    async def one(asked: Asked, stream: bool, hangs_up: bool, rng: random.Random) -> None:
        body = {"model": "model", "messages": asked.messages, "max_tokens": MAX_NEW_TOKENS}
        at = time.monotonic()
        try:
            # Half of those who go do so while the answer streams, half before there is any.
            status, said = await post(
                host, int(port), {**body, "stream": stream or hangs_up}, hangs_up and rng
            )
        except OSError as error:
            told.failed[type(error).__name__] += 1
            return
        if hangs_up:
            told.hung_up += 1
        elif status in BUSY:
            told.busy += 1
            await asyncio.sleep(rng.random())
        elif status != 200:
            told.failed[str(status)] += 1
        elif said == asked.answer:
            told.right[asked.kind] += 1
            told.seconds.append(time.monotonic() - at)
        else:
            told.wrong.append((asked.kind, asked.answer, said))
            told.crossed += said in others

    async def post(host: str, port: int, body: dict[str, Any], leaves: Any) -> tuple[int, str]:
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        at = time.monotonic()
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(head.encode() + data)
            await writer.drain()
            if leaves and leaves.random() < 0.5:
                await asyncio.sleep(leaves.random() * 0.5)
                return 0, ""
            answer = await reader.readuntil(b"\r\n\r\n")
            status = int(answer.split()[1])
            first = await reader.read(1)
            told.first_s.append(time.monotonic() - at)
            if leaves:
                return 0, ""
            rest = first + await reader.read()
        finally:
            writer.transport.abort()
        if status != 200:
            return status, ""
        return status, streamed(rest) if body["stream"] else whole(rest)

    async def watch() -> None:
        while True:
            memory.append((time.monotonic() - began, resident_mb(pid)))
            await asyncio.sleep(SAMPLED_S)

    watching = asyncio.ensure_future(watch())
    await asyncio.gather(*(client(number) for number in range(clients)))
    watching.cancel()
    return told, memory


def whole(body: bytes) -> str:
    """The reply of an answer."""
    return str(json.loads(body)["choices"][0]["message"]["content"])


def streamed(body: bytes) -> str:
    """The reply of an answer in events, in chunks."""
    text = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        text += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    events = [line.removeprefix("data: ") for line in text.decode().split("\n\n") if line]
    if events[-1] != "[DONE]":
        return f"cut off: {events[-1]}"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    return "".join(delta.get("content") or "" for delta in deltas)


# What came of it


def report(
    given: argparse.Namespace,
    told: Told,
    memory: list[tuple[float, float]],
    left: dict[str, float],
    ended: int,
    seconds: float,
    settled_s: float,
) -> int:
    """Print and write it; the exit code."""
    settled = [mb for at, mb in memory if at >= settled_s]
    growth = max(settled) / settled[0] - 1
    answers = sum(told.right.values())
    rows = [
        measure.more("answers per second", answers / seconds, None, "1/s"),
        measure.less("time of an answer, median", statistics.median(told.seconds), None, "s"),
        measure.less("time of an answer, 95 %", quantile(told.seconds, 0.95), None, "s"),
        measure.less("first byte of an answer, median", statistics.median(told.first_s), None, "s"),
        measure.less("wrong answers", len(told.wrong), None, ""),
        measure.less("answers of another question", told.crossed, None, ""),
        measure.less("hung up by the client", told.hung_up, None, ""),
        measure.less("refused, 429 or 503", told.busy, None, ""),
        measure.less("failed otherwise", sum(told.failed.values()), None, ""),
        measure.less("places still taken", sum(left.values()), None, ""),
        measure.less(f"memory after {settled_s:g} s", settled[0], None, "MB"),
        measure.less("its growth from then on", 100 * growth, None, "%"),
    ]
    faults = {
        "wrong": told.wrong[:5],
        "failed": dict(told.failed),
        "left": left,
        "growth": growth if growth > GROWTH else 0,
        "exit": ended,
    }
    good = not any(faults.values())
    measure.finish(
        rows, given.json, given.quick, clients=given.clients, seconds=seconds, right=dict(told.right),
        memory_mb=[round(mb, 1) for _, mb in memory], faults=faults, good=good,
    )  # fmt: skip
    print("as it should be" if good else f"not as it should be: {faults}")
    return 0 if good else 1


def quantile(values: list[float], share: float) -> float:
    """The value that so many are at most."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    sys.exit(main())
