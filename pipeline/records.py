"""Plain data, as YAML gives it, into frozen records with the types that their fields declare."""

import dataclasses
import types
import typing

from pipeline.errors import UserError


def build(kind, raw, where: str):
    """Turn plain YAML data into the record `kind`, recursively; `where` names the place in errors."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        fields = {f.name: f for f in dataclasses.fields(kind)}
        if not isinstance(raw, dict):
            raise UserError(f"{where} must be a mapping with the keys {', '.join(fields)}; it is {raw!r}.")
        unknown = [str(key) for key in raw if key not in fields]
        if unknown:
            raise UserError(
                f"{where} has an unknown key: {', '.join(unknown)}. Known keys: {', '.join(fields)}. "
                "Correct the spelling or remove it."
            )
        missing = [
            n
            for n, f in fields.items()
            if n not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise UserError(f"{where} lacks: {', '.join(missing)}. Its keys are {', '.join(fields)}.")
        hints = typing.get_type_hints(kind)
        return kind(**{key: build(hints[key], value, f"{where}: {key}") for key, value in raw.items()})
    if origin is types.UnionType:  # a record, or nothing
        return None if raw is None else build(typing.get_args(kind)[0], raw, where)
    if origin is dict:
        if not isinstance(raw, dict):
            raise UserError(f"{where} must be a mapping of names; it is {raw!r}.")
        value_kind = typing.get_args(kind)[1]
        if value_kind is object:  # handed to others as it is, also to other processes
            return {str(key): value for key, value in raw.items()}
        return types.MappingProxyType(
            {str(key): build(value_kind, value, f"{where}: {key}") for key, value in raw.items()}
        )
    if origin is tuple:
        if not isinstance(raw, list):
            raise UserError(f"{where} must be a list; it is {raw!r}.")
        return tuple(build(typing.get_args(kind)[0], value, where) for value in raw)
    if kind is float and not isinstance(raw, bool):
        # PyYAML reads YAML 1.1, where 1e-4 without a point is a string; DVC reads it as a number.
        try:
            return float(raw)
        except (TypeError, ValueError):
            pass
    if kind is object:
        return raw
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        raise UserError(f"{where} must be {kind.__name__}; it is {raw!r}.")
    return raw
