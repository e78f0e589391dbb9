"""Source `geobench`: the twelve sets of GEO-Bench 1.0 as released, one HDF5 file per sample.

All copies of the released files have the same faults. Wrong band names, locations and dates are corrected, unless the
option `keep_released_metadata` is set.

Source: Lacoste et al. 2023, GEO-Bench, arXiv 2306.03831.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from h5py import h5d

from pipeline.bands import Band
from pipeline.config import DatasetConfig, Params, parse
from pipeline.data.image_store import LazyImageDataset
from pipeline.data.sources import DatasetSize
from pipeline.data.sources.geobench import catalog, partitions
from pipeline.data.sources.geobench.catalog import GeoBenchSet
from pipeline.data.sources.geobench.download import describe_files, existing_files, local_folder
from pipeline.data.sources.geobench.partitions import BandMeanCheck
from pipeline.data.sources.geobench.reader import (
    GeoBenchReader,
    check_numeric,
    file_error,
    keys_without_dates,
    open_hdf5,
)
from pipeline.errors import UserError

SETS = {spec.name: spec for spec in (*catalog.CLASSIFICATION_SETS, *catalog.SEGMENTATION_SETS)}
# In standard deviations: a swap of two bands is detected if their published means differ by more. The means in
# band_stats.json are less precise: GEO-Bench computed them from at most 1000 images.
MIN_SEPARATION, MIN_SEPARATION_BAND_STATS = 0.03, 0.1
# Samples that are read to measure the reading speed.
TIMED_SAMPLES = 8


@dataclass(frozen=True)
class GeoBenchOptions:
    """Options of a GEO-Bench dataset in params.yaml.

    Attributes:
        set: name of the set, such as `m-eurosat`.
        partition: `default`, or one with fewer labels, such as `0.01x_train`.
        bands: names of the bands to use, in this order; empty for all.
        keep_released_metadata: keep band names, locations and dates as released, even where they are wrong, and keep
            8-bit images divided by 255 as they are.
        ignore_nodata: exclude pixels of the class "no data" from loss and score. GEO-Bench does not.
        skip_bad: skip samples that cannot be read.
        check_means: compare the band means of the full set with the published means.
    """

    set: str
    partition: str = "default"
    bands: tuple[str, ...] = ()
    keep_released_metadata: bool = False
    ignore_nodata: bool = False
    skip_bad: bool = False
    check_means: bool = True


Options = GeoBenchOptions


def validate_options(options: GeoBenchOptions, dataset: DatasetConfig, dataset_key: str) -> None:
    """Raise UserError if the set does not exist, or lacks a band or the class "no data"."""
    if options.set not in SETS:
        raise UserError(
            f"{dataset_key}: there is no set '{options.set}'. GEO-Bench has: {', '.join(SETS)}.",
            key=f"{dataset_key}.options.set", value=options.set, allowed=SETS,
        )  # fmt: skip
    spec = SETS[options.set]
    _selected_bands(spec, options, dataset_key)
    if options.ignore_nodata and spec.nodata_class is None:
        raise UserError(
            f"{dataset_key}: {spec.name} has no class 'no data'. Remove ignore_nodata.",
            key=f"{dataset_key}.options.ignore_nodata",
            value=True,
            allowed=[name for name, spec in SETS.items() if spec.nodata_class is not None],
        )


def fetch(dataset: DatasetConfig, params: Params) -> dict:
    """Find the set in `geobench_dir` or download it there; return the record for source.json.

    Raises:
        UserError: the set cannot be downloaded, or has no such partition.
    """
    options = _parse_options(dataset)
    record = describe_files(SETS[options.set], options.partition, Path(params.geobench_dir))
    partitions.read_partition(Path(record["folder"]) / f"{options.partition}_partition.json", options.skip_bad)
    return record


def prepare(raw: Path, dataset: DatasetConfig) -> LazyImageDataset:
    """Return the set's samples, in the order of the partition; `raw` has the source.json of `fetch`.

    Raises:
        UserError: the set's folder is missing, or its files are damaged.
    """
    folder = Path(json.loads((raw / "source.json").read_text())["folder"])
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing; it existed when the set was fetched. Run: dvc repro -f fetch", path=folder
        )
    return _open_set(folder, _parse_options(dataset))


def estimate_size(dataset: DatasetConfig, params: Params) -> tuple[DatasetSize, int]:
    """Return the size of the prepared set and the approximate number of bytes to download.

    Raises:
        UserError: the set is in `geobench_dir`, but one of its first samples cannot be read.
    """
    options = _parse_options(dataset)
    spec = SETS[options.set]
    bands, n_pixels = _selected_bands(spec, options), spec.image_size**2
    folder = local_folder(spec, Path(params.geobench_dir))
    images = _open_set(folder, options) if folder else None

    fraction = re.fullmatch(r"(\d*\.?\d+)x_train", options.partition)
    if images and not fraction and options.partition != "default":  # a partition that the user wrote
        n_samples = len(images.sample)
    else:
        n_train, n_valid, n_test = spec.split_sizes
        n_train = max(1, round(float(fraction[1]) * n_train)) if fraction else n_train
        n_samples = n_train + n_valid + n_test
    bytes_per_value = spec.file_bytes_per_value if options.keep_released_metadata else spec.bytes_per_value
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
    download = sum(spec.split_sizes) * n_pixels * spec.file_bytes_per_value * len(spec.released_bands)
    return size, 0 if folder else download


def _parse_options(dataset: DatasetConfig) -> GeoBenchOptions:
    return parse(GeoBenchOptions, dataset.options, "options")


def _open_set(folder: Path, options: GeoBenchOptions) -> LazyImageDataset:
    """Read the set's lists, and prepare to read its samples."""
    spec = SETS[options.set]
    partition = partitions.read_partition(folder / f"{options.partition}_partition.json", options.skip_bad)
    bands = _selected_bands(spec, options)
    file_dtype = _file_dtype(existing_files(folder, partition.names), spec, tuple(bands), options.skip_bad)
    restore_bytes = spec.divided_by_255 and not options.keep_released_metadata
    dtype = np.dtype(np.uint8) if restore_bytes else file_dtype

    split_sizes = tuple(partition.splits.count(split) for split in partitions.SPLITS.values())
    mean_check = None
    if split_sizes == spec.split_sizes and options.check_means:
        published = partitions.read_published_stats(folder, spec, tuple(bands), scale=255 if restore_bytes else 1)
        if any(published.values()) and not partition.dropped:
            separation = MIN_SEPARATION if spec.published_stats else MIN_SEPARATION_BAND_STATS
            mean_check = BandMeanCheck(spec.name, published, separation)

    labels = partitions.read_labels(folder, spec)
    notes = _notes(spec, options, partition.dropped)
    if labels is None and not spec.task_class.is_dense:
        notes.append("labels: from the sample files, since the folder has no JSON file with labels")
    notes.append("band means: compared with the published means" if mean_check else "band means: not compared")
    reader = GeoBenchReader(
        folder=folder,
        spec=spec,
        keys=tuple(bands),
        dtype=dtype,
        labels=labels,
        keep_released_metadata=options.keep_released_metadata,
        ignore_nodata=options.ignore_nodata,
        restore_bytes=restore_bytes,
    )
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
        read_sample=reader,
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
        raise UserError(
            f"{dataset_key}: {spec.name} has no band {', '.join(unknown)}. It has: {', '.join(names)}.",
            key=f"{dataset_key}.options.bands", value=unknown, allowed=names,
        )  # fmt: skip
    return {key_of_name[name]: bands[key_of_name[name]] for name in options.bands}


