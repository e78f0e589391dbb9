"""The images store: the one format that every source is turned into and everything else reads.

A Zarr v3 group that opens with `xarray.open_zarr`:

    image   (sample, band, y, x)   the data's own units and size
    label   (sample) | (sample, class) | (sample, y, x)   class index, multi-hot, or mask
    sample, split, band, wavelength, and lat, lon, time where known: coordinates

Its attributes state task, classes, ignore value, units, ground sampling distance, licence, source,
corrections, and the SHA-256 of the content, from which every later digest follows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xarray as xr
import zarr

from cache.durable import building
from cache.schema import consolidate, put_array
from pipeline.bands import FULL_SCALE, Band
from pipeline.errors import UserError

IGNORE = 255
CHUNK = 64


@dataclass(frozen=True)
class Images:
    """One prepared dataset in memory.

    Attributes:
        image: (sample, band, y, x).
        label: class index (sample,), multi-hot (sample, class) or mask (sample, y, x) with `IGNORE`.
        sample: unique, stable names.
        split: `train`, `val` or `test` of every sample.
        lat, lon: chip centres in degrees (WGS 84), or None where unknown.
        time: acquisition, UTC, datetime64[s], or None.
        display: for reflectances, the [low, high] that is stretched to [0, 1] for models trained on
            photographs; None for 8-bit colour, which is display already.
        notes: what was merged, dropped or resampled on the way.
    """

    image: np.ndarray
    label: np.ndarray
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
    lat: np.ndarray | None = None
    lon: np.ndarray | None = None
    time: np.ndarray | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def write(images: Images, scratch: Path, final: Path) -> None:
    """Check the dataset and write it as an images store that appears at `final` in one step.

    Raises:
        UserError: shapes, names, splits or labels that do not fit together.
    """
    check(images)
    names = [band.common_name for band in images.bands]
    arrays = {
        "image": (images.image, ("sample", "band", "y", "x")),
        "label": (images.label, label_dims(images.task)),
        "sample": (np.array(images.sample, dtype=object), ("sample",)),
        "split": (np.array(images.split, dtype=object), ("sample",)),
        "band": (np.array(names, dtype=object), ("band",)),
        "band_name": (np.array([band.name for band in images.bands], dtype=object), ("band",)),
        "wavelength": (np.array([band.wavelength for band in images.bands]), ("band",)),
    }
    for name in ("lat", "lon", "time"):
        if (values := getattr(images, name)) is not None:
            arrays[name] = (values, ("sample",))
    described = {
        "image": {"units": images.units},
        "label": {"ignore_value": IGNORE} if images.task == "segmentation" else {},
        "wavelength": {"units": "micrometre"},
        "lat": {"units": "degrees_north"},
        "lon": {"units": "degrees_east"},
        "time": {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"},
    }
    with building(scratch, final):
        group = zarr.open_group(scratch, mode="w", zarr_format=3)
        content = hashlib.sha256()
        for name, (values, dims) in arrays.items():
            if name == "time":
                values = values.astype("datetime64[s]").astype(np.int64)
            chunks = (CHUNK if dims[0] == "sample" and values.ndim > 1 else len(values), *values.shape[1:])
            put_array(group, name, values, dims, chunks=chunks, attributes=described.get(name, {}))
            content.update(f"{name} {values.dtype} {values.shape}".encode())
            content.update("\0".join(values).encode() if values.dtype == object else values.tobytes())
        attributes = {
            "task": images.task,
            "classes": list(images.classes),
            "units": images.units,
            "gsd": images.gsd,
            "gsd_units": "metre",
            "display": list(images.display) if images.display else None,
            "licence": images.licence,
            "source": images.source,
            "notes": list(images.notes),
        }
        content.update(repr(sorted(attributes.items())).encode())
        group.attrs.update(
            {**attributes, "content_sha256": content.hexdigest(), "coordinates": " ".join(list(arrays)[2:])}
        )
        consolidate(group)


def open_images(path: Path) -> xr.Dataset:
    """The images store as a lazy xarray dataset.

    Raises:
        UserError: nothing there; the message says which stage makes it.
    """
    if not (Path(path) / "zarr.json").exists():
        raise UserError(f"There is no images store at {path}. Make it with: dvc repro prepare@{Path(path).stem}")
    return xr.open_zarr(path, chunks=None)


def label_dims(task: str) -> tuple[str, ...]:
    """Dimensions of the label of a task."""
    return {
        "classification": ("sample",),
        "multilabel": ("sample", "class"),
        "segmentation": ("sample", "y", "x"),
    }[task]


def check(images: Images) -> None:
    """Refuse what could not be a dataset; every message names what is wrong."""
    count = len(images.image)
    if images.image.ndim != 4 or images.image.shape[1] != len(images.bands):
        raise UserError(f"Images of shape {images.image.shape} do not have {len(images.bands)} bands second.")
    for name in ("label", "sample", "split", "lat", "lon", "time"):
        values = getattr(images, name)
        if values is not None and len(values) != count:
            raise UserError(f"There are {count} images but {len(values)} values of '{name}'.")
    if len(set(images.sample)) != count:
        raise UserError("A sample's name appears twice; names must be unique.")
    if absent := {"train", "val", "test"} - set(images.split):
        raise UserError(f"The splits {', '.join(sorted(absent))} are empty. Use smaller blocks or more data.")
    if images.units not in FULL_SCALE:
        raise UserError(f"Units '{images.units}' are not known. Known units: {', '.join(FULL_SCALE)}.")
    if images.label.ndim != len(label_dims(images.task)):
        raise UserError(f"A {images.task} label has dimensions {label_dims(images.task)}, not {images.label.shape}.")
    if images.task == "multilabel":
        allowed = np.isin(images.label, (0, 1)).all() and images.label.shape[1] == len(images.classes)
    else:
        known = np.arange(len(images.classes))
        ignore = [IGNORE] if images.task == "segmentation" else []
        allowed = np.isin(np.unique(images.label), [*known, *ignore]).all()
    if not allowed:
        raise UserError(f"A label lies outside the {len(images.classes)} classes {', '.join(images.classes)}.")
    if images.lat is not None and (np.abs(images.lat).max() > 90 or np.abs(images.lon).max() > 180):
        raise UserError("A latitude lies outside ±90° or a longitude outside ±180°. Are they swapped?")
