"""Read a TOML file into a typed value, strictly, and write one back.

A key that nobody knows, a value of the wrong kind or a contradiction is one line that names the file, the
place, the key and, for a misspelt word, the nearest right one. Overrides are ``dotted.path=value``. Where a
file is not enough, ``my_runs.py:point`` names a function that returns the same value. Imports no torch: a
wrong key is answered in milliseconds.
"""

from __future__ import annotations

import json
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from tinymodal.core.errors import RecipeError
from tinymodal.core.lookup import find, nearest

Place = tuple[str | int, ...]
Value = TypeVar("Value", bound=BaseModel)


def load(path: Path | str, model: type[Value], overrides: Sequence[str] = ()) -> Value:
    """The value that a file describes.

    Args:
        path: a TOML file, or ``file.py:function`` whose function takes nothing and returns a ``model``.
        model: the pydantic model to read into.
        overrides: ``dotted.path=value``; a list is entered by number or by its member's ``name``
            (``stages.0.steps=10``, ``stages.align.steps=10``). Values are TOML; a bare word is a string.

    Raises:
        RecipeError: one line, see the module.
    """
    source = str(path)
    if source.rpartition(":")[0].endswith(".py"):
        data = _from_python(source, model)
    else:
        data = _from_toml(Path(path))
    places: dict[Place, str] = {}
    for override in overrides:
        places[_override(data, override)] = override
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_one_line(error, model, source, places)) from None


def dump(value: BaseModel) -> str:
    """``value`` as TOML that :func:`load` reads back equal. Keys that are None are left out.

    Raises:
        RecipeError: the value holds a None that leaving out would change.
    """
    text = _table(_bare(value.model_dump(exclude_none=True)))
    if type(value).model_validate(tomllib.loads(text)) != value:
        raise RecipeError("this value holds a None, which TOML cannot write; leave the key out instead.")
    return text


