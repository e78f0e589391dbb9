"""Description of a GEO-Bench set: classes, bands, sizes, units and known faults of its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.bands import SENTINEL2, Band
from pipeline.tasks import Task, get_task

SENTINEL2_BANDS = {band.name: band for band in SENTINEL2}
# Band name of every Sentinel-2 key, in the order in which GEO-Bench sorts the keys.
SENTINEL2_KEYS = {
    "01 - Coastal aerosol": "B01",
    "02 - Blue": "B02",
    "03 - Green": "B03",
    "04 - Red": "B04",
    "05 - Vegetation Red Edge": "B05",
    "06 - Vegetation Red Edge": "B06",
    "07 - Vegetation Red Edge": "B07",
    "08 - NIR": "B08",
    "08A - Vegetation Red Edge": "B8A",
    "09 - Water vapour": "B09",
    "10 - SWIR - Cirrus": "B10",
    "11 - SWIR": "B11",
    "12 - SWIR": "B12",
}
# Reflectances that are displayed as black and as white.
REFLECTANCE_DISPLAY_RANGE = (0.0, 0.3)


@dataclass(frozen=True)
class GeoBenchSet:
    """One of GEO-Bench's twelve sets.

    Attributes:
        name: as in the GEO-Bench paper.
        folder_names: names that its folder may have.
        task: name of the task.
        classes: class names, in the order of the indices.
        image_size: height and width of an image in pixels.
        split_sizes: number of samples of the default partition in train, valid and test.
        released_bands: the band of each HDF5 key (without date), according to the released files.
        actual_bands: the band of each key, where the released names are wrong; else empty.
        unread_keys: keys that are not read, with the reason.
        units, gsd, licence, display: as in the images store.
        divided_by_255: whether the files contain 8-bit images divided by 255. The store then contains the 8-bit
            values, at a quarter of the size.
        nodata_class: index of the class "no data", which GEO-Bench counts as a class.
        location_format: how sample names contain the location: `lat_lon_date`, `lat,lon`, `lon,lat`, or empty.
        date_source: where the date is: `key` (HDF5 keys), `name` (sample name), or empty.
        has_placeholder_dates: whether 1 January stands for an unknown date.
        known_issues: faults of the released files; written into the notes of the store.
        published_stats: mean and standard deviation of each key.
    """

    name: str
    folder_names: tuple[str, ...]
    task: str
    classes: tuple[str, ...]
    image_size: int
    split_sizes: tuple[int, int, int]
    released_bands: Mapping[str, Band]
    units: str
    gsd: float
    licence: str
    display: tuple[float, float] | None = None
    divided_by_255: bool = False
    actual_bands: Mapping[str, Band] = field(default_factory=dict)
    unread_keys: Mapping[str, str] = field(default_factory=dict)
    nodata_class: int | None = None
    location_format: str = ""
    date_source: str = ""
    has_placeholder_dates: bool = False
    known_issues: tuple[str, ...] = ()
    published_stats: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def task_class(self) -> type[Task]:
        """The task's class."""
        return get_task(self.task)

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one value in the images store: 1 if 8-bit, else at most 4."""
        return 1 if self.units == "uint8" else 4

    @property
    def file_bytes_per_value(self) -> int:
        """Approximate number of bytes of one value in the released files."""
        return 4 if self.divided_by_255 else self.bytes_per_value

    @property
    def archive_folder(self) -> str:
        """Folder of the set in GEO-Bench's repository."""
        return "segmentation_v1.0" if self.task_class.is_dense else "classification_v1.0"


def sentinel2_bands(*excluded: str) -> dict[str, Band]:
    """Return the Sentinel-2 bands by key, without those whose names are `excluded`."""
    return {key: SENTINEL2_BANDS[name] for key, name in SENTINEL2_KEYS.items() if name not in excluded}


def rgb_bands(gsd: float) -> dict[str, Band]:
    """Return the bands of an aerial RGB image by key; `gsd` in metres."""
    wavelengths = {"Blue": 0.49, "Green": 0.56, "Red": 0.665}
    return {name: Band(name, name.lower(), wavelength, gsd) for name, wavelength in wavelengths.items()}


def stats_by_key(bands: Mapping[str, Band], *mean_std: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """Assign (mean, standard deviation) pairs to the keys of `bands`, in their order."""
    return dict(zip(bands, mean_std, strict=True))
