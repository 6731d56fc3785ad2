"""Reading a table of keys strictly into a dataclass: unknown keys, wrong types and bad values are refused.

The dataclass is the schema: its fields are the keys, their types what is right. Knows nothing of scenarios.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qlm_sim.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limit:
    """The numbers that a key takes."""

    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf

    def holds(self, value: float) -> bool:
        return self.above < value < math.inf and self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (
                ("above", self.above),
                ("at least", self.at_least),
                ("at most", self.at_most),
            )
            if math.isfinite(bound)
        ]
        return " and ".join(bounds) or "finite"


@dataclass(frozen=True, slots=True)
class Source:
    """Where values come from, to name it in an error: a file, and the flags that override its keys."""

    name: str
    limits: Mapping[str, Limit]
    """Bounds of numbers, by the last part of the key: a key means the same wherever it stands."""
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Dotted key to the flag that set it."""

    def place(self, key: str) -> str:
        if key in self.flags:
            return self.flags[key]
        flag = next(
            (flag for parent, flag in self.flags.items() if key.startswith((f"{parent}[", f"{parent}."))),
            None,
        )
        return f"{flag or self.name}: {key}"

    def refuse(self, key: str, found: object, expected: str) -> InputError:
        return InputError(f"{self.place(key)}: found {_show(found)}, expected {expected}")


def read_table(cls: type[T], table: object, source: Source, at: str = "") -> T:
    """``table`` as a ``cls``; ``at`` is the table's own dotted key. Raises InputError."""
    if not isinstance(table, Mapping):
        raise source.refuse(at, table, "a table")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{at}." if at else ""
    for key in table:
        if key not in fields:
            raise InputError(_unknown(source.place(prefix + key), key, list(fields)))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        key = prefix + name
        if name in table:
            values[name] = _read(hints[name], table[name], source, key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{source.place(key)}: missing, expected {_describe(hints[name])}")
    return cls(**values)


def table_of(value: object) -> Any:
    """The plain dict, list and scalar form of a dataclass, without its None values. Reads back equal."""
    if dataclasses.is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: table_of(held) for name, held in pairs if held is not None}
    if isinstance(value, Mapping):
        return {name: table_of(held) for name, held in value.items()}
    if isinstance(value, tuple | list):
        return [table_of(held) for held in value]
    return value


def did_you_mean(name: str, known: list[str]) -> str:
    """``known names: …`` with the nearest first named, for the end of an error."""
    near = get_close_matches(name.lower(), [each.lower() for each in known], n=1)
    nearest = next((each for each in known if near and each.lower() == near[0]), None)
    hint = f"did you mean {nearest!r}? " if nearest else ""
    return f"{hint}known: {', '.join(known)}"


def _unknown(place: str, key: str, known: list[str]) -> str:
    return f"{place}: unknown key; {did_you_mean(key, known)}"


def _read(hint: Any, value: object, source: Source, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (hint,) = (each for each in args if each is not NoneType)
        return _read(hint, value, source, key)
    if origin is Literal:
        if value not in args:
            raise InputError(
                f"{source.place(key)}: found {_show(value)}; {did_you_mean(str(value), list(args))}"
            )
        return value
    if dataclasses.is_dataclass(hint):
        return read_table(hint, value, source, key)  # type: ignore[arg-type]
    if origin is tuple:
        return _read_tuple(args, value, source, key)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise source.refuse(key, value, "a table")
        return {name: _read(args[1], held, source, f"{key}.{name}") for name, held in value.items()}
    return _read_scalar(hint, value, source, key)


def _read_tuple(args: tuple[Any, ...], value: object, source: Source, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise source.refuse(key, value, "a list")
    if args[-1] is Ellipsis:
        return tuple(_read(args[0], held, source, f"{key}[{i}]") for i, held in enumerate(value))
    if len(value) != len(args):
        raise source.refuse(key, list(value), f"a list of {len(args)}")
    return tuple(
        _read(arg, held, source, f"{key}[{i}]") for i, (arg, held) in enumerate(zip(args, value, strict=True))
    )


def _read_scalar(hint: Any, value: object, source: Source, key: str) -> Any:
    number = hint in (int, float)
    right = isinstance(value, hint) or (hint is float and isinstance(value, int))
    if not right or (number and isinstance(value, bool)):
        raise source.refuse(key, value, _describe(hint))
    if number:
        limit = source.limits.get(key.rpartition(".")[2].partition("[")[0], Limit())
        if not limit.holds(value):  # type: ignore[arg-type]
            raise source.refuse(key, value, f"{_describe(hint)} {limit}")
    return hint(value)


_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return _describe(next(each for each in get_args(hint) if each is not NoneType))
    return _WORDS.get(hint, "a list" if get_origin(hint) is tuple else "a table")


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "a table" if isinstance(value, Mapping) else repr(value)
