"""SHA-256 of values, of files and of whole stores.

A store lists every file with its SHA-256 in the format that `sha256sum -c` reads. `python -m cache.verify` and
`FeatureStore(path, verify=True)` compare the files with the list; other reads do not.
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


def fingerprint(*parts: object) -> str:
    """SHA-256 of values that a result depends on, as hexadecimal text, the same in every process.

    The parts are JSON values, dataclass instances (as dictionaries of their fields), paths (as POSIX text), tuples
    (as lists), sets (as sorted lists), bytes (as their SHA-256) and NumPy scalars and arrays, nested as deep as
    needed. Their order matters, that of keys does not. Raises TypeError for other types, whose text differs by run.
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


def write(store: Path, digests: Mapping[str, str]) -> None:
    """Write the list of all files below `store`; `digests` has SHA-256s that are known, by path."""
    all_digests = {file: digests.get(file) or digest(store / file) for file in files(store)}
    write_file(store / NAME, [_format(all_digests).encode()])


def check(store: Path) -> dict[str, str]:
    """Compare every file of a store with the list; return the SHA-256 of every file by path in the store.

    Raises StoreError for the first file by name that is damaged, missing or not listed; `value` is its path.
    """
    text = _read(store)
    listed, existing = _parse(text), files(store)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        actual = dict(zip(existing, pool.map(lambda file: digest(store / file), existing), strict=True))
    for file in sorted({*existing, *listed}):
        if file not in actual:
            raise _error(store, file, f"is listed in {NAME} but does not exist")
        if file not in listed:
            raise _error(store, file, f"is not listed in {NAME}")
        if actual[file] != listed[file]:
            raise _error(store, file, f"is damaged: its SHA-256 is not the one in {NAME}")
    if text != _format(actual):
        raise _error(store, NAME, "is damaged")
    return actual


def missing_files(store: Path) -> list[str]:
    """Return the listed files that do not exist, or the list itself; contents are not checked."""
    try:
        listed = _parse(_read(store))
        return [file for file in listed if not (store / file).is_file()] if listed else [NAME]
    except StoreError:
        return [NAME]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files(store: Path) -> list[str]:
    """Return the paths in the store of every file below it except the list, sorted."""
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(store) for name in names)
    names = (Path(os.path.relpath(path, store)).as_posix() for path in paths if os.path.isfile(path))
    return sorted(name for name in names if name != NAME)


def _read(store: Path) -> str:
    try:
        return (store / NAME).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise _error(store, NAME, "is missing or damaged, so no file can be checked") from None


def _error(store: Path, file: str, fault: str) -> StoreError:
    remedy = "Delete the store and extract it again, or copy it again from its source."
    return StoreError(f"{file} of {store} {fault}. {remedy}", value=file, path=store)


def _parse(text: str) -> dict[str, str]:
    return {line[66:]: line[:64] for line in text.split("\n") if line}


def _format(digests: Mapping[str, str]) -> str:
    return "".join(f"{digests[file]}  {file}\n" for file in sorted(digests))
