"""Read random rows of stored arrays from memory-mapped files, in parallel.

`LocalArray` maps the shard files into memory and copies each row to its destination. `pread` to the same destination
is slower (LAB.md). Mapped pages count as memory of the process, so `MmapPool` releases them above a
limit: memory is bounded for stores of any size. `cache.remote.RemoteArray` has the same interface for
stores that are not a local folder, and `DequantizedArray` for int8.

A row is one sample or, in a store with views, one view of one sample: `row = sample * n_views + view`.
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
from contextlib import suppress
from functools import cache
from itertools import pairwise
from math import prod
from typing import ClassVar

import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec

from cache.codecs import EMPTY, decode_index, dequantize, index_size
from cache.errors import StoreError
from cache.remote import RemoteArray
from cache.schema import CHUNK_KEYS

VERIFY_HINT = "Check the store with: python -m cache.verify PATH"
READ_THREADS = 4
_MAX_OPEN_FILES = 1 << 14
# Bytes of a batch per reading thread: with fewer, a thread costs more than it saves.
_BYTES_PER_THREAD = 1 << 20
_CORES = os.cpu_count() or 1
# Rows of each array in a batch that are looked up in the page cache; looking up all would take as long as reading.
_ROWS_PROBED = 2


@cache
def max_open_files() -> int:
    """Return how many files all stores together may hold open, after raising the limit of the process.

    It is a quarter of the limit, since a mapped file uses two descriptors. The usual limit of 1,024 exists for
    programs that call `select`; like Go's runtime, this raises it to what the system grants, because opening a file
    again for every row would cost as much as reading the row.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 4 * _MAX_OPEN_FILES
    target = limit if hard == resource.RLIM_INFINITY else min(hard, limit)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    return _MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(_MAX_OPEN_FILES, soft // 4)


class MmapPool:
    """Open and map the files of one store, within the limits on open files and on mapped memory.

    Files are opened relative to the folder as it was at the start, so a store that is replaced meanwhile is
    noticed. As with any memory map, a file that is truncated while it is mapped kills the process; stores never
    change in place.

    Args:
        folder: the store's folder.
        max_mapped_bytes: bytes that may stay mapped, or None for a tenth of the machine's memory.

    Attributes:
        lock: hold it while calling `open`, and while reading `opened`.
        opened: for each array, (path, file, chunk index) by number of the shard file; emptied when too many files
            are open.
    """

    _live: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, folder: str, max_mapped_bytes: int | None = None):
        self.folder, self.lock = folder, threading.Lock()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._max_mapped_bytes = memory // 10 if max_mapped_bytes is None else max_mapped_bytes
        self.opened: dict[str, dict[int, tuple]] = defaultdict(dict)
        self._root, self._open_count = _Descriptor(folder, os.O_DIRECTORY), 0
        # Mapped bytes that remain after a release, such as those of other stores.
        self._baseline_bytes = _mapped_bytes()
        self._is_too_large = False
        MmapPool._live.add(self)

    def open(self, path: str) -> "MmapFile":
        """Open and map the file at `path` in the store; it stays open as long as the returned object exists.

        Raises:
            StoreError: the file is missing.
        """
        if self._open_count >= max(1, max_open_files() // len(MmapPool._live)):
            self._open_count = 0
            for files in self.opened.values():
                files.clear()
        self._open_count += 1
        try:
            file = MmapFile(path, self._root.number)
        except FileNotFoundError:
            raise StoreError(
                f"{path} is missing from {self.folder}, or that store was replaced while it was read. {VERIFY_HINT}",
                value=path,
                path=self.folder,
            ) from None
        if file.map:
            self._disable_huge_pages(file.map)
        return file

    def release_excess(self) -> None:
        """Release mapped pages if there are more than allowed; call it with `lock` held, before copying rows."""
        if _mapped_bytes() - self._baseline_bytes <= self._max_mapped_bytes:
            return
        maps = [file.map for files in self.opened.values() for _, file, _ in files.values() if file.map]
        if not self._is_too_large and sum(map(len, maps)) > self._max_mapped_bytes:
            self._is_too_large = True
        for file_map in maps:
            self._disable_huge_pages(file_map)
            file_map.madvise(mmap.MADV_DONTNEED)
        self._baseline_bytes = _mapped_bytes()

    def _disable_huge_pages(self, file_map: mmap.mmap) -> None:
        """For a store too large to stay mapped: one row read should not map 2 MB."""
        if self._is_too_large and hasattr(mmap, "MADV_NOHUGEPAGE"):
            with suppress(OSError):  # a system without huge pages
                file_map.madvise(mmap.MADV_NOHUGEPAGE)

    @staticmethod
    def _after_fork() -> None:
        """Replace locks in a forked child, where no thread releases one that a thread of the parent held."""
        _statm.cache_clear()
        for pool in MmapPool._live:
            pool.lock = threading.Lock()


os.register_at_fork(after_in_child=MmapPool._after_fork)


@cache
def _statm() -> "_Descriptor | None":
    try:
        return _Descriptor("/proc/self/statm")
    except OSError:
        return None


def _mapped_bytes() -> int:
    """Bytes of mapped files in this process's memory as the system counts them; 0 where it does not count.

    They cannot be computed from the rows read: how much more than the touched page is mapped differs between
    kernels, up to 2 MB.
    """
    statm = _statm()
    if statm is None:
        return 0
    return int(os.pread(statm.number, 128, 0).split()[2]) * mmap.PAGESIZE


class _Descriptor:
    """A file descriptor that is closed when the object is deleted."""

    def __init__(self, path: str, flags: int = 0, dir_fd: int | None = None):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | flags, dir_fd=dir_fd)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


