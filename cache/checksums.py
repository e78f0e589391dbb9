"""The list of every file of a store with its SHA-256, in the format that `sha256sum -c` reads.

Reading at speed never looks at it; `python -m cache.verify` and `Features(path, verify=True)` do.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import numpy as np

from cache.atomic import write_file
from cache.errors import StoreError

NAME = "SHA256SUMS"
_REPAIR_HINT = "Delete the store and extract again, or fetch it again from where it came."


def fingerprint(*parts: object) -> str:
    """SHA-256 of values that decide a result, as hexadecimal text.

    The values are written as canonical JSON: keys sorted, no spaces. Equal values give equal fingerprints in every
    process and on every machine.

    Args:
        parts: JSON values, dataclass instances (as dictionaries of their fields), paths (as POSIX text), tuples (as
            lists), sets (as sorted lists), bytes (as their SHA-256) and NumPy scalars and arrays, nested as deep as
            needed. The order of the parts matters.

    Raises:
        TypeError: a value of another type, whose text could differ from run to run.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"A fingerprint cannot contain a {type(value).__name__}; use JSON values, dataclasses or paths.")


def write(store: Path, known: Mapping[str, str]) -> None:
    """List every file below `store`; `known` has digests that need no second reading, by path in the store."""
    digests = {file: known.get(file) or digest(store / file) for file in files(store)}
    write_file(store / NAME, [_listing(digests).encode()])


def content_digest(described: Mapping, shards: Mapping[str, str]) -> str:
    """The SHA-256 of a store's content: its attributes, and the digests of its shard files by path."""
    listed = json.dumps([dict(described), _listing(shards)], sort_keys=True)
    return hashlib.sha256(listed.encode()).hexdigest()


def check(store: Path) -> dict[str, str]:
    """Compare every file with the list.

    Returns:
        Every file that was checked, and its digest.

    Raises:
        StoreError: naming the first file, in order of names, that is damaged, missing or not listed.
    """
    text = _text(store)
    listed = _parsed(text)
    found = files(store)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        actual = dict(zip(found, pool.map(lambda file: digest(store / file), found), strict=True))
    for file in sorted({*found, *listed}):
        if file not in actual:
            raise StoreError(f"{file} is listed in {NAME} but is not in {store}. {_REPAIR_HINT}")
        if file not in listed:
            raise StoreError(f"{file} of {store} is not listed in {NAME}. {_REPAIR_HINT}")
        if actual[file] != listed[file]:
            raise StoreError(f"{file} of {store} is damaged: its SHA-256 is not the one in {NAME}. {_REPAIR_HINT}")
    if text != _listing(actual):
        raise StoreError(f"{store / NAME} is damaged. {_REPAIR_HINT}")
    return actual


def missing_files(store: Path) -> list[str]:
    """The listed files, or the list itself, that are not there; what is in them is not looked at."""
    try:
        listed = _parsed(_text(store))
        return [file for file in listed if not (store / file).is_file()] if listed else [NAME]
    except StoreError:
        return [NAME]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files(store: Path) -> list[str]:
    """Every file below `store` but the list itself, sorted, as paths within it."""
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(store) for name in names)
    found = (Path(os.path.relpath(path, store)).as_posix() for path in paths if os.path.isfile(path))
    return sorted(path for path in found if path != NAME)


def _text(store: Path) -> str:
    try:
        return (store / NAME).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise StoreError(f"{store / NAME} is missing or damaged, so nothing in {store} can be checked.") from None


def _parsed(text: str) -> dict[str, str]:
    return {line[66:]: line[:64] for line in text.split("\n") if line}


def _listing(digests: Mapping[str, str]) -> str:
    return "".join(f"{digests[file]}  {file}\n" for file in sorted(digests))
