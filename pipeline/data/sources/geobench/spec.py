"""What is declared of a set of GEO-Bench, and the keys and bands that several sets share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.bands import SENTINEL2, Band

S2 = {band.name: band for band in SENTINEL2}
S2_KEYS = {
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
# Reflectance shown as black and as white.
REFLECTANCE_DISPLAY_RANGE = (0.0, 0.3)


@dataclass(frozen=True)
class GeoBenchSet:
    """What one set's files hold, and where they mislead.

    Attributes:
        name, folders: as its paper calls it, and as its folder may be called.
        task, classes: what is asked.
        size: side of an image in pixels.
        counts: samples of the default partition in train, valid and test.
        keys: band by HDF5 key (without date), as they are labelled.
        true: what the keys are in truth, by key; empty where the labels are right.
        skipped: keys that are not read, with the reason.
        units, display, gsd: as in the images store.
        divided_by_255: the files hold 8-bit pictures divided by 255. The store has their bytes, a quarter as many,
            or, as they are labelled, the files' values in the units `display`.
        nodata: index of the class that means "no data"; GEO-Bench counts it as a class.
        place: how a sample's name gives its place: `lat_lon_date`, `lat,lon`, `lon,lat` or nothing.
        time: how its date is known: `key`, `name` or nothing.
        placeholders: 1 January stands for a date that is not known.
        traps: what a reader is told in the store.
        published: mean and standard deviation by key.
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
    def bytes_per_value(self) -> int:
        """Bytes of a value in the images store: 1 of pictures, else at most 4."""
        return 1 if self.units == "uint8" else 4

    @property
    def file_bytes_per_value(self) -> int:
        """Bytes of a value in the files, roughly."""
        return 4 if self.divided_by_255 else self.bytes_per_value

    @property
    def archive_folder(self) -> str:
        """The folder, and zip, that it lies in."""
        return "segmentation_v1.0" if self.task == "segmentation" else "classification_v1.0"


def sentinel2_bands(*skipped: str) -> dict[str, Band]:
    return {key: S2[name] for key, name in S2_KEYS.items() if name not in skipped}


def rgb_bands(gsd: float) -> dict[str, Band]:
    centres = {"Blue": 0.49, "Green": 0.56, "Red": 0.665}
    return {name: Band(name, name.lower(), centre, gsd) for name, centre in centres.items()}


def stats_by_key(keys: Mapping[str, Band], *pairs: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return dict(zip(keys, pairs, strict=True))
