"""Rows of one stored array, gathered into the caller's memory.

`LocalRows` maps the shard files into memory and copies each row from where it lies to where it is wanted. Pages that
are mapped count as the process's memory, though the system may take them back at any time; they are let go whenever
as many bytes were copied as may stay mapped, so that memory is bounded whatever the store's size. (`pread` to the
same place was slower; LAB.md.) `RemoteRows` asks zarr-python, wherever the store is.

A row is one sample, or in a store with views one view of one sample: `sample * views + view`.
"""

import mmap
import os
import resource
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import pairwise
from math import prod
from typing import ClassVar

import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec

from cache import shard
from cache.codecs import restore
from cache.schema import CHUNK_KEYS, StoreError

THREADS = 4
# Linux maps so many bytes around the one that is touched.
_MAPPED_AT_ONCE = 1 << 16
# Below this many bytes for each thread a batch is read by fewer.
_SMALL = 1 << 20
_CORES = os.cpu_count() or 1
# Rows of each array in a batch that are asked whether they are in the page cache.
_ASKED = 2
_MOST_FILES = 1 << 14
_CHECK = "Check the store with: python -m cache.verify PATH"


@cache
def _files_allowed() -> int:
    """How many files all stores together may hold open: a quarter of what the process may, since each counts twice.

    The usual limit of 1,024 is there for programs that call `select`; like Go's runtime this asks for what the
    system grants, since opening a file again for every row would cost as much as reading it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4 * _MOST_FILES
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else min(_MOST_FILES, soft // 4)


class Files:
    """Opens files of one store, and sees that no more are open than the process may have.

    They are opened relative to the store's folder as it was: a store that is replaced meanwhile is noticed. A file
    that is cut short while it is open ends the process, as with any memory map; stores never change in place.

    Args:
        folder: the store's.
        mapped: bytes that may stay mapped, or None for a tenth of the machine's memory.

    Attributes:
        lock: to be held while calling `open`, and while using what it gave to others.
        opened: what has been opened, by array and number of the file; emptied when there are too many.
    """

    _live: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, folder: str, mapped: int | None = None):
        self.folder, self.lock = folder, threading.Lock()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._mapped = memory // 10 if mapped is None else mapped
        self.opened: dict[str, dict[int, tuple]] = defaultdict(dict)
        self._root, self._count, self._copied = _Descriptor(folder, os.O_DIRECTORY), 0, 0
        Files._live.add(self)

    def open(self, path: str) -> "_Mapped":
        """The open file at `path` within the store; it stays open while anyone holds what is returned."""
        if self._count >= max(1, _files_allowed() // len(Files._live)):
            self._count = 0
            for files in self.opened.values():
                files.clear()
        self._count += 1
        try:
            return _Mapped(path, self._root.number)
        except FileNotFoundError:
            raise StoreError(
                f"{path} is missing from {self.folder}, or that store was replaced while it was read. {_CHECK}"
            ) from None

    def copying(self, size: int) -> None:
        """Note that so many bytes are about to be copied, and let go of what is mapped if that may be too much."""
        self._copied += size
        if self._copied <= self._mapped:
            return
        self._copied = 0
        if self._size() > self._mapped:
            for files in self.opened.values():
                for _, file, _ in files.values():
                    file.map.madvise(mmap.MADV_DONTNEED)

    def _size(self) -> int:
        """Bytes of all files that are open."""
        return sum(len(file.content) for files in self.opened.values() for _, file, _ in files.values())

    @staticmethod
    def _after_fork() -> None:
        """Another thread may have held the lock of a process when it was forked; it is not here to let go."""
        for files in Files._live:
            files.lock = threading.Lock()


os.register_at_fork(after_in_child=Files._after_fork)


class _Descriptor:
    """A file descriptor that closes with its last holder."""

    def __init__(self, path: str, flags: int = 0, dir_fd: int | None = None):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | flags, dir_fd=dir_fd)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


class _Mapped(_Descriptor):
    """A file that is open and mapped; it has two descriptors, its own and the map's.

    Attributes:
        content: its bytes, uint8.
    """

    def __init__(self, path: str, folder: int):
        super().__init__(path, dir_fd=folder)
        self.map, self.content = None, np.empty(0, np.uint8)
        if os.fstat(self.number).st_size:
            self.map = mmap.mmap(self.number, 0, prot=mmap.PROT_READ)
            self.content = np.frombuffer(self.map, np.uint8)


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

    def at_hand(self, place: tuple) -> bool:
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

    def advise(self, places: Sequence[tuple]) -> None:
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

    def find(self, index: Sequence[int]) -> list[tuple[str, _Mapped, int, int]]:
        """Where rows lie: path, file, offset and length of each."""
        found = []
        with self._files.lock:
            self._files.copying(len(index) * max(self._bytes, _MAPPED_AT_ONCE))
            opened = self._files.opened[self._path]
            for number, row in [divmod(row, self._rows) for row in index]:
                path, file, places = opened.get(number) or self._open(number)
                start, length = (row * self._bytes, self._bytes) if places is None else places[row].tolist()
                if start == shard.EMPTY:
                    raise self._damaged(path, f"its row {row} was never written")
                found.append((path, file, start, length))
        return found

    def _open(self, number: int) -> tuple[str, _Mapped, np.ndarray | None]:
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
        self.find(range(self._total))
        plain = np.arange(self._rows, dtype="<u8") * self._bytes
        for number in range(-(-self._total // self._rows) if self._sharded else 0):
            with self._files.lock:
                path, file, _ = self._open(number)
            rows = min(self._rows, self._total - number * self._rows)
            index = self._read_index(path, file)[:rows]
            if (index[:, 0] == shard.EMPTY).any():
                raise self._damaged(path, "rows were never written")
            if not self._compressed and not np.array_equal(index[:, 0], plain[:rows]):
                raise self._damaged(path, "its rows do not follow one another")

    def _plain_size(self, number: int) -> int:
        """Bytes of an uncompressed file none of whose rows is missing."""
        if not self._sharded:
            return self._rows * self._bytes
        return min(self._rows, self._total - number * self._rows) * self._bytes + shard.index_bytes(self._rows)

    def _read_index(self, path: str, file: _Mapped) -> np.ndarray:
        """Offset and length of a file's rows."""
        size = len(file.content)
        if not self._sharded:
            raise self._damaged(path, f"it has {size} bytes, not {self._rows * self._bytes}")
        try:
            index = shard.decode_index(file.content[-shard.index_bytes(self._rows) :].tobytes(), self._rows)
        except ValueError as error:
            raise self._damaged(path, str(error)) from None
        written = index[index[:, 1] != shard.EMPTY]
        if not self._compressed and (written[:, 1] != self._bytes).any():
            raise self._damaged(path, "its index gives rows of another length")
        if (written > size).any() or (written.sum(axis=1) > size).any():
            raise self._damaged(path, "its index points beyond its end")
        return index

    def _damaged(self, path: str, how: str) -> StoreError:
        return StoreError(f"{path} of {self._files.folder} is damaged: {how}. {_CHECK}")


