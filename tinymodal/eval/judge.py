"""A judge: a language model behind any OpenAI-compatible endpoint that grades replies.

Every verdict is written to ``FOLDER/judge.jsonl`` the moment it comes, one line each, and one that can be
read is never asked for again: what was judged is kept when the endpoint fails or the process is killed, and
the next run goes on with the rest. A line is known by a hash of address, model, messages, temperature and
length; another judge or prompt asks anew. The endpoint's key comes from the environment, and is in no file
and no message.

A request is tried again where trying can help (a time-out, HTTP 408, 409, 429, 5xx), with waits that double
and the ``Retry-After`` that the endpoint asks for; refused for good, the judge stops and says why.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import ipaddress
import json
import os
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.log import Progress, append, say
from tinymodal.eval.benchmark import Judging, Problems, Question, Score
from tinymodal.eval.own import JudgingFails

VERDICTS = "judge.jsonl"
KEY_FROM = "OPENAI_API_KEY"
UNGRADED = "answers that no judge has graded"
UNREAD = "answers whose verdicts cannot be read"
READINGS = 5
"""So often a reply is judged until its verdict can be read, as MM-Vet's scorer has it."""
WARMER = 0.5
"""Is added to the temperature from one reading to the next; MM-Vet's too."""
HOTTEST = 2.0
"""What OpenAI's endpoints take at most."""
LONGEST_WAIT_S = 120.0
"""An endpoint that asks to wait longer has failed for now."""
LARGEST_REPLY = 1 << 22
"""Bytes of a response: a verdict of 1,024 tokens is some 6 KB."""
CHUNK = 1 << 16
IN_A_ROW = 3
"""Questions that failed after all tries, with no success between: the endpoint is down."""
REFUSED_IN_A_ROW = 20
"""The same of requests that are refused at once, where the question itself may be what is refused."""
VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")
SECRET = 8
"""Shorter keys are stand-ins such as ``EMPTY``; hiding those would hide words of verdicts."""


