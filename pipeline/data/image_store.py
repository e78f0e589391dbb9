"""The images store: the one format that every source is turned into and everything else reads.

A Zarr v3 group that opens with `xarray.open_zarr`:

    image   (sample, band, y, x)   the data's own units and size
    label   (sample) | (sample, class) | (sample, y, x)   class index, multi-hot, or mask; `no_label` if unlabelled
    sample, split, band, wavelength, and lat, lon, time, crs, transform where known: coordinates

Its attributes state task, classes, ignore value, units, ground sampling distance, licence, source, corrections,
what was left out, and the SHA-256 of the content, from which every later digest follows.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.bands import FULL_SCALE, Band
from pipeline.errors import UserError

if TYPE_CHECKING:
    import xarray as xr

IGNORE = 255
# A split of images without labels: backbones encode them, and students learn what their teachers say of them.
UNLABELLED = "unlabelled"
# In place of a class index. Losses, counts and indexing raise on it; -1 would be the last class to an index, and to
# counts, as 255, a class of another sample.
NO_CLASS = -(2**31)
# numpy takes 20170216 for a year, and xarray none that nanoseconds since 1970 cannot say.
_MOMENT = re.compile(r"(19|20|21)\d\d-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?)?(Z|\+00:?00)?")


@dataclass(frozen=True, kw_only=True)
class ImageDatasetInfo:
    """What is known of a dataset before a pixel of it is read.

    Attributes:
        sample: unique, stable names.
        split: `train`, `val`, `test` or `unlabelled` of every sample.
        display: for reflectances, the [low, high] that is stretched to [0, 1] for models trained on
            photographs; None for 8-bit colour, which is display already.
        notes: what was corrected, merged, dropped or resampled on the way.
        crs: coordinate reference system of every sample, as WKT or an authority's code; empty where unknown.
        transform: (sample, 6), affine coefficients a to f from a pixel's column and row to its place in `crs`.
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
    """One prepared dataset in memory.

    Attributes:
        image: (sample, band, y, x).
        label: class index (sample,), multi-hot (sample, class) or mask (sample, y, x) with `IGNORE`.
        lat, lon: chip centres in degrees (WGS 84), or None where unknown.
        time: acquisition, UTC, datetime64[s], or None.
    """

    image: np.ndarray
    label: np.ndarray
    lat: np.ndarray | None = None
    lon: np.ndarray | None = None
    time: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """One sample as a stream's reader gives it: image (band, y, x), its label, and its place and time if known."""

    image: np.ndarray
    label: np.ndarray
    lat: float = np.nan
    lon: float = np.nan
    time: np.datetime64 = field(default_factory=lambda: np.datetime64("NaT", "s"))


@dataclass(frozen=True, kw_only=True)
class LazyImageDataset(ImageDatasetInfo):
    """One prepared dataset that is read sample by sample, by several processes, since it may not fit into memory.

    Attributes:
        read: from a sample's name, and memory that its image may be read into, to the sample; it is sent to other
            processes. It raises UserError for a sample that is damaged.
        shape, dtype: of every image.
        verify: looks at the mean of each band over all samples (of every eighth pixel each way) and raises
            UserError if they cannot be those of this dataset; None where nothing is known of them.
        ahead: given names of samples that will be read soon, has the system fetch their files meanwhile; None where
            nothing can be fetched.
    """

    read_sample: Callable[[str, np.ndarray], Sample]
    shape: tuple[int, int, int]
    dtype: np.dtype
    check_band_means: Callable[[np.ndarray], None] | None = None
    prefetch: Callable[[Sequence[str]], None] | None = None


def open_images(path: Path) -> "xr.Dataset":
    """The images store as a lazy xarray dataset.

    Raises:
        UserError: nothing there, or a file of it is missing or cut; the message says which stage makes it.
    """
    path = Path(path)
    if not (path / "zarr.json").exists():
        raise UserError(f"There is no images store at {path}. Make it with: dvc repro prepare@{path.stem}")
    of_all = json.loads((path / "zarr.json").read_text()).get("consolidated_metadata") or {"metadata": {}}
    for name, described in of_all["metadata"].items():
        _check_files(path / name, described)
    import xarray as xr  # takes half a second, which processes that only write would wait for

    return xr.open_zarr(path, chunks=None)


def image_bands(images: "xr.Dataset") -> list[Band]:
    """Return the bands of an images store, in order."""
    columns = (images[name].values.tolist() for name in ("band_name", "band", "wavelength"))
    return [Band(*row, gsd=images.attrs["gsd"]) for row in zip(*columns, strict=True)]


def _again(store: Path) -> str:
    return f"Delete {store} and make it again with: dvc repro prepare@{store.stem}"


