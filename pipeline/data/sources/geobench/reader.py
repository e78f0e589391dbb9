"""One file of GEO-Bench, read as data: pixels, label, place and date, with every fault named."""

import contextlib
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5f, h5l, h5p, h5s, h5t

from pipeline.data.image_store import IGNORE, Sample
from pipeline.data.sources.geobench.attributes import as_integer_label, read_attributes, short_repr
from pipeline.data.sources.geobench.spec import GeoBenchSet
from pipeline.errors import UserError

_DATED = re.compile(r"(.+)_(\d{4}-\d{2}-\d{2})")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_PLACES = {
    "lat_lon_date": re.compile(rf"{_NUMBER}_{_NUMBER}_\d{{4}}_\d{{2}}_\d{{2}}$"),
    "lat,lon": re.compile(rf"{_NUMBER},{_NUMBER}"),
    "lon,lat": re.compile(rf".*_{_NUMBER},{_NUMBER}"),
}
_ALL = h5s.ALL
# A little more than 255: what rounding took from a byte over 255 must not cost a whole one when the rest is cut off.
_OVER_255 = np.float32(255.0002)
# More than is cut off of a byte over 255 times that, .0002 and rounding: values are at most 1e-6 from such a byte's.
_CUT_OFF = np.float32(0.000255)


def _access() -> h5p.PropFAID:
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_file_locking(False, True)  # folders that cannot be written, and disks that know no locks
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    return access


# h5py's low-level calls throughout: its files and datasets as objects take several times as long as the reading.
_ACCESS = _access()
_type = functools.cache(h5t.py_create)


