"""Opening a store that is not a local folder, through fsspec and zarr-python."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping

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
