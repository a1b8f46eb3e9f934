"""Talk to a model in the terminal, about pictures if you like.

Lines are questions; lines that begin with a slash are commands. A mistake (a picture that is not there, a
word that is a control token) is one line, and the conversation goes on as if nothing had been typed. Where
input comes from a pipe only the replies are printed, so ``echo "What is this?" | tinymodal chat --image
cat.png`` can be used in a script.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from tinymodal.core.errors import DataError, TinyModalError
from tinymodal.core.types import Image, Message, Part, Sample, Text
from tinymodal.data.convert import Folders
from tinymodal.data.convert import messages as as_sample
from tinymodal.infer.engine import GREEDY, Engine, Sampling

HELP = """\
/image FILE   show a picture; it goes with your next question
/reset        forget the conversation
/save FILE    write the conversation as a row that training reads (format = "messages")
/help         this list
/quit         leave (also Ctrl-D)
Anything else is a question; one that ends with a backslash goes on in the next line. An answer can be stopped
with Ctrl-C."""


@dataclass(slots=True)
class Chat:
    """A conversation in progress."""

    engine: Engine
    sampling: Sampling = GREEDY
    messages: list[Message] = field(default_factory=list)
    """Questions and replies in turn; a reply that was stopped does not train."""
    waiting: list[Path] = field(default_factory=list)
    """Pictures shown since the last question."""

    def show(self, path: Path) -> None:
        """Put a picture beside the next question.

        Raises:
            DataError: there is no such file, or it is no picture.
        """
        if not path.is_file():
            raise DataError(f"{path}: there is no such picture (looked in {Path.cwd()}).")
        sample = Sample((Message("user", (Image(path), Text("?"))),), str(path))
        self.engine.encode(sample)
        self.waiting.append(path)

    def ask(self, question: str) -> Generator[str]:
        """The reply in pieces. Question and reply are remembered once the reply is complete or was stopped.

        It is stopped by Ctrl-C, or by closing the iterator.

        Raises:
            DataError: the question cannot be encoded, or the conversation has become too long.
        """
        user = Message("user", (*map(Image, self.waiting), Text(question)))
        pieces: list[str] = []
        stream = self.engine.stream(Sample((*self.messages, user), "chat"), self.sampling)
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            self._remember(user, pieces, train=False)
            raise
        self._remember(user, pieces)

    def _remember(self, user: Message, pieces: Sequence[str], train: bool | None = None) -> None:
        self.messages += [user, Message("assistant", (Text("".join(pieces)),), train)]
        self.waiting.clear()

    def reset(self) -> None:
        """Forget words and pictures."""
        self.messages.clear()
        self.waiting.clear()

    def row(self) -> tuple[dict[str, list[dict[str, object]]], list[str]]:
        """The conversation as a row of format ``messages``, and what was left out of it and why.

        Questions with a reply that was stopped, or that training would refuse, are left out with it. Their
        pictures go with the next question, which may be about them.
        """
        kept: list[dict[str, object]] = []
        left_out: list[str] = []
        pictures: list[Part] = []
        for question, reply in zip(self.messages[::2], self.messages[1::2], strict=True):
            both = [_written(replace(question, parts=(*pictures, *question.parts))), _written(reply)]
            words = " ".join(part.text for part in question.parts if isinstance(part, Text))
            if reason := self._refusal(repr(words[:60]), both, reply):
                left_out.append(reason)
                pictures += [part for part in question.parts if isinstance(part, Image)]
            else:
                kept += both
                pictures.clear()
        return {"messages": kept}, left_out

    def _refusal(self, name: str, both: list[dict[str, object]], reply: Message) -> str:
        """Why the question called ``name`` and its reply cannot be trained on; empty where they can."""
        if not reply.trains:
            return f"{name}: the reply was stopped"
        try:
            self.engine.encoder(as_sample({"messages": both}, row_id=name, images=Folders(Path())))
        except DataError as error:
            return str(error)
        return ""

    def save(self, path: Path) -> list[str]:
        """Append the conversation to a .jsonl file; what was left out of it and why, see :meth:`row`.

        Raises:
            DataError: nothing was said yet, nothing of it can be trained on, or the file cannot be written.
        """
        if not self.messages:
            raise DataError("nothing to save: nothing was said yet.")
        row, left_out = self.row()
        if not row["messages"]:
            raise DataError(f"nothing to save: training would refuse all of it ({left_out[0]}).")
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}.") from error
        return left_out


def _written(message: Message) -> dict[str, object]:
    """A message as a row holds it, with the pictures' whole paths."""
    content = []
    for part in message.parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
        else:
            content.append({"type": "image", "image": str(Path(str(part.source)).resolve())})
    return {"role": message.role, "content": content}


