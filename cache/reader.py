"""Read a finished feature store."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec.core
import numpy as np
import zarr
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.cached import SimpleCacheFileSystem
from zarr.abc.store import Store
from zarr.storage import FsspecStore

from cache import arrays, checksums
from cache.errors import StoreError
from cache.schema import CONTRACT, level_array, pooled_array, scale_array

_ROWS_PER_READ = 256


class FeatureStore:
    """A finished feature store, open for reading.

    Args:
        location: a folder; an address for fsspec, such as `s3://bucket/store.zarr`; or a Zarr store object.
            Remote files are copied to a temporary folder when they are first read.
        options: for fsspec, when `location` is an address.
        verify: compare every file with its checksum first; for local stores only.

    Attributes:
        location: the folder as a Path, else as given.
        sample, split: text arrays (sample,).
        view: names of the augmented copies of every sample; empty for a store without them.
        levels: names of the levels, finest first.
        pooled: names of the pooled vectors, in the backbone's order.
        attributes: of the root group, with the provenance.
        root: the Zarr group.

    Raises StoreError if there is no store, or it is unfinished, of another contract, or without features.
    """

    def __init__(self, location: str | Path | Store, options: Mapping | None = None, verify: bool = False):
        self._arguments, self._folder = (location, options), None
        is_local = not isinstance(location, Store) and "://" not in str(location)
        self.location = Path(location) if is_local else location
        if is_local and not (self.location / "zarr.json").exists():
            raise self._error(f"There is no feature store at {location}: no writer has published one there.")
        try:
            if is_local:
                self._folder = arrays.StoreFolder(str(location))
            self.root: zarr.Group = zarr.open_group(_with_cache(location, options), mode="r")
        except Exception as error:  # each file system fails in its own way
            reason = f"{type(error).__name__}: {error}"
            raise self._error(f"{location} cannot be opened as a Zarr store: {reason}") from None
        self.attributes = dict(self.root.attrs)
        self._check_attributes()
        if verify:
            if not is_local:
                raise self._error(f"{location} is not a local folder. Copy it to one to verify its checksums.")
            checksums.check(self.location)
        self._read_names()

    def __reduce__(self):
        return FeatureStore, self._arguments

    @property
    def level_arrays(self) -> list[str]:
        """Paths of the levels' features, finest first."""
        return [level_array(level) for level in self.levels]

    @property
    def pooled_arrays(self) -> list[str]:
        """Paths of the pooled vectors."""
        return [pooled_array(name) for name in self.pooled]

    def rows(self, split: str | None = None, fraction: float = 1.0, seed: int = 0) -> np.ndarray:
        """Return the indices, ascending, of a split's samples (None: of all), or of a random fraction.

        Which samples are drawn depends only on their names and the seed. A smaller fraction is a subset of a larger
        one. Raises StoreError if the store has no such split, or the fraction is not above 0 and at most 1.
        """
        if split is not None:
            self._check_name("split", split, sorted(set(self.split.tolist())))
        if not 0 < fraction <= 1:
            raise self._error(
                f"fraction is {fraction}; it must be above 0 and at most 1.", key="fraction", value=fraction
            )
        rows = np.arange(len(self.sample)) if split is None else np.flatnonzero(self.split == split)
        if fraction == 1:
            return rows
        keys = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in self.sample[rows].tolist()]
        order = sorted(range(len(rows)), key=keys.__getitem__)
        return np.sort(rows[order[: max(1, round(fraction * len(rows)))]])

    def read(self, name: str, index: np.ndarray, view: str | None = None) -> np.ndarray:
        """Read samples of an array.

        Args:
            name: path of the array, such as `level0/features`.
            index: indices of samples (sample,), in any order.
            view: name of the augmented copy; None for the first.

        Returns:
            (sample, …) in the order of `index`, in the dtype that was written; int8 is dequantized.

        Raises StoreError if there is no such array, sample or view, or a file is missing or damaged.
        """
        array, rows = self.array(name), self.row_index(index, view)
        out = np.empty((len(rows), *array.shape), array.dtype)
        with ThreadPoolExecutor(arrays.READ_THREADS) as pool:
            for start in range(0, len(rows), _ROWS_PER_READ):
                part = slice(start, start + _ROWS_PER_READ)
                arrays.gather([arrays.ReadRequest(array, rows[part].tolist(), out[part])], pool)
        return out

    def array(self, name: str) -> arrays.AnyArray:
        """Return the rows of an array, such as `level0/features`; StoreError if there is none."""
        if name not in self._arrays:
            self._check_name("name", name, self.level_arrays + self.pooled_arrays)
            self._arrays[name] = self._open(name)
        return self._arrays[name]

    def row_index(self, index: np.ndarray, view: str | None = None) -> np.ndarray:
        """Return rows, int64 (sample,), of a view of samples; StoreError if one does not exist."""
        index = self.validate_index(index)
        if view is None:
            return index * max(1, len(self.view))
        self._check_name("view", view, self.view)
        return index * len(self.view) + self.view.index(view)

    def validate_index(self, index: np.ndarray) -> np.ndarray:
        """Return indices of samples as int64 (sample,); StoreError unless integers in range."""
        index = np.asarray(index)
        if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
            raise self._error(
                f"Samples are selected by a list of integers; this is {index.ndim}-dimensional {index.dtype}. "
                "Convert a mask with np.flatnonzero.",
                key="index", value=str(index.dtype),
            )  # fmt: skip
        index = index.astype(np.int64, copy=False)
        if index.size and (index.min() < 0 or index.max() >= len(self.sample)):
            limits = int(index.min()), int(index.max())
            raise self._error(
                f"{self.location} has samples 0 to {len(self.sample) - 1}; the index has {limits[0]} to {limits[1]}.",
                key="index", value=limits,
            )  # fmt: skip
        return index

    def statistics(self, level: str) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, float64 (channel,), of a level over the training split."""
        self._check_name("level", level, self.levels)
        mean, std = (np.asarray(self.root[level][name][:]) for name in ("mean", "std"))
        return mean, std

    def _check_attributes(self) -> None:
        if not self.attributes.get("complete"):
            raise self._error(
                f"{self.location} was never finished. Delete it and extract it again.", key="complete", value=False
            )
        if (contract := self.attributes.get("contract")) != CONTRACT:
            raise self._error(
                f"{self.location} has contract {contract}; this version reads contract {CONTRACT}. Extract it again, "
                "or read it with the version that wrote it.",
                key="contract", value=contract, allowed=[CONTRACT],
            )  # fmt: skip
        if reason := self.attributes.get("skipped"):
            raise self._error(f"{self.location} has no features: {reason}", key="skipped", value=reason)

    def _read_names(self) -> None:
        self.sample = np.array(self.root["sample"][:].tolist())
        self.split = np.array(self.root["split"][:].tolist())
        self.view = self.root["view"][:].tolist() if "view" in self.root else []
        for name in ("sample", "split", "view"):
            if "" in getattr(self, name):  # what zarr reads in place of a missing file
                raise self._error(
                    f"{self.location} has lost a file of its array '{name}', so some entries are empty. Copy the "
                    "store again from its source, or delete it and extract it again.",
                    key=name,
                )
        levels = [name for name in self.root.group_keys() if re.fullmatch(r"level\d+", name)]
        self.levels = sorted(levels, key=lambda name: int(name.removeprefix("level")))
        self.pooled = list(self.root["pooled"].attrs["vectors"])
        self._arrays: dict[str, arrays.AnyArray] = {}

    def _open(self, name: str) -> arrays.AnyArray:
        n_leading = 2 if self.view else 1

        def rows(path: str) -> arrays.LocalArray | arrays.RemoteArray:
            stored = self.root[path]
            if self._folder and arrays.has_row_layout(stored):
                return arrays.LocalArray(stored, self._folder, n_leading)
            return arrays.RemoteArray(stored, n_leading)

        if self.root[name].dtype != np.int8:
            return rows(name)
        return arrays.DequantizedArray(rows(name), rows(scale_array(name)), self.attributes["dtype"])

    def _check_name(self, key: str, name: str, names: Sequence[str]) -> None:
        if name not in names:
            raise self._error(
                f"{self.location} has no {key} '{name}'; it has {', '.join(names) or 'none'}.",
                key=key, value=name, allowed=names,
            )  # fmt: skip

    def _error(self, message: str, **fields) -> StoreError:
        path = self.location if isinstance(self.location, (str, Path)) else None
        return StoreError(message, path=path, **fields)


class _FileCache(SimpleCacheFileSystem):
    """fsspec's cache of whole files, which cannot read ranges that count from the end by itself."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_) -> bytes:
        with self.open(path) as file:
            selected = range(file.seek(0, os.SEEK_END))[start:end]
            file.seek(selected.start)
            return file.read(len(selected))


