"""Row formats that are mainly heard or spoken: transcripts, questions about sounds, answers aloud.

All are named in ``CONVERTERS``. A sound is a path, bytes, a ``data:`` URL, a struct of parquet, or samples,
see ``Folders.sound``; ``start_s`` and ``end_s`` beside it say which stretch of the file is meant.
"""

from __future__ import annotations

from collections import Counter

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Message, Part, Sample, Text
from tinymodal.data.folders import Folders
from tinymodal.data.row import Row, as_sample, listed, turns_of, words_of

TRANSCRIBE = "Transcribe the speech."
"""What an ``asr`` row asks, unless it says itself."""

READ = "Read aloud: {text}"
"""What a ``tts`` row asks, unless it says itself."""

TRANSCRIPTS = ("text", "transcript", "sentence", "transcription")
"""Names of the words of a sound, of which the first that a row has counts: LibriSpeech and GigaSpeech write
``text``, Common Voice ``sentence``, FLEURS ``transcription``."""


def asr(row: Row, *, row_id: str, images: Folders) -> Sample:
    """``{"audio", "text"}``: the sound and :data:`TRANSCRIBE` are the user's turn, the words the reply.

    The words may also be called as in :data:`TRANSCRIPTS`; ``question`` asks otherwise.
    """
    key = next((key for key in TRANSCRIPTS if row.get(key) is not None), "text")
    words = words_of(row, key, row_id)
    question = TRANSCRIBE if row.get("question") is None else words_of(row, "question", row_id)
    return _answered(row, row_id, (_sound(row, row_id, images), Text(question)), (Text(words),))


def audio_qa(row: Row, *, row_id: str, images: Folders) -> Sample:
    """``{"audio", "question", "answer"}``, or ``"answers"``: the most frequent one, the first of equals.

    With ``image``, a path or a list, it is shown before the sound.
    """
    question = words_of(row, "question", row_id)
    asked: tuple[Part, ...] = (*_pictures(row, row_id, images), _sound(row, row_id, images), Text(question))
    if row.get("answer") is None and row.get("answers") is not None:
        given = [words_of({"answers": value}, "answers", row_id) for value in listed(row["answers"])]
        if not given:
            raise DataError(f"{row_id}: answers is empty; expected at least one. Add one, or remove the row")
        # Counter keeps the order of arrival among equals, so the choice does not depend on a hash.
        answer = Counter(given).most_common(1)[0][0]
    else:
        answer = words_of(row, "answer", row_id)
    return _answered(row, row_id, asked, (Text(answer),))


def audio_caption(row: Row, *, row_id: str, images: Folders) -> Sample:
    """``{"audio", "caption" or "text"}``: the sound is the user's turn, the words are the reply."""
    key = "text" if row.get("caption") is None and "text" in row else "caption"
    words = words_of(row, key, row_id)
    return _answered(row, row_id, (_sound(row, row_id, images),), (Text(words),))


def tts(row: Row, *, row_id: str, images: Folders) -> Sample:
    """``{"text", "audio"}``: the reply is the words, and the sound is how they are spoken.

    The user's turn is :data:`READ`, or ``question``. ``voice`` names who speaks, of the voices that the
    speech head knows.
    """
    words = words_of(row, "text", row_id)
    asked = READ.format(text=words) if row.get("question") is None else words_of(row, "question", row_id)
    if row.get("audio") is None:
        raise _silent(row, row_id, "audio")
    speech = images.speech(row["audio"], row_id, row)
    return _answered(row, row_id, (Text(asked),), (Text(words), speech))


def spoken(row: Row, *, row_id: str, images: Folders) -> Sample:
    """A conversation aloud: ``{"audio", "answer"}``, or several such turns in ``turns``.

    ``audio`` is the question as it is asked, or ``question`` are its words. ``answer_audio`` is how the
    answer sounds and ``voice`` who says it; a turn may do without. ``image``, a path or a list, is shown
    before its question.
    """
    given = [row] if row.get("turns") is None else turns_of(row, "turns", row_id, instead="messages")
    messages = []
    for number, turn in enumerate(given, 1):
        where = row_id if row.get("turns") is None else f"{row_id}: turn {number}"
        asked: list[Part] = [*_pictures(turn, where, images)]
        if turn.get("audio") is not None:
            asked.append(_sound(turn, where, images))
        if turn.get("question") is not None:
            asked.append(Text(words_of(turn, "question", where)))
        if not any(isinstance(part, Audio | Text) for part in asked):
            raise _silent(turn, where, "audio")
        answer: list[Part] = [Text(words_of(turn, "answer", where))]
        if turn.get("answer_audio") is not None:
            answer.append(images.speech(turn["answer_audio"], where, {"voice": turn.get("voice")}))
        messages += [Message("user", tuple(asked)), Message("assistant", tuple(answer))]
    return as_sample(messages, row, row_id)


def _answered(row: Row, row_id: str, asked: tuple[Part, ...], answer: tuple[Part, ...]) -> Sample:
    return as_sample([Message("user", asked), Message("assistant", answer)], row, row_id)


def _sound(row: Row, row_id: str, images: Folders) -> Audio:
    value = row.get("audio")
    if value is None:
        raise _silent(row, row_id, "audio")
    if isinstance(value, list | tuple):
        raise DataError(
            f"{row_id}: audio is a list; expected one sound. Several have their places in rows of format "
            f"messages"
        )
    return images.sound(value, row_id, row)


def _pictures(row: Row, row_id: str, images: Folders) -> list[Part]:
    return [images.picture(value, row_id) for value in listed(row.get("image"))]


def _silent(row: Row, row_id: str, key: str) -> DataError:
    found = ", ".join(map(str, row)) or "nothing"
    return DataError(
        f"{row_id}: no {key} in the row (it has {found}); expected a path. Add it, or rename the key"
    )
