"""Source `geobench`: the twelve sets of GEO-Bench 1.0 as released, one HDF5 file per sample.

All copies of the released files have the same faults. Wrong band names, locations and dates are corrected, unless the
option `keep_released_metadata` is set.

Source: Lacoste et al. 2023, GEO-Bench, arXiv 2306.03831.
"""

import contextlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.bands import Band
from pipeline.config import DatasetConfig, Params, parse
from pipeline.data.image_store import LazyImageDataset
from pipeline.data.sources import DatasetSize
from pipeline.data.sources.geobench.catalog import SETS, GeoBenchOptions, GeoBenchSet
from pipeline.data.sources.geobench.download import describe_files, local_folder
from pipeline.data.sources.geobench.partitions import SPLITS, make_mean_check, read_labels, read_partition
from pipeline.data.sources.geobench.reader import GeoBenchReader, common_dtype
from pipeline.errors import UserError

N_TIMED_SAMPLES = 8
Options = GeoBenchOptions


def validate_options(options: GeoBenchOptions, dataset: DatasetConfig, dataset_key: str) -> None:
    """Raise UserError if the set does not exist, or lacks a band or the class "no data"."""
    if options.set not in SETS:
        message = f"{dataset_key}: there is no set '{options.set}'. GEO-Bench has: {', '.join(SETS)}."
        raise UserError(message, key=f"{dataset_key}.options.set", value=options.set, allowed=SETS)
    spec = SETS[options.set]
    _selected_bands(spec, options, dataset_key)
    if options.ignore_nodata and spec.nodata_class is None:
        allowed = [name for name, spec in SETS.items() if spec.nodata_class is not None]
        message = f"{dataset_key}: {spec.name} has no class 'no data'. Remove ignore_nodata."
        raise UserError(message, key=f"{dataset_key}.options.ignore_nodata", value=True, allowed=allowed)


def fetch(dataset: DatasetConfig, params: Params) -> dict:
    """Find the set in `geobench_dir` or download it there; return the record for source.json.

    Raises UserError: the set cannot be downloaded, or has no such partition.
    """
    options = _parse_options(dataset)
    record = describe_files(SETS[options.set], options.partition, Path(params.geobench_dir))
    read_partition(Path(record["folder"]), options.partition, options.skip_bad)
    return record


def prepare(raw: Path, dataset: DatasetConfig) -> LazyImageDataset:
    """Return the set's samples, in the order of the partition; `raw` has the source.json of `fetch`.

    Raises UserError: the set's folder is missing, or its files are damaged.
    """
    folder = Path(json.loads((raw / "source.json").read_text())["folder"])
    if not folder.is_dir():
        message = f"{folder} is missing; it existed when the set was fetched. Run: dvc repro -f fetch"
        raise UserError(message, path=folder)
    return _open_set(folder, _parse_options(dataset))


def estimate_size(dataset: DatasetConfig, params: Params) -> tuple[DatasetSize, int]:
    """Return the size of the prepared set and the approximate number of bytes to download.

    Raises UserError: the set is in `geobench_dir`, but one of its first samples cannot be read.
    """
    options = _parse_options(dataset)
    spec = SETS[options.set]
    bands, n_pixels = _selected_bands(spec, options), spec.image_size**2
    folder = local_folder(spec, Path(params.geobench_dir))
    images = _open_set(folder, options) if folder else None

    fraction = re.fullmatch(r"(\d*\.?\d+)x_train", options.partition)
    n_samples = sum(spec.split_sizes)
    if fraction:
        n_train = spec.split_sizes[0]
        n_samples += max(1, round(float(fraction[1]) * n_train)) - n_train
    elif images and options.partition != "default":  # a partition that the user wrote
        n_samples = len(images.sample)
    stored_bytes = 1 if spec.units == "uint8" else 4
    file_bytes = 4 if spec.divided_by_255 else stored_bytes
    bytes_per_value = file_bytes if options.keep_released_metadata else stored_bytes
    mask_bytes = n_pixels if spec.task_class.is_dense else 0
    size = DatasetSize(
        n_samples=n_samples,
        bands=tuple(bands.values()),
        task=spec.task,
        n_classes=len(spec.classes),
        image_size=(spec.image_size, spec.image_size),
        bytes_per_image=n_pixels * bytes_per_value * len(bands) + mask_bytes,
        images_per_second=_measure_images_per_second(images, options.skip_bad) if images else None,
    )
    download = sum(spec.split_sizes) * n_pixels * file_bytes * len(spec.released_bands)
    return size, 0 if folder else download


def _parse_options(dataset: DatasetConfig) -> GeoBenchOptions:
    return parse(GeoBenchOptions, dataset.options, "options")


