"""Whether replies can be held to a JSON schema, found out in a process of its own.

A schema may come from a stranger, and a few lines of patterns can take the library minutes, which none of its
own limits ends: 800 ``patternProperties`` of twenty characters each ran for more than 80 s. A process can be
ended. It imports nothing of ours, so it begins in a sixth of a second.
"""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""What one schema may take of the library: about 20 ms a token, and 40 MB."""
FORM: JsonCompileOptions = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""A schema is kept to the letter or refused, and a reply is written as ``json.dumps`` writes it: JSON allows
any white space, and the starter model, left to it, put sixteen blanks before each mark."""


class TrialTimeout(Exception):
    """The library had not made up its mind in time."""


def grammar_of(json_schema: str) -> str:
    """A schema as the library's own grammar.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    from llguidance import LLMatcher

    # The last word is ours: a schema may bring options of its own, under "x-guidance".
    found: str = LLMatcher.grammar_from_json_schema(json_schema, overrides=FORM)
    return found


def fault_of(json_schema: str) -> str:
    """What is wrong with a schema, in the library's words; empty where nothing is. In this process."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = grammar_of(json_schema)
    except ValueError as error:
        return in_a_line(str(error)) or "no schema"
    return in_a_line(str(LLMatcher.validate_grammar(grammar, limits=LLParserLimits(**LIMITS))))


def in_a_line(message: str) -> str:
    """A message of the library as one line that is not too long."""
    words = " ".join(message.replace("<non-verbose/>", "").split())
    return words if len(words) <= MOST else f"{words[:MOST]}..."


MOST = 200
"""Characters of a message: some repeat the whole schema."""


@lru_cache(maxsize=64)
def tried(json_schema: str, within_s: float) -> str:
    """What is wrong with a schema; empty where nothing is. Known ones are answered at once.

    Args:
        json_schema: as text.
        within_s: then it is given up.

    Raises:
        TrialTimeout: it was.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json_schema.encode("utf-8", "replace"),
            capture_output=True,
            timeout=within_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrialTimeout(f"not read within {within_s:g} s") from None
    return done.stdout.decode() if done.returncode == 0 else "the library ended on it"


def limit_memory(mb: int) -> None:
    """Let this process take so much and no more, where the system can do that."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (mb * 10**6, mb * 10**6))


if __name__ == "__main__":
    limit_memory(1000)
    sys.stdout.write(fault_of(sys.stdin.buffer.read().decode()))
