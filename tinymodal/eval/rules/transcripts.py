"""Word and character error rates, as the field counts them.

A rate is of a whole test, errors over words of the references, and not a mean of sentences: so published
numbers are made. The counting is jiwer's; the texts are first written as Whisper's paper has them (lower
case, numbers in digits, no punctuation, contractions in full, American spelling).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from tinymodal.core.errors import DataError
from tinymodal.eval.benchmark import Question, Score

Normaliser = Callable[[str], str]
MISSING = "which is not here; pip install 'tinymodal[eval]'"


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of some transcripts against their references."""

    wer: float
    """Words substituted, left out and put in, over the words of the references; may be above 1."""
    cer: float
    """The same of characters, spaces included."""
    words: int
    """Of the references."""
    substitutions: int
    deletions: int
    insertions: int


def count_errors(references: Sequence[str], transcripts: Sequence[str]) -> Errors:
    """The errors of ``transcripts``, as they are written; see :func:`normaliser` for what comes before.

    Raises:
        DataError: different numbers of texts, or references without a word.
    """
    if len(references) != len(transcripts):
        raise DataError(
            f"{len(transcripts)} transcripts for {len(references)} references; expected one for each"
        )
    require_words(references)
    jiwer = _jiwer()
    # jiwer refuses an empty reference on its own account, but what is put in there counts.
    empty = [hyp for ref, hyp in zip(references, transcripts, strict=True) if not ref.split()]
    pairs = [(ref, hyp) for ref, hyp in zip(references, transcripts, strict=True) if ref.split()]
    refs, hyps = [ref for ref, _ in pairs], [hyp for _, hyp in pairs]
    words, characters = jiwer.process_words(refs, hyps), jiwer.process_characters(refs, hyps)
    num_words = words.hits + words.substitutions + words.deletions
    num_characters = characters.hits + characters.substitutions + characters.deletions
    put_in = words.insertions + sum(len(text.split()) for text in empty)
    wrong = words.substitutions + words.deletions + put_in
    wrong_characters = (
        characters.substitutions + characters.deletions + characters.insertions + sum(map(len, empty))
    )
    return Errors(
        wrong / num_words,
        wrong_characters / num_characters,
        num_words,
        words.substitutions,
        words.deletions,
        put_in,
    )


def require_words(references: Sequence[str]) -> None:
    """Refuse references without a word.

    Raises:
        DataError: they are.
    """
    if not any(text.split() for text in references):
        raise DataError("the references hold no word; an error rate needs at least one")


@lru_cache(maxsize=1)
def normaliser() -> Normaliser:
    """Whisper's normaliser of English (arXiv:2212.04356, appendix C), its table of spellings included.

    Raises:
        DataError: the package that holds it is not installed.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    try:
        # Only its table, which is Whisper's: its code also takes "cause" for a short "because".
        table = resources.files("whisper_normalizer") / "normalizers" / "english.json"
    except ModuleNotFoundError as error:
        raise DataError(f"the table of spellings comes with whisper-normalizer, {MISSING}") from error
    found: Normaliser = EnglishTextNormalizer(json.loads(table.read_text(encoding="utf-8")))
    return found


def understood(expected: str, said: str) -> Score:
    """1 less the word error rate of one transcript, at least 0; both as they are counted."""
    if not expected.split():
        return Score(float(not said.split()), parsed=said)
    return Score(max(0.0, 1 - count_errors([expected], [said]).wer), parsed=said)


def rates(references: Sequence[str], scores: Sequence[Score]) -> dict[str, float]:
    """``wer`` and ``cer`` of all transcripts together; nothing where no reference has a word."""
    if not any(text.split() for text in references):
        return {}
    found = count_errors(references, [score.parsed for score in scores])
    return {"wer": found.wer, "cer": found.cer}


def transcript(question: Question, reply: str) -> Score:
    """1 less the reply's word error rate, at least 0; both texts normalised first."""
    return understood(normaliser()(question.answer), normaliser()(reply))


def error_rates(scores: Sequence[Score]) -> dict[str, float]:
    """``wer`` and ``cer`` of all replies together; their references are ``meta["reference"]``.

    Raises:
        DataError: no reference has a word.
    """
    if not scores:
        return {}
    references = [normaliser()(score.meta["reference"]) for score in scores]
    require_words(references)
    return rates(references, scores)


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise DataError(f"error rates are counted by jiwer, {MISSING}") from error
    return jiwer