class MmapFile(_Descriptor):
    """An open, memory-mapped file. It uses two descriptors: the file's and the map's.

    Args:
        path: relative to the folder.
        folder: descriptor of the folder.

    Attributes:
        content: the file's bytes, uint8 (byte,).
        map: the memory map, None for an empty file.
    """

    def __init__(self, path: str, folder: int):
        super().__init__(path, dir_fd=folder)
        self.map, self.content = None, np.empty(0, np.uint8)
        if os.fstat(self.number).st_size:
            self.map = mmap.mmap(self.number, 0, prot=mmap.PROT_READ)
            self.content = np.frombuffer(self.map, np.uint8)


# Path of a shard file, the file, and the offset and length in bytes of a row in it.
RowLocation = tuple[str, MmapFile, int, int]


class LocalArray:
    """Rows of an array in a local folder, of a layout that `is_mappable` accepts.

    Args:
        array: the Zarr array.
        pool: opens the store's files.
        n_leading: number of leading axes that count rows: 1, or 2 in a store with views.

    Attributes:
        shape, dtype: of one row.
    """

    def __init__(self, array: zarr.Array, pool: MmapPool, n_leading: int):
        codec, file_shape = array.metadata.codecs[0], array.shards or array.chunks
        self._is_sharded = isinstance(codec, ShardingCodec)
        self._is_compressed = self._is_sharded and len(codec.codecs) > 1
        self._pool, self._path, self._suffix = pool, array.path, ".0" * (array.ndim - 1)
        self._rows_per_file, self._n_rows = prod(file_shape[:n_leading]), prod(array.shape[:n_leading])
        self.shape, self.dtype = array.shape[n_leading:], array.dtype
        self._row_bytes = prod(self.shape) * self.dtype.itemsize
        self._chunk_index: dict[int, np.ndarray | None] = {}

    def read(self, locations: Sequence[RowLocation], out: np.ndarray) -> None:
        """Copy rows to `out` (row, …), each row of which is contiguous.

        Raises:
            StoreError: a chunk cannot be decompressed.
        """
        target = out.reshape(len(locations), -1, copy=False).view(np.uint8)
        if self._is_compressed:
            self._decompress(locations, target)
        else:
            rows = [file.content[None, start : start + length] for _, file, start, length in locations]
            np.concatenate(rows, out=target)

    def in_page_cache(self, location: RowLocation) -> bool:
        """Return whether the first byte of a row is in memory; True where the system cannot tell."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        _, file, start, _ = location
        try:
            return os.preadv(file.number, [bytearray(1)], start, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError:  # a file system without RWF_NOWAIT
            return True

    def prefetch(self, locations: Sequence[RowLocation]) -> None:
        """Ask the system to load rows into the page cache, concurrently and without waiting."""
        if hasattr(os, "posix_fadvise"):
            for _, file, start, length in locations:
                os.posix_fadvise(file.number, start, length, os.POSIX_FADV_WILLNEED)

    def _decompress(self, locations: Sequence[RowLocation], target: np.ndarray) -> None:
        for (path, file, start, length), row in zip(locations, target, strict=True):
            try:
                blosc.decompress(file.content[start : start + length], row)
            except (RuntimeError, ValueError):
                raise self._damaged(path, "a chunk cannot be decompressed") from None

    def locate(self, rows: Sequence[int]) -> list[RowLocation]:
        """Return the location of each row, opening files as needed.

        Raises:
            StoreError: a file is missing or damaged, or a row was never written.
        """
        locations = []
        with self._pool.lock:
            self._pool.release_excess()
            opened = self._pool.opened[self._path]
            for number, row in [divmod(row, self._rows_per_file) for row in rows]:
                path, file, index = opened.get(number) or self._open(number)
                start, length = (row * self._row_bytes, self._row_bytes) if index is None else index[row].tolist()
                if start == EMPTY:
                    raise self._damaged(path, f"its row {row} was never written")
                locations.append((path, file, start, length))
        return locations

    def _open(self, number: int) -> tuple[str, MmapFile, np.ndarray | None]:
        path = f"{self._path}/c.{number}{self._suffix}"
        file = self._pool.open(path)
        if number not in self._chunk_index:
            is_plain = not self._is_compressed and len(file.content) == self._plain_size(number)
            # The contract fixes the offsets of rows: reading the index of every file would make a cold start slow.
            self._chunk_index[number] = None if is_plain else self._read_index(path, file)
        opened = self._pool.opened[self._path][number] = path, file, self._chunk_index[number]
        return opened

    def check(self) -> None:
        """Check that every row exists, at the offset that the contract and the index of its file state.

        Raises:
            StoreError: names the first file with an error.
        """
        self.locate(range(self._n_rows))
        plain_offsets = np.arange(self._rows_per_file, dtype="<u8") * self._row_bytes
        for number in range(-(-self._n_rows // self._rows_per_file) if self._is_sharded else 0):
            with self._pool.lock:
                path, file, _ = self._open(number)
            rows = min(self._rows_per_file, self._n_rows - number * self._rows_per_file)
            index = self._read_index(path, file)[:rows]
            if (index[:, 0] == EMPTY).any():
                raise self._damaged(path, "rows were never written")
            if not self._is_compressed and not np.array_equal(index[:, 0], plain_offsets[:rows]):
                raise self._damaged(path, "its rows are not in order without gaps")

    def _plain_size(self, number: int) -> int:
        """Bytes of an uncompressed file that has all its rows."""
        if not self._is_sharded:
            return self._rows_per_file * self._row_bytes
        rows = min(self._rows_per_file, self._n_rows - number * self._rows_per_file)
        return rows * self._row_bytes + index_size(self._rows_per_file)

    def _read_index(self, path: str, file: MmapFile) -> np.ndarray:
        """Offset and length of a file's rows, uint64 (row, 2)."""
        size = len(file.content)
        if not self._is_sharded:
            raise self._damaged(path, f"it has {size} bytes instead of {self._rows_per_file * self._row_bytes}")
        try:
            tail = file.content[-index_size(self._rows_per_file) :].tobytes()
            index = decode_index(tail, self._rows_per_file)
        except ValueError as error:
            raise self._damaged(path, str(error)) from None
        written = index[index[:, 1] != EMPTY]
        if not self._is_compressed and (written[:, 1] != self._row_bytes).any():
            raise self._damaged(path, "its index has rows of another length")
        if (written > size).any() or (written.sum(axis=1) > size).any():
            raise self._damaged(path, "its index points beyond its end")
        return index

    def _damaged(self, path: str, reason: str) -> StoreError:
        return StoreError(
            f"{path} of {self._pool.folder} is damaged: {reason}. {VERIFY_HINT}", value=path, path=self._pool.folder
        )


