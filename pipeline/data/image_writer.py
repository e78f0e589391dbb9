"""Writing of images stores, chunk by chunk and by a pool of processes.

A chunk of samples is one file and the unit of work, so that the memory of a process does not grow with the dataset.
The digest of the content is made of the chunks' digests.
"""

import dataclasses
import hashlib
import itertools
import math
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from cache.atomic import atomic_dir
from cache.schema import CHUNK_KEYS, consolidate_metadata, put_array
from pipeline.bands import FULL_SCALE
from pipeline.data.image_store import SPLITS, UNLABELLED, ImageDataset, ImageDatasetInfo, LazyImageDataset, Sample
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, get_task

if TYPE_CHECKING:
    import zarr

# Largest chunk, in samples and in bytes. Each process holds a few chunks in memory.
CHUNK, CHUNK_BYTES = 64, 32 << 20
# Maximum number of processes: a disk can supply no more.
MAX_PROCESSES = 32
# With fewer chunks, this process alone finishes before other processes have started.
MIN_CHUNKS_FOR_PROCESSES = 16
# Band means are taken of every so many pixels in y and x; the bands of a dataset differ by more than this changes.
MEAN_STRIDE = 8
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
    """Samples to skip; its argument is their reasons by name."""


def write(
    dataset: ImageDataset | LazyImageDataset, scratch: Path, final: Path, workers: int = 0, skip_bad: bool = False
) -> WriteSummary:
    """Write a dataset as an images store that appears at `final` in one step.

    Args:
        scratch: folder to write in, on the file system of `final`.
        workers: processes that read and write a lazy dataset, at most `MAX_PROCESSES`; 0 for one per CPU.
        skip_bad: skip unreadable samples and list them in the store.

    Raises UserError for shapes, names, splits or labels that do not fit together, or a sample that cannot be read.
    """
    if isinstance(dataset, ImageDataset):
        dataset, workers = _as_lazy(dataset), 1
    skipped: dict[str, str] = {}
    while True:
        _validate(dataset)
        try:
            with atomic_dir(scratch, final):
                _write_store(dataset, scratch, workers or len(os.sched_getaffinity(0)), skip_bad, skipped)
            splits = (*SPLITS, *({UNLABELLED} & set(dataset.split)))
            return WriteSummary({split: list(dataset.split).count(split) for split in splits}, skipped)
        except UnreadableSamples as unreadable:  # a store has no gaps: it is written again without these samples
            skipped |= unreadable.args[0]
            dataset = _without(dataset, skipped)


def _as_lazy(images: ImageDataset) -> LazyImageDataset:
    if images.image.ndim != 4 or images.image.shape[1] != len(images.bands):
        raise UserError(
            f"Images have the shape {images.image.shape}; it must be (sample, band, y, x) with {len(images.bands)} "
            "bands.",
            key="image", value=images.image.shape, allowed=[len(images.bands)],
        )  # fmt: skip
    arrays = {key: getattr(images, key) for key in ("image", "label", "lat", "lon", "time")}
    _check_lengths(len(images.image), arrays | {"sample": images.sample, "split": images.split})
    index_of = {name: index for index, name in enumerate(images.sample)}

    def read_sample(name: str) -> Sample:
        return Sample(**{key: array[index_of[name]] for key, array in arrays.items() if array is not None})

    info = {field.name: getattr(images, field.name) for field in dataclasses.fields(ImageDatasetInfo)}
    return LazyImageDataset(**info, read_sample=read_sample, shape=images.image.shape[1:], dtype=images.image.dtype)


