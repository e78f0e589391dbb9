"""Read random rows of stored arrays in parallel.

`LocalArray` maps the shard files into memory and copies each row to its destination; `pread` takes 1.5 times as long.
Mapped pages count as memory of the process, so they are released above a limit: memory is bounded for stores of any
size. `RemoteArray` has the same interface for stores that are not a local folder, and `DequantizedArray` for int8.

A row is one sample or, in a store with views, one view of one sample: `row = sample * n_views + view`.
"""

import mmap
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec

from cache.codecs import EMPTY, decode_index, dequantize, index_size
from cache.errors import StoreError
from cache.schema import CHUNK_KEYS

VERIFY_HINT = "Check the store with: python -m cache.verify PATH"
READ_THREADS = 4
_CORES = os.cpu_count() or 1
# Bytes of a store that may stay mapped.
MAX_MAPPED_BYTES = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 10
# Stores that are read at the same time share the files that may be open.
_STORES = 8
# Bytes of a batch per reading thread: with fewer, a thread costs more than it saves.
_BYTES_PER_THREAD = 1 << 20


@cache
def max_open_files() -> int:
    """Return how many files a store may hold open; raises the process's soft limit to the hard one.

    The usual soft limit of 1,024 exists for programs that call `select`. A mapped file uses two descriptors.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(1, limit // 2 // _STORES)


def _mapped_bytes() -> int:
    """Bytes of mapped files in this process's memory as the system counts them; 0 where it does not count.

    They cannot be computed from the rows read: up to 2 MB are mapped around a touched page.
    """
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


class OpenPath:
    """An open file or folder, by its path in `folder` if given; closed when the object is deleted."""

    def __init__(self, path: str, folder: "OpenPath | None" = None):
        self.path, self.descriptor = path, -1
        self.descriptor = os.open(path, os.O_RDONLY, dir_fd=folder and folder.descriptor)

    def __del__(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)


class MmapFile(OpenPath):
    """An open, memory-mapped file of a folder.

    As with any memory map, a file that is truncated meanwhile kills the process; stores never change in place.
    """

    def __init__(self, path: str, folder: OpenPath):
        super().__init__(path, folder)
        is_empty = os.fstat(self.descriptor).st_size == 0
        self.map = None if is_empty else mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        self.content = np.frombuffer(self.map or b"", np.uint8)
        # Offset and length of the rows of a shard, uint64 (row, 2); None if they are in order without gaps.
        self.index: np.ndarray | None = None


class StoreFolder(OpenPath):
    """The folder of a store, opened once: a store that replaces it meanwhile is noticed."""

    def __init__(self, path: str):
        super().__init__(path)
        # Open shard files, by path of the array and number of the file; emptied when there are too many.
        self.files: dict[str, dict[int, MmapFile]] = defaultdict(dict)
        # Mapped bytes that remain after a release, such as those of other stores.
        self._baseline_bytes = _mapped_bytes()

    def open(self, path: str) -> MmapFile:
        """Open and map the file at `path` in the store, for `files`; FileNotFoundError if it does not exist."""
        if sum(map(len, self.files.values())) >= max_open_files():
            for files in self.files.values():
                files.clear()
        return MmapFile(path, self)

    def release_excess(self) -> None:
        """Release mapped pages if there are more than allowed."""
        if _mapped_bytes() - self._baseline_bytes > MAX_MAPPED_BYTES:
            for files in list(self.files.values()):
                for file in list(files.values()):
                    if file.map:
                        file.map.madvise(mmap.MADV_DONTNEED)
            self._baseline_bytes = _mapped_bytes()


class RowLocation(NamedTuple):
    """Where a row is stored, in bytes."""

    file: MmapFile
    start: int
    length: int


class LocalArray:
    """Rows of an array in a local folder, of a layout that `has_row_layout` accepts.

    `n_leading` axes of the Zarr array count rows: 1, or 2 in a store with views. `shape` and `dtype` are of one row.
    """

    def __init__(self, array: zarr.Array, folder: StoreFolder, n_leading: int):
        codec, file_shape = array.metadata.codecs[0], array.shards or array.chunks
        self._is_sharded = isinstance(codec, ShardingCodec)
        self._is_compressed = self._is_sharded and len(codec.codecs) > 1
        self._files = folder.files[array.path]
        self._folder, self._path, self._suffix = folder, array.path, ".0" * (array.ndim - 1)
        self._rows_per_file, self._n_rows = prod(file_shape[:n_leading]), prod(array.shape[:n_leading])
        self.shape, self.dtype = array.shape[n_leading:], array.dtype
        self._row_bytes = prod(self.shape) * self.dtype.itemsize

    def locate(self, rows: Sequence[int]) -> list[RowLocation]:
        """Locate rows; StoreError if a file is missing or damaged, or a row was never written."""
        self._folder.release_excess()
        locations = []
        for number, row in [divmod(row, self._rows_per_file) for row in rows]:
            file = self._files.get(number) or self._open(number)
            start, length = (row * self._row_bytes, self._row_bytes)
            if file.index is not None:
                start, length = file.index[row].tolist()
                if start == EMPTY:
                    raise self._damaged(file.path, f"its row {row} was never written")
            locations.append(RowLocation(file, start, length))
        return locations

    def is_cached(self, location: RowLocation) -> bool:
        """Return whether the first byte of a row is in the page cache; True where the system cannot tell."""
        try:
            return os.preadv(location.file.descriptor, [bytearray(1)], location.start, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except (OSError, AttributeError):  # a file system, or a system, without RWF_NOWAIT
            return True

    def prefetch(self, locations: Sequence[RowLocation]) -> None:
        """Ask the system to load rows into the page cache, concurrently and without waiting."""
        if hasattr(os, "posix_fadvise"):
            for file, start, length in locations:
                os.posix_fadvise(file.descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def read(self, locations: Sequence[RowLocation], out: np.ndarray) -> None:
        """Copy rows to `out` (row, …), whose rows are contiguous; StoreError if a chunk is damaged."""
        target = out.reshape(len(locations), -1, copy=False).view(np.uint8)
        rows = [file.content[start : start + length] for file, start, length in locations]
        if not self._is_compressed:
            np.concatenate([row[None] for row in rows], out=target)
            return
        for location, chunk, row in zip(locations, rows, target, strict=True):
            try:
                blosc.decompress(chunk, row)
            except (RuntimeError, ValueError):
                raise self._damaged(location.file.path, "a chunk cannot be decompressed") from None

    def check(self) -> None:
        """Check that every row exists, at the offset that the contract and the index of its file state."""
        self.locate(range(self._n_rows))
        plain_offsets = np.arange(self._rows_per_file, dtype="<u8") * self._row_bytes
        for number in range(-(-self._n_rows // self._rows_per_file) if self._is_sharded else 0):
            file, n_rows = self._open(number), self._rows_in_file(number)
            index = self._read_index(file)[:n_rows]
            if (index[:, 0] == EMPTY).any():
                raise self._damaged(file.path, "rows were never written")
            if not self._is_compressed and not np.array_equal(index[:, 0], plain_offsets[:n_rows]):
                raise self._damaged(file.path, "its rows are not in order without gaps")

    def _open(self, number: int) -> MmapFile:
        path = f"{self._path}/c.{number}{self._suffix}"
        try:
            file = self._folder.open(path)
        except FileNotFoundError:
            raise StoreError(
                f"{path} is missing from {self._folder.path}, or that store was replaced while it was read. "
                f"{VERIFY_HINT}",
                value=path, path=self._folder.path,
            ) from None  # fmt: skip
        plain_size = self._rows_in_file(number) * self._row_bytes
        if self._is_sharded:
            plain_size += index_size(self._rows_per_file)
        # The contract fixes the offsets of rows: reading the index of every file would make a cold start slow.
        if self._is_compressed or len(file.content) != plain_size:
            file.index = self._read_index(file)
        self._files[number] = file  # only now: another thread may read it at once
        return file

    def _rows_in_file(self, number: int) -> int:
        """Return the rows of a file; a plain chunk is padded to its full size."""
        remaining = self._n_rows - number * self._rows_per_file
        return min(self._rows_per_file, remaining) if self._is_sharded else self._rows_per_file

    def _read_index(self, file: MmapFile) -> np.ndarray:
        """Return offset and length of a file's rows, uint64 (row, 2)."""
        size = len(file.content)
        if not self._is_sharded:
            expected = self._rows_per_file * self._row_bytes
            raise self._damaged(file.path, f"it has {size} bytes instead of {expected}")
        try:
            tail = file.content[-index_size(self._rows_per_file) :].tobytes()
            index = decode_index(tail, self._rows_per_file)
        except ValueError as error:
            raise self._damaged(file.path, str(error)) from None
        written = index[index[:, 1] != EMPTY]
        if not self._is_compressed and (written[:, 1] != self._row_bytes).any():
            raise self._damaged(file.path, "its index has rows of another length")
        if (written > size).any() or (written.sum(axis=1) > size).any():
            raise self._damaged(file.path, "its index points beyond its end")
        return index

    def _damaged(self, path: str, reason: str) -> StoreError:
        folder = self._folder.path
        return StoreError(f"{path} of {folder} is damaged: {reason}. {VERIFY_HINT}", value=path, path=folder)