class DequantizedArray:
    """Rows of an int8 array times their scale, as floats.

    Args:
        quantized: int8 rows (channel, y, x).
        scale: float32 rows (channel,).
        dtype: of the rows that are read.

    Attributes:
        shape, dtype: of one row.
    """

    def __init__(self, quantized: LocalArray | RemoteArray, scale: LocalArray | RemoteArray, dtype: str):
        self._quantized, self._scale = quantized, scale
        self.shape, self.dtype = quantized.shape, np.dtype(dtype)
        self._buffers = threading.local()

    def locate(self, rows: Sequence[int]) -> list[tuple]:
        """Return the location of each row: those of its int8 values and of its scale."""
        return list(zip(self._quantized.locate(rows), self._scale.locate(rows), strict=True))

    def read(self, locations: Sequence[tuple], out: np.ndarray) -> None:
        """Read rows to `out` (row, channel, y, x)."""
        if not hasattr(self._buffers, "quantized"):
            self._buffers.quantized = np.empty((1, *self._quantized.shape), np.int8)
            self._buffers.scale = np.empty((1, *self._scale.shape), np.float32)
        for (quantized, scale), target in zip(locations, out, strict=True):
            self._quantized.read([quantized], self._buffers.quantized)
            self._scale.read([scale], self._buffers.scale)
            dequantize(self._buffers.quantized[0], self._buffers.scale[0], target)

    def in_page_cache(self, location: tuple) -> bool:
        """Return whether the int8 values of a row are in memory."""
        return self._quantized.in_page_cache(location[0])

    def check(self) -> None:
        """Check both arrays, as `LocalArray.check` does."""
        self._quantized.check()
        self._scale.check()

    def prefetch(self, locations: Sequence[tuple]) -> None:
        """Ask the system to load rows into the page cache."""
        self._quantized.prefetch([quantized for quantized, _ in locations])
        self._scale.prefetch([scale for _, scale in locations])