def _file_dtype(paths: Sequence[Path], spec: GeoBenchSet, keys: Sequence[str], skip_bad: bool) -> np.dtype:
    """Return the dtype of all bands in the first file, or with `skip_bad` in the first readable file."""
    for path in paths:
        try:
            with open_hdf5(path) as file:
                key_in_file = keys_without_dates(file, spec)
                dtypes = {key: h5d.open(file.id, key_in_file[key]).dtype for key in keys}
            for key, dtype in dtypes.items():
                check_numeric(key, dtype)
            common = np.result_type(*dtypes.values())
            # float32 has seven digits, more than any sensor.
            return np.dtype(np.float32) if common == np.float64 else common
        except Exception as error:  # a damaged file can fail in any way
            if not skip_bad or path == paths[-1]:
                raise file_error(path, error) from None
    raise ValueError("no files")


def _notes(spec: GeoBenchSet, options: GeoBenchOptions, dropped: Sequence[str]) -> list[str]:
    """Describe the set's faults and their corrections, for the attributes of the store."""
    keep_released = options.keep_released_metadata
    notes = list(spec.known_issues)
    if spec.actual_bands and keep_released:
        notes.append("band names: as released, most of them wrong (keep_released_metadata)")
    elif spec.actual_bands:
        renamed = [
            f"{key} is {band.name}" for key, band in spec.actual_bands.items() if band != spec.released_bands[key]
        ]
        notes.append(f"band names: corrected, since the released ones are wrong: {', '.join(renamed)}")
    if spec.location_format == "lat,lon":
        state = "as released (keep_released_metadata)" if keep_released else "corrected"
        notes.append(f"swapped latitude and longitude: {state}")
    if spec.has_placeholder_dates:
        state = "as released (keep_released_metadata)" if keep_released else "removed"
        notes.append(f"placeholder dates: {state}")
    notes += [f"'{key}' is not read: {reason}" for key, reason in spec.unread_keys.items()]
    if spec.nodata_class is not None:
        state = "ignored" if options.ignore_nodata else "counted as a class, as in GEO-Bench"
        notes.append(f"class '{spec.classes[spec.nodata_class]}': {state}")
    if spec.divided_by_255:
        state = "as released (keep_released_metadata)" if keep_released else "converted back to 8 bits"
        notes.append(f"8-bit images divided by 255: {state}")
    if dropped:
        notes.append(f"repeated samples, dropped: {', '.join(dropped)}")
    return notes


def _measure_images_per_second(images: LazyImageDataset, skip_bad: bool) -> float:
    """Measure how many images per second one process reads."""
    names = images.sample[:TIMED_SAMPLES]
    start = time.perf_counter()
    for name in names:
        try:
            images.read_sample(name)
        except UserError:
            if not skip_bad:
                raise
    return len(names) / (time.perf_counter() - start)
