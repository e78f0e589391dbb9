"""Rows of one stored array, gathered into the caller's memory.

`LocalRows` knows where every row lies and reads it with one `pread` straight to where it is wanted: as fast as a
memory map (benchmarks/reader), but without mapping pages into the process, so that memory stays bounded, and
without the crash of a mapped file that is cut short. `RemoteRows` asks zarr-python, wherever the store is.

A row is one sample, or in a store with views one view of one sample: `sample * views + view`.
"""

import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from math import prod

import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec

from cache import shard
from cache.codecs import restore
from cache.schema import CHUNK_KEYS, StoreError

THREADS = 4
# Below this many bytes a batch is read by the thread that asks for it.
_SMALL = 1 << 19
# Linux answers at once when a read would have to wait for the disk; elsewhere every read waits.
_AT_ONCE = getattr(os, "RWF_NOWAIT", 0)
_CHECK = "Check the store with: python -m cache.verify PATH"


class Files:
    """Files of one store, the most recently used of them open.

    They are opened relative to the store's folder as it was: a store that is replaced meanwhile is noticed.

    Attributes:
        lock: to be held while calling `open`.
    """

    def __init__(self, folder: str):
        self.folder, self.lock = folder, threading.Lock()
        self._root = _Descriptor(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._limit = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def open(self, path: str) -> "_Descriptor":
        """The open file at `path` within the store; it stays open while anyone holds what is returned."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            opened = self._open[path] = _Descriptor(os.open(path, os.O_RDONLY, dir_fd=self._root.number))
        except FileNotFoundError:
            raise StoreError(
                f"{path} is missing from {self.folder}, or that store was replaced while it was read. {_CHECK}"
            ) from None
        while len(self._open) > self._limit:
            self._open.popitem(last=False)
        return opened


class _Descriptor:
    """A file descriptor that closes with its last holder."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.close(self.number)


class LocalRows:
    """Rows of an array in a local folder, whose layout `readable` has accepted.

    Attributes:
        shape, dtype: of one row, as it is read.
    """

    def __init__(self, array: zarr.Array, files: Files, leading: int):
        codec, file_shape = array.metadata.codecs[0], array.shards or array.chunks
        self._sharded = isinstance(codec, ShardingCodec)
        self._compressed = self._sharded and len(codec.codecs) > 1
        self._files, self._path, self._tail = files, array.path, ".0" * (array.ndim - 1)
        self._rows = prod(file_shape[:leading])
        self.shape, self.dtype = array.shape[leading:], array.dtype
        self._bytes = prod(self.shape) * self.dtype.itemsize
        self._index: dict[int, np.ndarray] = {}

    def targets(self, out: np.ndarray) -> list[memoryview]:
        """The memory of every row of `out`, whose rows are contiguous."""
        return [memoryview(row).cast("B") for row in out]

    def find(self, rows: Sequence[int]) -> list[tuple]:
        """Where rows lie: path, file, offset and length of each."""
        with self._files.lock:
            return [self._find(*divmod(row, self._rows)) for row in rows]

    def read(self, place: tuple, target: memoryview, wait: bool = True) -> bool:
        """Read one row to its target; False if that would mean to wait for the disk and `wait` is false."""
        path, file, offset, length = place
        packed = memoryview(bytearray(length)) if self._compressed else target
        try:
            got = os.preadv(file.number, [packed], offset, *([] if wait else [_AT_ONCE]))
        except OSError:
            if wait:
                raise
            return False
        if got < length:
            if not wait:
                return False
            raise StoreError(f"{path} of {self._files.folder} is damaged: it ends early. {_CHECK}")
        if self._compressed:
            try:
                blosc.decompress(packed, target)
            except (RuntimeError, ValueError):
                raise StoreError(
                    f"{path} of {self._files.folder} is damaged: a chunk cannot be decompressed. {_CHECK}"
                ) from None
        return True

    def advise(self, place: tuple) -> None:
        """Tell the system that a row will be read soon."""
        if hasattr(os, "posix_fadvise"):
            _, file, offset, length = place
            os.posix_fadvise(file.number, offset, length, os.POSIX_FADV_WILLNEED)

    def _find(self, number: int, row: int) -> tuple:
        path = f"{self._path}/c.{number}{self._tail}"
        file = self._files.open(path)
        if not self._sharded:
            return path, file, row * self._bytes, self._bytes
        if number not in self._index:
            self._index[number] = self._read_index(path, file)
        offset, length = self._index[number][row].tolist()
        if offset == shard.EMPTY:
            raise StoreError(f"{path} of {self._files.folder} lacks its row {row}: it was never written. {_CHECK}")
        return path, file, offset, length

    def _read_index(self, path: str, file: _Descriptor) -> np.ndarray:
        size, tail = os.fstat(file.number).st_size, shard.index_bytes(self._rows)
        try:
            index = shard.decode_index(os.pread(file.number, tail, max(0, size - tail)), self._rows)
            if not self._compressed and (index[index[:, 1] != shard.EMPTY, 1] != self._bytes).any():
                raise ValueError("its index gives rows of another length")
        except ValueError as error:
            raise StoreError(f"{path} of {self._files.folder} is damaged: {error}. {_CHECK}") from None
        return index


class RemoteRows:
    """Rows of an array through zarr-python, from any store it can open: slower, and by the same interface."""

    def __init__(self, array: zarr.Array, leading: int):
        self._array, self._views = array, array.shape[1:leading]
        self.shape, self.dtype = array.shape[leading:], array.dtype
        self._step = array.chunks[0]
        # A chunk of many rows is kept for the others of a batch.
        self._chunk = lru_cache(maxsize=8)(lambda start: array[start : start + self._step])

    def targets(self, out: np.ndarray) -> list[np.ndarray]:
        return list(out)

    def find(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """Sample, and view where there are views, of every row."""
        return [divmod(row, *self._views) if self._views else (row,) for row in rows]

    def read(self, place: tuple[int, ...], target: np.ndarray, wait: bool = True) -> bool:
        sample, *view = place
        if self._step == 1:
            target[...] = self._array[place]
        else:
            target[...] = self._chunk(sample - sample % self._step)[(sample % self._step, *view)]
        return True

    def advise(self, place: tuple[int, ...]) -> None:
        pass


class ScaledRows:
    """Rows of 8-bit steps times their scale, as floats of `dtype`."""

    def __init__(self, steps: LocalRows | RemoteRows, scale: LocalRows | RemoteRows, dtype: str):
        self._steps, self._scale = steps, scale
        self.shape, self.dtype = steps.shape, np.dtype(dtype)
        self._own = threading.local()

    def targets(self, out: np.ndarray) -> list[np.ndarray]:
        return list(out)

    def find(self, rows: Sequence[int]) -> list[tuple]:
        return list(zip(self._steps.find(rows), self._scale.find(rows), strict=True))

    def read(self, place: tuple, target: np.ndarray, wait: bool = True) -> bool:
        parts = (self._steps, self._scale)
        if not hasattr(self._own, "memory"):
            self._own.memory = [np.empty((1, *rows.shape), rows.dtype) for rows in parts]
            self._own.targets = [rows.targets(out)[0] for rows, out in zip(parts, self._own.memory, strict=True)]
        for rows, part, own in zip(parts, place, self._own.targets, strict=True):
            if not rows.read(part, own, wait):
                return False
        restore(*[out[0] for out in self._own.memory], target)
        return True

    def advise(self, place: tuple) -> None:
        self._steps.advise(place[0])
        self._scale.advise(place[1])


def readable(array: zarr.Array) -> bool:
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


def gather(requests: Sequence[tuple], pool: ThreadPoolExecutor, size: int) -> int:
    """Read rows, side by side.

    Args:
        requests: (rows object, place, target) of every row.
        size: bytes wanted in all.

    Returns:
        How many rows were not in the system's page cache.
    """
    threads = THREADS if size > _SMALL else 1
    missed = _parallel(pool, threads, requests, _try_each)
    for rows, place, _ in missed:
        rows.advise(place)
    if missed:
        _parallel(pool, THREADS, missed, _read_each)
    return len(missed)


def _try_each(requests: Sequence[tuple]) -> list[tuple]:
    return [request for request in requests if not request[0].read(request[1], request[2], wait=False)]


def _read_each(requests: Sequence[tuple]) -> list:
    for rows, place, target in requests:
        rows.read(place, target)
    return []


def _parallel(pool, threads: int, requests: Sequence[tuple], work) -> list:
    """The concatenated results of `work` on `threads` shares of the requests."""
    if threads == 1:
        return work(requests)
    bounds = [len(requests) * share // threads for share in range(threads + 1)]
    shares = [requests[start:stop] for start, stop in pairwise(bounds)]
    return [item for part in pool.map(work, shares) for item in part]
