"""Read one HDF5 file of GEO-Bench: pixels, label, location and date.

The files are not trusted: a file cannot run code, refer to other files, or make the reader allocate more memory than
its set needs. Every error names the file.
"""

import ast
import contextlib
import functools
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5l, h5p, h5s, h5t

from pipeline.data.image_store import Sample
from pipeline.data.sources.geobench import unpickler
from pipeline.data.sources.geobench.catalog import GeoBenchSet
from pipeline.errors import UserError
from pipeline.tasks import IGNORE

_DATED_KEY = re.compile(r"(.+)_(\d{4}-\d{2}-\d{2})")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_LOCATION_PATTERNS = {
    "lat_lon_date": re.compile(rf"{_NUMBER}_{_NUMBER}_\d{{4}}_\d{{2}}_\d{{2}}$"),
    "lat,lon": re.compile(rf"{_NUMBER},{_NUMBER}"),
    "lon,lat": re.compile(rf".*_{_NUMBER},{_NUMBER}"),
}
# A little more than 255: value / 255 * 255 can round to just below the value, and conversion to uint8 truncates.
_SCALE_TO_BYTES = np.float32(255.0002)
# Largest fraction that the conversion may truncate: 0.0002 from the scale, and rounding. Values within 1e-6 of
# value / 255 pass.
_MAX_TRUNCATED = np.float32(0.000255)
# Keys named in a message.
_MAX_KEYS_SHOWN = 30


def _file_access_properties() -> h5p.PropFAID:
    properties = h5p.create(h5p.FILE_ACCESS)
    properties.set_file_locking(False, True)  # for read-only folders and file systems without locks
    properties.set_fclose_degree(h5f.CLOSE_STRONG)
    return properties


# The low-level API of h5py, since creating h5py.File and h5py.Dataset takes several times as long as reading.
_FILE_ACCESS = _file_access_properties()
_hdf5_type = functools.cache(h5t.py_create)