def _validate(info: ImageDatasetInfo) -> None:
    """Refuse a repeated name, an empty split, unknown units, or arrays of other lengths."""
    for key, names in (("sample", info.sample), ("bands", [band.common_name for band in info.bands])):
        if len(set(names)) != len(names):
            repeated = next(a for a, b in itertools.pairwise(sorted(names)) if a == b)
            raise UserError(f"'{repeated}' is twice in {key}; names must be unique.", key=key, value=repeated)
    if empty := set(SPLITS) - set(info.split):
        raise UserError(
            f"The splits {', '.join(sorted(empty))} are empty. Use smaller blocks or more data, or a list of splits "
            "that has all three.",
            key="split", value=sorted(empty), allowed=SPLITS,
        )  # fmt: skip
    if info.units not in FULL_SCALE:
        raise UserError(
            f"Units '{info.units}' are not known. Known units: {', '.join(FULL_SCALE)}.",
            key="units", value=info.units, allowed=FULL_SCALE,
        )  # fmt: skip
    _check_lengths(len(info.sample), {"crs": info.crs, "transform": info.transform})


def _check_lengths(count: int, arrays: Mapping[str, Any]) -> None:
    for name, values in arrays.items():
        if values is not None and len(values) != count:
            raise UserError(
                f"There are {count} samples but {len(values)} values of '{name}'.",
                key=name, value=len(values), allowed=[count],
            )  # fmt: skip


def _without(dataset: LazyImageDataset, skipped: Mapping[str, str]) -> LazyImageDataset:
    remaining = [index for index, name in enumerate(dataset.sample) if name not in skipped]
    fields = {
        name: [values[index] for index in remaining]
        for name in ("sample", "split", "crs", "transform")
        if (values := getattr(dataset, name)) is not None
    }
    return dataclasses.replace(dataset, **fields)


