"""Nested dataclasses from YAML. Unknown names and wrong types are refused in one line: field, value, fix."""

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar

import yaml

Built = TypeVar("Built")


def override(values: dict[str, Any], text: str) -> None:
    """Set one value in place: `text` is "field=value" or "group.field=value", the value in YAML. Raises ValueError."""
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise ValueError(f"--set {text!r} is not an override; write field=value, as in data.num_workers=2")
    *groups, last = name.strip().split(".")
    for group in groups:
        if values.get(group) is None:
            values[group] = {}
        values = values[group]
        if not isinstance(values, dict):
            raise ValueError(f"--set {text!r}: {group} has no fields of its own")
    try:
        values[_key(last)] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise ValueError(f"--set {text!r}: the value is not YAML; quote it") from error


def _key(text: str) -> Any:
    """A key as YAML reads it, so that sizes.128 meets the file's 128."""
    return yaml.safe_load(text) if text.isdigit() else text


def build(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    """A dataclass of the given kind from what YAML read; `prefix` names it in errors. Raises ValueError."""
    _check_names(values, [item.name for item in fields(kind)], prefix)
    hints = typing.get_type_hints(kind)
    return kind(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})


def construct(kind: Callable[..., Built], arguments: Mapping[str, Any], field: str) -> Built:
    """A model from the arguments that a config field holds, which are its constructor's.

    Raises:
        ValueError: an unknown argument, one of another type or below 1, or a combination that the constructor refuses.
    """
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    _check_names(arguments, [name for name in hints if name != "return"], f"{field}.")
    for name, value in arguments.items():
        value = _convert(hints[name], value, f"{field}.{name}")
        least = 0 if name == "num_aligned_blocks" else 1
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or any(isinstance(number, int) and number < least for number in numbers):
            raise ValueError(f"config field {field}.{name} is {value}; give at least {least}")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"config field {field} cannot be: {error}") from error


def _check_names(values: Iterable[Any], known: list[str], prefix: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"fields are {', '.join(known)}"
            raise ValueError(f"config field {prefix}{name} is unknown; {hint}")


def _convert(hint: Any, value: Any, name: str) -> Any:
    """The value as the type asks, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, f"{name}.")
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, name, hint)
    if origin is Literal and value in arguments and type(value) in map(type, arguments):
        return value
    if origin is dict and isinstance(value, dict):
        key_type, value_type = arguments
        return {_convert(key_type, k, f"{name} key"): _convert(value_type, v, f"{name}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, name) for item in value)
        if len(value) == len(arguments):
            return tuple(_convert(kind, item, name) for kind, item in zip(arguments, value))
    if hint is float and not isinstance(value, bool):
        try:  # YAML reads 6e-5, without a point, as text
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if hint is type(None) and value is None:
        return None
    raise ValueError(f"config field {name} is {value!r}; give {_spell(hint)}")


def _convert_union(arguments: tuple, value: Any, name: str, hint: Any) -> Any:
    if type(None) in arguments and value is None:
        return None
    kinds = [kind for kind in arguments if kind is not type(None)]
    if len(kinds) == 1:  # the message then names the field inside
        return _convert(kinds[0], value, name)
    for kind in kinds:
        try:
            return _convert(kind, value, name)
        except ValueError:
            continue
    raise ValueError(f"config field {name} is {value!r}; give {_spell(hint)}")


def _spell(hint: Any) -> str:
    """A type in words."""
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is dict:
        return f"a table of {_spell(arguments[0])}: {_spell(arguments[1])}"
    if origin is tuple:
        return f"a list of {_spell(arguments[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_spell(kind) for kind in arguments)
    return "a table of " + ", ".join(item.name for item in fields(hint))


def plain(value: Any) -> Any:
    """The value with lists for tuples, as YAML writes them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a nested dataclass by its name with dots, such as "data.sizes"."""
    found: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        found |= flat(value, f"{prefix}{item.name}.") if is_dataclass(value) else {prefix + item.name: value}
    return found