@dataclass(frozen=True)
class GeoBenchReader:
    """Reader of a set's samples by name; other processes receive a copy.

    Attributes:
        folder: of the set.
        spec: description of the set.
        keys: HDF5 keys of the bands to read, without dates, in order.
        file_dtypes: dtype of each of them in most files.
        dtype: of the image.
        labels: label by sample name, from the set's JSON files; None if only the samples' own attributes have labels.
        keep_released_metadata: keep location and date as released, even where they are known to be wrong.
        ignore_nodata: exclude pixels of the class "no data" from loss and score.
        restore_bytes: convert 8-bit images divided by 255 back to 8 bits.
    """

    folder: Path
    spec: GeoBenchSet
    keys: tuple[str, ...]
    file_dtypes: tuple[np.dtype, ...]
    dtype: np.dtype
    labels: Mapping[str, int | tuple[int, ...]] | None
    keep_released_metadata: bool = False
    ignore_nodata: bool = False
    restore_bytes: bool = False

    def __call__(self, name: str, out: np.ndarray | None = None) -> Sample:
        """Read a sample.

        Args:
            name: of the sample.
            out: (band, y, x) of `dtype`, into which the image is read; None for a new array.

        Raises:
            UserError: the file is missing, damaged or not a file of this set.
        """
        path = f"{self.folder}/{name}.hdf5"
        try:
            with open_hdf5(path) as file:
                return self._read_sample(file, name, out)
        except FileNotFoundError:
            raise UserError(
                f"There is no {path}, but the partition lists it. Restore it, or skip it with skip_bad: true.",
                path=path,
            ) from None
        except Exception as error:  # a damaged file can fail in any way
            raise file_error(path, error) from None

    def prefetch(self, names: Sequence[str]) -> None:
        """Have the system read the files of samples in the background."""
        for name in names:
            with contextlib.suppress(OSError):  # reading the sample reports the error
                descriptor = os.open(f"{self.folder}/{name}.hdf5", os.O_RDONLY)
                try:
                    if not _in_page_cache(descriptor):
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def _read_sample(self, file: h5f.FileID, name: str, out: np.ndarray | None) -> Sample:
        attributes = read_attributes(file)
        key_in_file = keys_without_dates(file, self.spec)
        size = self.spec.image_size
        image = np.empty((len(self.keys), size, size), self.dtype) if out is None else out
        for band, key, file_dtype in zip(image, self.keys, self.file_dtypes, strict=True):
            self._read_band(file, key, key_in_file[key], file_dtype, band)
        if self.spec.task_class.is_dense:
            label = self._read_mask(file, h5d.open(file, key_in_file["label"]))
        else:
            label = self._label(attributes, name)
        lat, lon = location_from_name(name, self.spec, self.keep_released_metadata)
        return Sample(image, label, lat, lon, self._date(name, key_in_file))

    def _read_band(
        self, file: h5f.FileID, key: str, key_in_file: bytes, file_dtype: np.dtype, out: np.ndarray
    ) -> None:
        dataset = h5d.open(file, key_in_file)
        values = _reusable_buffer(out.shape, np.dtype(np.float32)) if self.restore_bytes else out
        if dataset.shape == out.shape and dataset.get_type() == _hdf5_type(file_dtype):
            _read(file, dataset, key, values, same_type=file_dtype == values.dtype)
        else:
            values[:] = _read_converted(h5py.Dataset(dataset), key, values.dtype, self.spec)
        if self.restore_bytes and (invalid := _restore_bytes(values, out)) is not None:
            raise UserError(
                f"Band '{key}' has the value {invalid:.6g}, which is not an 8-bit value divided by 255. Skip such "
                "files with skip_bad: true. If the values are in [0, 1], keep_released_metadata: true keeps them.",
                key=key,
                value=invalid,
            )

    def _read_mask(self, file: h5f.FileID, dataset: h5d.DatasetID) -> np.ndarray:
        """Read a mask, uint8 (y, x)."""
        size, n_classes = self.spec.image_size, len(self.spec.classes)
        if dataset.shape not in ((size, size), (size, size, 1)) or dataset.dtype.kind not in "biuf":
            raise UserError(
                f"The label has {dataset.dtype} values of shape {dataset.shape}. Masks of {self.spec.name} have "
                f"numbers of shape ({size}, {size}).",
                key="label",
                value=dataset.shape,
                allowed=((size, size), (size, size, 1)),
            )
        mask = _reusable_buffer(dataset.shape, dataset.dtype)
        _read(file, dataset, "label", mask, same_type=dataset.get_type() == _hdf5_type(mask.dtype))
        mask = mask.reshape(size, size)
        # As unsigned integers, negative values are greater than any class index.
        unsigned = mask.view(mask.dtype.str.replace("i", "u"))
        if not 0 <= unsigned.max() < n_classes or (mask.dtype.kind == "f" and (mask.min() < 0 or (mask % 1).any())):
            invalid = sorted({value for value in np.unique(mask).tolist() if value not in range(n_classes)})
            raise UserError(
                f"The label has the values {invalid[:5]}. {self.spec.name} has the classes 0 to {n_classes - 1}.",
                key="label",
                value=invalid[:5],
                allowed=range(n_classes),
            )
        mask = mask.astype(np.uint8)
        if self.ignore_nodata:
            mask[mask == self.spec.nodata_class] = IGNORE
        return mask

    def _label(self, attributes: Mapping, name: str) -> np.ndarray:
        """Return the label in the set's JSON files or the sample's attributes; refuse it if the two differ."""
        n_classes = len(self.spec.classes)
        released_labels = (attributes.get("label"), self.labels.get(name) if self.labels is not None else None)
        file_label, listed_label = (None if label is None else as_integer_label(label) for label in released_labels)
        label = listed_label if file_label is None else file_label
        if label is None:
            raise UserError(
                "There is no label, neither in the attribute 'pickle' nor in the JSON files of the folder.",
                key="label",
            )
        if file_label is not None and listed_label is not None and not np.array_equal(file_label, listed_label):
            raise UserError(
                f"The label is {file_label.tolist()} in the file, but {listed_label.tolist()} in the JSON files of "
                "the folder.",
                key="label",
                value=file_label.tolist(),
                allowed=(listed_label.tolist(),),
            )
        if self.spec.task_class.is_multilabel:
            if label.shape != (n_classes,) or not ((label == 0) | (label == 1)).all():
                raise UserError(
                    f"The label is {short_repr(label.tolist())}. Labels of {self.spec.name} are lists of {n_classes} "
                    "zeros and ones.",
                    key="label",
                    value=label.tolist(),
                )
            return label.astype(np.uint8)
        if label.shape != () or not 0 <= label < n_classes:
            raise UserError(
                f"The label is {short_repr(label.tolist())}. {self.spec.name} has the classes 0 to {n_classes - 1}.",
                key="label",
                value=label.tolist(),
                allowed=range(n_classes),
            )
        return label

    def _date(self, name: str, key_in_file: Mapping[str, bytes]) -> np.datetime64:
        """Return the acquisition date, datetime64[s]; NaT if unknown."""
        date = ""
        if self.spec.date_source == "name":
            date = name[-10:].replace("_", "-")
        elif self.spec.date_source == "key":
            dates = {match[2] for key in self.keys if (match := _DATED_KEY.fullmatch(key_in_file[key].decode()))}
            date = dates.pop() if len(dates) == 1 else ""  # bands of several dates have no common date
        is_placeholder = (
            self.spec.has_placeholder_dates and date.endswith("-01-01") and not self.keep_released_metadata
        )
        try:
            return np.datetime64("NaT" if is_placeholder or not date else date, "s")
        except ValueError:
            return np.datetime64("NaT", "s")


