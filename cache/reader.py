"""Reading a finished feature store."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr
from zarr.abc.store import Store

from cache import checksums
from cache.arrays import DequantizedArray, LocalArray, is_mappable
from cache.errors import StoreError
from cache.files import MmapPool
from cache.gather import THREADS, gather
from cache.remote import RemoteArray, open_store
from cache.schema import CONTRACT

# Rows read side by side.
_ROWS_PER_READ = 256


class FeatureStore:
    """A finished feature store, opened for reading.

    Args:
        location: a folder; an address that fsspec knows, such as `s3://bucket/store.zarr`; or a Zarr store object.
        options: for fsspec, when `location` is an address.
        verify: compare every file with its checksum first; a local store only.
        mapped: bytes of a local store that may stay mapped into memory; None for a tenth of the machine's. A store
            that fits is read fastest once its pages are there.

    Attributes:
        location: as given.
        sample, split: text arrays (sample,).
        view: names of the augmented copies of every sample; empty for a store without them.
        levels: names of the levels, finest first.
        pooled: names of the pooled vectors, in the backbone's order.
        attributes: provenance.
        root: the Zarr group itself.

    Raises:
        StoreError: nothing there, a store whose writer did not finish, or one of another contract.
    """

    def __init__(
        self,
        location: str | Path | Store,
        options: Mapping | None = None,
        verify: bool = False,
        mapped: int | None = None,
    ):
        self._opened_with = (location, options, False, mapped)
        try:
            if isinstance(location, Store) or "://" in str(location):
                self.location, self._files = location, None
                store = open_store(location, options)
            else:
                store = self.location = Path(location)
                if not (store / "zarr.json").exists():
                    raise StoreError(f"There is no feature store at {location}; no writer has published one there.")
                self._files = MmapPool(str(store), mapped)
            self.root = zarr.open_group(store, mode="r")
        except StoreError:
            raise
        except Exception as error:  # every file system fails in its own way
            raise StoreError(
                f"{location} cannot be opened as a Zarr store: {type(error).__name__}: {error}"
            ) from None
        self.attributes = dict(self.root.attrs)
        self._check()
        if verify:
            if not self._files:
                raise StoreError(f"{location} is not a local folder; fetch it before checking its checksums.")
            checksums.check(self.location)
        self._describe()

    @classmethod
    def unfinished(cls, folder: Path) -> "FeatureStore":
        """A writer's store whose shards are all there but which is not yet marked complete."""
        features = cls.__new__(cls)
        features.location, features._files = folder, MmapPool(str(folder), mapped=1 << 28)
        features.root = zarr.open_group(folder, mode="r", use_consolidated=False)
        features.attributes = dict(features.root.attrs)
        features._describe()
        return features

    def __reduce__(self):
        return FeatureStore, self._opened_with

    def rows(self, split: str | None = None, fraction: float = 1.0, seed: int = 0) -> np.ndarray:
        """Indices, ascending, of a split's samples (None: all), or of a random fraction of them.

        Which samples are drawn depends on their names and the seed alone, and a smaller fraction is part of a
        larger one.

        Raises:
            StoreError: the store has no such split.
        """
        if split is not None and split not in self.split:
            raise StoreError(f"{self.location} has no split '{split}'; it has {sorted(set(self.split.tolist()))}.")
        chosen = np.arange(len(self.sample)) if split is None else np.flatnonzero(self.split == split)
        if not 0 < fraction <= 1:
            raise StoreError(f"A fraction of {fraction} was asked for; it must be above 0 and at most 1.")
        if fraction == 1:
            return chosen
        draws = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in self.sample[chosen].tolist()]
        order = sorted(range(len(chosen)), key=draws.__getitem__)
        return np.sort(chosen[order[: max(1, round(fraction * len(chosen)))]])

    def read(
        self, name: str, index: np.ndarray, view: str | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Samples `index` of the array `name` (such as `level0/features`), in that order.

        Args:
            view: which augmented copy; None for the first.
            out: where to put them: of their shape and dtype, each row contiguous; None for new memory.

        Returns:
            (len(index), …) in the dtype the store was given, int8 restored.
        """
        rows = self.array(name)
        index = self.row_index(index, view)
        shape = (len(index), *rows.shape)
        out = np.empty(shape, rows.dtype) if out is None else out
        if out.shape != shape or out.dtype != rows.dtype or not (len(out) == 0 or out[0].flags.c_contiguous):
            raise StoreError(
                f"{name} gives {shape} {rows.dtype}, each row contiguous; the memory given is {out.shape} "
                f"{out.dtype}."
            )
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(index), _ROWS_PER_READ):
                some = slice(start, start + _ROWS_PER_READ)
                gather([(rows, index[some].tolist(), out[some])], pool)
        return out

    def array(self, name: str) -> LocalArray | DequantizedArray | RemoteArray:
        """The rows of one array.

        Raises:
            StoreError: the store has no such array.
        """
        if name not in self._arrays:
            self._arrays[name] = self._open(name)
        return self._arrays[name]

    def row_index(self, index: np.ndarray, view: str | None = None) -> np.ndarray:
        """Row numbers of samples' views, int64.

        Raises:
            StoreError: not row numbers, one out of range, or no such view.
        """
        index = self.validate_index(index)
        if view is None:
            return index * max(1, len(self.view))
        if view not in self.view:
            raise StoreError(f"{self.location} has no view '{view}'; it has {self.view or 'none'}.")
        return index * len(self.view) + self.view.index(view)

    def validate_index(self, index: np.ndarray) -> np.ndarray:
        """Sample numbers as int64, each of which the store has.

        Raises:
            StoreError: not row numbers, or one out of range.
        """
        index = np.asarray(index)
        if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
            raise StoreError(
                f"Samples are asked for by a list of row numbers; this is {index.ndim}-dimensional {index.dtype}. "
                "A mask becomes one by np.flatnonzero."
            )
        index = index.astype(np.int64, copy=False)
        if index.size and (index.min() < 0 or index.max() >= len(self.sample)):
            raise StoreError(
                f"{self.location} has samples 0 to {len(self.sample) - 1}; asked for {index.min()} to {index.max()}."
            )
        return index

    def statistics(self, level: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of a level's channels over the training split, float64 (channel,)."""
        if level not in self.levels:
            raise StoreError(f"{self.location} has no level '{level}'; it has {', '.join(self.levels) or 'none'}.")
        return self.root[level]["mean"][:], self.root[level]["std"][:]

    def _check(self) -> None:
        if not self.attributes.get("complete"):
            raise StoreError(f"{self.location} was never finished, so it is not read. Delete it and extract again.")
        if (contract := self.attributes.get("contract")) != CONTRACT:
            raise StoreError(
                f"{self.location} follows contract {contract}; this reader knows {CONTRACT}. Extract it again, or "
                "read it with the version that wrote it."
            )
        if reason := self.attributes.get("skipped"):
            raise StoreError(f"{self.location} holds no features: {reason}")

    def _describe(self) -> None:
        self.sample = np.array(self.root["sample"][:].tolist())
        self.split = np.array(self.root["split"][:].tolist())
        self.view = self.root["view"][:].tolist() if "view" in self.root else []
        for name in ("sample", "split", "view"):
            if "" in getattr(self, name):  # what zarr reads where a file is missing
                raise StoreError(
                    f"{self.location} lacks a file of its array '{name}': some of its samples have none. Fetch the "
                    "store again, or delete it and extract again."
                )
        levels = [name for name in self.root.group_keys() if re.fullmatch(r"level\d+", name)]
        self.levels = sorted(levels, key=lambda name: int(name.removeprefix("level")))
        self.pooled = list(self.root["pooled"].attrs["vectors"])
        self._arrays: dict[str, LocalArray | DequantizedArray | RemoteArray] = {}

    def _open(self, name: str) -> LocalArray | DequantizedArray | RemoteArray:
        known = [f"{level}/features" for level in self.levels] + [f"pooled/{vector}" for vector in self.pooled]
        if name not in known:
            raise StoreError(f"{self.location} has no array '{name}'; it has {', '.join(known)}.")
        array = self.root[name]
        scale = self.root[name.replace("features", "scale")] if array.dtype == np.int8 else None
        local = self._files and all(is_mappable(one) for one in (array, scale) if one is not None)
        leading = 2 if self.view else 1

        def rows(one: zarr.Array) -> LocalArray | RemoteArray:
            return LocalArray(one, self._files, leading) if local else RemoteArray(one, leading)

        return rows(array) if scale is None else DequantizedArray(rows(array), rows(scale), self.attributes["dtype"])


def check_aligned(stores: Sequence[FeatureStore]) -> None:
    """Check that stores hold the same samples in the same order with the same splits and views.

    Raises:
        StoreError: naming the two stores and the first difference.
    """
    first = stores[0]
    for other in stores[1:]:
        for what in ("sample", "split", "view"):
            ours, theirs = np.asarray(getattr(first, what)), np.asarray(getattr(other, what))
            if len(ours) != len(theirs):
                raise StoreError(
                    f"{first.location} has {len(ours)} {what}s, {other.location} has {len(theirs)}. Both must come "
                    "from one images store: extract again."
                )
            if (ours != theirs).any():
                row = int(np.argmax(ours != theirs))
                raise StoreError(
                    f"{first.location} and {other.location} differ in '{what}' at row {row}: '{ours[row]}' and "
                    f"'{theirs[row]}'. Both must come from one images store: extract again."
                )
