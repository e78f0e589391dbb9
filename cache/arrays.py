"""Rows of one stored array: where each lies, and how it comes into the caller's memory.

`LocalRows` maps the shard files into memory and copies each row from where it lies to where it is wanted. Pages that
are mapped count as the process's memory, though the system may take them back at any time; they are let go whenever
they are more than may stay mapped, so that memory is bounded whatever the store's size. (`pread` to the
same place was slower; LAB.md.) `cache.remote.RemoteRows` does the same for a store that is elsewhere.

A row is one sample, or in a store with views one view of one sample: `sample * views + view`.
"""

import os
import sys
import threading
from collections.abc import Sequence
from math import prod

import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec

from cache import zarr_shard
from cache.codecs import dequantize
from cache.errors import StoreError
from cache.files import VERIFY_HINT, MmapFile, MmapPool
from cache.remote import RemoteArray
from cache.schema import CHUNK_KEYS


class LocalArray:
    """Rows of an array in a local folder, whose layout `readable` has accepted.

    Attributes:
        shape, dtype: of one row, as it is read.
    """

    def __init__(self, array: zarr.Array, files: MmapPool, leading: int):
        codec, file_shape = array.metadata.codecs[0], array.shards or array.chunks
        self._sharded = isinstance(codec, ShardingCodec)
        self._compressed = self._sharded and len(codec.codecs) > 1
        self._files, self._path, self._tail = files, array.path, ".0" * (array.ndim - 1)
        self._rows, self._total = prod(file_shape[:leading]), prod(array.shape[:leading])
        self.shape, self.dtype = array.shape[leading:], array.dtype
        self._bytes = prod(self.shape) * self.dtype.itemsize
        self._index: dict[int, np.ndarray | None] = {}

    def read(self, places: Sequence[tuple], out: np.ndarray) -> None:
        """Rows at `places`, in that order, to `out` (row, …), each of whose rows is contiguous."""
        target = out.reshape(len(places), -1, copy=False).view(np.uint8)
        if self._compressed:
            self._decompress(places, target)
        else:
            rows = [file.content[None, start : start + length] for _, file, start, length in places]
            np.concatenate(rows, out=target)

    def in_page_cache(self, place: tuple) -> bool:
        """Whether a row can be read without waiting for the disk, by its first byte; True where no one can say."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        _, file, start, _ = place
        try:
            return os.preadv(file.number, [bytearray(1)], start, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError:  # this file system does not say
            return True

    def prefetch(self, places: Sequence[tuple]) -> None:
        """Tell the system that rows will be read soon, so that it fetches them side by side."""
        if hasattr(os, "posix_fadvise"):
            for _, file, start, length in places:
                os.posix_fadvise(file.number, start, length, os.POSIX_FADV_WILLNEED)

    def _decompress(self, places: Sequence[tuple], target: np.ndarray) -> None:
        for (path, file, start, length), row in zip(places, target, strict=True):
            try:
                blosc.decompress(file.content[start : start + length], row)
            except (RuntimeError, ValueError):
                raise self._damaged(path, "a chunk cannot be decompressed") from None

    def locate(self, index: Sequence[int]) -> list[tuple[str, MmapFile, int, int]]:
        """Where rows lie: path, file, offset and length of each."""
        found = []
        with self._files.lock:
            self._files.release_excess()
            opened = self._files.opened[self._path]
            for number, row in [divmod(row, self._rows) for row in index]:
                path, file, places = opened.get(number) or self._open(number)
                start, length = (row * self._bytes, self._bytes) if places is None else places[row].tolist()
                if start == zarr_shard.EMPTY:
                    raise self._damaged(path, f"its row {row} was never written")
                found.append((path, file, start, length))
        return found

    def _open(self, number: int) -> tuple[str, MmapFile, np.ndarray | None]:
        path = f"{self._path}/c.{number}{self._tail}"
        file = self._files.open(path)
        if number not in self._index:
            plain = not self._compressed and len(file.content) == self._plain_size(number)
            # The contract says how plain rows lie: reading every file's index first would make a cold start slow.
            self._index[number] = None if plain else self._read_index(path, file)
        opened = self._files.opened[self._path][number] = path, file, self._index[number]
        return opened

    def check(self) -> None:
        """Check that every row is where its file's index says, and lies as the contract says.

        Raises:
            StoreError: naming the first file of which that is not so.
        """
        self.locate(range(self._total))
        plain = np.arange(self._rows, dtype="<u8") * self._bytes
        for number in range(-(-self._total // self._rows) if self._sharded else 0):
            with self._files.lock:
                path, file, _ = self._open(number)
            rows = min(self._rows, self._total - number * self._rows)
            index = self._read_index(path, file)[:rows]
            if (index[:, 0] == zarr_shard.EMPTY).any():
                raise self._damaged(path, "rows were never written")
            if not self._compressed and not np.array_equal(index[:, 0], plain[:rows]):
                raise self._damaged(path, "its rows do not follow one another")

    def _plain_size(self, number: int) -> int:
        """Bytes of an uncompressed file none of whose rows is missing."""
        if not self._sharded:
            return self._rows * self._bytes
        return min(self._rows, self._total - number * self._rows) * self._bytes + zarr_shard.index_size(self._rows)

    def _read_index(self, path: str, file: MmapFile) -> np.ndarray:
        """Offset and length of a file's rows."""
        size = len(file.content)
        if not self._sharded:
            raise self._damaged(path, f"it has {size} bytes, not {self._rows * self._bytes}")
        try:
            index = zarr_shard.decode_index(file.content[-zarr_shard.index_size(self._rows) :].tobytes(), self._rows)
        except ValueError as error:
            raise self._damaged(path, str(error)) from None
        written = index[index[:, 1] != zarr_shard.EMPTY]
        if not self._compressed and (written[:, 1] != self._bytes).any():
            raise self._damaged(path, "its index gives rows of another length")
        if (written > size).any() or (written.sum(axis=1) > size).any():
            raise self._damaged(path, "its index points beyond its end")
        return index

    def _damaged(self, path: str, how: str) -> StoreError:
        return StoreError(f"{path} of {self._files.folder} is damaged: {how}. {VERIFY_HINT}")


