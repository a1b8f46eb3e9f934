"""Find a thing by its name: a built-in by its short name, yours by ``file.py:Name``.

There is no registry. A table is a dict literal beside the things it names; your own file is loaded when it is
named, and nothing has to be edited or imported first for that.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tinymodal.core.errors import RecipeError


def find(name: str, table: Mapping[str, Any], what: str) -> Any:
    """The thing called ``name``.

    Args:
        name: a key of ``table``, or ``path/to/file.py:Name`` with the path relative to the working directory.
        table: the built-ins.
        what: one word for the error, e.g. ``"converter"``.

    Raises:
        RecipeError: nobody knows the name; the file is missing, does not load, or does not hold it.
    """
    if name in table:
        return table[name]
    file, colon, attribute = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        known = f"known: {', '.join(sorted(table))}" if table else f"no {what} is built in"
        raise RecipeError(
            f"unknown {what} '{name}'; {known}; your own is named 'file.py:Name'{nearest(name, table)}"
        )
    module = load_file(Path(file), what)
    if not hasattr(module, attribute):
        own = [key for key in vars(module) if not key.startswith("_")]
        raise RecipeError(f"{what} '{name}': {file} does not define '{attribute}'{nearest(attribute, own)}.")
    return getattr(module, attribute)


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest of ``known``, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def load_file(path: Path, what: str) -> ModuleType:
    """Run a Python file once and give its module; a second call gives the same module."""
    if not path.is_file():
        raise RecipeError(f"{what}: the file {path} does not exist (looked in {Path.cwd()}).")
    whole = path.resolve()
    # The path is part of the module's name: two files called my_rows.py are two modules.
    name = f"{path.stem}_{hashlib.sha1(str(whole).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, whole)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look their module up by name while they are being made.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise RecipeError(
            f"{what}: {path}{line} does not load: {type(error).__name__}: {error}. "
            f"TINYMODAL_DEBUG=1 shows where."
        ) from error
    return module
