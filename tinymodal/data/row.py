"""What every row format asks of a row: its turns, its words, and a conversation to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinymodal.chat.turns import check_speech
from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Image, Message, Sample, Text

PLACE = "<image>"
"""How LLaVA rows write the place of a picture inside the words."""

SOUND_PLACE = "<audio>"
"""The same of a sound, in a row that has one."""

Row = Mapping[str, Any]


def as_sample(turns: Sequence[Message], row: Row, row_id: str) -> Sample:
    """The conversation, once it is one that a model can learn from."""
    for number, message in enumerate(turns, 1):
        check_speech(row_id, number, message)
        empty = not any(
            isinstance(part, Image | Audio) or (isinstance(part, Text) and part.text.strip())
            for part in message.parts
        )
        if empty and message.role != "system":
            raise DataError(
                f"{row_id}: turn {number} ({message.role}) is empty; give it words, or remove the row"
            )
        if message.role == "system" and number > 1:
            raise DataError(
                f"{row_id}: turn {number} is the system's; expected it first. Move it to the front"
            )
        if number > 1 and message.role == "assistant" == turns[number - 2].role:
            raise DataError(
                f"{row_id}: turns {number - 1} and {number} are both the assistant's; expected the user's "
                f"between them. Join them, or add what the user said"
            )
    if turns[-1].role != "assistant":
        raise DataError(
            f"{row_id}: the conversation ends with the {turns[-1].role}'s turn; expected the assistant's, "
            f"which is what is learned. Add the reply, or remove the turn"
        )
    # An empty system turn is how many exports write "none".
    kept = tuple(message for message in turns if message.parts)
    return Sample(kept, id=row_id, meta={"id": str(row["id"])} if row.get("id") is not None else {})


def turns_of(row: Row, key: str, row_id: str, instead: str) -> Sequence[Row]:
    """The turns under ``key``, each an object with named values."""
    if row.get(key) is None:
        found = ", ".join(map(str, row)) or "nothing"
        other = {"messages": "messages", "conversations": "llava"}
        hint = (
            f'set format = "{other[instead]}"'
            if row.get(instead) is not None
            else "set the format these rows have"
        )
        raise DataError(
            f"{row_id}: no {key} in the row (it has {found}); expected a list of turns. Add it, or {hint}"
        )
    turns = row[key]
    if not isinstance(turns, list | tuple):
        raise DataError(f"{row_id}: {key} is {kind_of(turns)}; expected a list of turns. Write it so")
    if not turns:
        raise DataError(
            f"{row_id}: the conversation is empty; expected at least a question and a reply. Remove the row"
        )
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{row_id}: turn {number} is {kind_of(turn)}; expected an object with named values"
            )
    return turns


def words_of(row: Row, key: str, row_id: str) -> str:
    """The words under ``key``: some, and no place of a picture among them."""
    words: str = named(row, key, str, row_id)
    if not words.strip():
        raise DataError(f"{row_id}: {key} is empty; expected words. Write them, or remove the row")
    refuse_place(words, row_id)
    return words


def refuse_place(words: str, where: str) -> None:
    """Refuse words that write the place of a picture."""
    if PLACE in words:
        raise DataError(
            f"{where}: the words contain {PLACE}, which stands for a picture; expected plain words. Give the "
            f"picture a part of its own, or write the word differently"
        )


def named(row: Row, key: str, kind: type[str], where: str) -> str:
    """The value under ``key``, of that kind."""
    if row.get(key) is None:
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(f"{where}: no {key} (found {found}); expected words. Add it, or rename the key")
    value = row[key]
    if not isinstance(value, kind):
        raise DataError(f"{where}: {key} is {kind_of(value)}; expected words. Write it in quotes")
    return value


def listed(value: Any) -> list[Any]:
    """A list as it is, one value as a list, nothing as none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def kind_of(value: object) -> str:
    """What a value is, for an error."""
    names = {
        "NoneType": "nothing",
        "list": "a list",
        "dict": "an object",
        "str": "words",
        "bool": "true or false",
    }
    return names.get(
        type(value).__name__, f"a number ({value})" if isinstance(value, int | float) else repr(value)[:40]
    )


def many(count: int, noun: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