@contextlib.contextmanager
def open_hdf5(path: str | Path) -> Iterator[h5f.FileID]:
    """Open a file for reading with h5py's low-level API."""
    file = h5f.open(os.fsencode(path), h5f.ACC_RDONLY, _FILE_ACCESS)
    try:
        yield file
    finally:
        file.close()


def file_error(path: str | Path, error: Exception) -> UserError:
    """Make a UserError that adds the path to an error; the fields of a UserError are kept."""
    if isinstance(error, UserError):
        return UserError(f"{path}: {error}", key=error.key, value=error.value, allowed=error.allowed, path=path)
    message = " ".join(str(error).split())[:300]
    return UserError(f"{path} cannot be read: {message}", path=path)


def read_attributes(file: h5f.FileID) -> Mapping:
    """Read the dictionary in a file's attribute 'pickle', without running the pickle.

    Raises:
        UserError: the attribute is missing, damaged or refused.
    """
    try:
        data = ast.literal_eval(_pickle_text(file))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        data = None
    if not isinstance(data, bytes):
        raise UserError(
            "There is no attribute 'pickle' that contains bytes as text, as GEO-Bench's files have.", key="pickle"
        )
    attributes = unpickler.loads(data)
    if not isinstance(attributes, dict):
        raise UserError("The attribute 'pickle' is not a dictionary.", key="pickle")
    return attributes


def _pickle_text(file: h5f.FileID) -> str | None:
    """Return the attribute 'pickle' if it is a single text."""
    try:
        attribute = h5a.open(file, b"pickle")
    except KeyError:
        return None
    dtype = attribute.dtype
    if attribute.shape != () or h5py.check_string_dtype(dtype) is None:
        return None
    text = np.empty((), dtype)
    attribute.read(text)
    return text.item().decode(errors="surrogateescape")


