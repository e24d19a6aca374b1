"""Fields of dataclasses: what values they allow, and how text and YAML become values."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import is_dataclass
from typing import Any

from flallm.utils import UserError


def number(default: Any, minimum: float = 0, below: float | None = None) -> Any:
    """A field for a number, or a tuple of numbers, from `minimum` to less than `below`.

    A number without bounds of its own is at least 0.
    """
    return dataclasses.field(default=default, metadata={"minimum": minimum, "below": below})


def share(default: float) -> Any:
    """A field for a number from 0 to below 1."""
    return dataclasses.field(default=default, metadata={"share": True})


def choice(default: str | None, choices: tuple[str | None, ...]) -> Any:
    """A field for one of a few texts."""
    return dataclasses.field(default=default, metadata={"choices": choices})


def check_fields(section: Any, prefix: str = "") -> None:
    """Raises UserError for the first value, here or in a section below, that its field refuses.

    prefix: of the names of the fields in the error, such as "train.".
    """
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            check_fields(value, f"{name}.")
        else:
            _check_value(name, value, field.metadata)


def _check_value(name: str, value: object, metadata: typing.Mapping[str, Any]) -> None:
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise UserError(f"{name}: {value!r} is none of {', '.join(map(str, choices))}")
    minimum, below = metadata.get("minimum", 0), metadata.get("below")
    for item in value if isinstance(value, tuple) else (value,):
        if not isinstance(item, int | float):
            continue
        if "share" in metadata and not 0 <= item < 1:
            raise UserError(f"{name}: {item} is no share from 0 to below 1")
        if item < minimum:
            raise UserError(f"{name}: {item} is less than {minimum}")
        if below is not None and item >= below:
            raise UserError(f"{name}: {item} is not below {below}")


def from_dict(cls, values: dict, where: str):
    """A dataclass from nested dicts, not checked against what its fields allow.

    where: the beginning of errors. Raises UserError for unknown fields and wrong types.
    """
    hints, arguments = typing.get_type_hints(cls), {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{where}: there is no field {name!r}{suggest(str(name), hints)}")
        arguments[name] = coerce(value, hints[name], f"{where}: {name}")
    return cls(**arguments)


def from_options(cls, options: dict[str, str]):
    """A flat dataclass from `--name=value` options."""
    hints = typing.get_type_hints(cls)
    for name in options:
        if name not in hints:
            raise UserError(f"unknown option --{name}{suggest(name, hints, '--')}")
    return from_dict(cls, options, "options")


def suggest(name: str, known: typing.Collection[str], dashes: str = "") -> str:
    """The end of an error about an unknown field: the nearest known name.

    The last parts of dotted names are compared first, then the full names.
    """
    leaves = {_leaf(field) for field in known}
    nearest_leaf = difflib.get_close_matches(_leaf(name), leaves, 1, 0.6)
    candidates = [field for field in known if _leaf(field) in nearest_leaf]
    matches = difflib.get_close_matches(name, candidates, 1, 0)
    if not matches:
        matches = difflib.get_close_matches(name, list(known), 1, 0.6)
    if matches:
        return f": did you mean {dashes}{matches[0]}?"
    if dashes:
        return ": see the recipe for its fields"
    return f" (it has: {', '.join(known)})"


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def type_of(hint: Any) -> Any:
    """The type of a field without its None."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    return next(option for option in typing.get_args(hint) if option is not type(None))


def coerce(value: object, hint: Any, where: str) -> Any:
    """The value as the field's type. YAML reads 1e-3 as text, and options are text.

    Raises UserError, which begins with `where`, for a value of another type.
    """
    if type(None) in typing.get_args(hint) and value in (None, "null", "none", "None"):
        return None
    kind = type_of(hint)
    if typing.get_origin(kind) is tuple:
        return _to_tuple(value, typing.get_args(kind)[0], where)
    if is_dataclass(kind) and isinstance(value, dict):
        return from_dict(kind, value, where)
    convert, kind_name = CONVERSIONS.get(kind, (_to_section, "a section"))
    with contextlib.suppress(ValueError, OverflowError):
        return convert(value)
    raise UserError(f"{where}: {value!r} is not {kind_name}")


def _to_tuple(value: object, item_type: Any, where: str) -> tuple:
    items = value
    if isinstance(value, str):
        items = [item for item in value.strip("[]()").split(",") if item.strip()]
    if not isinstance(items, list | tuple):
        raise UserError(f"{where}: {value!r} is not a list of numbers")
    return tuple(coerce(item, item_type, where) for item in items)


def _to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    result = float(value)
    if math.isnan(result):
        raise ValueError
    return result


def _to_int(value: object) -> int:
    result = _to_float(value)
    if not result.is_integer():
        raise ValueError
    return int(result)


def _to_bool(value: object) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def _to_text(value: object) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError
    return str(value)


def _to_section(value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError
    return value


CONVERSIONS = {  # by the type of a field: a function that raises ValueError, and what errors say
    float: (_to_float, "a number"),
    int: (_to_int, "a whole number"),
    bool: (_to_bool, "true or false"),
    str: (_to_text, "text"),
    dict: (_to_section, "a section"),
}