def chat(
    engine: Engine,
    images: Sequence[Path] = (),
    sampling: Sampling = GREEDY,
    lines: TextIO | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> int:
    """Read lines until there are no more; the number of lines that ended in an error.

    Args:
        engine: who answers.
        images: pictures for the first question.
        sampling: how words are chosen.
        lines: where lines come from; a terminal gets a greeting and a prompt. None: standard input.
        out: where replies go. None: standard output.
        err: where errors go. None: standard error.

    Raises:
        DataError: one of ``images`` cannot be shown.
    """
    lines, out, err = lines or sys.stdin, out or sys.stdout, err or sys.stderr
    talk = Chat(engine, sampling)
    for path in images:
        talk.show(path)
    terminal = lines.isatty()
    if terminal:
        _enable_line_editing()
        shown = f" {len(images)} picture{'s' if len(images) > 1 else ''} shown." if images else ""
        print(f"Ask away.{shown} /image FILE shows a picture, /help lists the rest, Ctrl-D leaves.", file=out)
    errors = 0
    for text in _joined(_typed(out) if terminal else lines):
        if text == "/quit":
            break
        if not text.strip():
            continue
        try:
            if text.startswith("/"):
                _command(talk, text, err)
            else:
                # Closed at once, so that a turn that is stopped here is remembered too.
                with contextlib.closing(talk.ask(text)) as pieces:
                    for piece in pieces:
                        print(piece, end="", file=out, flush=True)
                print(file=out, flush=True)
        except TinyModalError as error:
            errors += 1
            print(f"error: {error}", file=err, flush=True)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(" (stopped)", file=out, flush=True)
    return errors


def _command(talk: Chat, text: str, err: TextIO) -> None:
    """Do what a slash command says; what it has to say goes to ``err``, apart from the replies."""
    name, _, rest = text.partition(" ")
    path = Path(rest.strip().strip("'\"")).expanduser()
    if name in ("/image", "/save") and not rest.strip():
        raise DataError(f"{name} needs a file: {name} FILE")
    if name == "/image":
        talk.show(path)
        many = f" ({len(talk.waiting)} wait)" if len(talk.waiting) > 1 else ""
        print(f"shown: {path.name}{many}; now ask about it", file=err)
    elif name == "/reset":
        talk.reset()
        print("forgotten", file=err)
    elif name == "/save":
        for left_out in talk.save(path):
            print(f"left out: {left_out}", file=err)
        print(f"written to {path}", file=err)
    elif name == "/help":
        print(HELP, file=err)
    else:
        raise DataError(f"unknown command {name}; /help lists them. A question may not begin with a slash.")


def _joined(lines: Iterable[str | None]) -> Iterator[str]:
    """Questions out of lines: one that ends with a backslash goes on in the next; None takes it back."""
    question = ""
    for line in lines:
        if line is None:
            question = ""
            continue
        question += line.strip()
        if question.endswith("\\"):
            question = question[:-1] + "\n"
            continue
        yield question
        question = ""
    if question:
        yield question


def _typed(out: TextIO) -> Iterator[str | None]:
    """Lines typed at a prompt, until Ctrl-D; None where Ctrl-C took back what was typed."""
    while True:
        try:
            yield input("\n> ")
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)", file=out)
            yield None


def _enable_line_editing() -> None:
    """Arrow keys and history, where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is loaded
