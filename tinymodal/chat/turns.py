"""What is asked of a conversation before it is written: whose turn it is, what it shows, who speaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tinymodal.chat.template import AnyTemplate
from tinymodal.core.errors import DataError
from tinymodal.core.types import ROLES, Image, Medium, Message, Sample, Speech, Text


@dataclass(frozen=True, kw_only=True, slots=True)
class Speaking:
    """What must be known of a model that speaks to encode its answers."""

    rate_hz: int
    """Of the codec: the rate at which sounds are kept."""
    voices: tuple[str, ...] = ()
    """Names of the voices of the speech head, in their order; empty: one without a name."""
    max_s: float = 600.0
    """Longer answers are refused."""

    def number(self, voice: str | None) -> int:
        """Of the voice with that name; None: the first.

        Raises:
            ValueError: the speech head does not have it.
        """
        if voice is None:
            return 0
        if voice not in self.voices:
            known = (
                f"has {', '.join(self.voices)}" if self.voices else "was made for one voice without a name"
            )
            raise ValueError(
                f"voice {voice!r} is not one of this model's, which {known}; list it in "
                f"model.speech.voices, or take it out of the row"
            )
        return self.voices.index(voice)


WORDS = {"image": "picture", "audio": "sound"}
"""What a person calls a medium of each kind."""


def kind_of(part: Medium) -> Literal["image", "audio"]:
    """Which tower it is for."""
    return "image" if isinstance(part, Image) else "audio"


def numbered(sample: Sample) -> Iterator[tuple[str, Medium]]:
    """The media in reading order, each with its name: ``picture 1``, ``sound 1``, ``picture 2``."""
    count = dict.fromkeys(WORDS, 0)
    for part in sample.media():
        kind = kind_of(part)
        count[kind] += 1
        yield f"{WORDS[kind]} {count[kind]}", part


def check_turns(sample: Sample, reply: bool, template: AnyTemplate) -> None:
    """Refuse conversations nobody can learn from or reply to.

    Raises:
        DataError: no messages; an unknown role; a system turn that is not the first; two turns of one side
            in a row; the wrong side at the end; an answer without words; speech of anyone but the assistant,
            or twice in a turn.
    """
    if not sample.messages:
        raise DataError(f"{sample.id}: the conversation is empty; it needs a user's and an assistant's turn.")
    # A caption needs no question.
    expected = "user" if not getattr(template, "captions_only", False) else None
    for n, message in enumerate(sample.messages, 1):
        role = message.role
        if role not in ROLES:
            raise DataError(f"{sample.id}: message {n} has the role {role!r}; known: {', '.join(ROLES)}.")
        check_speech(sample.id, n, message)
        if role == "system":
            if n > 1:
                raise DataError(
                    f"{sample.id}: message {n} is from the system, which may only open a conversation."
                )
            continue
        if expected is not None and role != expected:
            found = (
                "the conversation begins with the assistant"
                if expected == "user" and n == first_turn(sample)
                else f"two {role} turns in a row"
            )
            raise DataError(
                f"{sample.id}: message {n}: {found}; turns alternate, the user begins. Join the two, or put "
                f"the missing turn between them."
            )
        expected = "assistant" if role == "user" else "user"
        if (
            role == "assistant"
            and message.trains
            and not reply
            and not any(isinstance(part, Text) and part.text for part in message.parts)
        ):
            raise DataError(f"{sample.id}: message {n}: the answer has no words; take the row out.")
    last = sample.messages[-1].role
    if reply and last != "user":
        raise DataError(f"{sample.id}: to reply, the conversation must end with the user, found {last}.")
    if not reply and last != "assistant":
        raise DataError(
            f"{sample.id}: the conversation ends with the {last}, so its last turn has no answer to learn; "
            f"add the assistant's turn or take the last one out."
        )


def check_speech(where: str, n: int, message: Message) -> None:
    """Refuse ``Speech`` where nothing speaks.

    Args:
        where: what the message is of, for the error.
        n: which message, from 1.
        message: the message.

    Raises:
        DataError: the turn is not the assistant's, or speaks twice.
    """
    spoken = sum(isinstance(part, Speech) for part in message.parts)
    if spoken and message.role != "assistant":
        raise DataError(
            f"{where}: turn {n} ({message.role}) has a speech part, which is how an answer sounds; what the "
            f"model shall hear is an audio part. Rename it"
        )
    if spoken > 1:
        raise DataError(
            f"{where}: turn {n} has {spoken} speech parts; expected one, the sound of the whole turn. Join "
            f"them into one file"
        )


def first_turn(sample: Sample) -> int:
    """Number of the first message that is not the system's, from 1."""
    return 2 if sample.messages[0].role == "system" else 1


def turn_number(sample: Sample, message: Message) -> int:
    """Which of the messages it is, from 1."""
    return next(n for n, other in enumerate(sample.messages, 1) if other is message)