@dataclass(frozen=True)
class GeoBenchReader:
    """From a sample's name to the sample; sent to other processes.

    Attributes:
        keys: HDF5 keys that are read, without date, in order.
        stored: the files' dtype of each of them.
        dtype: of the image.
        labels: label by name, from the folder's JSON; None if the files' attributes alone have them.
        as_labelled: keep what the names say of place and time, also where it is known to be wrong.
        as_bytes: pictures divided by 255 become the bytes that they were.
        ignore_nodata: pixels of the class "no data" do not count.
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
        """The sample of a name; its image is read into `out`, if that is given."""
        path = f"{self.folder}/{name}.hdf5"
        try:
            with open_hdf5(path) as file:
                return self._sample(file, name, out)
        except FileNotFoundError:
            raise UserError(f"There is no {path}, though the partition lists it.") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # a damaged file may fail in any way
            raise UserError(f"{path} cannot be read: {short_repr(error)}") from None

    def ahead(self, names: Sequence[str]) -> None:
        """Have the system read files that will be wanted next, beside what is done until then."""
        for name in names:
            with contextlib.suppress(OSError):  # whoever reads it will say what is wrong with it
                descriptor = os.open(f"{self.folder}/{name}.hdf5", os.O_RDONLY)
                try:
                    if not _in_memory(descriptor):
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def _sample(self, file: h5f.FileID, name: str, out: np.ndarray | None) -> Sample:
        size, declared = self.spec.image_size, self.spec
        attributes = read_attributes(file)
        there = keys_without_dates(file, declared)
        image = np.empty((len(self.keys), size, size), self.dtype) if out is None else out
        for place, (key, kind) in enumerate(zip(self.keys, self.file_dtypes, strict=True)):
            array = h5d.open(file, there[key])
            values = _memory((size, size), np.dtype(np.float32)) if self.restore_bytes else image[place]
            if array.shape == (size, size) and array.get_type() == _type(kind):
                _read(file, array, values, same=kind == values.dtype)
            else:
                values[:] = _fitted(h5py.Dataset(array), key, size, values.dtype, declared)
            if self.restore_bytes and (strange := _into_bytes(values, image[place])) is not None:
                raise UserError(
                    f"its {key} has {strange:.6g}, which is no byte divided by 255, as {declared.name} has them. "
                    "skip_bad: true leaves such files out; as_labelled: true keeps all values, if they are 0 to 1"
                )
        if declared.task == "segmentation":
            label = self._mask(file, h5d.open(file, there["label"]))
        else:
            label = self._label(attributes, name)
        lat, lon = location_from_name(name, declared, self.keep_released_metadata)
        return Sample(image, label, lat, lon, self._time(name, there))

    def _mask(self, file: h5f.FileID, array: h5d.DatasetID) -> np.ndarray:
        size, count = self.spec.image_size, len(self.spec.classes)
        if array.shape not in ((size, size), (size, size, 1)) or array.dtype.kind not in "biuf":
            raise UserError(
                f"its label has {array.dtype} values of the shape {array.shape}; {self.spec.name} has {size} x "
                f"{size} px, of numbers"
            )
        mask = _memory(array.shape, array.dtype)
        _read(file, array, mask, same=array.get_type() == _type(mask.dtype))
        mask = mask.reshape(size, size)
        # Whole numbers without their sign: what is negative is then greater than any class.
        unsigned = mask.view(mask.dtype.str.replace("i", "u"))
        if not 0 <= unsigned.max() < count or (mask.dtype.kind == "f" and (mask.min() < 0 or (mask % 1).any())):
            strange = sorted({value for value in np.unique(mask).tolist() if value not in range(count)})
            raise UserError(f"its label has {strange[:5]}; {self.spec.name} has the classes 0 to {count - 1}")
        mask = mask.astype(np.uint8)
        if self.ignore_nodata:
            mask[mask == self.spec.nodata_class] = IGNORE
        return mask

    def _label(self, attributes: Mapping, name: str) -> np.ndarray:
        """The label in the folder's JSON, which the file's own must not contradict, or the file's own."""
        own, count = attributes.get("label"), len(self.spec.classes)
        listed = self.labels.get(name) if self.labels is not None else None
        if own is None and listed is None:
            raise UserError("it has no label: neither the folder's JSON files nor its attribute 'pickle' give one")
        own, listed = (None if one is None else as_integer_label(one) for one in (own, listed))
        if own is not None and listed is not None and not np.array_equal(own, listed):
            raise UserError(f"its label is {own.tolist()} in the file and {listed.tolist()} in the folder's JSON")
        label = listed if own is None else own
        if self.spec.task == "multilabel":
            if label.shape != (count,) or not ((label == 0) | (label == 1)).all():
                raise UserError(f"its label is no list of {count} zeros and ones")
            return label.astype(np.uint8)
        if label.shape != () or not 0 <= label < count:
            raise UserError(f"its label is {label.tolist()}; {self.spec.name} has the classes 0 to {count - 1}")
        return label

    def _time(self, name: str, there: Mapping[str, bytes]) -> np.datetime64:
        date = ""
        if self.spec.date_source == "name":
            date = name[-10:].replace("_", "-")
        elif self.spec.date_source == "key":
            dates = {dated[2] for key in self.keys if (dated := _DATED.fullmatch(there[key].decode()))}
            date = dates.pop() if len(dates) == 1 else ""  # of several no one is the image's
        placeholder = self.spec.has_placeholder_dates and date.endswith("-01-01") and not self.keep_released_metadata
        try:
            return np.datetime64("NaT" if placeholder or not date else date, "s")
        except ValueError:
            return np.datetime64("NaT", "s")


def _read(file: h5f.FileID, array: h5d.DatasetID, values: np.ndarray, same: bool) -> None:
    """Read a dataset; by the system alone, which is faster, if it has the `same` type and lies in one piece."""
    offset = array.get_offset() if same else None
    if offset is None:
        _check_stored(array)
        array.read(_ALL, _ALL, values, _type(values.dtype))
    elif os.preadv(file.get_vfd_handle(), [values], offset) < values.nbytes:
        raise OSError("it ends within its pixels")


def _check_stored(array: h5d.DatasetID) -> None:
    """Refuse a dataset whose values are not in the file: HDF5 would read other files, or give zeros."""
    made = array.get_create_plist()
    if made.get_layout() == h5d.VIRTUAL or made.get_external_count():
        raise UserError("it keeps pixels in other files; GEO-Bench's files have their own")
    if array.get_space_status() == h5d.SPACE_STATUS_NOT_ALLOCATED:
        raise UserError("it lacks pixels that were never written")