def _with_cache(location: str | Path | Store, options: Mapping | None) -> Any:
    """Copy whole files on first use: DVC's file system, and some web servers, return no byte ranges."""
    if isinstance(location, str) and "://" in location:
        files, path = fsspec.core.url_to_fs(location, **(options or {}))
    elif isinstance(location, FsspecStore) and isinstance(location.fs, AsyncFileSystemWrapper):
        files, path = location.fs.sync_fs, location.path
    else:
        return location
    cached = AsyncFileSystemWrapper(_FileCache(fs=files), asynchronous=True)
    return FsspecStore(cached, read_only=True, path=path)


def check_aligned(stores: Sequence[FeatureStore]) -> None:
    """Check that stores have the same samples in the same order, with the same splits and views.

    Raises StoreError for the first two stores that differ; `key` is `sample`, `split` or `view`.
    """
    first = stores[0]
    for store in stores[1:]:
        for key in ("sample", "split", "view"):
            a, b = np.asarray(getattr(first, key)), np.asarray(getattr(store, key))
            if np.array_equal(a, b):
                continue
            values: list = [len(a), len(b)]
            difference = f"differ in their number of {key}s"
            if len(a) == len(b):
                row = int(np.argmax(a != b))
                difference, values = f"differ in '{key}' at row {row}", [str(a[row]), str(b[row])]
            raise StoreError(
                f"{first.location} and {store.location} {difference}: {values[0]} and {values[1]}. Extract "
                "both again from one images store.",
                key=key, value=values[1], allowed=[values[0]],
            )  # fmt: skip
