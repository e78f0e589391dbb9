"""The error shown to users, and its messages for pydantic's validation errors."""

import difflib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ValidationError

from cache.errors import InputError

# A message lists at most this many mistakes of one file.
MAX_MISTAKES = 3


class UserError(InputError):
    """Bad input: a parameter, an option or a file. Its fields locate the mistake."""


def similar_name(name: object, names: Iterable) -> str:
    """Return " Did you mean 'x'?", or nothing if no name is similar."""
    matches = difflib.get_close_matches(str(name), [str(candidate) for candidate in names], n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def validation_error(error: ValidationError, model: type, section: str, path: Path | str | None) -> UserError:
    """Translate pydantic's errors into one message; its fields are those of the first mistake.

    Args:
        error: raised by the validation of `model`.
        model: the dataclass.
        section: dotted key of the dataclass in its file; empty for the whole file.
        path: the file, or None.
    """
    details = _merge_missing(error.errors(include_url=False))
    mistakes = [_mistake(detail, model, section) for detail in details[:MAX_MISTAKES]]
    text = " ".join(mistake.message for mistake in mistakes)
    if len(details) > MAX_MISTAKES:
        text += f" There are {len(details) - MAX_MISTAKES} more mistakes."
    first = mistakes[0]
    return UserError(
        f"{path}: {text}" if path else text, key=first.key, value=first.value, allowed=first.allowed, path=path
    )


class _Mistake(NamedTuple):
    key: str
    value: object
    allowed: tuple | None
    message: str


# What a value must be, by the type of pydantic's error.
_REQUIREMENTS: dict[str, Callable[[Mapping], str]] = {
    "int_type": lambda limits: "a whole number (int)",
    "float_type": lambda limits: "a number (float)",
    "finite_number": lambda limits: "a finite number",
    "bool_type": lambda limits: "true or false (bool)",
    "string_type": lambda limits: "text (str)",
    "tuple_type": lambda limits: "a list",
    "dict_type": lambda limits: "a mapping of names",
    "greater_than": lambda limits: f"above {limits['gt']:g}",
    "greater_than_equal": lambda limits: f"at least {limits['ge']:g}",
    "less_than": lambda limits: f"below {limits['lt']:g}",
    "less_than_equal": lambda limits: f"at most {limits['le']:g}",
    "too_short": lambda limits: f"a list of at least {limits['min_length']}",
    "too_long": lambda limits: f"a list of at most {limits['max_length']}",
    "string_pattern_mismatch": lambda limits: f"text that matches {limits['pattern']}",
}


def _merge_missing(details: Iterable[Mapping]) -> list[Mapping]:
    """Merge the errors of missing keys of one section; the merged error lists their names."""
    merged: list[Mapping] = []
    for detail in details:
        if detail["type"] != "missing":
            merged.append(detail)
            continue
        *parents, name = detail["loc"]
        last = merged[-1] if merged else None
        if last and last["type"] == "missing" and list(last["loc"][:-1]) == parents:
            last["names"].append(name)
        else:
            merged.append({**detail, "names": [name]})
    return merged


def _mistake(detail: Mapping, model: type, section: str) -> _Mistake:
    """Describe one of pydantic's errors."""
    location = [part for part in detail["loc"] if part != "[key]"]
    if detail["type"] in ("unexpected_keyword_argument", "missing"):
        return _key_mistake(detail, model, section)
    if "[key]" in detail["loc"]:
        key, name = _dotted(section, location), location[-1]
        rule = "use letters, digits, '_' and '-' (DVC reads '.' as nesting)"
        return _Mistake(key, name, None, f"{key}: invalid name '{name}': {rule}.")
    return _value_mistake(detail, model, section)


def _key_mistake(detail: Mapping, model: type, section: str) -> _Mistake:
    """Describe an unknown or a missing key."""
    *parents, name = detail["loc"]
    parent = _dotted(section, parents) or "the file"
    key, known_keys = _dotted(section, detail["loc"]), _keys(_follow(model, parents)[0])
    if detail["type"] == "missing":
        message = f"{parent} lacks: {', '.join(detail['names'])}. Its keys are: {', '.join(known_keys)}."
        return _Mistake(key, None, known_keys, message)
    message = (
        f"{parent} has an unknown key: {name}. Known keys: {', '.join(known_keys)}."
        f"{similar_name(name, known_keys)} Correct the spelling or remove it."
    )
    return _Mistake(key, detail["input"], known_keys, message)


def _value_mistake(detail: Mapping, model: type, section: str) -> _Mistake:
    """Describe a value of the wrong type, out of bounds or not among the allowed values."""
    key, value, error_type = _dotted(section, detail["loc"]), detail["input"], detail["type"]
    kind, description = _follow(model, detail["loc"])
    allowed = None
    if error_type == "literal_error":
        allowed = tuple(choice for choice in _literals(kind) if choice != "")
        problem = f"allowed: {', '.join(map(str, allowed))}.{similar_name(value, allowed)}"
    elif error_type == "dataclass_type":
        allowed = _keys(kind)
        problem = f"it must be a mapping with the keys {', '.join(allowed)}."
    elif error_type == "value_error":
        problem = f"{detail['ctx']['error']}."
    elif error_type in _REQUIREMENTS:
        problem = f"it must be {_REQUIREMENTS[error_type](detail.get('ctx', {}))}."
    else:
        problem = f"{detail['msg'][0].lower()}{detail['msg'][1:]}."
    meaning = f" Meaning: {description.rstrip('.')}." if description else ""
    return _Mistake(key, value, allowed, f"{key or 'the file'} is {value!r}; {problem}{meaning}")


def _dotted(section: str, location: Sequence) -> str:
    """Join a location to a key such as `datasets.x.bands[2].gsd`, without the index of a plain value."""
    while location and isinstance(location[-1], int):
        location = location[:-1]
    key = section
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    return key


def _follow(model: type, location: Sequence) -> tuple[Any, str]:
    """Return the type at a location in a dataclass, and the description of the field that ends there."""
    kind, description = _plain_type(model), ""
    for part in location:
        arguments = typing.get_args(kind)
        if is_dataclass(kind):
            field = getattr(kind, "__pydantic_fields__", {}).get(part)
            description = (field.description or "") if field else ""
            kind = typing.get_type_hints(kind, include_extras=True).get(part)
        elif typing.get_origin(kind) is dict and len(arguments) > 1:
            kind, description = arguments[1], ""
        elif arguments:
            kind = arguments[0]
        kind = _plain_type(kind)
    return kind, description


def _plain_type(kind: Any) -> Any:
    """Strip `Annotated` and `| None` from a type."""
    if typing.get_origin(kind) is Annotated:
        return _plain_type(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (UnionType, typing.Union):
        return _plain_type(next(part for part in typing.get_args(kind) if part is not NoneType))
    return kind


def _keys(kind: Any) -> tuple[str, ...]:
    return tuple(kind.__dataclass_fields__) if is_dataclass(kind) else ()


def _literals(kind: Any) -> tuple:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