class _Failed(Exception):
    """A question that got no verdict, and why."""

    def __init__(self, why: str, *, again: bool = False, for_all: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.again, self.for_all, self.wait_s = again, for_all, wait_s


class _NotAsked(_Failed):
    """The judge had stopped before."""


class _Verdict(NamedTuple):
    text: str
    model: str
    """Who the endpoint says it was."""
    tokens: tuple[int, int] | None
    """Of prompt and reply; None where the endpoint does not tell."""


class _Kept(NamedTuple):
    """A line of :data:`VERDICTS`."""

    text: str
    model: str
    """Who the endpoint said it was."""


class _Request(NamedTuple):
    body: dict[str, Any]
    key: str
    """The hash that its verdict is known by."""


class _Outcome(NamedTuple):
    score: Score | None
    why: str = ""
    kind: str = UNGRADED


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to another address."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


class Judge:
    """Grades replies; one for all benchmarks of a run."""

    def __init__(
        self,
        base_url: str,
        model: str = "",
        *,
        folder: Path,
        key_from: str = KEY_FROM,
        parallel: int = 8,
        timeout_s: float = 120.0,
        tries: int = 6,
        first_wait_s: float = 1.0,
        price: tuple[float, float] | None = None,
    ) -> None:
        """Nothing is sent and nothing written before the first question.

        Args:
            base_url: of the endpoint, as a rule with ``/v1`` at its end; ``/chat/completions`` is put behind.
            model: who judges; empty: whom the benchmark's protocol names.
            folder: gets :data:`VERDICTS`.
            key_from: the environment variable that holds the key; where it is not set none is sent.
            parallel: requests at once.
            timeout_s: for one request, from first to last byte.
            tries: requests for one verdict.
            first_wait_s: before the second of them; doubled from one to the next.
            price: of a million tokens of prompts and of replies, in any currency.

        Raises:
            RecipeError: ``base_url`` is no http address, or holds a key; ``key_from`` is no variable's name;
                the key holds what no header can.
        """
        if not VARIABLE.fullmatch(key_from):
            # Not shown: it may be the key.
            raise RecipeError(
                f"the judge's key: expected the name of the environment variable that holds it, such as "
                f"{KEY_FROM}, found something else. Set a variable to the key, and give its name."
            )
        self.url, local = _endpoint(base_url)
        self.model, self.path, self.price = model, folder / VERDICTS, price
        self.parallel, self.timeout_s, self.tries = max(1, parallel), timeout_s, max(1, tries)
        self._first_wait_s, self._key_from = first_wait_s, key_from
        self._key = os.environ.get(key_from, "").strip()
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise RecipeError(f"{key_from}: holds what no key can; expected letters, digits and signs only.")
        # A proxy of the environment does not know this computer's own servers.
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_Stay, *proxies)
        self._open = not local and self.url.startswith("http://")
        self._verdicts: dict[str, _Kept] = {}
        self._has_read = False
        self._asked: set[str] = set()
        self._kept_models: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._why = ""
        self._in_a_row = 0
        self._rest_until = 0.0
        self._models: dict[str, int] = {}
        self._num_kept = self._num_untold = 0
        self._tokens = [0, 0]

    def told(self, judging: Judging) -> dict[str, Any]:
        """How it grades, for ``results.json``."""
        return {
            "model": self.model or judging.model,
            "official_model": judging.model,
            "answered_by": sorted(self._models.keys() | self._kept_models),
            "endpoint": self.url,
            "wording": judging.wording,
            "temperature": judging.temperature,
            "max_tokens": judging.max_tokens,
        }

    def bill(self) -> str:
        """What was asked and what it took, in a sentence."""
        num_asked = sum(self._models.values())
        kept = f", {self._num_kept:,} kept in {self.path.name}" if self._num_kept else ""
        if not num_asked:
            return f"judge: no new verdicts{kept}"
        prompts, replies = self._tokens
        parts = [
            f"judge {', '.join(sorted(self._models))}: {num_asked:,} new verdicts{kept}",
            f"{prompts:,} tokens of prompts and {replies:,} of replies",
        ]
        if self.price is not None:
            cost = (prompts * self.price[0] + replies * self.price[1]) / 1e6
            parts.append(f"cost {cost:,.4f} at {self.price[0]:g} and {self.price[1]:g} a million tokens")
        if self._num_untold:
            parts.append(f"without those of {self._num_untold:,} verdicts that came without their tokens")
        return "; ".join(parts)

    def grade(self, judging: Judging, question: Question, reply: str, problems: Problems) -> Score | None:
        """One reply's score, see :meth:`grade_all`."""
        return self.grade_all(judging, [(question, reply)], problems)[0]

    def grade_all(
        self, judging: Judging, asked: Sequence[tuple[Question, str]], problems: Problems
    ) -> list[Score | None]:
        """Scores in the order of ``asked``; None, and a note in ``problems``, where there is no verdict.

        Raises:
            DataError: the file of verdicts holds something of somebody's own.
        """
        if not asked:
            return []
        if not self._has_read:
            self._verdicts, self._has_read = _read_verdicts(self.path), True
        if self._open:
            with_it = "The key and all" if self._key else "All"
            say(f"{self.url}: http is not encrypted. {with_it} that is judged can be read on the way there.")
            self._open = False
        self._stop.clear()
        self._why, self._in_a_row = "", 0
        futures: list[Future[_Outcome]] = []
        found: list[Score | None] = []
        with (
            Progress("judge", len(asked), "verdicts") as progress,
            ThreadPoolExecutor(self.parallel, "judge") as pool,
        ):
            try:
                futures += [pool.submit(self._grade, judging, *each) for each in asked]
                for (question, _), future in zip(asked, futures, strict=True):
                    score, why, kind = future.result()
                    found.append(score)
                    if score is None:
                        problems.add(kind, f"{question.sample.id}: {why}")
                    progress.advance()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if self._why:
            num_left = sum(score is None for score in found)
            say(
                f"the judge stopped, {num_left:,} of {len(found):,} replies have no verdict: {self._why} All "
                f"other verdicts are kept in {self.path}; the same command goes on with the rest."
            )
        return found

    def _grade(self, judging: Judging, question: Question, reply: str) -> _Outcome:
        """One reply, judged until the verdict can be read."""
        try:
            requests = self._requests(judging, question, reply)
        except ValueError as error:
            return _Outcome(None, str(error))
        with self._lock:
            kept = [self._verdicts.get(request.key) for request in requests]
        for one in kept:
            if one is None:
                continue
            try:
                score = judging.read(question, reply, one.text)
            except ValueError:
                continue
            with self._lock:
                self._num_kept += 1
                self._kept_models.add(one.model)
            return _Outcome(score)
        # A reply whose every reading failed in an earlier run is judged as if it had not been.
        left = [each for each, one in zip(requests, kept, strict=True) if one is None] or requests
        why = "no verdict that can be read"
        for request in left:
            with self._lock:
                if request.key in self._asked and request.key in self._verdicts:
                    continue  # asked by this run, for a question with the same words
            try:
                verdict = self._verdict(request, question.sample.id)
            except _Failed as error:
                return _Outcome(None, str(error))
            try:
                return _Outcome(judging.read(question, reply, verdict))
            except JudgingFails as error:
                return _Outcome(None, str(error))  # no more verdicts are paid for; the next run tries again
            except ValueError as error:
                why = str(error)
        return _Outcome(None, why, UNREAD)

    def _requests(self, judging: Judging, question: Question, reply: str) -> list[_Request]:
        """What is sent at each reading; ``ValueError``: something that a judge has to know is missing."""
        found, prompt = [], judging.prompt(question, reply)
        for reading in range(READINGS):
            messages = [dict(message) for message in prompt]
            # Words that ask anew are tried before warmth is.
            warmer = max(0, reading - 1) if judging.again else reading
            if reading and judging.again:
                messages[-1]["content"] += judging.again
            body = {
                "model": self.model or judging.model,
                "messages": messages,
                "temperature": min(HOTTEST, judging.temperature + WARMER * warmer),
                "max_tokens": judging.max_tokens,
            }
            asked = json.dumps([self.url, body], sort_keys=True)
            found.append(_Request(body, hashlib.sha256(asked.encode()).hexdigest()))
        return found

    def _verdict(self, request: _Request, name: str) -> str:
        """What the judge writes; kept, but for one that is empty."""
        body, key = request
        try:
            verdict = self._ask(json.dumps(body).encode(), str(body["model"]))
        except _NotAsked:
            raise
        except _Failed as error:
            with self._lock:
                self._in_a_row += 1
                limit = IN_A_ROW if error.again else REFUSED_IN_A_ROW
                if (error.for_all or self._in_a_row >= limit) and not self._stop.is_set():
                    self._why = str(error)
                    self._stop.set()
            raise
        row = {
            "key": key,
            "question": name,
            "model": body["model"],
            "answered_by": verdict.model,
            "temperature": body["temperature"],
            "verdict": verdict.text,
            "tokens": verdict.tokens,
        }
        with self._lock:
            if verdict.text.strip():
                append(self.path, row)
                self._verdicts[key] = _Kept(verdict.text, verdict.model)
            self._asked.add(key)
            self._in_a_row = 0
            self._models[verdict.model] = self._models.get(verdict.model, 0) + 1
            self._num_untold += verdict.tokens is None
            for i, num in enumerate(verdict.tokens or ()):
                self._tokens[i] += num
        return verdict.text

    def _ask(self, sent: bytes, model: str) -> _Verdict:
        """Post until there is a verdict or no use in trying."""
        wait_s = self._first_wait_s
        for left in reversed(range(self.tries)):
            # Where the endpoint asks for a rest all threads keep it, and do not come back at once.
            while (rest_s := self._rest_until - time.monotonic()) > 0 and not self._stop.is_set():
                self._stop.wait(rest_s * random.uniform(1.0, 1.2))
            if self._stop.is_set():
                raise _NotAsked("not asked, the judge had stopped")
            try:
                return self._post(sent, model)
            except _Failed as error:
                if not error.again or not left:
                    raise
                if error.wait_s:
                    self._rest_until = max(self._rest_until, time.monotonic() + error.wait_s)
                else:
                    self._stop.wait(wait_s * random.uniform(0.5, 1.0))
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise AssertionError("the last try returns or raises")

    def _post(self, sent: bytes, model: str) -> _Verdict:
        """One request."""
        headers = {"Content-Type": "application/json", "User-Agent": "tinymodal"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=sent, headers=headers, method="POST")
        deadline = time.monotonic() + self.timeout_s
        # "from None": a chained error would show the request with the key.
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                content = _read(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._refused(error, model, deadline) from None
        except TimeoutError:
            raise self._late() from None
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._late() from None
            if isinstance(reason, ssl.SSLCertVerificationError):
                why = f"{self.url}: its certificate cannot be trusted: {self._hidden(str(reason))}."
                raise _Failed(why, for_all=True) from None
            why = f"{self.url}: cannot be reached: {self._hidden(str(reason) or type(reason).__name__)}."
            raise _Failed(why, again=True) from None
        if len(content) > LARGEST_REPLY:
            raise _Failed(f"{self.url}: answers with more than {LARGEST_REPLY:,} bytes; expected a verdict.")
        try:
            told = json.loads(content)
            text = told["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = 0
        if not isinstance(text, str | None):
            start = self._hidden(content[:80].decode(errors="replace"))
            raise _Failed(f"{self.url}: expected a chat completion, found {start!r}.", again=True)
        answered_by = told.get("model")
        return _Verdict(
            # None where a filter or the bound on tokens left nothing: a verdict that cannot be read.
            self._hidden(text or ""),
            self._hidden(answered_by) if isinstance(answered_by, str) and answered_by else model,
            _tokens(told.get("usage")),
        )

    def _late(self) -> _Failed:
        return _Failed(f"{self.url}: no answer within {self.timeout_s:g} s.", again=True)

    def _refused(self, error: urllib.error.HTTPError, model: str, deadline: float) -> _Failed:
        """What an HTTP status means, and what to do about it."""
        with error:
            code, said = error.code, _message(error, deadline)
            where = self._hidden(f"{self.url}: HTTP {code}{f': {said}' if said else ''}")
            if error.headers.get("Location") and 300 <= code < 400:
                other = self._hidden(error.headers["Location"])
                return _Failed(f"{where}: it is at {other}; give that address.", for_all=True)
            wait_s = _retry_after(error.headers.get("Retry-After"))
        if code == 401 or code == 403:
            held = "is refused" if self._key else "is not set, and no key was sent"
            return _Failed(f"{where}: the key in {self._key_from} {held}. Set one.", for_all=True)
        if code == 402 or "insufficient_quota" in said:
            return _Failed(f"{where}: the account behind {self._key_from} has no credit left.", for_all=True)
        if code == 404 or code == 405:
            ends = "the base URL as a rule ends in /v1"
            return _Failed(f"{where}: no such address, or no model {model!r}; {ends}.", for_all=True)
        again = code in (408, 409, 429) or code >= 500
        if wait_s > LONGEST_WAIT_S:
            return _Failed(f"{where}: asks to come back in {wait_s:,.0f} s.", for_all=True)
        return _Failed(f"{where}.", again=again, wait_s=wait_s)

    def _hidden(self, text: str) -> str:
        """The text without the key: some endpoints send it back."""
        return text.replace(self._key, "***") if len(self._key) >= SECRET else text


def _endpoint(base_url: str) -> tuple[str, bool]:
    """The address of the chat completions, and whether it is on this computer."""
    expected = "expected an address such as https://api.openai.com/v1 or http://localhost:8000/v1"
    try:
        parts = urlsplit(base_url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise RecipeError(f"the judge's base URL cannot be read; {expected}.") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        # Not shown: it may be the key.
        raise RecipeError(f"the judge's base URL holds more than an address; {expected}, the key apart.")
    if parts.scheme not in ("http", "https") or not host or any(c <= " " for c in parts.geturl()):
        raise RecipeError(f"{base_url!r}: no address of a judge; {expected}.")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost" or host.endswith(".localhost")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path}/chat/completions", local


def _read(response: IO[bytes], deadline: float) -> bytes:
    """The body, or one byte more than is allowed.

    Raises:
        TimeoutError: it drips in until the deadline has passed.
    """
    content = b""
    while len(content) <= LARGEST_REPLY:
        chunk = response.read1(CHUNK) if hasattr(response, "read1") else response.read(CHUNK)
        if not chunk:
            break
        content += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
    return content[: LARGEST_REPLY + 1]


def _message(error: urllib.error.HTTPError, deadline: float) -> str:
    """What an endpoint says about a failure, on one line; empty where it says nothing readable."""
    try:
        told = json.loads(_read(error, deadline))
        about = told.get("error", told)
        said = about if isinstance(about, str) else f"{about.get('message', '')} {about.get('code') or ''}"
    except (ValueError, AttributeError, OSError, http.client.HTTPException, RecursionError):
        return ""
    return " ".join(said.split())[:300].rstrip(". ")


def _retry_after(header: str | None) -> float:
    """Seconds that a ``Retry-After`` asks for, given as such or as a date; 0 where it asks for none."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _tokens(usage: object) -> tuple[int, int] | None:
    if not isinstance(usage, Mapping):
        return None
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    whole = [num for num in counts if isinstance(num, int) and not isinstance(num, bool) and num >= 0]
    return (whole[0], whole[1]) if len(whole) == 2 else None


def _read_verdicts(path: Path) -> dict[str, _Kept]:
    """Hash -> verdict of earlier runs. Empty ones, and the half line that a kill left, count for nothing.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    found: dict[str, _Kept] = {}
    begun = '{"key": "'
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line)
            key, verdict = row["key"], str(row["verdict"])
            if verdict.strip():
                found[key] = _Kept(verdict, str(row.get("answered_by") or row.get("model") or ""))
        except (ValueError, TypeError, LookupError):
            if line[: len(begun)] != begun[: len(line)]:
                raise DataError(
                    f"{path}: line {number}: expected verdicts of an earlier run, found something else. Move "
                    f"the file away, or give another folder with --out."
                ) from None
    if text and not text.endswith("\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return found
