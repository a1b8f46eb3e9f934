"""Talk to a model in the terminal, about pictures and sounds if you like, and let it answer aloud.

Lines are questions; lines that begin with a slash are commands. A mistake (a picture that is not there, a
word that is a control token) is one line, and the conversation goes on as if nothing had been typed. A
terminal that can shows the pictures. Where input comes from a pipe only the replies are printed, so ``echo
"What is this?" | tinymodal chat --image cat.png`` can be used in a script.

A sound may be the question itself: an empty line asks it, and so does the end of a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from tinymodal.core.errors import DataError, TinyModalError
from tinymodal.core.types import Audio, Image, Medium, Message, Part, Sample, Text
from tinymodal.data.convert import Folders
from tinymodal.data.convert import messages as as_sample
from tinymodal.infer.engine import GREEDY, AudioDelta, Engine, Sampling, TextDelta
from tinymodal.infer.preview import preview, way_of
from tinymodal.infer.recording import Recording, check_place

HELP = """\
/image FILE   show a picture; it goes with your next question
/audio FILE   play a sound; it goes with your next question, or is it: then press Enter
/speak FILE   replies are spoken too, into FILE (.wav), the next into FILE-2, and so on; /speak alone ends it
/voice NAME   in this voice, or in that of a clip: a file's name
/reset        forget the conversation
/save FILE    write the conversation as a row that training reads (format = "messages")
/help         this list
/quit         leave (also Ctrl-D)
Anything else is a question; one that ends with a backslash goes on in the next line. An answer can be stopped
with Ctrl-C."""


KINDS: dict[type[Medium], str] = {Image: "picture", Audio: "sound"}


@dataclass(slots=True)
class Chat:
    """A conversation in progress."""

    engine: Engine
    sampling: Sampling = GREEDY
    messages: list[Message] = field(default_factory=list)
    """Questions and replies in turn; a reply that was stopped does not train."""
    waiting: list[Medium] = field(default_factory=list)
    """Pictures and sounds since the last question."""
    voice: str | Path | None = None
    """Of spoken replies; None: the model's first."""
    speech: Path | None = None
    """File that the first spoken reply goes to; None: replies are not spoken."""
    num_spoken: int = 0
    """Replies that went to ``speech`` and the files after it."""
    recorded: Recording | None = None
    """The last reply aloud; None where it was not spoken."""

    def show(self, path: Path) -> None:
        """Put a picture beside the next question.

        Raises:
            DataError: there is no such file, or it is no picture; or the model does not see.
        """
        self._put(Image(path), path)

    def play(self, path: Path) -> None:
        """Put a sound beside the next question.

        Raises:
            DataError: there is no such file, or it is no sound; or the model does not hear.
        """
        self._put(Audio(path), path)

    def _put(self, part: Medium, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"{path}: there is no such {KINDS[type(part)]} (looked in {Path.cwd()}).")
        self.engine.encode(Sample((Message("user", (part, Text("?"))),), str(path)))
        self.waiting.append(part)

    def speak(self, path: Path | None) -> None:
        """Say replies aloud, into ``path`` and the files numbered after it; None: no longer.

        Raises:
            CheckpointError: the model does not speak.
            DataError: no sound can be written there.
        """
        if path is not None:
            self.engine.mouth.known(self.voice)
            check_place(path)
        self.speech, self.num_spoken = path, 0

    def speak_as(self, name: str | None) -> None:
        """Choose the voice, by its name or by a file with a clip of it.

        Raises:
            CheckpointError: the model does not speak.
            DataError: it has no such voice, or the clip cannot be read.
        """
        voice: str | Path | None = name
        if (
            name is not None
            and name not in self.engine.mouth.head.voices
            and Path(name).expanduser().is_file()
        ):
            voice = Path(name).expanduser()
        self.engine.mouth.known(voice)
        self.voice = voice

    @property
    def is_asked(self) -> bool:
        """Whether what waits may be the question itself: a sound is among it."""
        return any(isinstance(part, Audio) for part in self.waiting)

    def ask(self, question: str = "") -> Generator[str]:
        """The reply in pieces. Question and reply are remembered once the reply is complete or was stopped.

        It is stopped by Ctrl-C, or by closing the iterator. If replies are spoken, this one is written while
        it comes; ``recorded`` tells where.

        Args:
            question: its words; empty where a sound is the question.

        Raises:
            DataError: the question cannot be encoded, or the conversation has become too long; or the sound
                of the reply cannot be written.
        """
        user = Message("user", (*self.waiting, *([Text(question)] if question else [])))
        pieces: list[str] = []
        sample, aloud = Sample((*self.messages, user), "chat"), self.speech is not None
        stream = (
            self.engine.stream(sample, self.sampling, speak=True, voice=self.voice)
            if aloud
            else self.engine.stream(sample, self.sampling)
        )
        self.recorded = None
        try:
            with contextlib.ExitStack() as stack:
                for delta in stream:
                    if aloud and self.recorded is None:
                        self._begin_recording(stack)
                    if isinstance(delta, TextDelta):
                        pieces.append(delta.text)
                        yield delta.text
                    elif isinstance(delta, AudioDelta) and self.recorded is not None:
                        self.recorded.write(delta.samples)
                if aloud and self.recorded is None:
                    self._begin_recording(stack)  # without words: a file without samples, not an older reply
        except (KeyboardInterrupt, GeneratorExit):
            self._remember(user, pieces, train=False)
            raise
        self._remember(user, pieces)

    def _begin_recording(self, stack: contextlib.ExitStack) -> None:
        assert self.speech is not None
        number = "" if self.num_spoken == 0 else f"-{self.num_spoken + 1}"
        path = self.speech.with_stem(self.speech.stem + number)
        self.recorded = stack.enter_context(Recording(path, self.engine.mouth.codec.rate_hz))
        self.num_spoken += 1

    def _remember(self, user: Message, pieces: Sequence[str], train: bool | None = None) -> None:
        self.messages += [user, Message("assistant", (Text("".join(pieces)),), train)]
        self.waiting.clear()

    def reset(self) -> None:
        """Forget words, pictures and sounds."""
        self.messages.clear()
        self.waiting.clear()

    def row(self) -> tuple[dict[str, list[dict[str, object]]], list[str]]:
        """The conversation as a row of format ``messages``, and what was left out of it and why.

        Questions with a reply that was stopped, or that training would refuse, are left out with it. Their
        pictures go with the next question, which may be about them; their sounds too, unless there was no
        word beside them: then they were the question.
        """
        kept: list[dict[str, object]] = []
        left_out: list[str] = []
        media: list[Part] = []
        for question, reply in zip(self.messages[::2], self.messages[1::2], strict=True):
            both = [_written(replace(question, parts=(*media, *question.parts))), _written(reply)]
            words = " ".join(part.text for part in question.parts if isinstance(part, Text))
            heard = [part for part in question.parts if isinstance(part, Audio)]
            name = words[:60] if words else Path(str(heard[-1].source)).name
            if reason := self._refusal(repr(name), both, reply):
                left_out.append(reason)
                media += [
                    p for p in question.parts if isinstance(p, Image) or (isinstance(p, Audio) and words)
                ]
            else:
                kept += both
                media.clear()
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
    """A message as a row holds it, with the whole paths of pictures and sounds."""
    content = []
    for part in message.parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
        else:
            kind = "image" if isinstance(part, Image) else "audio"
            content.append({"type": kind, kind: str(Path(str(part.source)).resolve())})
    return {"role": message.role, "content": content}


