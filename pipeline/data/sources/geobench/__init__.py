"""GEO-Bench 1.0 (Lacoste et al. 2023, arXiv 2306.03831) as released: one HDF5 file a sample, twelve sets.

The files were never regenerated, so every copy has the same faults; those of the bands' names, places and dates are
put right unless `as_labelled` asks for them as they are.
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
from pipeline.data.sources.geobench import classification, partitions, segmentation
from pipeline.data.sources.geobench import reader as read
from pipeline.data.sources.geobench.attributes import short_repr
from pipeline.data.sources.geobench.band_check import BandMeanCheck
from pipeline.data.sources.geobench.download import describe_files, existing_files, local_folder
from pipeline.data.sources.geobench.spec import GeoBenchSet
from pipeline.errors import UserError
from pipeline.plan import DatasetSize

SETS = {one.name: one for one in (*classification.SETS, *segmentation.SETS)}
# Standard deviations between two bands' means that tell them apart, where these are of all images, and where they are
# of band_stats.json, which GEO-Bench made of a thousand at most.
_TOLD, _TOLD_OF_FEW = 0.03, 0.1
# Samples that are read to see how fast that goes.
_FEW = 8


@dataclass(frozen=True)
class GeoBenchOptions:
    """`options` of a block in params.yaml.

    `set` is the set's name; `partition` is `default` or one with fewer labels, such as `0.01x_train`. `bands` keeps
    some, by name, and in this order; none given keeps all. `as_labelled` reproduces the released labels of bands,
    places and dates, and keeps pictures that were divided by 255 so. `ignore_nodata` leaves pixels of the class "no
    data" out of loss and score, which GEO-Bench does not. `skip_bad` leaves out samples that cannot be read.
    `check_means` compares the full set's bands with the published means.
    """

    set: str
    partition: str = "default"
    bands: tuple[str, ...] = ()
    keep_released_metadata: bool = False
    ignore_nodata: bool = False
    skip_bad: bool = False
    check_means: bool = True


def validate_options(options: GeoBenchOptions, dataset: DatasetConfig, where: str) -> None:
    """Refuse options that no set has."""
    if options.set not in SETS:
        raise UserError(f"{where}: there is no set '{options.set}'. GEO-Bench has: {', '.join(SETS)}.")
    declared = SETS[options.set]
    _chosen(declared, options)
    if options.ignore_nodata and declared.nodata_class is None:
        raise UserError(f"{where}: {declared.name} has no class 'no data' to ignore.")


def fetch(dataset: DatasetConfig, params: Params) -> dict:
    """Find the set in `geobench_dir`, or download it there; nothing is copied."""
    options = parse(GeoBenchOptions, dataset.options, "options")
    found = describe_files(SETS[options.set], options.partition, Path(params.geobench_dir))
    partitions.read_partition(Path(found["folder"]) / f"{options.partition}_partition.json", options.skip_bad)
    return found


def prepare(raw: Path, dataset: DatasetConfig) -> LazyImageDataset:
    """The set as a stream of its samples, in the partition's order."""
    folder = Path(json.loads((raw / "source.json").read_text())["folder"])
    if not folder.is_dir():
        raise UserError(f"{folder} is gone; it was there when the set was fetched. Run: dvc repro -f fetch")
    return _stream(folder, parse(GeoBenchOptions, dataset.options, "options"))


def _stream(folder: Path, options: GeoBenchOptions) -> LazyImageDataset:
    declared = SETS[options.set]
    names, splits, dropped = partitions.read_partition(folder / f"{options.partition}_partition.json", options.skip_bad)
    chosen = _chosen(declared, options)
    stored = _stored(existing_files(folder, names), declared, tuple(chosen), options.skip_bad)
    dtype = np.result_type(*stored)
    dtype = np.dtype(np.float32) if dtype == np.float64 else dtype  # seven digits are more than any sensor has
    as_bytes = declared.divided_by_255 and not options.keep_released_metadata
    if as_bytes:
        dtype = np.dtype(np.uint8)
    means = None
    if tuple(splits.count(one) for one in partitions.SPLITS.values()) == declared.split_sizes and options.check_means:
        published = partitions.read_published_stats(folder, declared, tuple(chosen), 255 if as_bytes else 1)
        means = BandMeanCheck(declared.name, published, _TOLD if declared.published_stats else _TOLD_OF_FEW)
        means = means if any(means.published.values()) and not dropped else None
    labels = partitions.read_labels(folder, declared)
    notes = _notes(declared, options, dropped)
    if labels is None and declared.task != "segmentation":
        notes.append("labels are those of the files themselves, since the folder lists none")
    notes.append("band means are compared with the published" if means else "band means are compared with none")
    reader = read.GeoBenchReader(
        folder, declared, tuple(chosen), stored, dtype,
        labels, options.keep_released_metadata, options.ignore_nodata, as_bytes,
    )  # fmt: skip
    return LazyImageDataset(
        sample=names,
        split=splits,
        bands=tuple(chosen.values()),
        classes=declared.classes,
        task=declared.task,
        units="display" if declared.divided_by_255 and not as_bytes else declared.units,
        gsd=declared.gsd,
        licence=declared.licence,
        source=f"GEO-Bench 1.0, {declared.name}, partition {options.partition}",
        display=declared.display,
        notes=notes,
        read_sample=reader,
        shape=(len(chosen), declared.image_size, declared.image_size),
        dtype=dtype,
        check_band_means=means,
        prefetch=reader.ahead,
    )


