"""The error shown to users, and its messages for pydantic's validation errors."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cache.errors import InputError

# A message lists at most this many mistakes of one file.
MAX_MISTAKES = 3
# Keys of earlier versions, with `*` for any name. They are refused with the new name.
RENAMED_KEYS = {
    "extract.dense": "extract.keep_levels",
    "heads.memory": "heads.max_feature_gb",
    "heads.checks": "heads.val_checks",
    "search.parallel": "search.trials_per_round",
    "distill.search.parallel": "distill.search.trials_per_round",
    "compose": "composition",
    "composition.best": "composition.top_k",
    "finetune.what": "finetune.method",
    "finetune.decay": "finetune.layer_decay",
    "finetune.checks": "finetune.val_checks",
    "distill.labels": "distill.loss_weights.labels",
    "distill.features": "distill.loss_weights.features",
    "distill.logits": "distill.loss_weights.logits",
    "distill.ablation": "distill.extra_variants",
    "distill.chips": "distill.classification",
    "distill.masks": "distill.segmentation",
    "backbones.*.eats": "backbones.*.input_units",
    "datasets.*.options.as_labelled": "datasets.*.options.keep_released_metadata",
}


class UserError(InputError):
    """Bad input: a parameter, an option or a file. Its fields locate the mistake."""


def similar_name(name: object, names: Iterable) -> str:
    """Return " Did you mean 'x'?", or nothing if no name is similar."""
    matches = difflib.get_close_matches(str(name), [str(candidate) for candidate in names], n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def validation_error(error: ValidationError, model: type, section: str, path: Path | str | None) -> UserError:
    """Translate pydantic's errors into one message; its fields are those of the first mistake.

    Args:
        section: dotted key of `model` in its file; empty for the whole file.
    """
    details = error.errors(include_url=False)
    mistakes = [_mistake(detail, TypeAdapter(model).json_schema(), section) for detail in details[:MAX_MISTAKES]]
    text = " ".join(map(str, mistakes))
    if len(details) > MAX_MISTAKES:
        text += f" There are {len(details) - MAX_MISTAKES} more mistakes."
    text, first = f"{path}: {text}" if path else text, mistakes[0]
    return UserError(text, key=first.key, value=first.value, allowed=first.allowed, path=path)


def _mistake(detail: Mapping, schema: Mapping, section: str) -> UserError:
    """Describe one of pydantic's errors."""
    location, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    key, value = _dotted(section, location), detail["input"]
    if kind in ("unexpected_keyword_argument", "missing"):
        known_keys = tuple(subschema(schema, location[:-1])["properties"])
        if kind == "missing":
            return UserError(f"{key} is missing.", key=key, allowed=known_keys)
        if new_key := _renamed(key):
            return UserError(f"{key} is now called {new_key}. Rename it.", key=key, value=value, allowed=[new_key])
        similar = similar_name(location[-1], known_keys)
        message = f"{key} is an unknown key. Known keys: {', '.join(known_keys)}.{similar}"
        return UserError(message, key=key, value=value, allowed=known_keys)
    if "[key]" in location:
        message = f"{key}: invalid name '{value}': use letters, digits, '_' and '-' (DVC reads '.' as nesting)."
        return UserError(message, key=key, value=value)
    target = subschema(schema, location)
    choices = context.get("allowed") or target.get("enum") or target.get("properties")
    allowed = None if choices is None else tuple(choice for choice in choices if choice != "")
    problem = str(context.get("error") or detail["msg"][0].lower() + detail["msg"][1:])
    names = f" Allowed: {', '.join(map(str, allowed))}.{similar_name(value, allowed)}" if allowed else ""
    meaning = f" Meaning: {target['description'].rstrip('.')}." if "description" in target and not allowed else ""
    message = f"{key or 'the file'} is {value!r}; {problem}.{names}{meaning}"
    return UserError(message, key=key, value=value, allowed=allowed)


def _renamed(key: str) -> str | None:
    """Return the present name of a key of an earlier version."""
    new_key = next((new for old, new in RENAMED_KEYS.items() if fnmatchcase(key, old)), None)
    return new_key and new_key.replace("*", key.split(".")[1] if "." in key else "")


def _dotted(section: str, location: Sequence) -> str:
    """Join a location to a key such as `datasets.x.bands[2].gsd`, without the index of a plain value."""
    location = [part for part in location if part != "[key]"]
    while location and isinstance(location[-1], int):
        location = location[:-1]
    key = section
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    return key


def subschema(schema: Mapping, location: Sequence) -> Mapping:
    """Return the JSON schema of the value at a location; keys next to a `$ref` take precedence."""
    node: Mapping = schema
    for part in (None, *location):
        if part is not None:
            patterns = node.get("patternProperties", {}).values()
            children = (node.get("properties", {}).get(part), node.get("items"), *patterns)
            node = next((child for child in children if child), {})
        if "anyOf" in node:  # an optional value
            node = {**node["anyOf"][0], **node}
        if "$ref" in node:
            node = {**schema["$defs"][node["$ref"].rpartition("/")[2]], **node}
    return node