def _open_set(folder: Path, options: GeoBenchOptions) -> LazyImageDataset:
    """Read the set's lists, and prepare to read its samples."""
    spec = SETS[options.set]
    partition = read_partition(folder, options.partition, options.skip_bad)
    bands = _selected_bands(spec, options)
    file_dtype = common_dtype(folder, partition.names, spec, tuple(bands), options.skip_bad)
    restore_bytes = spec.divided_by_255 and not options.keep_released_metadata
    dtype = np.dtype(np.uint8) if restore_bytes else file_dtype

    split_sizes = tuple(partition.splits.count(split) for split in SPLITS.values())
    mean_check = None
    if split_sizes == spec.split_sizes and options.check_means and not partition.dropped:
        mean_check = make_mean_check(folder, spec, tuple(bands), scale=255 if restore_bytes else 1)

    labels = read_labels(folder, spec)
    notes = _notes(spec, options, partition.dropped)
    if labels is None and not spec.task_class.is_dense:
        notes.append("labels: from the sample files, since the folder has no JSON file with labels")
    notes.append("band means: compared with the published means" if mean_check else "band means: not compared")
    return LazyImageDataset(
        sample=partition.names,
        split=partition.splits,
        bands=tuple(bands.values()),
        classes=spec.classes,
        task=spec.task,
        units="display" if spec.divided_by_255 and not restore_bytes else spec.units,
        gsd=spec.gsd,
        licence=spec.licence,
        source=f"GEO-Bench 1.0, {spec.name}, partition {options.partition}",
        display=spec.display,
        notes=notes,
        read_sample=GeoBenchReader(folder, spec, options, tuple(bands), dtype, labels, restore_bytes),
        shape=(len(bands), spec.image_size, spec.image_size),
        dtype=dtype,
        check_band_means=mean_check,
    )


def _selected_bands(spec: GeoBenchSet, options: GeoBenchOptions, dataset_key: str = "datasets") -> dict[str, Band]:
    """Return the bands to read by key: the actual ones, unless the released metadata is kept."""
    use_released = options.keep_released_metadata or not spec.actual_bands
    bands = dict(spec.released_bands if use_released else spec.actual_bands)
    if not options.bands:
        return bands
    key_of_name = {name: key for key, band in bands.items() for name in (band.name, band.common_name)}
    if unknown := [name for name in options.bands if name not in key_of_name]:
        names = [band.common_name for band in bands.values()]
        message = f"{dataset_key}: {spec.name} has no band {', '.join(unknown)}. It has: {', '.join(names)}."
        raise UserError(message, key=f"{dataset_key}.options.bands", value=unknown, allowed=names)
    return {key_of_name[name]: bands[key_of_name[name]] for name in options.bands}


def _notes(spec: GeoBenchSet, options: GeoBenchOptions, dropped: Sequence[str]) -> list[str]:
    """Describe the set's faults and their corrections, for the attributes of the store."""
    keep_released = options.keep_released_metadata

    def as_released_or(correction: str) -> str:
        return "as released (keep_released_metadata)" if keep_released else correction

    notes = list(spec.known_issues)
    if spec.actual_bands and keep_released:
        notes.append("band names: as released, most of them wrong (keep_released_metadata)")
    elif spec.actual_bands:
        renamed = [
            f"{key} is {band.name}" for key, band in spec.actual_bands.items() if band != spec.released_bands[key]
        ]
        notes.append(f"band names: corrected, since the released ones are wrong: {', '.join(renamed)}")
    if spec.location_format == "lat,lon":
        notes.append(f"swapped latitude and longitude: {as_released_or('corrected')}")
    if spec.has_placeholder_dates:
        notes.append(f"placeholder dates: {as_released_or('removed')}")
    notes += [f"'{key}' is not read: {reason}" for key, reason in spec.unread_keys.items()]
    if spec.nodata_class is not None:
        state = "ignored" if options.ignore_nodata else "counted as a class, as in GEO-Bench"
        notes.append(f"class '{spec.classes[spec.nodata_class]}': {state}")
    if spec.divided_by_255:
        notes.append(f"8-bit images divided by 255: {as_released_or('converted back to 8 bits')}")
    if dropped:
        notes.append(f"repeated samples, dropped: {', '.join(dropped)}")
    return notes


def _measure_images_per_second(images: LazyImageDataset, skip_bad: bool) -> float:
    """Measure how many images per second one process reads."""
    names = images.sample[:N_TIMED_SAMPLES]
    start = time.perf_counter()
    for name in names:
        with contextlib.suppress(UserError) if skip_bad else contextlib.nullcontext():
            images.read_sample(name)
    return len(names) / (time.perf_counter() - start)
