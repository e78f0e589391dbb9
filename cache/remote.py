"""Stores that are not a local folder: opened through fsspec, read by zarr-python."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

# Whole files kept, where parts of files cannot be read.
_KEPT = 8


def open_store(location: str | Store, options: Mapping | None) -> Store:
    """The Zarr store at an address, one that can give parts of files.

    DVC's file system, and web servers without ranges, give whole files only or fail.

    Raises:
        FileNotFoundError: there is no zarr.json.
    """
    store = zarr.open_group(location, mode="r", storage_options=options).store
    whole = sync(store.get("zarr.json", default_buffer_prototype())).to_bytes()
    try:
        part = sync(store.get("zarr.json", default_buffer_prototype(), SuffixByteRequest(4))).to_bytes()
    except Exception:  # each file system fails in its own way
        part = b""
    return store if part == whole[-4:] else WholeFiles(store)


class WholeFiles(WrapperStore):
    """Fetches whole files and gives parts of them, remembering the last few."""

    def __init__(self, store: Store):
        super().__init__(store)
        self._files, self._fetching = OrderedDict(), asyncio.Lock()

    async def get(self, key, prototype, byte_range=None):
        async with self._fetching:  # others want the same file
            if key not in self._files:
                self._files[key] = await self._store.get(key, prototype)
            self._files.move_to_end(key)
            value = self._files[key]
            while len(self._files) > _KEPT:
                self._files.popitem(last=False)
        if value is None or byte_range is None:
            return value
        if isinstance(byte_range, RangeByteRequest):
            return value[byte_range.start : byte_range.end]
        if isinstance(byte_range, OffsetByteRequest):
            return value[byte_range.offset :]
        return value[-byte_range.suffix :]

    async def get_partial_values(self, prototype, key_ranges):
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]


class RemoteArray:
    """Rows of an array through zarr-python, from any store it can open: slower, and by the same interface."""

    def __init__(self, array: zarr.Array, leading: int):
        self._array, self._views = array, array.shape[1:leading]
        self.shape, self.dtype = array.shape[leading:], array.dtype
        self._step = array.chunks[0]
        # A chunk of many rows is kept for the others of a batch.
        self._chunk = lru_cache(maxsize=8)(lambda start: array[start : start + self._step])

    def locate(self, index: Sequence[int]) -> list[tuple[int, ...]]:
        """Sample, and view where there are views, of each row."""
        return [divmod(row, *self._views) if self._views else (row,) for row in index]

    def read(self, places: Sequence[tuple[int, ...]], out: np.ndarray) -> None:
        # File after file, since some stores can fetch whole files only.
        for number in sorted(range(len(places)), key=places.__getitem__):
            sample, *view = places[number]
            if self._step == 1:
                out[number] = self._array[places[number]]
            else:
                out[number] = self._chunk(sample - sample % self._step)[(sample % self._step, *view)]

    def in_page_cache(self, place: tuple) -> bool:
        return True

    def prefetch(self, places: Sequence[tuple]) -> None:
        """Nothing that can be told ahead."""