def _into_bytes(values: np.ndarray, out: np.ndarray) -> float | None:
    """Put float32 pixels of a picture that was divided by 255 into uint8; returns one that was not, if any.

    `values` is overwritten.
    """
    with np.errstate(invalid="ignore"):
        np.multiply(values, _OVER_255, out=values)
        np.copyto(out, values, casting="unsafe")
        np.subtract(values, out, out=values)  # what was cut off
    # As whole numbers, the bits of what is negative or no number are greater than those of any positive one.
    if values.view(np.uint32).max() < _CUT_OFF.view(np.uint32):
        return None
    strange = ~(values < _CUT_OFF) | (values < 0)
    return float((values[strange][0] + out[strange][0]) / _OVER_255) if strange.any() else None  # -0. is no stranger


@functools.lru_cache(maxsize=2)
def _memory(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that masks, or bands, are read into in turn: for so much, the system would be asked again each time."""
    return np.empty(shape, dtype)


def _in_memory(descriptor: int) -> bool:
    """Whether the system has a file's end in memory, and so most likely all of it: asking it to read takes longer."""
    try:
        return os.preadv(descriptor, [bytearray(1)], os.fstat(descriptor).st_size - 1, os.RWF_NOWAIT) == 1
    except OSError:  # it has not, or the file is empty, or this disk cannot say
        return False


@contextlib.contextmanager
def open_hdf5(path: str | Path):
    """A file, open for reading, as h5py's low-level calls take it."""
    file = h5f.open(os.fsencode(path), h5f.ACC_RDONLY, _ACCESS)
    try:
        yield file
    finally:
        file.close()


def keys_without_dates(file: h5f.FileID, declared: GeoBenchSet) -> dict[str, bytes]:
    """The file's keys by their names without dates.

    Raises:
        UserError: a band is missing, strange or there for several dates.
    """
    there, links = {}, []
    file.links.iterate(lambda name, link: links.append((name, link.type)), info=True)
    for key, kind in links:
        if kind != h5l.TYPE_HARD:
            raise UserError(
                f"its {short_repr(key)} is a link; GEO-Bench's files have none, and it may lead to another file"
            )
        dated = _DATED.fullmatch(key.decode())
        base = dated[1] if dated else key.decode()
        if base in there:
            raise UserError(f"it has {base} for several dates; {declared.name} has one")
        there[base] = key
    wanted = {*declared.released_bands} | ({"label"} if declared.task == "segmentation" else set())
    if gone := wanted - there.keys():
        has = ", ".join(sorted(there)[:30]) or "nothing"
        raise UserError(f"it lacks {', '.join(sorted(gone))}; it has {has}")
    if strange := there.keys() - wanted - declared.unread_keys.keys() - {"label"}:
        raise UserError(f"it has {', '.join(sorted(strange)[:30])}, which {declared.name} does not have")
    return there


def location_from_name(name: str, declared: GeoBenchSet, as_labelled: bool) -> tuple[float, float]:
    """Latitude and longitude in a sample's name, in degrees; not a number where it says none."""
    found = _PLACES[declared.location_format].match(name) if declared.location_format else None
    if not found:
        return np.nan, np.nan
    first, second = float(found[1]), float(found[2])
    if declared.location_format == "lon,lat" or (declared.location_format == "lat,lon" and first < second and not as_labelled):
        first, second = second, first
    return first, second


def _fitted(array: h5py.Dataset, key: str, size: int, dtype: np.dtype, declared: GeoBenchSet) -> np.ndarray:
    """A band of another dtype than the first file's, or, where the set has such, of a coarser grid."""
    coarse = declared.released_bands[key].gsd > declared.gsd
    sides = [side for side in range(1, size + 1) if size % side == 0] if coarse else [size]
    if array.shape not in [(side, side, *more) for side in sides for more in ((), (1,))]:
        raise UserError(f"its {key} has the shape {array.shape}; {declared.name} has {size} x {size} px")
    if array.dtype.kind not in "iuf":
        raise UserError(f"its {key} has {array.dtype} values; pixels are numbers")
    _check_stored(array.id)
    values = array[()].reshape(array.shape[:2])
    repeat = size // values.shape[0]
    values = values.repeat(repeat, axis=0).repeat(repeat, axis=1)
    with np.errstate(invalid="ignore"):
        cast = values.astype(dtype)
    # Of floats a narrower type keeps fewer digits, and whole numbers nothing but whole numbers.
    if (dtype.kind != "f" or values.dtype.kind != "f") and not np.array_equal(cast, values):
        raise UserError(f"its {key} has {values.dtype} values that do not fit into {dtype}")
    return cast