def chat(
    engine: Engine,
    media: Sequence[Medium] = (),
    sampling: Sampling = GREEDY,
    lines: TextIO | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
    *,
    speech: Path | None = None,
    voice: str | None = None,
) -> int:
    """Read lines until there are no more; the number of lines that ended in an error.

    Args:
        engine: who answers.
        media: pictures and sounds for the first question, by their paths.
        sampling: how words are chosen.
        lines: where lines come from; a terminal gets a greeting and a prompt. None: standard input.
        out: where replies go. None: standard output.
        err: where errors go. None: standard error.
        speech: file that the first reply is spoken into, see :meth:`Chat.speak`; None: not spoken.
        voice: see :meth:`Chat.speak_as`; None: the model's first.

    Raises:
        DataError: one of ``media`` cannot be shown or played; no sound can be written to ``speech``; there is
            no such voice.
        CheckpointError: speech is asked of a model that does not speak.
    """
    lines, out, err = lines or sys.stdin, out or sys.stdout, err or sys.stderr
    talk = Chat(engine, sampling)
    if voice is not None:
        talk.speak_as(voice)
    talk.speak(speech)
    for part in media:
        path = Path(str(part.source))
        talk.show(path) if isinstance(part, Image) else talk.play(path)
    terminal = lines.isatty()
    # Replies may go to a file while questions are typed: a picture goes to a terminal only.
    shown = out if terminal and out.isatty() else None
    if terminal:
        _enable_line_editing()
        for part in media:
            _preview(part, shown)
        told = _count(talk.waiting)
        print(f"Ask away.{told} /image FILE shows a picture, /help lists the rest, Ctrl-D leaves.", file=out)
    errors = 0
    for text in _asked(talk, _joined(_typed(out) if terminal else lines), terminal):
        try:
            if text.startswith("/"):
                _command(talk, text, err)
                if text.startswith("/image "):
                    _preview(talk.waiting[-1], shown)
            else:
                # Closed at once, so that a turn that is stopped here is remembered too.
                with contextlib.closing(talk.ask(text)) as pieces:
                    for piece in pieces:
                        print(piece, end="", file=out, flush=True)
                print(file=out, flush=True)
                if terminal and talk.recorded is not None:
                    print(f"spoken: {talk.recorded.path}, {talk.recorded.seconds:.1f} s", file=err)
        except TinyModalError as error:
            errors += 1
            print(f"error: {error}", file=err, flush=True)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(" (stopped)", file=out, flush=True)
    return errors


