"""Writing of images stores, chunk by chunk and by several processes.

The memory of a process does not grow with the dataset.
A chunk of samples is one file and the unit of work. The digest of the content is made of the chunks' digests, so that
processes do not wait for each other.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from cache.atomic import atomic_dir
from cache.schema import CHUNK_KEYS, consolidate_metadata, put_array
from pipeline.data.image_store import (
    SPLITS,
    UNLABELLED,
    ImageDataset,
    LazyImageDataset,
    Sample,
    check_label,
    check_label_is_missing,
    check_location,
    validate_dataset,
    validate_info,
)
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, get_task

if TYPE_CHECKING:
    import zarr

# Largest chunk, in samples and in bytes. Each process holds a few chunks in memory.
CHUNK, CHUNK_BYTES = 64, 32 << 20
# Maximum number of processes: a disk can supply no more, and each uses eight of the open files of this process.
MAX_PROCESSES = 32
# With fewer chunks, this process alone finishes before other processes have started.
MIN_CHUNKS_FOR_PROCESSES = 16
# Band means are taken of every so many pixels in y and x; the bands of a dataset differ by more than this changes.
MEAN_STRIDE = 8
# Samples that the system reads from disk ahead of use; enough to hide the latency of a disk.
PREFETCH_SAMPLES = 16
# Alignment in bytes of writes that bypass the page cache; no common disk has larger blocks.
DISK_BLOCK_BYTES = 4096
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
COORDINATE_ATTRIBUTES = {
    "wavelength": {"units": "micrometre"},
    "lat": {"units": "degrees_north"},
    "lon": {"units": "degrees_east"},
    "time": {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"},
    "transform": {"description": "affine coefficients a to f, from (column, row) of a pixel's corner to the crs"},
}


@dataclass(frozen=True)
class WriteSummary:
    """Number of written samples of each split, and skipped samples by name, with the reason."""

    counts: dict[str, int]
    skipped: dict[str, str]


class UnreadableSamples(Exception):
    """Samples to skip, by name, with the reason."""

    def __init__(self, reasons: dict[str, str]):
        super().__init__(reasons)
        self.reasons = reasons


def write(
    dataset: ImageDataset | LazyImageDataset, scratch: Path, final: Path, workers: int = 0, skip_bad: bool = False
) -> WriteSummary:
    """Write a dataset as an images store that appears at `final` in one step.

    Args:
        scratch: folder to write in, on the file system of `final`.
        workers: processes that read and write a lazy dataset, at most `MAX_PROCESSES`; 0 for one per CPU.
        skip_bad: skip unreadable samples of a lazy dataset and list them in the store.

    Raises:
        UserError: shapes, names, splits or labels that do not fit together, or a sample that cannot be read.
    """
    skipped: dict[str, str] = {}
    while True:
        validate_dataset(dataset) if isinstance(dataset, ImageDataset) else validate_info(dataset)
        try:
            with atomic_dir(scratch, final):
                _write_store(dataset, scratch, workers or len(os.sched_getaffinity(0)), skip_bad, skipped)
            splits = (*SPLITS, *({UNLABELLED} & set(dataset.split)))
            return WriteSummary({split: list(dataset.split).count(split) for split in splits}, skipped)
        except UnreadableSamples as unreadable:  # a store has no gaps: it is written again without these samples
            skipped |= unreadable.reasons
            dataset = _without(dataset, skipped)


def _write_store(
    dataset: ImageDataset | LazyImageDataset, scratch: Path, workers: int, skip_bad: bool, skipped: dict[str, str]
) -> None:
    import zarr  # takes 0.2 s to import; the worker processes need none

    group = zarr.open_group(scratch, mode="w", zarr_format=3)
    count, content = len(dataset.sample), hashlib.sha256()
    in_memory = isinstance(dataset, ImageDataset)
    chunk = _create_arrays(group, dataset, content)
    records = []
    starts = range(0, count, chunk)
    with tqdm(total=count, unit="image", mininterval=2, file=sys.stderr, disable=in_memory) as progress:
        for record in _write_chunks(dataset, scratch, starts, chunk, workers, skip_bad):
            records.append(record)
            progress.update(len(record.time))
    records.sort(key=lambda record: record.start)
    if unreadable := dict(sample for record in records for sample in record.unreadable):
        raise UnreadableSamples(unreadable)
    for record in records:
        content.update("".join(record.digests).encode())
    if not in_memory and dataset.check_band_means:
        dataset.check_band_means(sum(record.band_sums for record in records) / count)
    coordinates = []
    for name, (values, dims) in _small_arrays(dataset, records).items():
        units = COORDINATE_ATTRIBUTES.get(name, {})
        put_array(group, name, values, dims, chunks=(len(values), *values.shape[1:]), attributes=units)
        content.update(f"{name} {values.dtype} {values.shape}".encode())
        content.update("\0".join(values).encode() if values.dtype == object else values.tobytes())
        coordinates += [name] if name != "label" else []
    attributes = _store_attributes(dataset, skipped)
    content.update(repr(sorted(attributes.items())).encode())
    group.attrs.update({**attributes, "content_sha256": content.hexdigest(), "coordinates": " ".join(coordinates)})
    consolidate_metadata(group)


def _create_arrays(group: "zarr.Group", dataset: ImageDataset | LazyImageDataset, content) -> int:
    """Create the arrays of pixels and masks, add them to the digest, and return the samples per chunk."""
    in_memory, count = isinstance(dataset, ImageDataset), len(dataset.sample)
    shape, dtype = (dataset.image.shape[1:], dataset.image.dtype) if in_memory else (dataset.shape, dataset.dtype)
    chunk = min(count, max(1, min(CHUNK, CHUNK_BYTES // (math.prod(shape) * dtype.itemsize))))
    arrays: dict[str, tuple[tuple, np.dtype, dict]] = {"image": (shape, dtype, {"units": dataset.units})}
    if get_task(dataset.task).is_dense:
        mask_dtype = dataset.label.dtype if in_memory else np.dtype("uint8")
        arrays["label"] = (shape[1:], mask_dtype, {"ignore_value": IGNORE})
    for name, (sample_shape, array_dtype, attributes) in arrays.items():
        group.create_array(
            name, shape=(count, *sample_shape), dtype=array_dtype, chunks=(chunk, *sample_shape), compressors=None,
            attributes=attributes, dimension_names=("sample", *("band", "y", "x")[-len(sample_shape) :]),
            chunk_key_encoding=CHUNK_KEYS,
        )  # fmt: skip
        content.update(f"{name} {array_dtype} {(count, *sample_shape)} by {chunk}".encode())
    return chunk


def _store_attributes(dataset: ImageDataset | LazyImageDataset, skipped: Mapping[str, str]) -> dict[str, Any]:
    return {
        "task": dataset.task,
        "classes": list(dataset.classes),
        "units": dataset.units,
        "gsd": None if math.isnan(dataset.gsd) else dataset.gsd,
        "gsd_units": "metre",
        "display": list(dataset.display) if dataset.display else None,
        "licence": dataset.licence,
        "source": dataset.source,
        "notes": list(dataset.notes),
        "skipped": dict(sorted(skipped.items())),
    }


def _small_arrays(
    dataset: ImageDataset | LazyImageDataset, records: "Sequence[ChunkRecord]"
) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """Values and dimensions of all arrays except pixels and masks, by name."""
    arrays, task = {}, get_task(dataset.task)
    if not task.is_dense:
        arrays["label"] = (np.concatenate([record.label for record in records]), task.label_dims)
    for name, values in (("sample", dataset.sample), ("split", dataset.split)):
        arrays[name] = (np.array(values, dtype=object), ("sample",))
    names = [band.common_name for band in dataset.bands]
    arrays["band"] = (np.array(names, dtype=object), ("band",))
    arrays["band_name"] = (np.array([band.name for band in dataset.bands], dtype=object), ("band",))
    arrays["wavelength"] = (np.array([float(band.wavelength) for band in dataset.bands]), ("band",))
    lat = np.concatenate([record.lat for record in records])
    lon = np.concatenate([record.lon for record in records])
    time = np.concatenate([record.time for record in records])
    if not np.isnan(lat).all():
        arrays |= {"lat": (lat, ("sample",)), "lon": (lon, ("sample",))}
    if not np.isnat(time).all():
        arrays["time"] = (time.astype("datetime64[s]").astype(np.int64), ("sample",))
    if dataset.crs is not None:
        arrays["crs"] = (np.array(dataset.crs, dtype=object), ("sample",))
    if dataset.transform is not None:
        arrays["transform"] = (np.asarray(dataset.transform, dtype=np.float64), ("sample", "coefficient"))
    return arrays


def _without(dataset: LazyImageDataset, skipped: Mapping[str, str]) -> LazyImageDataset:
    """Copy a dataset without the skipped samples."""
    remaining = [index for index, name in enumerate(dataset.sample) if name not in skipped]
    fields = {
        name: [values[index] for index in remaining]
        for name in ("sample", "split", "crs", "transform")
        if (values := getattr(dataset, name)) is not None
    }
    return dataclasses.replace(dataset, **fields)


# One chunk


@dataclass(frozen=True)
class ChunkRecord:
    """Record of a chunk, which stays in memory once the chunk is on disk.

    Attributes:
        start: index of its first sample.
        digests: SHA-256 of its values of each large array.
        label: labels that are not masks, (sample, …); None for masks.
        lat, lon, time: of its samples.
        band_sums: sum over its samples of the mean of each band, float64 (band,).
        unreadable: name of each sample that could not be read, and why.
    """

    start: int
    digests: tuple[str, ...]
    label: np.ndarray | None
    lat: np.ndarray
    lon: np.ndarray
    time: np.ndarray
    band_sums: np.ndarray
    unreadable: tuple[tuple[str, str], ...]


class ChunkWriter:
    """Reads, checks, hashes and writes chunks; while one is written to disk, the next is read.

    Args:
        scratch: the store, whose arrays exist already.
        chunk: samples per chunk.
        skip_bad: record unreadable samples of a lazy dataset and continue.
    """

    def __init__(self, dataset: ImageDataset | LazyImageDataset, scratch: Path, chunk: int, skip_bad: bool):
        self._dataset, self._scratch, self._chunk, self._skip_bad = dataset, scratch, chunk, skip_bad
        self._disk_thread = ThreadPoolExecutor(1)  # only waits for the disk
        self._unfinished: list[ChunkRecord] = []
        self._writes: list[Future] = []
        if isinstance(dataset, LazyImageDataset):
            self._image_buffers = _alternating_buffers((chunk, *dataset.shape), dataset.dtype)
            self._mask_buffers = _alternating_buffers((chunk, *dataset.shape[1:]), np.dtype(np.uint8))

    def write_chunk(self, start: int) -> list[ChunkRecord]:
        """Read the chunk that begins with sample `start` and begin to write it; return chunks now on disk."""
        dataset = self._dataset
        rows = slice(start, min(start + self._chunk, len(dataset.sample)))
        if isinstance(dataset, ImageDataset):
            count = rows.stop - rows.start
            image, label, unreadable = dataset.image[rows], dataset.label[rows], []
            lat, lon = (np.full(count, np.nan) if axis is None else axis[rows] for axis in (dataset.lat, dataset.lon))
            time = np.full(count, "NaT", "datetime64[s]") if dataset.time is None else dataset.time[rows]
        else:
            image, label, lat, lon, time, unreadable = self._read(dataset, rows)
        finished = self.finish()
        is_dense = get_task(dataset.task).is_dense
        large_arrays = {"image": image} | ({"label": label} if is_dense else {})
        record = ChunkRecord(
            start=start,
            digests=tuple(self._store(name, values, start // self._chunk) for name, values in large_arrays.items()),
            label=None if is_dense else label,
            lat=np.asarray(lat, dtype=np.float64),
            lon=np.asarray(lon, dtype=np.float64),
            time=np.asarray(time, dtype="datetime64[s]"),
            band_sums=image[:, :, ::MEAN_STRIDE, ::MEAN_STRIDE].mean(axis=(2, 3), dtype=np.float64).sum(axis=0),
            unreadable=tuple(unreadable),
        )
        self._unfinished = [record]
        return finished

    def finish(self) -> list[ChunkRecord]:
        """Wait for the disk; return the chunks that were written since the last call."""
        for future in self._writes:
            future.result()
        finished, self._unfinished, self._writes = self._unfinished, [], []
        return finished

    def close(self) -> None:
        """Stop writing; nothing is written once this returns."""
        self._disk_thread.shutdown()

    def _store(self, name: str, values: np.ndarray, chunk_index: int) -> str:
        """Begin to write a chunk's file as zarr would, several times faster; return the SHA-256 of its values.

        A chunk without compressor is its values, little-endian and in C order; the last chunk is padded with zeros.
        `atomic_dir` flushes it.
        """
        values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        file = CHUNK_KEYS["separator"].join(["c", str(chunk_index), *["0"] * (values.ndim - 1)])
        size = values[:1].nbytes * self._chunk
        self._writes.append(self._disk_thread.submit(_write_file, self._scratch / name / file, values, size))
        return hashlib.sha256(values).hexdigest()

    def _read(self, dataset: LazyImageDataset, rows: slice):
        """Read a chunk: images, labels, lat, lon, times, and the samples that could not be read."""
        names, splits = dataset.sample[rows], dataset.split[rows]
        task = get_task(dataset.task)
        image = next(self._image_buffers)[: len(names)]
        if task.is_dense:
            label = next(self._mask_buffers)[: len(names)]
        else:  # not in a reused buffer, since these labels stay in memory until all chunks are written
            label_shape = task.label_shape(len(dataset.classes), dataset.shape[1:])
            label = np.zeros((len(names), *label_shape), task.label_dtype)
        lat, lon, time, unreadable = [], [], [], []
        prefetch = dataset.prefetch or (lambda names: None)
        prefetch(dataset.sample[rows.start : rows.start + PREFETCH_SAMPLES])
        for index, name in enumerate(names):
            ahead = rows.start + index + PREFETCH_SAMPLES
            prefetch(dataset.sample[ahead : ahead + 1])
            try:
                sample = dataset.read_sample(name, image[index])
                pixels, label[index] = _check_sample(sample, dataset, name, splits[index])
                if pixels is not sample.image or not np.shares_memory(pixels, image):
                    image[index] = pixels
            except UserError as error:
                if not self._skip_bad:
                    raise
                unreadable.append((name, str(error)))
                sample = Sample(image[index], label[index])
            lat.append(sample.lat)
            lon.append(sample.lon)
            time.append(sample.time)
        return image, label, lat, lon, time, unreadable


def _check_sample(
    sample: Sample, dataset: LazyImageDataset, name: str, split: str
) -> tuple[np.ndarray, np.ndarray | np.int64]:
    """Return a sample's image, in the dataset's dtype, and its label, if they fit the dataset.

    Raises:
        UserError: another shape, non-finite pixels, a label outside the classes or in the split `unlabelled`, or a
            location that is not on Earth.
    """
    image = sample.image
    if image.shape != dataset.shape:
        raise UserError(
            f"Sample {name} has the shape {image.shape} (band, y, x); the others have {dataset.shape}.",
            key="image", value=image.shape, allowed=[dataset.shape],
        )  # fmt: skip
    if image.dtype != dataset.dtype:
        cast = image.astype(dataset.dtype)
        if not np.array_equal(cast, image):
            raise UserError(
                f"Sample {name} has {image.dtype} values that do not fit into {dataset.dtype}.",
                key="image", value=str(image.dtype), allowed=[str(dataset.dtype)],
            )  # fmt: skip
        image = cast
    if image.dtype.kind == "f" and not np.isfinite(image.sum()) and not np.isfinite(image).all():
        raise UserError(f"Sample {name} has non-finite pixels (NaN or Inf).", key="image", value=name)
    try:
        if split == UNLABELLED:
            check_label_is_missing(np.asarray(sample.label), dataset.task)
        else:
            check_label(np.asarray(sample.label), dataset)
        check_location(sample.lat, sample.lon)
    except UserError as error:
        raise UserError(f"Sample {name}: {error}", key=error.key, value=error.value, allowed=error.allowed) from None
    return image, sample.label


def _write_file(path: Path, values: np.ndarray, size: int) -> None:
    """Write values to a file and pad it with zeros to `size` bytes."""
    with open(path, "wb", buffering=0) as file:
        _write_uncached(file, memoryview(values).cast("B"))
        file.truncate(size)


def _write_uncached(file: io.FileIO, data: memoryview) -> None:
    """Write bytes bypassing the page cache, whose copies take as long as the hashing.

    Writes that the disk or the alignment of the memory does not allow, and the rest of the last block, use the cache.
    """
    written, aligned = 0, len(data) - len(data) % DISK_BLOCK_BYTES
    with contextlib.suppress(OSError):  # a full or broken disk raises again below
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
        while written < aligned:
            written += file.write(data[written:aligned])
    fcntl.fcntl(file, fcntl.F_SETFL, 0)
    while written < len(data):
        written += file.write(data[written:])
    # Linux then starts to write the cached rest, concurrently with the next chunk.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _alternating_buffers(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield two aligned buffers alternately, forever: allocation costs as much as reading into them."""
    size = math.prod(shape) * dtype.itemsize
    memory = [np.zeros(size + DISK_BLOCK_BYTES, np.uint8) for _ in range(2)]
    return itertools.cycle(
        array[-array.ctypes.data % DISK_BLOCK_BYTES :][:size].view(dtype).reshape(shape) for array in memory
    )


