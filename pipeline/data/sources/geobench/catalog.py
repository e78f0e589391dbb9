"""GEO-Bench's twelve sets, as described in catalog.yaml, and the options of a dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.bands import SENTINEL2, Band
from pipeline.config import read_yaml
from pipeline.tasks import Task, get_task


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


@dataclass(frozen=True)
class GeoBenchSet:
    """One of GEO-Bench's twelve sets.

    Attributes:
        name: as in the GEO-Bench paper.
        classes: class names, in the order of the indices.
        image_size: height and width of an image in pixels.
        split_sizes: number of samples of the default partition in train, valid and test.
        released_bands: the band of each HDF5 key (without date), according to the released files.
        units, gsd, licence, display: as in the images store.
        divided_by_255: whether the files contain 8-bit images divided by 255. The store then contains the 8-bit
            values, at a quarter of the size.
        actual_bands: the band of each key, where the released names are wrong; else empty.
        unread_keys: keys that are not read, with the reason.
        nodata_class: index of the class "no data", which GEO-Bench counts as a class.
        location_format: how sample names contain the location: `lat_lon_date`, `lat,lon`, `lon,lat`, or empty.
        date_source: where the date is: `key` (HDF5 keys), `name` (sample name), or empty.
        has_placeholder_dates: whether 1 January means an unknown date.
        known_issues: faults of the released files; written into the notes of the store.
        published_stats: mean and standard deviation of each key; may be empty.
        other_folder_name: another name that its folder may have.
        archive_sha256: digest of its archive; empty if nobody published it.
    """

    name: str
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
    other_folder_name: str = ""
    archive_sha256: str = ""

    @property
    def task_class(self) -> type[Task]:
        return get_task(self.task)

    @property
    def folder_names(self) -> tuple[str, ...]:
        """Names that its folder may have."""
        return (self.name, self.other_folder_name) if self.other_folder_name else (self.name,)

    @property
    def archive_folder(self) -> str:
        """Folder of the set in GEO-Bench's repository."""
        return "segmentation_v1.0" if self.task_class.is_dense else "classification_v1.0"


def _load_set(name: str, entry: dict[str, Any], other_bands: Mapping[str, dict]) -> GeoBenchSet:
    bands = {band.name: band for band in SENTINEL2}
    for band_name, values in other_bands.items():
        bands[band_name] = Band(band_name, **{"gsd": entry["gsd"], **values})
    rows = entry.pop("bands")
    actual_bands = {key: bands[row.get("actual", row["released"])] for key, row in rows.items()}
    return GeoBenchSet(
        name=name,
        released_bands={key: bands[row["released"]] for key, row in rows.items()},
        actual_bands=actual_bands if any("actual" in row for row in rows.values()) else {},
        published_stats={key: (row["mean"], row["std"]) for key, row in rows.items() if "mean" in row},
        **{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()},
    )


_catalog: Any = read_yaml(Path(__file__).with_suffix(".yaml"))
SETS = {name: _load_set(name, entry, _catalog["bands"]) for name, entry in _catalog["sets"].items()}
