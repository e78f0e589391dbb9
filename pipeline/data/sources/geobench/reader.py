"""Read GEO-Bench's HDF5 files: pixels, label, location and date of a sample.

The files are not trusted: a file cannot run code, refer to other files, or make the reader allocate more memory than
its set needs. Every error names the file.
"""

import ast
import contextlib
import itertools
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5l, h5s

from pipeline.data.image_store import Sample
from pipeline.data.sources.geobench import unpickler
from pipeline.data.sources.geobench.catalog import GeoBenchOptions, GeoBenchSet
from pipeline.errors import UserError
from pipeline.tasks import IGNORE

_DATED_KEY = re.compile(r"(.+)_(\d{4}-\d{2}-\d{2})")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_LOCATION_PATTERNS = {
    "lat_lon_date": re.compile(rf"{_NUMBER}_{_NUMBER}_\d{{4}}_\d{{2}}_\d{{2}}$"),
    "lat,lon": re.compile(rf"{_NUMBER},{_NUMBER}"),
    "lon,lat": re.compile(rf".*_{_NUMBER},{_NUMBER}"),
}
# Largest difference of a pixel, times 255, from an 8-bit value: float32 rounds by a tenth of it.
_BYTE_TOLERANCE = 2.5e-4
# Keys named in a message.
_MAX_KEYS_SHOWN = 30
# The first files may be damaged; this many are tried to find the dtypes that all files share.
_MAX_PROBED_FILES = 100