# Several processes


def _write_chunks(
    dataset: ImageDataset | LazyImageDataset, scratch: Path, starts: range, chunk: int, workers: int, skip_bad: bool
) -> Iterator[ChunkRecord]:
    """Write all chunks and yield their records, in any order."""
    arguments = (dataset, scratch, chunk, skip_bad)
    use_processes = not isinstance(dataset, ImageDataset) and len(starts) > MIN_CHUNKS_FOR_PROCESSES
    n_processes = min(workers, len(starts), MAX_PROCESSES) - 1 if use_processes else 0
    writer = ChunkWriter(*arguments)
    try:
        if n_processes:
            yield from _write_in_processes(writer, arguments, starts, n_processes)
            return
        for start in starts:
            yield from writer.write_chunk(start)
        yield from writer.finish()
    finally:
        writer.close()


def _write_in_processes(
    writer: ChunkWriter, arguments: tuple, starts: range, n_processes: int
) -> Iterator[ChunkRecord]:
    """Write all chunks by this process and other ones, and yield their records, in any order."""
    # In shared memory, not as an argument: multiprocessing waits forever if a process dies before it has read an
    # argument that is larger than a pipe.
    pickled = pickle.dumps(arguments)
    shared = SharedMemory(create=True, size=len(pickled))
    shared.buf[: len(pickled)] = pickled
    # Not forked, since zarr's threads would not survive it. That takes a while, and this process writes meanwhile.
    context = multiprocessing.get_context("spawn")
    # One pool per process, so that `finish` reaches each process.
    pools = [
        ProcessPoolExecutor(1, context, initializer=_start_worker, initargs=(shared.name,))
        for _ in range(n_processes)
    ]
    # The processes need no linear algebra; its threads would spin on all CPUs while they wait.
    blas_threads = os.environ.get(BLAS_THREADS)
    os.environ[BLAS_THREADS] = "1"
    own_pool = ThreadPoolExecutor(1)
    executors = [
        (own_pool, writer.write_chunk, writer.finish),
        *((pool, _write_chunk_in_worker, _finish_worker) for pool in pools),
    ]
    # Each is listed twice: it receives its next chunk while it writes one, and does not wait for this thread.
    idle, busy = executors * 2, {}
    try:
        for start in starts:
            if not idle:
                wait(busy, return_when=FIRST_COMPLETED)
            for future in [future for future in busy if future.done()]:
                idle.append(busy.pop(future))
                yield from future.result()
            executor = idle.pop(0)
            pool, write_chunk, _ = executor
            busy[pool.submit(write_chunk, start)] = executor
        last = [pool.submit(finish) for pool, _, finish in executors]
        for future in as_completed([*busy, *last]):
            yield from future.result()
    except BrokenProcessPool:
        raise UserError(
            "A process that read images was killed, perhaps because memory ran out. Run the same command again; "
            "with fewer CPUs (taskset) it needs less memory.",
            key="workers", value=n_processes + 1,
        ) from None  # fmt: skip
    finally:
        os.environ.pop(BLAS_THREADS) if blas_threads is None else os.environ.update({BLAS_THREADS: blas_threads})
        for pool in (*pools, own_pool):
            pool.shutdown(cancel_futures=True)
        shared.close()
        shared.unlink()


_worker: ChunkWriter


def _start_worker(shared_memory: str) -> None:
    global _worker
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    shared = SharedMemory(shared_memory)
    _worker = ChunkWriter(*pickle.loads(shared.buf))
    shared.close()


def _exit_with_parent() -> None:
    """Exit when the parent is killed, instead of waiting forever or writing into its next store."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_chunk_in_worker(start: int) -> list[ChunkRecord]:
    return _worker.write_chunk(start)


def _finish_worker() -> list[ChunkRecord]:
    return _worker.finish()
