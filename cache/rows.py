"""Rows of one stored array, gathered into the caller's memory.

`LocalRows` maps the shard files into memory and copies each row from where it lies to where it is wanted. What is
mapped counts as the process's memory, so it is let go after every `_WINDOW` bytes: memory stays bounded whatever the
store's size, and pages that the system still has are mapped again at little cost (benchmarks/reader and memory;
`pread` into the same place was slower, see LAB.md). `RemoteRows` asks zarr-python, wherever the store is.

A row is one sample, or in a store with views one view of one sample: `sample * views + view`.
"""

import mmap
import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import prod

import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec

from cache import shard
from cache.codecs import restore
from cache.schema import CHUNK_KEYS, StoreError

THREADS = 4
# Bytes of rows copied from a store between two lettings go of its mapped pages.
_WINDOW = 1 << 28
# Below this many bytes a batch is read by the thread that asks for it.
_SMALL = 1 << 19
# Rows of each array in a batch that are asked whether they are in the page cache.
_ASKED = 2
_MOST_FILES = 1 << 14
_CHECK = "Check the store with: python -m cache.verify PATH"


class Files:
    """Files of one store, mapped into memory, the most recently used of them.

    They are opened relative to the store's folder as it was: a store that is replaced meanwhile is noticed. A file
    that is cut short while it is mapped ends the process, as with any memory map; stores never change in place.

    Attributes:
        lock: to be held while calling `open`.
    """

    def __init__(self, folder: str):
        self.folder, self.lock = folder, threading.Lock()
        self._root = _Folder(folder)
        self._open: OrderedDict[str, np.ndarray] = OrderedDict()
        self._limit, self._copied = _files_allowed(), 0

    def open(self, path: str) -> np.ndarray:
        """The bytes of the file at `path` within the store; they stay mapped while anyone holds what is returned."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            number = os.open(path, os.O_RDONLY, dir_fd=self._root.number)
        except FileNotFoundError:
            raise StoreError(
                f"{path} is missing from {self.folder}, or that store was replaced while it was read. {_CHECK}"
            ) from None
        try:
            if not os.fstat(number).st_size:
                raise StoreError(f"{path} of {self.folder} is damaged: it is empty. {_CHECK}")
            content = np.frombuffer(mmap.mmap(number, 0, prot=mmap.PROT_READ), dtype=np.uint8)
        finally:
            os.close(number)
        self._open[path] = content
        while len(self._open) > self._limit:
            self._open.popitem(last=False)
        return content

    def count(self, copied: int) -> None:
        """Note that so many bytes are about to be copied; let go of what is mapped once they are a window."""
        self._copied += copied
        if self._copied > _WINDOW:
            self._copied = 0
            for content in self._open.values():
                content.base.obj.madvise(mmap.MADV_DONTNEED)

    def at_hand(self, path: str, offset: int) -> bool:
        """Whether the page at `offset` is in the system's page cache; True where the system does not say."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        number = os.open(path, os.O_RDONLY, dir_fd=self._root.number)
        try:
            return os.preadv(number, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError:  # this file system does not say
            return True
        finally:
            os.close(number)


class _Folder:
    """A folder's descriptor, which closes with it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def _files_allowed() -> int:
    """How many files one store may hold open: a quarter of what the process may.

    The usual limit of 1,024 is there for programs that call `select`; like Go's runtime this asks for what the
    system grants, since opening a file again for every row would cost more than reading it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, 4 * _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else min(_MOST_FILES, max(16, soft // 4))


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
        self._index: dict[int, np.ndarray | None] = {}

    def gather(self, index: Sequence[int], out: np.ndarray) -> None:
        """Rows `index`, in that order, to `out` (row, …), each of whose rows is contiguous."""
        target = out.reshape(len(index), -1, copy=False).view(np.uint8)
        with self._files.lock:
            self._files.count(len(index) * self._bytes)
            found = [self._find(*divmod(row, self._rows)) for row in index]
        if not self._compressed:
            np.concatenate([content[None, start:stop] for _, content, start, stop in found], out=target)
            return
        for (path, content, start, stop), into in zip(found, target, strict=True):
            try:
                blosc.decompress(content[start:stop], into)
            except (RuntimeError, ValueError):
                raise StoreError(
                    f"{path} of {self._files.folder} is damaged: a chunk cannot be decompressed. {_CHECK}"
                ) from None

    def at_hand(self, row: int) -> bool:
        """Whether a row can be read without waiting for the disk, by its first page."""
        with self._files.lock:
            path, _, start, _ = self._find(*divmod(row, self._rows))
            return self._files.at_hand(path, start)

    def advise(self, index: Sequence[int]) -> None:
        """Tell the system that rows will be read soon, so that it fetches them side by side."""
        with self._files.lock:
            for row in index:
                _, content, start, stop = self._find(*divmod(row, self._rows))
                start -= start % mmap.PAGESIZE
                content.base.obj.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def _find(self, number: int, row: int) -> tuple[str, np.ndarray, int, int]:
        """Where a row lies: path, the file's bytes, start and stop."""
        path = f"{self._path}/c.{number}{self._tail}"
        content = self._files.open(path)
        if number not in self._index:
            self._index[number] = self._read_index(path, content)
        if self._index[number] is None:
            return path, content, row * self._bytes, (row + 1) * self._bytes
        start, length = self._index[number][row].tolist()
        if start == shard.EMPTY:
            raise StoreError(f"{path} of {self._files.folder} lacks its row {row}: it was never written. {_CHECK}")
        return path, content, start, start + length

    def _read_index(self, path: str, content: np.ndarray) -> np.ndarray | None:
        """Offset and length of a file's rows; None where they follow one another from the start."""
        try:
            if not self._sharded:
                if len(content) != self._rows * self._bytes:
                    raise ValueError(f"it has {len(content)} bytes, not {self._rows * self._bytes}")
                return None
            tail = content[-shard.index_bytes(self._rows) :].tobytes()
            index = shard.decode_index(tail, self._rows)
            written = index[index[:, 1] != shard.EMPTY]
            if not self._compressed and (written[:, 1] != self._bytes).any():
                raise ValueError("its index gives rows of another length")
            if (written.sum(axis=1) > len(content)).any():
                raise ValueError("its index points beyond its end")
        except ValueError as error:
            raise StoreError(f"{path} of {self._files.folder} is damaged: {error}. {_CHECK}") from None
        plain = np.arange(self._rows, dtype="<u8") * self._bytes
        return None if not self._compressed and np.array_equal(index[:, 0], plain) else index


class RemoteRows:
    """Rows of an array through zarr-python, from any store it can open: slower, and by the same interface."""

    def __init__(self, array: zarr.Array, leading: int):
        self._array, self._views = array, array.shape[1:leading]
        self.shape, self.dtype = array.shape[leading:], array.dtype
        self._step = array.chunks[0]
        # A chunk of many rows is kept for the others of a batch.
        self._chunk = lru_cache(maxsize=8)(lambda start: array[start : start + self._step])

    def gather(self, index: Sequence[int], out: np.ndarray) -> None:
        for row, target in zip(index, out, strict=True):
            sample, *view = divmod(row, *self._views) if self._views else (row,)
            if self._step == 1:
                target[...] = self._array[(sample, *view)]
            else:
                target[...] = self._chunk(sample - sample % self._step)[(sample % self._step, *view)]

    def at_hand(self, row: int) -> bool:
        return True

    def advise(self, index: Sequence[int]) -> None:
        """Nothing that can be told ahead."""


class ScaledRows:
    """Rows of 8-bit steps times their scale, as floats of `dtype`."""

    def __init__(self, steps: LocalRows | RemoteRows, scale: LocalRows | RemoteRows, dtype: str):
        self._steps, self._scale = steps, scale
        self.shape, self.dtype = steps.shape, np.dtype(dtype)
        self._own = threading.local()

    def gather(self, index: Sequence[int], out: np.ndarray) -> None:
        if not hasattr(self._own, "steps"):
            self._own.steps = np.empty((1, *self._steps.shape), np.int8)
            self._own.scale = np.empty((1, *self._scale.shape), np.float32)
        for row, target in zip(index, out, strict=True):
            self._steps.gather([row], self._own.steps)
            self._scale.gather([row], self._own.scale)
            restore(self._own.steps[0], self._own.scale[0], target)

    def at_hand(self, row: int) -> bool:
        return self._steps.at_hand(row)

    def advise(self, index: Sequence[int]) -> None:
        self._steps.advise(index)
        self._scale.advise(index)


# Rows of an array, which of them, and where they go.
Part = tuple[LocalRows | RemoteRows | ScaledRows, list[int], np.ndarray]


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


def gather(parts: Sequence[Part], pool: ThreadPoolExecutor) -> bool:
    """Read the rows of every part, side by side.

    Returns:
        Whether some of them had to come from the disk, as far as a few can tell.
    """
    cold = not all(rows.at_hand(row) for rows, index, _ in parts for row in index[:_ASKED])
    if cold:
        for rows, index, _ in parts:
            rows.advise(index)
    count, size = len(parts[0][1]), sum(out.nbytes for _, _, out in parts)
    threads = THREADS if cold else min(THREADS, os.cpu_count() or 1, 1 + size // _SMALL)

    def share(number: int) -> None:
        some = slice(count * number // threads, count * (number + 1) // threads)
        for rows, index, out in parts:
            if index[some]:
                rows.gather(index[some], out[some])

    others = [pool.submit(share, number) for number in range(1, threads)]
    share(0)
    for other in others:
        other.result()
    return cold