def differences(one: BaseModel, other: BaseModel) -> list[str]:
    """Dotted paths at which two values of one model differ, with both: ``stages.0.steps: 10 and 20``."""
    found: list[str] = []

    def walk(a: Any, b: Any, place: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in {**a, **b}:
                walk(a.get(key), b.get(key), f"{place}.{key}" if place else str(key))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(x, y, f"{place}.{i}")
        elif a != b:
            found.append(f"{place}: {_brief(a)} and {_brief(b)}")

    walk(_bare(one.model_dump()), _bare(other.model_dump()), "")
    return found


# Reading


def _from_toml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder; expected a recipe, a TOML file.")
    if not path.exists():
        around = path.parent if path.parent.is_dir() else Path()
        hint = nearest(path.name, (p.name for p in around.glob("*.toml")))
        raise RecipeError(f"{path}: there is no such file{hint}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); expected a TOML file.") from None


def _from_python(source: str, model: type[BaseModel]) -> dict[str, Any]:
    function = find(source, {}, "recipe")
    value = function() if callable(function) and not isinstance(function, BaseModel) else function
    if not isinstance(value, model):
        raise RecipeError(f"{source}: gave a {type(value).__name__}; expected a {model.__name__}.")
    return _bare(value.model_dump())


def _override(data: dict[str, Any], override: str) -> Place:
    """Put one ``dotted.path=value`` into ``data``; the place it went to."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override '{override}': expected dotted.path=value, e.g. stages.0.steps=10")
    place: list[str | int] = []
    here: Any = data
    for i, key in enumerate(keys):
        at: str | int = key
        if isinstance(here, list):
            at = _member(here, key, override)
        elif not isinstance(here, dict):
            raise RecipeError(
                f"override '{override}': '{'.'.join(keys[:i])}' is {_brief(here)}, not a table."
            )
        place.append(at)
        if i == len(keys) - 1:
            here[at] = _toml_value(text.strip())
        elif isinstance(here, dict):
            if here.get(key) is None:
                here[key] = {}
            here = here[key]
        else:
            here = here[at]
    return tuple(place)


def _member(items: list[Any], key: str, override: str) -> int:
    """The index that ``key``, a number or a member's name, means in a list."""
    if key.isdigit():
        if int(key) >= len(items):
            raise RecipeError(f"override '{override}': there is no [{key}]; the list has {len(items)}.")
        return int(key)
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key not in names:
        known = [name for name in names if isinstance(name, str)]
        raise RecipeError(
            f"override '{override}': '{key}' is neither a number nor a name in the list"
            f" ({', '.join(known) or 'its members have no names'}){nearest(key, known)}"
        )
    return names.index(key)


def _toml_value(text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["value"] if len(read) == 1 else text


def _bare(data: Any) -> Any:
    """Tuples as lists, as TOML has them; pydantic's own JSON mode would write infinity as null."""
    if isinstance(data, dict):
        return {key: _bare(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_bare(value) for value in data]
    return str(data) if isinstance(data, Path) else data


# Explaining


def _one_line(error: ValidationError, model: type, source: str, overrides: Mapping[Place, str]) -> str:
    # Of several faults an unknown key is told first: a misspelt key is often also a missing one.
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    loc = tuple(part for part in fault["loc"] if part != "[key]")
    told = next((o for place, o in overrides.items() if loc[: len(place)] == place), None)
    where = f"override '{told}'" if told else source
    key = loc[-1] if loc else ""
    if fault["type"] in ("extra_forbidden", "missing"):
        owner = _type_at(model, loc[:-1])
        place = _place(loc[:-1])
        head = f"{where}: {place}: " if place else f"{where}: "
        if fault["type"] == "missing":
            text = f"{head}missing key '{key}' in {owner.__name__}"
        else:
            known = tuple(owner.model_fields)
            hint = nearest(str(key), known) or f"; known keys: {', '.join(known)}"
            text = f"{head}unknown key '{key}' in {owner.__name__}{hint}"
    else:
        message = re.sub(r"^Value error, ", "", fault["msg"])
        if fault["type"] in ("value_error", "assertion_error"):
            # Our own cross-checks: they name the key themselves.
            text = f"{where}: {_place(loc)}: {message}" if loc else f"{where}: {message}"
        else:
            expected = re.findall(r"'([^']*)'", message) if fault["type"] == "literal_error" else []
            hint = nearest(str(fault["input"]), expected)
            message = message[0].lower() + message[1:]
            text = f"{where}: {_place(loc)} is {_brief(fault['input'])}; {message}{hint}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return " ".join(text.split()) + more


def _place(loc: Place) -> str:
    """``("stages", 1, "data", 0)`` -> ``stages[1].data[0]``."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _type_at(model: type, loc: Place) -> Any:
    """The model class that stands at ``loc``, for its name and its keys."""
    here: Any = model
    for part in loc:
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = _plain(here.model_fields[str(part)].annotation)
        else:
            here = _plain(get_args(here)[1 if get_origin(here) is dict else 0])
    return here


def _plain(annotation: Any) -> Any:
    """``X | None`` and ``Annotated[X, ...]`` -> ``X``."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(arg for arg in get_args(annotation) if arg is not type(None)))
    return annotation


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Writing. tomllib reads only, and the shapes we write are few.


def _table(data: Mapping[str, Any], name: str = "") -> str:
    """Scalars first, then ``[tables]``, then ``[[lists of tables]]``; what lies deeper is written inline."""
    lines, tables = [], []
    for key, value in data.items():
        if not name and isinstance(value, dict) and value:
            tables.append(f"[{_key(key)}]\n{_table(value, key)}")
        elif not name and isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            tables += [f"[[{_key(key)}]]\n{_table(v, key)}" for v in value]
        else:
            lines.append(f"{_key(key)} = {_inline(value)}\n")
    return "".join(lines) + "".join("\n" + table for table in tables)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list):
        if value and all(isinstance(v, dict) for v in value):
            return "[\n" + "".join(f"  {_inline(v)},\n" for v in value) + "]"
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON escapes as TOML does, but for DEL, which TOML does not allow bare.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise RecipeError(f"cannot write {value!r} as TOML: expected text, a number, a list or a table.")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _inline(key)