def _write_store(
    dataset: LazyImageDataset, scratch: Path, workers: int, skip_bad: bool, skipped: Mapping[str, str]
) -> None:
    import zarr  # takes 0.2 s to import

    group = zarr.open_group(scratch, mode="w", zarr_format=3)
    count, content = len(dataset.sample), hashlib.sha256()
    chunk = _create_arrays(group, dataset, content)
    rows = [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    records = []
    with tqdm(total=count, unit="image", delay=2, mininterval=2, file=sys.stderr) as progress:
        for record in _write_chunks(dataset, scratch, rows, workers, skip_bad):
            records.append(record)
            progress.update(len(record.time))
    if unreadable := {name: reason for record in records for name, reason in record.unreadable.items()}:
        raise UnreadableSamples(unreadable)
    for record in records:
        content.update("".join(record.digests).encode())
    if dataset.check_band_means:
        dataset.check_band_means(sum(record.band_sums for record in records) / count)
    coordinates = []
    for name, (values, dims) in _small_arrays(dataset, records).items():
        units = COORDINATE_ATTRIBUTES.get(name, {})
        put_array(group, name, values, dims, chunks=(len(values), *values.shape[1:]), attributes=units)
        content.update(f"{name} {values.dtype} {values.shape}".encode())
        content.update("\0".join(values).encode() if values.dtype == object else values.tobytes())
        coordinates += [name] if name != "label" else []
    attributes = {
        "task": dataset.task, "classes": list(dataset.classes), "units": dataset.units,
        "gsd": None if math.isnan(dataset.gsd) else dataset.gsd, "gsd_units": "metre",
        "display": list(dataset.display) if dataset.display else None, "licence": dataset.licence,
        "source": dataset.source, "notes": list(dataset.notes), "skipped": dict(sorted(skipped.items())),
    }  # fmt: skip
    content.update(repr(sorted(attributes.items())).encode())
    group.attrs.update({**attributes, "content_sha256": content.hexdigest(), "coordinates": " ".join(coordinates)})
    consolidate_metadata(group)


def _create_arrays(group: "zarr.Group", dataset: LazyImageDataset, content) -> int:
    """Create the arrays of pixels and masks, add them to the digest, and return the samples per chunk."""
    count, shape, task = len(dataset.sample), dataset.shape, get_task(dataset.task)
    chunk = min(count, max(1, min(CHUNK, CHUNK_BYTES // (math.prod(shape) * dataset.dtype.itemsize))))
    arrays: dict[str, tuple] = {"image": (shape, dataset.dtype, {"units": dataset.units})}
    if task.is_dense:
        arrays["label"] = (shape[1:], np.dtype(task.label_dtype), {"ignore_value": IGNORE})
    for name, (sample_shape, dtype, attributes) in arrays.items():
        group.create_array(
            name, shape=(count, *sample_shape), dtype=dtype, chunks=(chunk, *sample_shape), compressors=None,
            attributes=attributes, dimension_names=("sample", *("band", "y", "x")[-len(sample_shape) :]),
            chunk_key_encoding=CHUNK_KEYS,
        )  # fmt: skip
        content.update(f"{name} {dtype} {(count, *sample_shape)} by {chunk}".encode())
    return chunk


def _small_arrays(
    dataset: LazyImageDataset, records: "Sequence[ChunkRecord]"
) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """Values and dimensions of all arrays except pixels and masks, by name."""
    arrays, task, text = {}, get_task(dataset.task), partial(np.array, dtype=object)
    lat, lon, time = (np.concatenate([getattr(record, key) for record in records]) for key in ("lat", "lon", "time"))
    if not task.is_dense:
        arrays["label"] = (np.concatenate([record.label for record in records]), task.label_dims)
    arrays["sample"] = (text(dataset.sample), ("sample",))
    arrays["split"] = (text(dataset.split), ("sample",))
    arrays["band"] = (text([band.common_name for band in dataset.bands]), ("band",))
    arrays["band_name"] = (text([band.name for band in dataset.bands]), ("band",))
    arrays["wavelength"] = (np.array([float(band.wavelength) for band in dataset.bands]), ("band",))
    if not np.isnan(lat).all():
        arrays |= {"lat": (lat, ("sample",)), "lon": (lon, ("sample",))}
    if not np.isnat(time).all():
        arrays["time"] = (time.astype(np.int64), ("sample",))
    if dataset.crs is not None:
        arrays["crs"] = (text(dataset.crs), ("sample",))
    if dataset.transform is not None:
        arrays["transform"] = (np.asarray(dataset.transform, dtype=np.float64), ("sample", "coefficient"))
    return arrays


# One chunk


@dataclass(frozen=True)
class ChunkRecord:
    """Record of a chunk, which stays in memory once the chunk is on disk.

    Attributes:
        digests: SHA-256 of its values of each large array.
        label: labels that are not masks, (sample, …); None for masks.
        band_sums: sum over its samples of the mean of each band, float64 (band,).
        unreadable: reason by name of each sample that could not be read.
    """

    digests: tuple[str, ...]
    label: np.ndarray | None
    lat: np.ndarray
    lon: np.ndarray
    time: np.ndarray
    band_sums: np.ndarray
    unreadable: dict[str, str]


def _write_chunk(dataset: LazyImageDataset, scratch: Path, skip_bad: bool, rows: slice) -> ChunkRecord:
    """Read, check, hash and write the samples of a chunk."""
    import zarr  # takes 0.2 s to import

    task, names = get_task(dataset.task), dataset.sample[rows]
    label_shape = task.label_shape(len(dataset.classes), dataset.shape[1:])
    image = np.zeros((len(names), *dataset.shape), dataset.dtype)
    label = np.zeros((len(names), *label_shape), task.label_dtype)
    lat, lon, time = np.full(len(names), np.nan), np.full(len(names), np.nan), np.full(len(names), "NaT", "M8[s]")
    unreadable = {}
    for index, (name, split) in enumerate(zip(names, dataset.split[rows], strict=True)):
        try:
            sample = dataset.read_sample(name)
            image[index], label[index] = _check_sample(sample, dataset, name, split)
        except UserError as error:
            if not skip_bad:
                raise
            unreadable[name] = str(error)
        else:
            lat[index], lon[index], time[index] = sample.lat, sample.lon, sample.time
    large_arrays = {"image": image} | ({"label": label} if task.is_dense else {})
    for name, values in large_arrays.items():
        with zarr.config.set({"array.write_empty_chunks": True}):  # a missing file is always an error
            zarr.open_array(scratch / name, mode="r+")[rows] = values
    return ChunkRecord(
        digests=tuple(hashlib.sha256(values).hexdigest() for values in large_arrays.values()),
        label=None if task.is_dense else label, lat=lat, lon=lon, time=time,
        band_sums=image[:, :, ::MEAN_STRIDE, ::MEAN_STRIDE].mean(axis=(2, 3), dtype=np.float64).sum(axis=0),
        unreadable=unreadable,
    )  # fmt: skip


def _check_sample(sample: Sample, dataset: LazyImageDataset, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a sample's image and label in the dataset's dtypes; UserError if they do not fit."""
    task, label = get_task(dataset.task)(len(dataset.classes)), np.asarray(sample.label)
    image = _as_stored(name, "image", sample.image, dataset.shape, dataset.dtype)
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise UserError(f"Sample {name} has non-finite pixels (NaN or Inf).", key="image", value=name)
    if split == UNLABELLED and (label != task.missing_value).any():
        raise UserError(
            f"Sample {name} of the split {UNLABELLED} has a label. Give it another split, or no label.",
            key="split", value=UNLABELLED,
        )  # fmt: skip
    if split != UNLABELLED and not task.is_valid_label(label):
        raise UserError(
            f"Sample {name} has a label outside the {task.n_classes} classes {', '.join(dataset.classes)}.",
            key="label", allowed=dataset.classes,
        )  # fmt: skip
    if abs(sample.lat) > 90 or abs(sample.lon) > 180:
        raise UserError(
            f"Sample {name} has a latitude outside ±90° or a longitude outside ±180°. Are they swapped?",
            key="lat, lon", value=(sample.lat, sample.lon),
        )  # fmt: skip
    label_shape = task.label_shape(task.n_classes, dataset.shape[1:])
    return image, _as_stored(name, "label", label, label_shape, np.dtype(task.label_dtype))


def _as_stored(name: str, key: str, values: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the values of a sample's image or label in the dtype of the store."""
    if values.shape != shape:
        raise UserError(
            f"Sample {name} has the {key} shape {values.shape}; it must be {shape}, as of the other samples.",
            key=key, value=values.shape, allowed=[shape],
        )  # fmt: skip
    with np.errstate(invalid="ignore"):
        stored = values.astype(dtype, copy=False)
    if stored is not values and not np.array_equal(stored, values, equal_nan=dtype.kind == "f"):
        raise UserError(
            f"Sample {name} has {values.dtype} values in its {key} that do not fit into {dtype}.",
            key=key, value=str(values.dtype), allowed=[str(dtype)],
        )  # fmt: skip
    return stored


# Several processes


def _write_chunks(
    dataset: LazyImageDataset, scratch: Path, chunks: Sequence[slice], workers: int, skip_bad: bool
) -> Iterator[ChunkRecord]:
    """Write all chunks, and yield their records in order."""
    write_chunk = partial(_write_chunk, dataset, scratch, skip_bad)
    n_processes = min(workers, MAX_PROCESSES, len(chunks) if len(chunks) > MIN_CHUNKS_FOR_PROCESSES else 1)
    if n_processes == 1:
        yield from map(write_chunk, chunks)
        return
    # In a file: multiprocessing waits forever if a process dies before it has read an argument that fills a pipe.
    function_file = scratch / "write_chunk.pickle"
    function_file.write_bytes(pickle.dumps(write_chunk))
    # Not forked, since the threads of zarr and GDAL would not survive it.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n_processes, context, _start_worker, (function_file,))
    try:
        yield from pool.map(_write_chunk_in_worker, chunks)
    except BrokenProcessPool:
        raise UserError(
            "A process that read images was killed, perhaps because memory ran out. Run the same command again; "
            "with fewer CPUs (taskset) it needs less memory.",
            key="workers", value=n_processes,
        ) from None  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)
        function_file.unlink()


_worker_write_chunk: Callable[[slice], ChunkRecord]


def _start_worker(function_file: Path) -> None:
    global _worker_write_chunk
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_write_chunk = pickle.loads(function_file.read_bytes())


def _exit_with_parent() -> None:
    """Exit when the parent is killed, instead of waiting forever or writing into its next store."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_chunk_in_worker(rows: slice) -> ChunkRecord:
    return _worker_write_chunk(rows)