def as_integer_label(label: object) -> np.ndarray:
    """Convert a label, a number or a list of numbers, to int64.

    Raises:
        UserError: it is not made of integers.
    """
    elements = label if isinstance(label, list | tuple) else [label]
    integers = None
    # Nested lists could be too deep, or too large, for numpy.
    if not any(isinstance(element, list | tuple | dict | str | bytes) for element in elements):
        values = np.asarray(label)
        with np.errstate(invalid="ignore"):
            integers = values.astype(np.int64) if values.dtype.kind in "biuf" else None
    if integers is None or not np.array_equal(values, integers):
        # Not the label itself: an arbitrary object could not be sent to another process.
        shown = short_repr(label)
        raise UserError(f"The label is {shown}. Labels must be integers.", key="label", value=shown)
    return integers


def short_repr(value: object) -> str:
    """Represent a value of a file in one short line, whatever its size and nesting."""
    return reprlib.repr(value)


def keys_without_dates(file: h5f.FileID, spec: GeoBenchSet) -> dict[str, bytes]:
    """Return the keys in a file by their names without dates.

    Raises:
        UserError: a band is missing, unknown, a link, or has several dates.
    """
    key_in_file, links = {}, []
    file.links.iterate(lambda name, link: links.append((name, link.type)), info=True)
    for key, link_type in links:
        if link_type != h5l.TYPE_HARD:
            raise UserError(
                f"The key {short_repr(key)} is a link. GEO-Bench's files have none, and it may lead to another file.",
                key=key.decode(errors="replace"),
            )
        dated = _DATED_KEY.fullmatch(key.decode())
        name = dated[1] if dated else key.decode()
        if name in key_in_file:
            raise UserError(f"The key '{name}' has several dates. {spec.name} has one.", key=name)
        key_in_file[name] = key
    required = {*spec.released_bands} | ({"label"} if spec.task_class.is_dense else set())
    present = sorted(key_in_file)
    if missing := sorted(required - key_in_file.keys()):
        raise UserError(
            f"The keys {', '.join(missing)} are missing. The file has: "
            f"{', '.join(present[:_MAX_KEYS_SHOWN]) or 'none'}.",
            key=missing[0],
            allowed=present,
        )
    if unknown := sorted(key_in_file.keys() - required - spec.unread_keys.keys() - {"label"}):
        raise UserError(
            f"The keys {', '.join(unknown[:_MAX_KEYS_SHOWN])} are unknown. {spec.name} does not have them.",
            key=unknown[0],
            allowed=sorted(required | spec.unread_keys.keys()),
        )
    return key_in_file


def location_from_name(name: str, spec: GeoBenchSet, keep_released_metadata: bool) -> tuple[float, float]:
    """Return latitude and longitude in degrees from a sample's name; NaN if it has none.

    Args:
        keep_released_metadata: do not correct swapped latitude and longitude.
    """
    match = _LOCATION_PATTERNS[spec.location_format].match(name) if spec.location_format else None
    if not match:
        return np.nan, np.nan
    lat, lon = float(match[1]), float(match[2])
    # All `lat,lon` sets are in Germany, where the latitude is the larger number.
    is_swapped = spec.location_format == "lat,lon" and lat < lon and not keep_released_metadata
    if spec.location_format == "lon,lat" or is_swapped:
        lat, lon = lon, lat
    return lat, lon


def _read(file: h5f.FileID, dataset: h5d.DatasetID, key: str, out: np.ndarray, same_type: bool) -> None:
    """Read a dataset. If it is contiguous and of the `same_type` as `out`, bypass HDF5, which is slower."""
    offset = dataset.get_offset() if same_type else None
    if offset is None:
        _check_values_in_file(dataset, key)
        dataset.read(h5s.ALL, h5s.ALL, out, _hdf5_type(out.dtype))
    elif os.preadv(file.get_vfd_handle(), [memoryview(out)], offset) < out.nbytes:
        raise OSError("the file ends within the pixels of a band or mask")