class RemoteArray:
    """Rows of an array through zarr-python, from any store: the interface of `LocalArray`, but slower."""

    def __init__(self, array: zarr.Array, n_leading: int):
        self._array, self._n_views = array, prod(array.shape[1:n_leading])
        self._has_views = n_leading > 1
        self.shape, self.dtype = array.shape[n_leading:], array.dtype

    def locate(self, rows: Sequence[int]) -> Sequence[int]:
        return rows

    def is_cached(self, row: int) -> bool:
        """Return True: nothing can be loaded ahead."""
        return True

    def read(self, rows: Sequence[int], out: np.ndarray) -> None:
        samples, views = np.divmod(np.asarray(rows), self._n_views)
        for view in np.unique(views):
            is_view = views == view
            selection = (samples[is_view], int(view)) if self._has_views else samples
            out[is_view] = self._array.oindex[selection]


class DequantizedArray:
    """Rows of an int8 array (channel, y, x) times their float32 scale (channel,), as `dtype`."""

    def __init__(self, quantized: LocalArray | RemoteArray, scale: LocalArray | RemoteArray, dtype: str):
        self._quantized, self._scale = quantized, scale
        self.shape, self.dtype = quantized.shape, np.dtype(dtype)

    def locate(self, rows: Sequence[int]) -> list[tuple]:
        return list(zip(self._quantized.locate(rows), self._scale.locate(rows), strict=True))

    def is_cached(self, location: tuple) -> bool:
        return self._quantized.is_cached(location[0])

    def prefetch(self, locations: Sequence[tuple]) -> None:
        self._quantized.prefetch([quantized for quantized, _ in locations])

    def read(self, locations: Sequence[tuple], out: np.ndarray) -> None:
        quantized = np.empty((1, *self._quantized.shape), np.int8)
        scale = np.empty((1, *self._scale.shape), np.float32)
        for (quantized_location, scale_location), target in zip(locations, out, strict=True):
            self._quantized.read([quantized_location], quantized)
            self._scale.read([scale_location], scale)
            dequantize(quantized[0], scale[0], target)

    def check(self) -> None:
        self._quantized.check()
        self._scale.check()


