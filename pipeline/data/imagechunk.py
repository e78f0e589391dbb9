"""One chunk of an images store: its samples read, checked, written and hashed."""

import contextlib
import fcntl
import hashlib
import io
import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.schema import CHUNK_KEYS
from pipeline.data.image_store import (
    UNLABELLED,
    ImageDataset,
    LazyImageDataset,
    Sample,
    check_label,
    check_label_is_missing,
    check_location,
)
from pipeline.errors import UserError

# Means are taken of every so many pixels each way: bands differ by far more than that changes.
_THIN = 8
# So many samples are fetched from the disk while others are worked on: enough to hide what a disk takes to answer.
_AHEAD = 16
# Bytes. What is written past the system's cache begins and ends at multiples of it; no common disk has larger blocks.
_BLOCK = 4096


@dataclass(frozen=True)
class ChunkRecord:
    """What is left to say of a chunk once it is on the disk: digests, small values, sums, and what was damaged.

    `start` is its first sample's place.
    """

    start: int
    digests: tuple[str, ...]
    label: np.ndarray | None
    lat: np.ndarray
    lon: np.ndarray
    time: np.ndarray
    total: np.ndarray
    bad: tuple[tuple[str, str], ...]


class ChunkWriter:
    """Brings chunks of a dataset onto the disk; while the disk writes one, the next is read.

    Args:
        scratch: the store, whose arrays are described there.
        chunk: samples in a chunk.
        skip_bad: go on after a sample of a stream that cannot be read, and say so.
    """

    def __init__(self, dataset: ImageDataset | LazyImageDataset, scratch: Path, chunk: int, skip_bad: bool):
        self._dataset, self._scratch, self._chunk, self._skip_bad = dataset, scratch, chunk, skip_bad
        self._beside = ThreadPoolExecutor(1)  # computes nothing: it waits for the disk
        self._brought: list[ChunkRecord] = []
        self._writing: list[Future] = []
        if isinstance(dataset, LazyImageDataset):
            self._images = _in_turn((chunk, *dataset.shape), dataset.dtype)
            self._masks = _in_turn((chunk, *dataset.shape[1:]), np.dtype(np.uint8))

    def bring(self, start: int) -> list[ChunkRecord]:
        """Bring the chunk that begins with the sample at a place; returns those that are on the disk now."""
        dataset = self._dataset
        rows = slice(start, min(start + self._chunk, len(dataset.sample)))
        if isinstance(dataset, ImageDataset):
            count = rows.stop - rows.start
            image, label, bad = dataset.image[rows], dataset.label[rows], ()
            lat, lon = (np.full(count, np.nan) if axis is None else axis[rows] for axis in (dataset.lat, dataset.lon))
            time = np.full(count, "NaT", "datetime64[s]") if dataset.time is None else dataset.time[rows]
        else:
            image, label, lat, lon, time, bad = self._read(dataset, rows)
        before = self.finish()
        stored = {"image": image} | ({"label": label} if dataset.task == "segmentation" else {})
        piece = ChunkRecord(
            start=start,
            digests=tuple(self._store(name, values, start // self._chunk) for name, values in stored.items()),
            label=None if dataset.task == "segmentation" else label,
            lat=np.asarray(lat, dtype=np.float64),
            lon=np.asarray(lon, dtype=np.float64),
            time=np.asarray(time, dtype="datetime64[s]"),
            total=image[:, :, ::_THIN, ::_THIN].mean(axis=(2, 3), dtype=np.float64).sum(axis=0),
            bad=tuple(bad),
        )
        self._brought = [piece]
        return before

    def finish(self) -> list[ChunkRecord]:
        """Wait for the disk; returns the chunks that it has now and that nobody was told of."""
        for writing in self._writing:
            writing.result()
        done, self._brought, self._writing = self._brought, [], []
        return done

    def close(self) -> None:
        """Write nothing any more once this returns."""
        self._beside.shutdown()

    def _store(self, name: str, values: np.ndarray, number: int) -> str:
        """Have a chunk's file written, as zarr does and several times faster, and return the SHA-256 of its values.

        A chunk without compressor is its values, little-endian and in C order; the last is filled up. Publishing
        flushes it.
        """
        values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        file = CHUNK_KEYS["separator"].join(["c", str(number), *["0"] * (values.ndim - 1)])
        size = values[:1].nbytes * self._chunk
        self._writing.append(self._beside.submit(_write, self._scratch / name / file, values, size))
        return hashlib.sha256(values).hexdigest()

    def _read(self, stream: LazyImageDataset, rows: slice):
        """A chunk of a stream: images, labels, places and times, and the samples that could not be read."""
        names, splits = stream.sample[rows], stream.split[rows]
        image = next(self._images)[: len(names)]
        kind, empty = {
            "classification": (np.int64, ()),
            "multilabel": (np.uint8, (len(stream.classes),)),
            "segmentation": (np.uint8, stream.shape[1:]),
        }[stream.task]
        if stream.task == "segmentation":  # masks are written and forgotten, as images are; other labels are kept
            label = next(self._masks)[: len(names)]
        else:
            label = np.zeros((len(names), *empty), kind)
        lat, lon, time, bad = [], [], [], []
        ahead = stream.prefetch or (lambda names: None)
        ahead(stream.sample[rows.start : rows.start + _AHEAD])
        for place, name in enumerate(names):
            soon = rows.start + place + _AHEAD
            ahead(stream.sample[soon : soon + 1])
            try:
                sample = stream.read_sample(name, image[place])
                found, label[place] = _checked(sample, stream, name, splits[place])
                if found is not sample.image or not np.shares_memory(found, image):
                    image[place] = found
            except UserError as error:
                if not self._skip_bad:
                    raise
                bad.append((name, str(error)))
                sample = Sample(image[place], label[place])
            lat.append(sample.lat)
            lon.append(sample.lon)
            time.append(sample.time)
        return image, label, lat, lon, time, bad


def _write(path: Path, values: np.ndarray, size: int) -> None:
    with open(path, "wb", buffering=0) as file:
        _fill(file, memoryview(values).cast("B"))
        file.truncate(size)


def _fill(file: io.FileIO, wanted: memoryview) -> None:
    """Write bytes past the system's cache, which would cost new pages and a copy into them: as much as the hashing.

    What the disk or the memory's place does not allow so, and the rest of the last block, goes through the cache.
    """
    written, blocks = 0, len(wanted) - len(wanted) % _BLOCK
    with contextlib.suppress(OSError):  # a full or broken disk says so again below
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
        while written < blocks:
            written += file.write(wanted[written:blocks])
    fcntl.fcntl(file, fcntl.F_SETFL, 0)
    while written < len(wanted):
        written += file.write(wanted[written:])
    # Linux begins to write what the system holds of a file that is called not needed: beside the next chunk.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_turn(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Memory of two whole chunks, in turn for ever: fresh memory costs as much as reading into it.

    It begins at a multiple of a block, as it must to be written past the system's cache.
    """
    size = math.prod(shape) * dtype.itemsize
    raws = [np.zeros(size + _BLOCK, np.uint8) for _ in range(2)]
    return itertools.cycle(raw[-raw.ctypes.data % _BLOCK :][:size].view(dtype).reshape(shape) for raw in raws)


def _checked(sample: Sample, stream: LazyImageDataset, name: str, split: str):
    """A sample's image and label, if they fit the stream.

    Raises:
        UserError: another shape, pixels that are no numbers, a label outside the classes, or one in the split without
            labels, a place not on Earth.
    """
    image = sample.image
    if image.shape != stream.shape:
        raise UserError(f"Sample {name} has the shape {image.shape} (band, y, x); the others have {stream.shape}.")
    if image.dtype != stream.dtype:
        cast = image.astype(stream.dtype)
        if not np.array_equal(cast, image):
            raise UserError(f"Sample {name} has {image.dtype} values that do not fit into {stream.dtype}.")
        image = cast
    if image.dtype.kind == "f" and not np.isfinite(image.sum()) and not np.isfinite(image).all():
        raise UserError(f"Sample {name} has pixels that are no finite numbers.")
    try:
        if split == UNLABELLED:
            check_label_is_missing(np.asarray(sample.label), stream.task)
        else:
            check_label(np.asarray(sample.label), stream)
        check_location(sample.lat, sample.lon)
    except UserError as error:
        raise UserError(f"Sample {name}: {error}") from None
    return image, sample.label
