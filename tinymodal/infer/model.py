"""A model in Python: ``tinymodal.load("starter").reply("What is this?", images=["cat.png"])``.

Questions are words with pictures and sounds beside them; several at once are one batch, and a conversation
(:meth:`Model.chat`) remembers what was said. What was read stays read: the second question about a picture
costs its own words only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from tinymodal.compose import build
from tinymodal.compose.device import device_of
from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Image, Message, Part, Sample, Text
from tinymodal.infer.answer import AudioDelta, Reply, TextDelta
from tinymodal.infer.engine import Engine, Sampling, Voice

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed
    from tinymodal.compose.narrow import Bits


def load(
    path: str | Path,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    bits: Bits | None = None,
    *,
    prefix_mb: int = 256,
) -> Model:
    """Read a model to talk to.

    Args:
        path: its folder, a run's folder, a Hub name, or ``starter``.
        device: ``cpu``, ``cuda``, ``mps``; ``auto``: a GPU if there is one.
        dtype: of the weights and of what is computed.
        bits: 8 or 4: the language model's weights in so many, for less memory.
        prefix_mb: megabytes of what was read that are kept for the next question; 0: nothing.

    Raises:
        CheckpointError: there is no such folder, or it holds another kind of model.
        RecipeError: there is no such device; or 4 bits without bitsandbytes.
    """
    return Model(build.load(path, device_of(device, "device"), dtype, bits=bits), prefix_mb)


class Model:
    """A composed model that answers. It may be used by one thread; ``infer.scheduler`` serves many.

    Args:
        composed: what ``compose.build.load`` gave.
        prefix_mb: see :func:`load`.
    """

    def __init__(self, composed: Composed, prefix_mb: int = 256) -> None:
        self.composed = composed
        self.engine = Engine(composed, prefix_mb)
        # What a composed model has, so that it can stand where one is asked for.
        self.model, self.encoder, self.codec = composed.model, composed.encoder, composed.codec

    @property
    def processor(self) -> Any:
        """What prepares texts, pictures and sounds, as transformers knows it."""
        return self.composed.processor

    @property
    def tokenizer(self) -> Any:
        return self.composed.tokenizer

    @overload
    def reply(
        self,
        question: str | Sample = "",
        *,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        speak: bool = False,
        voice: Voice = None,
        **how: Any,
    ) -> Reply: ...

    @overload
    def reply(
        self, question: Sequence[Any], *, speak: bool = False, voice: Voice = None, **how: Any
    ) -> list[Reply]: ...

    def reply(
        self,
        question: Any = "",
        *,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        speak: bool = False,
        voice: Voice = None,
        **how: Any,
    ) -> Reply | list[Reply]:
        """The answer to a question, or to each of several.

        Args:
            question: words; may be empty where a sound is the question. A list is a batch: of words, of
                dicts with ``question``, ``images`` and ``audio``, of messages in turn, or of samples.
            images: pictures beside the words: paths, bytes of a file, or PIL's.
            audio: sounds beside them: paths, bytes of a file, or (samples, rate in Hz).
            speak: say it aloud too: ``reply.audio``, at ``reply.rate_hz``.
            voice: in which; a name, or a path of a clip.
            **how: of :class:`~tinymodal.infer.sampling.Sampling`: ``max_new_tokens``, ``temperature``, ...

        Raises:
            DataError: a question cannot be read; says which, and why.
            CheckpointError: the model does not speak.
            ValueError: a way to choose that makes no sense.
        """
        sampling = Sampling(**how)
        if isinstance(question, str | Sample):
            sample = as_sample(question, images, audio)
            return self.engine.reply([sample], sampling, speak=speak, voice=voice)[0]
        if images or audio:
            raise DataError("of several questions each brings its own: {'question': ..., 'images': [...]}")
        samples = [as_sample(one, name=f"question {n}") for n, one in enumerate(question, 1)]
        return self.engine.reply(samples, sampling, speak=speak, voice=voice)

    def stream(
        self,
        question: str | Sample = "",
        *,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        speak: bool = False,
        voice: Voice = None,
        **how: Any,
    ) -> Iterator[TextDelta | AudioDelta]:
        """The answer in pieces as it grows; ``print(piece, end="")`` shows one of text.

        See :meth:`reply`; pieces of sound come only where ``speak`` asks for them.
        """
        sampling = Sampling(**how)
        return self.engine.stream(as_sample(question, images, audio), sampling, speak=speak, voice=voice)

    def chat(self, system: str = "", **how: Any) -> Conversation:
        """Begin a conversation that remembers.

        Args:
            system: what the model is told before it, where its template has a place for that.
            **how: see :meth:`reply`.
        """
        return Conversation(self, system, Sampling(**how))


class Conversation:
    """Questions and answers in turn. Made by :meth:`Model.chat`."""

    def __init__(self, model: Model, system: str, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self._system = (Message("system", (Text(system),)),) if system else ()
        self.messages: list[Message] = [*self._system]

    def reply(
        self, question: str = "", *, images: Sequence[Any] = (), audio: Sequence[Any] = (), **aloud: Any
    ) -> Reply:
        """The answer, with all that was said before in mind; see :meth:`Model.reply`."""
        user = asked(question, images, audio)
        (reply,) = self.model.engine.reply([self._sample(user)], self.sampling, **aloud)
        self._remember(user, reply.text)
        return reply

    def stream(
        self, question: str = "", *, images: Sequence[Any] = (), audio: Sequence[Any] = (), **aloud: Any
    ) -> Iterator[TextDelta | AudioDelta]:
        """The same in pieces. Remembered when the last piece was taken, or the iterator closed."""
        user = asked(question, images, audio)
        said: list[str] = []
        pieces = self.model.engine.stream(self._sample(user), self.sampling, **aloud)
        begun = False
        try:
            for piece in pieces:
                begun = True
                if isinstance(piece, TextDelta):
                    said.append(piece.text)
                yield piece
            begun = True
        finally:
            if begun:
                self._remember(user, "".join(said))

    def reset(self) -> None:
        """Forget all but what the model was told before."""
        self.messages = [*self._system]

    def _sample(self, user: Message) -> Sample:
        return Sample((*self.messages, user), "chat")

    def _remember(self, user: Message, text: str) -> None:
        self.messages += [user, Message("assistant", (Text(text),))]


def asked(question: str, images: Sequence[Any] = (), audio: Sequence[Any] = ()) -> Message:
    """Words with pictures and sounds before them, as the user's turn."""
    for name, given in (("images", images), ("audio", audio)):
        if isinstance(given, str | bytes | Path):
            raise DataError(f"{name}: expected a list, so that there may be several; write {name}=[...]")
    parts: list[Part] = [_picture(one) for one in images]
    parts += [_sound(one) for one in audio]
    if question or not parts:
        parts.append(Text(question))
    return Message("user", tuple(parts))


