"""Read stores that are not a local folder: opened through fsspec, decoded by zarr-python."""

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

_CACHED_FILES = 8
_CACHED_CHUNKS = 8


def open_store(location: str | Store, options: Mapping | None) -> Store:
    """Open the Zarr store at an address, such that byte ranges of its files can be read.

    DVC's file system, and web servers without range requests, return whole files only or fail.

    Args:
        options: for fsspec.

    Raises:
        FileNotFoundError: there is no zarr.json.
    """
    store = zarr.open_group(location, mode="r", storage_options=options).store
    whole = sync(store.get("zarr.json", default_buffer_prototype())).to_bytes()
    try:
        tail = sync(store.get("zarr.json", default_buffer_prototype(), SuffixByteRequest(4))).to_bytes()
    except Exception:  # each file system fails in its own way
        tail = b""
    return store if tail == whole[-4:] else WholeFileStore(store)


class WholeFileStore(WrapperStore):
    """Serve byte ranges from whole files, of which it caches the last few."""

    def __init__(self, store: Store):
        super().__init__(store)
        self._files, self._lock = OrderedDict(), asyncio.Lock()

    async def get(self, key, prototype, byte_range=None):
        """Return a file or a range of its bytes."""
        async with self._lock:  # requests for one file must fetch it once
            if key not in self._files:
                self._files[key] = await self._store.get(key, prototype)
            self._files.move_to_end(key)
            value = self._files[key]
            while len(self._files) > _CACHED_FILES:
                self._files.popitem(last=False)
        if value is None or byte_range is None:
            return value
        if isinstance(byte_range, RangeByteRequest):
            return value[byte_range.start : byte_range.end]
        if isinstance(byte_range, OffsetByteRequest):
            return value[byte_range.offset :]
        return value[-byte_range.suffix :]

    async def get_partial_values(self, prototype, key_ranges):
        """Return several ranges."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]


class RemoteArray:
    """Rows of an array through zarr-python, from any store: the interface of `LocalArray`, but slower.

    Args:
        array: the Zarr array.
        n_leading: number of leading axes that count rows: 1, or 2 in a store with views.

    Attributes:
        shape, dtype: of one row.
    """

    def __init__(self, array: zarr.Array, n_leading: int):
        self._array, self._views = array, array.shape[1:n_leading]
        self.shape, self.dtype = array.shape[n_leading:], array.dtype
        self._chunk_rows = array.chunks[0]
        # A batch often needs several rows of one chunk.
        self._chunk = lru_cache(maxsize=_CACHED_CHUNKS)(lambda start: array[start : start + self._chunk_rows])

    def locate(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """Return sample, and view in a store with views, of each row."""
        return [divmod(row, self._views[0]) if self._views else (row,) for row in rows]

    def read(self, locations: Sequence[tuple[int, ...]], out: np.ndarray) -> None:
        """Read rows to `out` (row, …)."""
        # In the order of the files, since some stores fetch whole files only.
        for position in sorted(range(len(locations)), key=locations.__getitem__):
            sample, *view = locations[position]
            if self._chunk_rows == 1:
                out[position] = self._array[locations[position]]
            else:
                chunk = np.asarray(self._chunk(sample - sample % self._chunk_rows))
                out[position] = chunk[(sample % self._chunk_rows, *view)]

    def in_page_cache(self, location: tuple) -> bool:
        """Return True: the state of a remote file is unknown."""
        return True

    def prefetch(self, locations: Sequence[tuple]) -> None:
        """Do nothing: fsspec has no request to load ahead."""
