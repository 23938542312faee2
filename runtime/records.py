"""JSON objects as frozen dataclasses: every field is checked on reading, and keys nobody knows are kept."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from runtime.errors import UserError

_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON object. Subclasses add fields; `extra` holds the keys a newer version may have written."""

    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, data: object, where: str) -> Self:
        """Read the object, whose place `where` names it in errors ("manifest.json: graph").

        Raises:
            UserError: a field is missing or of another type.
        """
        if not isinstance(data, dict):
            raise _mismatch(where, "an object", data)
        hints = get_type_hints(cls)
        known = {f.name: f for f in fields(cls) if f.name != "extra"}
        values = {}
        for name, declared in known.items():
            if name in data:
                values[name] = _read(hints[name], data[name], f"{where}.{name}")
            elif not _optional(declared):
                raise UserError(f"{where} lacks {name!r}; export the bundle again")
        return cls(**values, extra={key: value for key, value in data.items() if key not in known})

    def to_json(self) -> dict[str, Any]:
        """The object as JSON types, in field order; an optional field that is None is left out."""
        written = {}
        for declared in fields(self):
            value = getattr(self, declared.name)
            if declared.name == "extra" or (value is None and _optional(declared)):
                continue
            written[declared.name] = _write(value)
        return {**written, **self.extra}


def _optional(declared: Field[Any]) -> bool:
    return declared.default is not MISSING or declared.default_factory is not MISSING


def _write(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, tuple | list):
        return [_write(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _write(item) for key, item in value.items()}
    return value


def _read(expected: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `expected`: scalars, unions, tuples, dictionaries and records."""
    if expected is Any:
        return value
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return _read(_member(arguments, value, where), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {key: _read(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if issubclass(expected, Record):
        return expected.from_json(value, where)
    if not _is(expected, value):
        raise _mismatch(where, _WORDS[expected], value)
    return float(value) if expected is float else value


def _member(members: tuple[Any, ...], value: Any, where: str) -> Any:
    """The member of a union that the value belongs to."""
    for member in members:
        if member in _WORDS:
            if _is(member, value):
                return member
        elif value is not None:
            return member
    raise _mismatch(where, " or ".join(_WORDS.get(member, "an object") for member in members), value)


def _is(scalar: type, value: object) -> bool:
    if isinstance(value, bool):  # a bool is an int to Python, not to a reader
        return scalar is bool
    return isinstance(value, (int, float) if scalar is float else scalar)


def _mismatch(where: str, expected: str, found: object) -> UserError:
    return UserError(f"{where} should be {expected}, found {str(found)[:60]!r}; export the bundle again")