class DequantizedArray:
    """Rows of 8-bit steps times their scale, as floats of `dtype`."""

    def __init__(self, steps: LocalArray | RemoteArray, scale: LocalArray | RemoteArray, dtype: str):
        self._steps, self._scale = steps, scale
        self.shape, self.dtype = steps.shape, np.dtype(dtype)
        self._own = threading.local()

    def locate(self, index: Sequence[int]) -> list[tuple]:
        return list(zip(self._steps.locate(index), self._scale.locate(index), strict=True))

    def read(self, places: Sequence[tuple], out: np.ndarray) -> None:
        if not hasattr(self._own, "steps"):
            self._own.steps = np.empty((1, *self._steps.shape), np.int8)
            self._own.scale = np.empty((1, *self._scale.shape), np.float32)
        for (steps, scale), target in zip(places, out, strict=True):
            self._steps.read([steps], self._own.steps)
            self._scale.read([scale], self._own.scale)
            dequantize(self._own.steps[0], self._own.scale[0], target)

    def in_page_cache(self, place: tuple) -> bool:
        return self._steps.in_page_cache(place[0])

    def check(self) -> None:
        self._steps.check()
        self._scale.check()

    def prefetch(self, places: Sequence[tuple]) -> None:
        self._steps.prefetch([steps for steps, _ in places])
        self._scale.prefetch([scale for _, scale in places])


def is_mappable(array: zarr.Array) -> bool:
    """Whether `LocalRows` understands the layout: files along the first axis, of raw or Blosc rows."""
    codecs, sharding = array.metadata.codecs, array.metadata.codecs[0]
    if array.metadata.chunk_key_encoding.to_dict().get("configuration") != {"separator": CHUNK_KEYS["separator"]}:
        return False
    if isinstance(sharding, ShardingCodec):
        codecs = sharding.codecs
        whole = array.shards[1:] == array.shape[1:] and sharding.index_location.value == "end"
    else:
        whole = array.chunks[1:] == array.shape[1:]
    known = [type(codec) for codec in codecs] in ([BytesCodec], [BytesCodec, BloscCodec])
    plain = isinstance(sharding, ShardingCodec) or len(codecs) == 1
    return whole and known and plain and sys.byteorder == "little"