@dataclass(frozen=True)
class GeoBenchReader:
    """Reader of a set's samples by name; other processes receive a copy.

    Attributes:
        keys: HDF5 keys of the bands to read, without dates, in order.
        dtype: of the image.
        labels: label by sample name, from the set's JSON files; None if only the samples' own attributes have labels.
        restore_bytes: convert 8-bit images divided by 255 back to 8 bits.
    """

    folder: Path
    spec: GeoBenchSet
    options: GeoBenchOptions
    keys: tuple[str, ...]
    dtype: np.dtype
    labels: Mapping[str, int | tuple[int, ...]] | None
    restore_bytes: bool

    def __call__(self, name: str) -> Sample:
        """Read a sample; UserError if the file is missing, damaged or not a file of this set."""
        path = self.folder / f"{name}.hdf5"
        try:
            with _open_hdf5(path) as file:
                sample = self._read_sample(file, name)
                if path.stat().st_size < file.id.get_filesize():  # HDF5 returns zeros for the missing bytes
                    raise OSError("the file was truncated while it was read")
                return sample
        except FileNotFoundError:
            message = f"There is no {path}, but the partition lists it. Restore it, or skip it with skip_bad: true."
            raise UserError(message, path=path) from None
        except Exception as error:  # a damaged file can fail in any way
            raise _file_error(path, error) from None

    def _read_sample(self, file: h5py.File, name: str) -> Sample:
        attributes = _read_attributes(file)
        key_in_file = _keys_without_dates(file, self.spec)
        image = np.empty((len(self.keys), self.spec.image_size, self.spec.image_size), self.dtype)
        for band, key in zip(image, self.keys, strict=True):
            band[:] = self._read_band(key, h5d.open(file.id, key_in_file[key]))
        if self.spec.task_class.is_dense:
            label = self._read_mask(h5d.open(file.id, key_in_file["label"]))
        else:
            label = self._label(attributes, name)
        lat, lon = _location(name, self.spec, self.options.keep_released_metadata)
        return Sample(image, label, lat, lon, self._date(name, key_in_file))

    def _read_band(self, key: str, dataset: h5d.DatasetID) -> np.ndarray:
        """Read a band, (y, x); pixels of a coarser GSD than the set's are repeated to its image size."""
        size = self.spec.image_size
        is_coarse = self.spec.released_bands[key].gsd > self.spec.gsd
        sides = [side for side in range(1, size + 1) if size % side == 0] if is_coarse else [size]
        values = _read(key, dataset, sides)
        repeats = size // len(values)
        values = values.repeat(repeats, axis=0).repeat(repeats, axis=1) if repeats > 1 else values
        return _restore_bytes(key, values) if self.restore_bytes else _cast(key, values, self.dtype)

    def _read_mask(self, dataset: h5d.DatasetID) -> np.ndarray:
        """Read a mask, uint8 (y, x)."""
        size, n_classes = self.spec.image_size, len(self.spec.classes)
        values = _read("label", dataset, [size])
        with np.errstate(invalid="ignore"):
            mask = values.astype(np.uint8)
        if mask.max() >= n_classes or not np.array_equal(mask, values):
            invalid = sorted({value for value in np.unique(values).tolist() if value not in range(n_classes)})[:5]
            message = f"The label has the values {invalid}. {self.spec.name} has the classes 0 to {n_classes - 1}."
            raise UserError(message, key="label", value=invalid, allowed=range(n_classes))
        if self.options.ignore_nodata:
            mask[mask == self.spec.nodata_class] = IGNORE
        return mask

    def _label(self, attributes: Mapping, name: str) -> np.ndarray:
        """Return the label in the set's JSON files or the sample's attributes; refuse it if the two differ."""
        n_classes = len(self.spec.classes)
        released_labels = (attributes.get("label"), (self.labels or {}).get(name))
        file_label, listed_label = (None if label is None else _as_integer_label(label) for label in released_labels)
        label = listed_label if file_label is None else file_label
        if label is None:
            message = "There is no label, neither in the attribute 'pickle' nor in the JSON files of the folder."
            raise UserError(message, key="label")
        shown = reprlib.repr(label.tolist())
        if listed_label is not None and not np.array_equal(label, listed_label):
            listed = listed_label.tolist()
            message = f"The label is {shown} in the file, but {reprlib.repr(listed)} in the JSON files of the folder."
            raise UserError(message, key="label", value=label.tolist(), allowed=(listed,))
        is_multilabel = self.spec.task_class.is_multilabel
        shape, allowed = ((n_classes,), range(2)) if is_multilabel else ((), range(n_classes))
        if label.shape != shape or not np.isin(label, allowed).all():
            expected = f"{n_classes} zeros and ones" if is_multilabel else f"a class from 0 to {n_classes - 1}"
            message = f"The label is {shown}. A label of {self.spec.name} is {expected}."
            raise UserError(message, key="label", value=label.tolist(), allowed=allowed)
        return label.astype(np.uint8) if is_multilabel else label

    def _date(self, name: str, key_in_file: Mapping[str, bytes]) -> np.datetime64:
        """Return the acquisition date; NaT if unknown."""
        date = ""
        if self.spec.date_source == "name":
            date = name[-10:].replace("_", "-")
        elif self.spec.date_source == "key":
            dates = {match[2] for key in self.keys if (match := _DATED_KEY.fullmatch(key_in_file[key].decode()))}
            date = dates.pop() if len(dates) == 1 else ""  # bands of several dates have no common date
        corrects_dates = self.spec.has_placeholder_dates and not self.options.keep_released_metadata
        is_unknown = not date or (corrects_dates and date.endswith("-01-01"))
        try:
            return np.datetime64("NaT" if is_unknown else date, "s")
        except ValueError:
            return np.datetime64("NaT", "s")


def common_dtype(
    folder: Path, names: Sequence[str], spec: GeoBenchSet, keys: Sequence[str], skip_bad: bool
) -> np.dtype:
    """Return the dtype of all bands in the first file, or with `skip_bad` in the first readable file.

    Raises UserError: there are no files, or the first one is damaged.
    """
    existing = (path for name in names if (path := folder / f"{name}.hdf5").exists())
    paths = list(itertools.islice(existing, _MAX_PROBED_FILES))
    for path in paths:
        try:
            with _open_hdf5(path) as file:
                key_in_file = _keys_without_dates(file, spec)
                dtypes = {key: h5d.open(file.id, key_in_file[key]).dtype for key in keys}
            for key, dtype in dtypes.items():
                _check_numeric(key, dtype)
            common = np.result_type(*dtypes.values())
            # float32 has seven digits, more than any sensor.
            return np.dtype(np.float32) if common == np.float64 else common
        except Exception as error:  # a damaged file can fail in any way
            if not skip_bad or path == paths[-1]:
                raise _file_error(path, error) from None
    message = f"{folder} has no file of its partition. Restore the files, or delete the folder to download the set."
    raise UserError(message, path=folder)