def is_mappable(array: zarr.Array) -> bool:
    """Whether `LocalArray` can read an array: files of raw or Blosc rows, split along the first axis."""
    codecs, sharding = array.metadata.codecs, array.metadata.codecs[0]
    if array.metadata.chunk_key_encoding.to_dict().get("configuration") != {"separator": CHUNK_KEYS["separator"]}:
        return False
    if isinstance(sharding, ShardingCodec):
        codecs = sharding.codecs
        has_whole_rows = array.shards[1:] == array.shape[1:] and sharding.index_location.value == "end"
    else:
        has_whole_rows = array.chunks[1:] == array.shape[1:]
    is_supported = [type(codec) for codec in codecs] in ([BytesCodec], [BytesCodec, BloscCodec])
    is_plain_or_sharded = isinstance(sharding, ShardingCodec) or len(codecs) == 1
    return has_whole_rows and is_supported and is_plain_or_sharded and sys.byteorder == "little"


AnyArray = LocalArray | RemoteArray | DequantizedArray
# An array, its row numbers, and the destination (row, …) of these rows.
ReadRequest = tuple[AnyArray, list[int], np.ndarray]


def gather(requests: Sequence[ReadRequest], pool: ThreadPoolExecutor) -> bool:
    """Read rows of several arrays in parallel.

    Args:
        requests: all for the same number of rows.
        pool: of `READ_THREADS` threads.

    Returns:
        True if the first rows were not in the page cache, so that the disk had to be read.
    """
    is_cold = False
    n_rows = len(requests[0][1])
    step = max(1, max_open_files() // 2 // len(requests))  # each row may be in a separate file
    for start in range(0, n_rows, step):
        part = slice(start, start + step)
        is_cold |= _gather([(array, rows[part], out[part]) for array, rows, out in requests], pool)
    return is_cold


def _gather(requests: Sequence[ReadRequest], pool: ThreadPoolExecutor) -> bool:
    # One thread locates all rows: two would wait for the lock longer than locating takes.
    located = [(array, array.locate(rows), out) for array, rows, out in requests]
    is_cold = not all(
        array.in_page_cache(location) for array, locations, _ in located for location in locations[:_ROWS_PROBED]
    )
    if is_cold:
        for array, locations, _ in located:
            array.prefetch(locations)
    n_rows, n_bytes = len(located[0][1]), sum(out.nbytes for _, _, out in located)
    threads = READ_THREADS if is_cold else min(READ_THREADS, _CORES, 1 + n_bytes // _BYTES_PER_THREAD)
    bounds = [n_rows * number // threads for number in range(threads + 1)]

    def read(start: int, stop: int) -> None:
        for array, locations, out in located:
            if start < stop:
                array.read(locations[start:stop], out[start:stop])

    futures = [pool.submit(read, start, stop) for start, stop in pairwise(bounds[1:])]
    read(*bounds[:2])
    for future in futures:
        future.result()
    return is_cold
