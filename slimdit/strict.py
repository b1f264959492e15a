"""Building frozen dataclasses from people's TOML and JSON: wrong names and types are refused with a sentence."""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Refused(ValueError):  # noqa: N818 (a rule speaks; nothing went wrong)
    """A rule says no: one sentence with what is wrong and what to do instead."""

    exit_code = 3  # of the command line


def require(condition: object, sentence: str) -> None:
    """Refuse with a sentence unless the condition holds.

    Raises:
        Refused: it does not.
    """
    if not condition:
        raise Refused(sentence)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ValueError: it is not TOML.
    """
    return parse_toml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """A text file that people wrote.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}): write it as a plain text file") from error


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text; `where` is what errors call it.

    Raises:
        ValueError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not a TOML file: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence that names the right name for a wrong one: "did you mean x?" or "use one of ..."."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"use one of: {', '.join(known) or 'none'}"


def build(cls: type[T], values: Any, where: str) -> T:
    """An instance of dataclass `cls` from a mapping; lists become tuples.

    Args:
        where: what is being read, for the sentence ("recipe lean.toml: quantize").

    Raises:
        ValueError: not a mapping, an unknown or missing name, a wrong type, or a value the class refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a table of options, not {values!r}")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ValueError(f"{where}: {name!r} is not an option; {nearest(name, known)}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}: {name!r} is missing")
    hints = typing.get_type_hints(cls)
    checked = {name: convert(value, hints[name], f"{where}: {name}") for name, value in values.items()}
    try:
        return cls(**checked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` says: no guessing but int to float and list to tuple.

    Raises:
        ValueError: the value is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for option in (option for option in arguments if option is not type(None)):
            try:
                return convert(value, option, where)
            except ValueError as error:
                failure = error
        raise failure
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {value!r} is unknown; {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, not {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(convert(item, arguments[0], where) for item in value)
        if len(value) != len(arguments):
            raise ValueError(f"{where}: expected {len(arguments)} values, not {len(value)}")
        return tuple(convert(item, option, where) for item, option in zip(value, arguments))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a table, not {value!r}")
        return {key: convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any:
        return value
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, not {value!r}")
    return value