def has_row_layout(array: zarr.Array) -> bool:
    """Whether `LocalArray` can read an array: files of raw or Blosc rows, split along the first axis."""
    codecs, sharding = array.metadata.codecs, array.metadata.codecs[0]
    if array.metadata.chunk_key_encoding.to_dict().get("configuration") != {"separator": CHUNK_KEYS["separator"]}:
        return False
    layouts: list[list[type]] = [[BytesCodec]]
    file_shape, index_is_last = array.shards or array.chunks, True
    if isinstance(sharding, ShardingCodec):
        codecs, index_is_last = sharding.codecs, sharding.index_location.value == "end"
        layouts.append([BytesCodec, BloscCodec])
    has_whole_rows = file_shape[1:] == array.shape[1:]
    return has_whole_rows and index_is_last and list(map(type, codecs)) in layouts and sys.byteorder == "little"


AnyArray = LocalArray | RemoteArray | DequantizedArray


class ReadRequest(NamedTuple):
    """Rows of an array, and the destination (row, …) of these rows."""

    array: AnyArray
    rows: list[int]
    out: np.ndarray


def gather(requests: Sequence[ReadRequest], pool: ThreadPoolExecutor) -> None:
    """Read equally many rows of several arrays in parallel, by a pool of `READ_THREADS` threads."""
    # One thread locates all rows: two would wait for the lock longer than locating takes.
    located = [(request, request.array.locate(request.rows)) for request in requests]
    # Looking up all rows in the page cache would take as long as reading them.
    is_cold = not all(request.array.is_cached(locations[0]) for request, locations in located if locations)
    if is_cold:
        for request, locations in located:
            request.array.prefetch(locations)
    n_rows, n_bytes = len(requests[0].rows), sum(request.out.nbytes for request in requests)
    n_threads = READ_THREADS if is_cold else min(READ_THREADS, _CORES, 1 + n_bytes // _BYTES_PER_THREAD)
    bounds = [n_rows * number // n_threads for number in range(n_threads + 1)]

    def read(start: int, stop: int) -> None:
        for request, locations in located:
            if start < stop:
                request.array.read(locations[start:stop], request.out[start:stop])

    futures = [pool.submit(read, start, stop) for start, stop in pairwise(bounds[1:])]
    read(*bounds[:2])
    for future in futures:
        future.result()