def as_sample(
    question: Any, images: Sequence[Any] = (), audio: Sequence[Any] = (), name: str = "question"
) -> Sample:
    """One question in any of the forms that :meth:`Model.reply` takes.

    Raises:
        DataError: it has none of them.
    """
    if isinstance(question, Sample):
        if images or audio:
            raise DataError(f"{name}: a sample has its pictures and sounds among its parts already")
        return question
    if isinstance(question, str):
        return Sample((asked(question, images, audio),), name)
    if isinstance(question, Message):
        return Sample((question,), name)
    if isinstance(question, Mapping):
        unknown = sorted(set(question) - {"question", "images", "audio"})
        if unknown:
            raise DataError(f"{name}: unknown key {unknown[0]!r}; it has question, images and audio")
        words = question.get("question", "")
        return Sample((asked(words, question.get("images", ()), question.get("audio", ())),), name)
    if isinstance(question, Sequence) and question and all(isinstance(m, Message) for m in question):
        return Sample(tuple(question), name)
    raise DataError(
        f"{name}: {type(question).__name__}; expected words, a dict with question, images and audio, "
        f"messages in turn, or a Sample"
    )


def _picture(given: Any) -> Image:
    return given if isinstance(given, Image) else Image(_path(given))


def _sound(given: Any) -> Audio:
    if isinstance(given, Audio):
        return given
    if isinstance(given, tuple):
        samples, rate_hz = given
        wave = samples if isinstance(samples, torch.Tensor) else torch.from_numpy(np.asarray(samples))
        # What wav files hold: whole numbers, full scale one more than the largest.
        full = 1 if wave.is_floating_point() else torch.iinfo(wave.dtype).max + 1
        return Audio(wave.to(torch.float32) / full, int(rate_hz))
    return Audio(_path(given))


def _path(given: Any) -> Any:
    return Path(given).expanduser() if isinstance(given, str) else given
