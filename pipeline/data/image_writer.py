"""Writing an images store: in chunks, by several processes, in memory that does not grow with the dataset.

A chunk of samples is one file and the unit of work. Its digest is part of the content's, so that processes need not
wait for one another.
"""

import dataclasses
import hashlib
import math
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np

from cache.atomic import atomic_dir
from cache.schema import CHUNK_KEYS, consolidate_metadata, put_array
from pipeline.data.image_store import (
    IGNORE,
    UNLABELLED,
    ImageDataset,
    LazyImageDataset,
    label_dims,
    validate_dataset,
    validate_info,
)
from pipeline.data.imagechunk import ChunkRecord, ChunkWriter
from pipeline.errors import UserError

# A chunk has at most so many samples, and about so many bytes: a few are in memory in each process.
CHUNK, CHUNK_BYTES = 64, 32 << 20
# Processes at most: a disk feeds no more, and each takes eight of the files that this one may have open.
_MOST = 32
# Fewer chunks are written sooner by this process than others are started.
_FEW = 16
_THREADS = "OPENBLAS_NUM_THREADS"
_DESCRIBED = {
    "wavelength": {"units": "micrometre"},
    "lat": {"units": "degrees_north"},
    "lon": {"units": "degrees_east"},
    "time": {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"},
    "transform": {"description": "affine coefficients a to f, from (column, row) of a pixel's corner to the crs"},
}


@dataclass(frozen=True)
class WriteSummary:
    """Samples of each split that were written, and those that were left out, by name, with the reason."""

    counts: dict[str, int]
    skipped: dict[str, str]


class UnreadableSamples(Exception):
    """Samples that are to be left out, by name, with the reason."""


def write(
    dataset: ImageDataset | LazyImageDataset, scratch: Path, final: Path, workers: int = 0, skip_bad: bool = False
) -> WriteSummary:
    """Write a dataset as an images store that appears at `final` in one step.

    Args:
        workers: processes that read and write a stream, 32 at most; 0 for as many as there are processors.
        skip_bad: leave out samples of a stream that cannot be read, and say so in the store.

    Raises:
        UserError: shapes, names, splits or labels that do not fit together, or a sample that cannot be read.
    """
    skipped = {}
    while True:
        validate_dataset(dataset) if isinstance(dataset, ImageDataset) else validate_info(dataset)
        try:
            with atomic_dir(scratch, final):
                _write(dataset, scratch, workers or len(os.sched_getaffinity(0)), skip_bad, skipped)
            splits = ("train", "val", "test", *({UNLABELLED} & set(dataset.split)))
            counts = {split: list(dataset.split).count(split) for split in splits}
            return WriteSummary(counts, skipped)
        except UnreadableSamples as damaged:  # a store has no holes: it is written again without these
            skipped |= damaged.args[0]
            dataset = _without(dataset, skipped)


def _write(
    dataset: ImageDataset | LazyImageDataset, scratch: Path, workers: int, skip_bad: bool, skipped: dict
) -> None:
    import zarr  # both here, since processes that only read for the one that writes would wait for them
    from tqdm import tqdm

    group = zarr.open_group(scratch, mode="w", zarr_format=3)
    count = len(dataset.sample)
    held = isinstance(dataset, ImageDataset)
    shape, dtype = (dataset.image.shape[1:], dataset.image.dtype) if held else (dataset.shape, dataset.dtype)
    chunk = min(count, max(1, min(CHUNK, CHUNK_BYTES // (math.prod(shape) * dtype.itemsize))))
    arrays = {"image": (shape, dtype, {"units": dataset.units})}
    if dataset.task == "segmentation":
        mask = dataset.label.dtype if held else np.dtype("uint8")
        arrays["label"] = (shape[1:], mask, {"ignore_value": IGNORE})
    content = hashlib.sha256()
    for name, (inner, kind, attributes) in arrays.items():
        group.create_array(
            name, shape=(count, *inner), dtype=kind, chunks=(chunk, *inner), compressors=None, attributes=attributes,
            dimension_names=("sample", *("band", "y", "x")[-len(inner) :]), chunk_key_encoding=CHUNK_KEYS,
        )  # fmt: skip
        content.update(f"{name} {kind} {(count, *inner)} by {chunk}".encode())
    pieces = []
    starts = range(0, count, chunk)
    with tqdm(total=count, unit="image", mininterval=2, file=sys.stderr, disable=held) as progress:
        for piece in _pieces(dataset, scratch, starts, chunk, workers, skip_bad):
            pieces.append(piece)
            progress.update(len(piece.time))
    pieces.sort(key=lambda piece: piece.start)
    if bad := dict(one for piece in pieces for one in piece.bad):
        raise UnreadableSamples(bad)
    for piece in pieces:
        content.update("".join(piece.digests).encode())
    if not held and dataset.check_band_means:
        dataset.check_band_means(sum(piece.total for piece in pieces) / count)
    coordinates = []
    for name, (values, dims) in _small(dataset, pieces).items():
        extra = _DESCRIBED.get(name, {})
        put_array(group, name, values, dims, chunks=(len(values), *values.shape[1:]), attributes=extra)
        content.update(f"{name} {values.dtype} {values.shape}".encode())
        content.update("\0".join(values).encode() if values.dtype == object else values.tobytes())
        coordinates += [name] if name != "label" else []
    attributes = {
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
    content.update(repr(sorted(attributes.items())).encode())
    group.attrs.update({**attributes, "content_sha256": content.hexdigest(), "coordinates": " ".join(coordinates)})
    consolidate_metadata(group)


def _small(
    dataset: ImageDataset | LazyImageDataset, pieces: Sequence[ChunkRecord]
) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """Everything but pixels and masks: values and dimensions by name."""
    arrays = {}
    if dataset.task != "segmentation":
        arrays["label"] = (np.concatenate([piece.label for piece in pieces]), label_dims(dataset.task))
    for name, values in (("sample", dataset.sample), ("split", dataset.split)):
        arrays[name] = (np.array(values, dtype=object), ("sample",))
    names = [band.common_name for band in dataset.bands]
    arrays["band"] = (np.array(names, dtype=object), ("band",))
    arrays["band_name"] = (np.array([band.name for band in dataset.bands], dtype=object), ("band",))
    arrays["wavelength"] = (np.array([float(band.wavelength) for band in dataset.bands]), ("band",))
    lat, lon, time = (np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("lat", "lon", "time"))
    if not np.isnan(lat).all():
        arrays |= {"lat": (lat, ("sample",)), "lon": (lon, ("sample",))}
    if not np.isnat(time).all():
        arrays["time"] = (time.astype("datetime64[s]").astype(np.int64), ("sample",))
    if dataset.crs is not None:
        arrays["crs"] = (np.array(dataset.crs, dtype=object), ("sample",))
    if dataset.transform is not None:
        arrays["transform"] = (np.asarray(dataset.transform, dtype=np.float64), ("sample", "coefficient"))
    return arrays


def _pieces(dataset, scratch: Path, starts: range, chunk: int, workers: int, skip_bad: bool):
    """Write all chunks, and yield what is to be said of each, in any order."""
    given = (dataset, scratch, chunk, skip_bad)
    others = 0 if isinstance(dataset, ImageDataset) or len(starts) <= _FEW else min(workers, len(starts), _MOST) - 1
    chunks = ChunkWriter(*given)
    try:
        if others:
            yield from _shared(chunks, given, starts, others)
            return
        for start in starts:
            yield from chunks.bring(start)
        yield from chunks.finish()
    finally:
        chunks.close()


def _shared(chunks: ChunkWriter, given: tuple, starts: range, others: int):
    """The same by this process and others."""
    # Not as arguments: a process that dies before it has read more of them than a pipe holds is waited for for ever.
    pickled = pickle.dumps(given)
    handed = SharedMemory(create=True, size=len(pickled))
    handed.buf[: len(pickled)] = pickled
    # Started afresh, not forked: zarr's threads would not survive it. That takes a while: this process works too.
    context = multiprocessing.get_context("spawn")
    # One process a pool, so that each can be told to finish.
    pools = [ProcessPoolExecutor(1, context, initializer=_take, initargs=(handed.name,)) for _ in range(others)]
    # numpy's linear algebra, which they do not need, would start threads that wait by spinning on all processors.
    threads = os.environ.get(_THREADS)
    os.environ[_THREADS] = "1"
    here = ThreadPoolExecutor(1)
    places = [(here, chunks.bring, chunks.finish), *((pool, _bring, _finish) for pool in pools)]
    # Twice: each has a next chunk when it ends one, and does not wait until this thread hands it out.
    idle, busy = places * 2, {}
    try:
        for start in starts:
            if not idle:
                wait(busy, return_when=FIRST_COMPLETED)
            for done in [one for one in busy if one.done()]:
                idle.append(busy.pop(done))
                yield from done.result()
            place = idle.pop(0)
            busy[place[0].submit(place[1], start)] = place
        last = [pool.submit(finish) for pool, _, finish in places]
        for done in as_completed([*busy, *last]):
            yield from done.result()
    except BrokenProcessPool:
        raise UserError(
            "A process that read images was killed, perhaps because memory ran out. Run the same command again; "
            "with fewer processors (taskset) it needs less."
        ) from None
    finally:
        os.environ.pop(_THREADS) if threads is None else os.environ.update({_THREADS: threads})
        for pool in (*pools, here):
            pool.shutdown(cancel_futures=True)
        handed.close()
        handed.unlink()


_mine: ChunkWriter


def _take(name: str) -> None:
    global _mine
    threading.Thread(target=_end_with_parent, daemon=True).start()
    handed = SharedMemory(name)
    _mine = ChunkWriter(*pickle.loads(handed.buf))
    handed.close()


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for more to do for ever, and might write beside the next run's."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _bring(start: int) -> list[ChunkRecord]:
    return _mine.bring(start)


def _finish() -> list[ChunkRecord]:
    return _mine.finish()


def _without(stream: LazyImageDataset, skipped: dict[str, str]) -> LazyImageDataset:
    keep = [place for place, name in enumerate(stream.sample) if name not in skipped]
    chosen = {
        name: [values[place] for place in keep]
        for name in ("sample", "split", "crs", "transform")
        if (values := getattr(stream, name)) is not None
    }
    return dataclasses.replace(stream, **chosen)
