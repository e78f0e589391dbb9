"""The images store: the one format that every source is converted to and everything else reads.

A Zarr v3 group that opens with `xarray.open_zarr`:

    image   (sample, band, y, x)   in the units and size of the data
    label   (sample) | (sample, class) | (sample, y, x)   class index, multi-hot vector, or mask
    sample, split, band, band_name, wavelength, and lat, lon, time, crs, transform where known: coordinates

Labels of the split `unlabelled` have the missing value of their task (pipeline/tasks.py). The attributes state task,
classes, units, ground sampling distance, licence, source, notes on corrections, skipped samples, and the SHA-256 of
the content, which identifies the images in everything computed from them.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.bands import Band
from pipeline.errors import UserError

if TYPE_CHECKING:
    import xarray as xr

SPLITS = ("train", "val", "test")
# Split of images without labels. Backbones encode them, and students learn from the teacher's predictions on them.
UNLABELLED = "unlabelled"
# Dates in the range of datetime64[ns]; without this pattern numpy would read 20170216 as a year.
TIMESTAMP = re.compile(r"(19|20|21)\d\d-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?)?(Z|\+00:?00)?")


@dataclass(frozen=True, kw_only=True)
class ImageDatasetInfo:
    """Description of a dataset, known before a pixel is read.

    Attributes:
        sample: unique, stable names.
        split: `train`, `val`, `test` or `unlabelled` of every sample.
        units: of the pixel values, a key of `FULL_SCALE` in pipeline/bands.py.
        gsd: ground sampling distance in metres.
        display: reflectances [low, high] that are stretched to [0, 1] for models trained on photographs; None for
            8-bit colour, which is display-referred already.
        notes: corrected metadata, merged classes, dropped chips and resampled bands.
        crs: coordinate reference system of every sample, as WKT or an authority's code; empty where unknown.
        transform: (sample, 6), affine coefficients a to f from a pixel's column and row to coordinates in `crs`.
    """

    sample: Sequence[str]
    split: Sequence[str]
    bands: Sequence[Band]
    classes: Sequence[str]
    task: str
    units: str
    gsd: float
    licence: str
    source: str
    display: tuple[float, float] | None = None
    notes: Sequence[str] = field(default_factory=tuple)
    crs: Sequence[str] | None = None
    transform: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class ImageDataset(ImageDatasetInfo):
    """A prepared dataset in memory.

    Attributes:
        image: (sample, band, y, x).
        label: class index (sample,), multi-hot (sample, class) or mask (sample, y, x) with `IGNORE`.
        lat, lon: chip centres in degrees (WGS 84), or None if unknown.
        time: acquisition, UTC, datetime64[s], or None.
    """

    image: np.ndarray
    label: np.ndarray
    lat: np.ndarray | None = None
    lon: np.ndarray | None = None
    time: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """One sample: image (band, y, x), label, and its location in degrees and time where known."""

    image: np.ndarray
    label: np.ndarray | np.int64
    lat: float = np.nan
    lon: float = np.nan
    time: np.datetime64 = field(default_factory=lambda: np.datetime64("NaT", "s"))


@dataclass(frozen=True, kw_only=True)
class LazyImageDataset(ImageDatasetInfo):
    """A dataset that several processes read sample by sample, because it may not fit into memory.

    Attributes:
        read_sample: picklable function from a sample's name to the sample. It raises UserError for a damaged sample.
        shape, dtype: of every image, (band, y, x).
        check_band_means: takes the mean of each band over all samples (of every eighth pixel in y and x) and raises
            UserError if they cannot belong to this dataset.
    """

    read_sample: Callable[[str], Sample]
    shape: tuple[int, int, int]
    dtype: np.dtype
    check_band_means: Callable[[np.ndarray], None] | None = None


def open_images(path: Path) -> "xr.Dataset":
    """Open an images store as a lazy xarray dataset; a missing or truncated file raises UserError."""
    path = Path(path)
    if not (path / "zarr.json").exists():
        raise UserError(f"There is no images store at {path}. Make it with: dvc repro prepare@{path.stem}", path=path)
    consolidated = json.loads((path / "zarr.json").read_text()).get("consolidated_metadata") or {"metadata": {}}
    for name, metadata in consolidated["metadata"].items():
        _check_chunk_files(path / name, metadata)
    import xarray as xr  # takes 0.4 s to import; processes that only write images need none

    return xr.open_zarr(path, chunks=None)


def image_bands(images: "xr.Dataset") -> list[Band]:
    """Return the bands of an images store, in order."""
    columns = (images[name].values.tolist() for name in ("band_name", "band", "wavelength"))
    return [
        Band(name, common_name, wavelength, images.attrs["gsd"])
        for name, common_name, wavelength in zip(*columns, strict=True)
    ]


def _check_chunk_files(array: Path, metadata: Mapping) -> None:
    """Refuse an array with a missing or truncated file: zarr would read zeros in its place."""
    codec, *compressors = (codec["name"] for codec in metadata["codecs"])
    if compressors:  # not written by this package: chunks of zeros may have no file
        return
    chunk_shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    size = math.prod(chunk_shape) * np.dtype(metadata["data_type"]).itemsize if codec == "bytes" else None
    separator = metadata["chunk_key_encoding"]["configuration"]["separator"]
    counts = (-(-side // step) for side, step in zip(metadata["shape"], chunk_shape, strict=True))
    for index in np.ndindex(*counts):
        path = array / separator.join(["c", *map(str, index)])
        actual = path.stat().st_size if path.exists() else None
        if actual is None or (size and actual != size):
            problem = "is missing" if actual is None else f"has {actual} of {size} bytes"
            store = array.parent
            raise UserError(
                f"{path} {problem}. Delete {store} and make it again with: dvc repro prepare@{store.stem}",
                key=array.name, value=actual, allowed=[size] if size else None, path=path,
            )  # fmt: skip


def parse_timestamp(text: str, name: str) -> np.datetime64:
    """Parse a time in UTC; NaT if the text is empty. A UserError for another format states `name`."""
    try:
        if text and not TIMESTAMP.fullmatch(text):
            raise ValueError
        return np.datetime64(re.sub(r"Z$|\+00:?00$", "", text) or "NaT", "s")
    except ValueError:
        raise UserError(
            f"{name} is '{text}'; write it as 2017-02-16 or 2017-02-16T10:21:01, in UTC, in the years 1900 to 2199.",
            key=name, value=text,
        ) from None  # fmt: skip