def _check_values_in_file(dataset: h5d.DatasetID, key: str) -> None:
    """Refuse a dataset whose values are not in the file: HDF5 would read other files, or return zeros."""
    properties = dataset.get_create_plist()
    if properties.get_layout() == h5d.VIRTUAL or properties.get_external_count():
        raise UserError(
            f"The pixels of '{key}' are in other files. GEO-Bench's files contain their own pixels.",
            key=key,
            value="external",
        )
    if dataset.get_space_status() == h5d.SPACE_STATUS_NOT_ALLOCATED:
        raise UserError(f"The pixels of '{key}' were never written.", key=key, value="not allocated")


def _read_converted(dataset: h5py.Dataset, key: str, dtype: np.dtype, spec: GeoBenchSet) -> np.ndarray:
    """Read a band that differs from the expected shape or dtype.

    Bands of a coarser GSD than the set are repeated to its image size. Other dtypes are cast; integers must stay
    exact.
    """
    size = spec.image_size
    is_coarse = spec.released_bands[key].gsd > spec.gsd
    sides = [side for side in range(1, size + 1) if size % side == 0] if is_coarse else [size]
    if dataset.shape not in [(side, side, *channel) for side in sides for channel in ((), (1,))]:
        raise UserError(
            f"Band '{key}' has shape {dataset.shape}. Bands of {spec.name} have {size} x {size} pixels.",
            key=key,
            value=dataset.shape,
            allowed=((size, size),),
        )
    check_numeric(key, dataset.dtype)
    _check_values_in_file(dataset.id, key)
    values = dataset[()].reshape(dataset.shape[:2])
    repeats = size // values.shape[0]
    values = values.repeat(repeats, axis=0).repeat(repeats, axis=1)
    with np.errstate(invalid="ignore"):
        cast = values.astype(dtype)
    # Casting floats to a smaller float type loses only precision; any other cast must be exact.
    if (dtype.kind != "f" or values.dtype.kind != "f") and not np.array_equal(cast, values):
        raise UserError(
            f"Band '{key}' has {values.dtype} values that {dtype} cannot represent.",
            key=key,
            value=str(values.dtype),
            allowed=(str(dtype),),
        )
    return cast


def check_numeric(key: str, dtype: np.dtype) -> None:
    """Refuse a band whose dtype is not an integer or floating-point number.

    Raises:
        UserError: it is not.
    """
    if dtype.kind not in "iuf":
        raise UserError(f"Band '{key}' has {dtype} values. Pixels must be numbers.", key=key, value=str(dtype))


def _restore_bytes(values: np.ndarray, out: np.ndarray) -> float | None:
    """Convert pixels divided by 255 back to 8 bits.

    Args:
        values: float32; overwritten.
        out: uint8, of the same shape.

    Returns:
        A value that is not an 8-bit value divided by 255; None if there is none.
    """
    with np.errstate(invalid="ignore"):
        np.multiply(values, _SCALE_TO_BYTES, out=values)
        np.copyto(out, values, casting="unsafe")
        np.subtract(values, out, out=values)  # the truncated fractions
    # One pass for valid images: as integers, the bits of negative and NaN floats are greater than those of the limit.
    if values.view(np.uint32).max() < _MAX_TRUNCATED.view(np.uint32):
        return None
    invalid = ~(values < _MAX_TRUNCATED) | (values < 0)
    return float((values[invalid][0] + out[invalid][0]) / _SCALE_TO_BYTES) if invalid.any() else None  # -0.0 is valid


@functools.lru_cache(maxsize=2)
def _reusable_buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the same buffer for every band or mask of a shape: new memory would have to be cleared."""
    return np.empty(shape, dtype)


def _in_page_cache(descriptor: int) -> bool:
    """Whether the last byte of a file, and so most likely all of it, is in the page cache.

    Prefetching a cached file takes longer than this test.
    """
    try:
        return os.preadv(descriptor, [bytearray(1)], os.fstat(descriptor).st_size - 1, os.RWF_NOWAIT) == 1
    except OSError:  # it is not cached, it is empty, or the file system does not support the flag
        return False