def _check_files(array: Path, described: Mapping) -> None:
    """Refuse an array that lacks a file, for which zarr would read zeros, or of which one is cut."""
    codec, *others = (codec["name"] for codec in described["codecs"])
    if others:  # not as all are written here: files may be left out that hold zeros alone
        return
    chunk = described["chunk_grid"]["configuration"]["chunk_shape"]
    size = math.prod(chunk) * np.dtype(described["data_type"]).itemsize if codec == "bytes" else None
    separator = described["chunk_key_encoding"]["configuration"]["separator"]
    for place in np.ndindex(*(-(-side // step) for side, step in zip(described["shape"], chunk, strict=True))):
        path = array / separator.join(["c", *map(str, place)])
        found = path.stat().st_size if path.exists() else None
        if found is None or (size and found != size):
            what = "is missing" if found is None else f"has {found} of {size} bytes"
            raise UserError(f"{path} {what}. {_again(array.parent)}")


def label_dims(task: str) -> tuple[str, ...]:
    """Dimensions of the label of a task."""
    return {
        "classification": ("sample",),
        "multilabel": ("sample", "class"),
        "segmentation": ("sample", "y", "x"),
    }[task]


def missing_label(task: str, classes: int, size: tuple[int, ...]) -> np.ndarray:
    """What stands in the label's place of a sample of the split `unlabelled`.

    Args:
        size: (y, x) of the image.

    Returns:
        `NO_CLASS`, int64 (), or `IGNORE` everywhere, which is in no multi-hot label either, uint8 (class,) or (y, x).
    """
    if task == "classification":
        return np.array(NO_CLASS)
    return np.full(size if task == "segmentation" else classes, IGNORE, np.uint8)


def validate_dataset(images: ImageDataset) -> None:
    """Refuse what could not be a dataset; every message names what is wrong."""
    count = len(images.image)
    if images.image.ndim != 4 or images.image.shape[1] != len(images.bands):
        raise UserError(f"Images of shape {images.image.shape} do not have {len(images.bands)} bands second.")
    for name in ("label", "sample", "split", "lat", "lon", "time"):
        values = getattr(images, name)
        if values is not None and len(values) != count:
            raise UserError(f"There are {count} images but {len(values)} values of '{name}'.")
    validate_info(images)
    if images.label.ndim != len(label_dims(images.task)):
        raise UserError(f"A {images.task} label has dimensions {label_dims(images.task)}, not {images.label.shape}.")
    bare = np.asarray(images.split) == UNLABELLED
    check_label(images.label[~bare], images)
    check_label_is_missing(images.label[bare], images.task)
    if images.lat is not None:
        check_location(images.lat, images.lon)


def parse_timestamp(text: str, what: str) -> np.datetime64:
    """A time in UTC, or NaT of no text.

    Raises:
        UserError: it is written otherwise; `what` begins the message.
    """
    try:
        if text and not _MOMENT.fullmatch(text):
            raise ValueError
        return np.datetime64(re.sub(r"Z$|\+00:?00$", "", text) or "NaT", "s")
    except ValueError:
        raise UserError(
            f"{what} is '{text}'; write it as 2017-02-16 or 2017-02-16T10:21:01, in UTC, in the years 1900 to 2199."
        ) from None


def validate_info(images: ImageDatasetInfo) -> None:
    """Refuse names, splits and units that could not be a dataset's."""
    if len(set(images.sample)) != len(images.sample):
        raise UserError("A sample's name appears twice; names must be unique.")
    if absent := {"train", "val", "test"} - set(images.split):
        raise UserError(
            f"The splits {', '.join(sorted(absent))} are empty. Use smaller blocks or more data, or a list of splits "
            "that has all three."
        )
    names = [band.common_name for band in images.bands]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"Two bands are called '{min(twice)}'; a band must be known by its name.")
    if images.units not in FULL_SCALE:
        raise UserError(f"Units '{images.units}' are not known. Known units: {', '.join(FULL_SCALE)}.")
    for name in ("crs", "transform"):
        values = getattr(images, name)
        if values is not None and len(values) != len(images.sample):
            raise UserError(f"There are {len(images.sample)} samples but {len(values)} values of '{name}'.")


def check_label(label: np.ndarray, images: ImageDatasetInfo) -> None:
    """Refuse a label, or labels, outside the classes."""
    if images.task == "multilabel":
        allowed = ((label == 0) | (label == 1)).all() and label.shape[-1] == len(images.classes)
    elif label.dtype.kind == "u" and label.size and label.max() < len(images.classes):  # as nearly all are
        allowed = True
    else:
        outside = (label < 0) | (label >= len(images.classes))
        allowed = not (outside & (label != IGNORE) if images.task == "segmentation" else outside).any()
    if not allowed:
        raise UserError(f"A label lies outside the {len(images.classes)} classes {', '.join(images.classes)}.")


def check_label_is_missing(label: np.ndarray, task: str) -> None:
    """Refuse labels in the split `unlabelled`, where nothing would use them, and something might by mistake."""
    if (label != (NO_CLASS if task == "classification" else IGNORE)).any():
        raise UserError(f"A sample of the split {UNLABELLED} has a label. Give it another split, or no label.")


def check_location(lat, lon) -> None:
    """Refuse what is no place on Earth; not a number is one that is not known."""
    if (np.abs(lat) > 90).any() or (np.abs(lon) > 180).any():
        raise UserError("A latitude lies outside ±90° or a longitude outside ±180°. Are they swapped?")