def _open_hdf5(path: Path) -> h5py.File:
    """Open a file for reading, also in read-only folders and on file systems without locks."""
    return h5py.File(path, "r", locking=False)


def _file_error(path: Path, error: Exception) -> UserError:
    """Add the path to an error; the fields of a UserError are kept."""
    if isinstance(error, UserError):
        return UserError(f"{path}: {error}", key=error.key, value=error.value, allowed=error.allowed, path=path)
    message = " ".join(str(error).split())[:300]
    return UserError(f"{path} cannot be read: {message}", path=path)


def _read_attributes(file: h5py.File) -> Mapping:
    """Read the dictionary in a file's attribute 'pickle', without running the pickle."""
    attribute = file.attrs.get_id("pickle") if "pickle" in file.attrs else None
    data = None
    if attribute and attribute.shape == () and h5py.check_string_dtype(attribute.dtype):
        text = file.attrs["pickle"]
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            data = ast.literal_eval(text.decode(errors="replace") if isinstance(text, bytes) else text)
    if not isinstance(data, bytes):
        message = "There is no attribute 'pickle' that contains bytes as text, as GEO-Bench's files have."
        raise UserError(message, key="pickle")
    attributes = unpickler.loads(data)
    if not isinstance(attributes, dict):
        raise UserError("The attribute 'pickle' is not a dictionary.", key="pickle")
    return attributes


def _as_integer_label(label: object) -> np.ndarray:
    """Convert a label, a number or a list of numbers, to int64; UserError if it is not made of integers."""
    elements = label if isinstance(label, list | tuple) else [label]
    integers = None
    # Nested lists could be too deep, or too large, for numpy.
    if not any(isinstance(element, list | tuple | dict | str | bytes) for element in elements):
        values = np.asarray(label)
        with np.errstate(invalid="ignore"):
            integers = values.astype(np.int64) if values.dtype.kind in "biuf" else None
    if integers is None or not np.array_equal(values, integers):
        # Not the label itself: an arbitrary object could not be sent to another process.
        shown = reprlib.repr(label)
        raise UserError(f"The label is {shown}. Labels must be integers.", key="label", value=shown)
    return integers


def _keys_without_dates(file: h5py.File, spec: GeoBenchSet) -> dict[str, bytes]:
    """Return the keys in a file by their names without dates.

    Raises UserError: a band is missing, unknown, a link, or has several dates.
    """
    key_in_file: dict[str, bytes] = {}
    links: list[tuple[bytes, int]] = []
    file.id.links.iterate(lambda key, link: links.append((key, link.type)), info=True)
    for key, link_type in links:
        if link_type != h5l.TYPE_HARD:
            message = f"The key {reprlib.repr(key)} is a link. GEO-Bench has none, and it may lead to another file."
            raise UserError(message, key=key.decode(errors="replace"))
        dated = _DATED_KEY.fullmatch(key.decode())
        name = dated[1] if dated else key.decode()
        if name in key_in_file:
            raise UserError(f"The key '{name}' has several dates. {spec.name} has one.", key=name)
        key_in_file[name] = key
    required = {*spec.released_bands} | ({"label"} if spec.task_class.is_dense else set())
    present = sorted(key_in_file)
    if missing := sorted(required - key_in_file.keys()):
        shown = ", ".join(present[:_MAX_KEYS_SHOWN]) or "none"
        message = f"The keys {', '.join(missing)} are missing. The file has: {shown}."
        raise UserError(message, key=missing[0], allowed=present)
    if unknown := sorted(key_in_file.keys() - required - spec.unread_keys.keys() - {"label"}):
        message = f"The keys {', '.join(unknown[:_MAX_KEYS_SHOWN])} are unknown. {spec.name} does not have them."
        raise UserError(message, key=unknown[0], allowed=sorted(required | spec.unread_keys.keys()))
    return key_in_file