def _chosen(declared: GeoBenchSet, options: GeoBenchOptions) -> dict[str, Band]:
    """The bands to read by key, as they are in truth unless as labelled."""
    bands = dict(declared.released_bands if options.keep_released_metadata or not declared.actual_bands else declared.actual_bands)
    if not options.bands:
        return bands
    known = {name: key for key, band in bands.items() for name in (band.name, band.common_name)}
    if strange := [name for name in options.bands if name not in known]:
        there = ", ".join(band.common_name for band in bands.values())
        raise UserError(f"{declared.name} has no band {', '.join(strange)}. It has: {there}.")
    return {known[name]: bands[known[name]] for name in options.bands}


def _stored(
    paths: Sequence[Path], declared: GeoBenchSet, keys: Sequence[str], skip_bad: bool
) -> tuple[np.dtype, ...]:
    """The dtypes of the bands in the first file, or, if damaged ones may be left out, in the first that is whole."""
    path, *others = paths
    try:
        with read.open_hdf5(path) as file:
            there = read.keys_without_dates(file, declared)
            kinds = tuple(h5d.open(file, there[key]).dtype for key in keys)
        if strange := [
            f"{key} has {kind} values" for key, kind in zip(keys, kinds, strict=True) if kind.kind not in "iuf"
        ]:
            raise UserError(f"its {strange[0]}; pixels are numbers")
        return kinds
    except Exception as error:  # a damaged file may fail in any way
        if skip_bad and others:
            return _stored(others, declared, keys, skip_bad)
        raise UserError(f"{path} cannot be read: {short_repr(error)}") from None


def _notes(declared: GeoBenchSet, options: GeoBenchOptions, dropped: Sequence[str]) -> list[str]:
    notes = list(declared.known_issues)
    if declared.actual_bands and options.keep_released_metadata:
        notes.append("bands are named as in the released files, which is wrong for most of them (as_labelled)")
    elif declared.actual_bands:
        wrong = [(key, declared.actual_bands[key]) for key, band in declared.released_bands.items() if band != declared.actual_bands[key]]
        notes.append(
            "bands renamed, the released names are wrong: " + ", ".join(f"{k} is {b.name}" for k, b in wrong)
        )
    if declared.location_format == "lat,lon":
        kept = "kept as they are (as_labelled)" if options.keep_released_metadata else "put right"
        notes.append(f"places whose latitude and longitude are swapped are {kept}")
    if declared.has_placeholder_dates:
        notes.append("placeholder dates kept (as_labelled)" if options.keep_released_metadata else "placeholder dates left out")
    notes += [f"'{key}' is not read: {reason}" for key, reason in declared.unread_keys.items()]
    if declared.nodata_class is not None:
        kept = "is ignored" if options.ignore_nodata else "counts as a class, as in GEO-Bench"
        notes.append(f"'{declared.classes[declared.nodata_class]}' {kept}")
    if declared.divided_by_255:
        kept = "are kept (as_labelled)" if options.keep_released_metadata else "are their bytes again"
        notes.append(f"8-bit pictures that the released files have divided by 255 {kept}")
    return notes + ([f"listed again and dropped: {', '.join(dropped)}"] if dropped else [])


def estimate_size(dataset: DatasetConfig, params: Params) -> tuple[DatasetSize, int]:
    """What the set will be, before its files are read, and the bytes that are to be downloaded, roughly."""
    options = parse(GeoBenchOptions, dataset.options, "options")
    declared = SETS[options.set]
    chosen, pixels = _chosen(declared, options), declared.image_size**2
    mask = pixels if declared.task == "segmentation" else 0
    width = declared.file_bytes_per_value if options.as_labelled else declared.bytes_per_value
    share = re.fullmatch(r"(\d*\.?\d+)x_train", options.partition)
    train = max(1, round(float(share[1]) * declared.split_sizes[0])) if share else declared.split_sizes[0]
    folder = local_folder(declared, Path(params.geobench_dir))
    stream = _stream(folder, options) if folder else None
    own = stream and not share and options.partition != "default"  # a partition of one's own
    wanted = DatasetSize(
        len(stream.sample) if own else train + sum(declared.split_sizes[1:]), tuple(chosen.values()), declared.task,
        len(declared.classes), pixels * width * len(chosen) + mask,
        _pace(stream, options.skip_bad) if stream else None,
    )  # fmt: skip
    return wanted, 0 if folder else sum(declared.split_sizes) * pixels * declared.file_bytes_per_value * len(declared.released_bands)


def _pace(stream: LazyImageDataset, skip_bad: bool) -> float:
    """Images a second that one process reads.

    Raises:
        UserError: one of the first cannot be read, and may not be left out.
    """
    few = stream.sample[:_FEW]
    begun = time.perf_counter()
    for name in few:
        try:
            stream.read_sample(name)
        except UserError:
            if not skip_bad:
                raise
    return len(few) / (time.perf_counter() - begun)