class RemoteRows:
    """Rows of an array through zarr-python, from any store it can open: slower, and by the same interface."""

    def __init__(self, array: zarr.Array, leading: int):
        self._array, self._views = array, array.shape[1:leading]
        self.shape, self.dtype = array.shape[leading:], array.dtype
        self._step = array.chunks[0]
        # A chunk of many rows is kept for the others of a batch.
        self._chunk = lru_cache(maxsize=8)(lambda start: array[start : start + self._step])

    def find(self, index: Sequence[int]) -> list[tuple[int, ...]]:
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

    def at_hand(self, place: tuple) -> bool:
        return True

    def advise(self, places: Sequence[tuple]) -> None:
        """Nothing that can be told ahead."""


class ScaledRows:
    """Rows of 8-bit steps times their scale, as floats of `dtype`."""

    def __init__(self, steps: LocalRows | RemoteRows, scale: LocalRows | RemoteRows, dtype: str):
        self._steps, self._scale = steps, scale
        self.shape, self.dtype = steps.shape, np.dtype(dtype)
        self._own = threading.local()

    def find(self, index: Sequence[int]) -> list[tuple]:
        return list(zip(self._steps.find(index), self._scale.find(index), strict=True))

    def read(self, places: Sequence[tuple], out: np.ndarray) -> None:
        if not hasattr(self._own, "steps"):
            self._own.steps = np.empty((1, *self._steps.shape), np.int8)
            self._own.scale = np.empty((1, *self._scale.shape), np.float32)
        for (steps, scale), target in zip(places, out, strict=True):
            self._steps.read([steps], self._own.steps)
            self._scale.read([scale], self._own.scale)
            restore(self._own.steps[0], self._own.scale[0], target)

    def at_hand(self, place: tuple) -> bool:
        return self._steps.at_hand(place[0])

    def check(self) -> None:
        self._steps.check()
        self._scale.check()

    def advise(self, places: Sequence[tuple]) -> None:
        self._steps.advise([steps for steps, _ in places])
        self._scale.advise([scale for _, scale in places])


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
    cold = False
    count = len(parts[0][1])
    step = max(1, _files_allowed() // 2 // len(parts))  # each row may be in a file of its own
    for first in range(0, count, step):
        some = slice(first, first + step)
        cold |= _gather([(rows, index[some], out[some]) for rows, index, out in parts], pool)
    return cold


def _gather(parts: Sequence[Part], pool: ThreadPoolExecutor) -> bool:
    # Found by one thread, since two would wait for each other's lock longer than finding takes.
    found = [(rows, rows.find(index), out) for rows, index, out in parts]
    cold = not all(rows.at_hand(place) for rows, places, _ in found for place in places[:_ASKED])
    if cold:
        for rows, places, _ in found:
            rows.advise(places)
    count, size = len(found[0][1]), sum(out.nbytes for _, _, out in found)
    threads = THREADS if cold else min(THREADS, _CORES, 1 + size // _SMALL)
    bounds = [count * number // threads for number in range(threads + 1)]

    def share(start: int, stop: int) -> None:
        for rows, places, out in found:
            if start < stop:
                rows.read(places[start:stop], out[start:stop])

    others = [pool.submit(share, *pair) for pair in pairwise(bounds[1:])]
    share(*bounds[:2])
    for other in others:
        other.result()
    return cold