def _location(name: str, spec: GeoBenchSet, keep_released_metadata: bool) -> tuple[float, float]:
    """Return latitude and longitude in degrees from a sample's name; NaN if it has none."""
    match = _LOCATION_PATTERNS[spec.location_format].match(name) if spec.location_format else None
    if not match:
        return np.nan, np.nan
    lat, lon = float(match[1]), float(match[2])
    # All `lat,lon` sets are in Germany, where the latitude is the larger number.
    is_swapped = spec.location_format == "lat,lon" and lat < lon and not keep_released_metadata
    if spec.location_format == "lon,lat" or is_swapped:
        lat, lon = lon, lat
    return lat, lon


def _read(key: str, dataset: h5d.DatasetID, sides: list[int]) -> np.ndarray:
    """Read a band or mask, (y, x), if it has one of the `sides` and its values are in the file.

    Through h5py's low-level API: creating an h5py.Dataset takes longer than reading.
    """
    shape, dtype, size = dataset.shape, dataset.dtype, sides[-1]
    if shape not in [(side, side, *channel) for side in sides for channel in ((), (1,))]:
        raise UserError(
            f"'{key}' has the shape {shape}. Bands and masks of this set have {size} x {size} pixels.",
            key=key, value=shape, allowed=((size, size), (size, size, 1)),
        )  # fmt: skip
    _check_numeric(key, dtype)
    properties = dataset.get_create_plist()
    if properties.get_layout() == h5d.VIRTUAL or properties.get_external_count():
        message = f"The pixels of '{key}' are in other files. GEO-Bench's files contain their own pixels."
        raise UserError(message, key=key, value="external")
    if dataset.get_space_status() == h5d.SPACE_STATUS_NOT_ALLOCATED:  # HDF5 would return zeros
        raise UserError(f"The pixels of '{key}' were never written.", key=key, value="not allocated")
    values = np.empty(shape, dtype)
    dataset.read(h5s.ALL, h5s.ALL, values)
    return values.reshape(shape[:2])


def _check_numeric(key: str, dtype: np.dtype) -> None:
    """Raise UserError for a band or mask that does not consist of integers or floating-point numbers."""
    if dtype.kind not in "iuf" and (key, dtype.kind) != ("label", "b"):
        raise UserError(f"'{key}' has {dtype} values. Pixels must be numbers.", key=key, value=str(dtype))


def _cast(key: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast a band: floats to a smaller float type, which loses only precision, or else exactly."""
    with np.errstate(invalid="ignore"):
        cast = values.astype(dtype, copy=False)
    loses_precision_only = dtype.kind == "f" and values.dtype.kind == "f"
    if cast is not values and not loses_precision_only and not np.array_equal(cast, values):
        message = f"Band '{key}' has {values.dtype} values that {dtype} cannot represent."
        raise UserError(message, key=key, value=str(values.dtype), allowed=(str(dtype),))
    return cast


def _restore_bytes(key: str, values: np.ndarray) -> np.ndarray:
    """Convert pixels divided by 255 back to 8 bits."""
    scaled = values * np.float32(255)
    with np.errstate(invalid="ignore"):
        restored = np.rint(scaled).astype(np.uint8)
        difference = np.abs(scaled - restored)
    if not difference.max() <= _BYTE_TOLERANCE:  # also if it is NaN
        invalid = float(values[~(difference <= _BYTE_TOLERANCE)][0])
        raise UserError(
            f"Band '{key}' has the value {invalid:.6g}, which is not an 8-bit value divided by 255. Skip such files "
            "with skip_bad: true. If the values are in [0, 1], keep_released_metadata: true keeps them.",
            key=key, value=invalid,
        )  # fmt: skip
    return restored