def _asked(talk: Chat, lines: Iterable[str], terminal: bool) -> Iterator[str]:
    """Commands and questions up to ``/quit``; empty ones only where a sound waits and is the question."""
    due = True
    for text in lines:
        if text == "/quit":
            return
        if text.strip() or talk.is_asked:
            yield text if text.strip() else ""
            due = text.startswith("/")
    # At the end of a pipe nobody can press Enter. After a question that failed nothing is asked in its place.
    if due and talk.is_asked and not terminal:
        yield ""


def _count(media: Sequence[Medium]) -> str:
    """`` 2 pictures and 1 sound wait.``; empty where there are none."""
    counts = {name: sum(isinstance(part, kind) for part in media) for kind, name in KINDS.items()}
    told = [f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items() if n]
    return f" {' and '.join(told)} wait{'' if len(media) > 1 else 's'}." if told else ""


def _command(talk: Chat, text: str, err: TextIO) -> None:
    """Do what a slash command says; what it has to say goes to ``err``, apart from the replies."""
    name, _, rest = text.partition(" ")
    rest = rest.strip().strip("'\"")
    path = Path(rest).expanduser()
    if name in ("/image", "/audio", "/save") and not rest:
        raise DataError(f"{name} needs a file: {name} FILE")
    if name == "/voice" and not rest:
        raise DataError("/voice needs a name, or a file with a clip: /voice NAME")
    many = f" ({len(talk.waiting) + 1} wait)" if talk.waiting else ""
    if name == "/image":
        talk.show(path)
        print(f"shown: {path.name}{many}; now ask about it", file=err)
    elif name == "/audio":
        talk.play(path)
        print(f"played: {path.name}{many}; now ask about it, or press Enter if it is the question", file=err)
    elif name == "/speak":
        talk.speak(path if rest else None)
        print(f"replies are spoken into {path}" if rest else "replies are no longer spoken", file=err)
    elif name == "/voice":
        talk.speak_as(rest)
        print(f"replies are spoken as {rest}, after /speak FILE", file=err)
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


def _preview(part: Medium, out: TextIO | None) -> None:
    """Show a picture in a terminal that can."""
    way = None if out is None else way_of(os.environ)
    if out is not None and way is not None and isinstance(part, Image):
        columns = shutil.get_terminal_size().columns
        print(preview(Path(str(part.source)), way, columns), end="", file=out, flush=True)


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
