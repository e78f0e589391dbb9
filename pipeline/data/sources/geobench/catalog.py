"""GEO-Bench's twelve sets: classes, bands, sizes, units and known faults of the files.

Sources: classes and keys from GEO-Bench's converters; published means and standard deviations from torchgeo-bench.
"""

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
        other_folder_name: another name that its folder may have.
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
        has_placeholder_dates: whether 1 January means an unknown date.
        known_issues: faults of the released files; written into the notes of the store.
        published_stats: mean and standard deviation of each key.
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

    @property
    def folder_names(self) -> tuple[str, ...]:
        """Names that its folder may have."""
        return (self.name, self.other_folder_name) if self.other_folder_name else (self.name,)

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


# Bands


def sentinel2_bands(*excluded: str) -> dict[str, Band]:
    """Return the Sentinel-2 bands by key, without those whose names are `excluded`."""
    return {key: SENTINEL2_BANDS[name] for key, name in SENTINEL2_KEYS.items() if name not in excluded}


def rgb_bands(gsd: float) -> dict[str, Band]:
    """Return the bands of an aerial RGB image by key; `gsd` in metres."""
    wavelengths = {"Blue": 0.49, "Green": 0.56, "Red": 0.665}
    return {name: Band(name, name.lower(), wavelength, gsd) for name, wavelength in wavelengths.items()}


def stats_by_key(bands: Mapping[str, Band], *mean_std: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """Assign pairs of mean and standard deviation to the keys of `bands`, in their order."""
    return dict(zip(bands, mean_std, strict=True))


def _radar_band(key: str) -> Band:
    """Make the band of a Sentinel-1 key such as `05 - VH.LEE Filtered`."""
    name = key.partition(" - ")[2]
    return Band(name, "sar_" + name.lower().replace(".", "_").replace(" ", "_"), gsd=10)


_SO2SAT_BANDS = dict(
    sorted(
        {
            **sentinel2_bands("B01", "B09", "B10"),
            **{
                key: _radar_band(key)
                for key in ("01 - VH.Real", "02 - VH.Imaginary", "03 - VV.Real", "04 - VV.Imaginary",
                            "05 - VH.LEE Filtered", "06 - VV.LEE Filtered", "07 - VH.LEE Filtered.Real",
                            "08 - VV.LEE Filtered.Imaginary")
            },
        }.items()
    )
)  # fmt: skip
_LANDSAT8_BANDS = {
    "02 - Blue": Band("B2", "blue", 0.482, 30),
    "03 - Green": Band("B3", "green", 0.561, 30),
    "04 - Red": Band("B4", "red", 0.655, 30),
    "05 - NIR": Band("B5", "nir08", 0.865, 30),
    "06 - SWIR1": Band("B6", "swir16", 1.609, 30),
    "07 - SWIR2": Band("B7", "swir22", 2.201, 30),
}
# The actual bands of two sets with wrong band names, in the order of the Sentinel-2 keys.
_EUROSAT_BANDS = tuple(
    SENTINEL2_BANDS[name]
    for name in ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
)
_BRICK_KILN_BANDS = (
    *(SENTINEL2_BANDS[name] for name in ("B01", "B02", "B03", "B04", "B05", "B07", "B8A", "B08", "B11", "B12")),
    Band("TCI_R", "tci_red", gsd=10),
    Band("TCI_G", "tci_green", gsd=10),
    Band("TCI_B", "tci_blue", gsd=10),
)
_CLOUD_BANDS = {"Cloud Probability": Band("CLP", "cloud_probability", gsd=10)}


# Classification sets


CLASSIFICATION_SETS = (
    GeoBenchSet(
        name="m-bigearthnet",
        task="multilabel",
        classes=(
            "continuous urban fabric", "discontinuous urban fabric", "industrial or commercial units",
            "road and rail networks and associated land", "port areas", "airports", "mineral extraction sites",
            "dump sites", "construction sites", "green urban areas", "sport and leisure facilities",
            "non-irrigated arable land", "permanently irrigated land", "rice fields", "vineyards",
            "fruit trees and berry plantations", "olive groves", "pastures",
            "annual crops associated with permanent crops", "complex cultivation patterns",
            "agriculture with significant natural vegetation", "agro-forestry areas", "broad-leaved forest",
            "coniferous forest", "mixed forest", "natural grassland", "moors and heathland",
            "sclerophyllous vegetation", "transitional woodland or shrub", "beaches, dunes, sands", "bare rock",
            "sparsely vegetated areas", "burnt areas", "inland marshes", "peatbogs", "salt marshes", "salines",
            "intertidal flats", "water courses", "water bodies", "coastal lagoons", "estuaries", "sea and ocean",
        ),
        image_size=120,
        split_sizes=(20000, 1000, 1000),
        released_bands=sentinel2_bands("B10"),
        units="dn",
        display=REFLECTANCE_DISPLAY_RANGE,
        gsd=10,
        licence="CDLA-Permissive-1.0, BigEarthNet",
        published_stats=stats_by_key(
            sentinel2_bands("B10"),
            (386.65, 467.31), (488.99, 510.79), (714.61, 551.8), (738.26, 691.78), (1114.42, 700.45),
            (1910.19, 976.75), (2191.48, 1134.89), (2334.29, 1238.07), (2392.91, 1215.98), (2367.29, 1153.86),
            (1902.69, 1117.01), (1261.07, 894.74),
        ),
    ),
    GeoBenchSet(
        name="m-so2sat",
        task="classification",
        classes=(
            "compact high rise", "compact mid rise", "compact low rise", "open high rise", "open mid rise",
            "open low rise", "lightweight low rise", "large low rise", "sparsely built", "heavy industry",
            "dense trees", "scattered trees", "bush, scrub", "low plants", "bare rock or paved",
            "bare soil or sand", "water",
        ),
        image_size=32,
        split_sizes=(19992, 986, 986),
        released_bands=_SO2SAT_BANDS,
        units="reflectance",
        display=REFLECTANCE_DISPLAY_RANGE,
        gsd=10,
        licence="CC-BY-4.0, So2Sat LCZ42",
        known_issues=("the keys mix eight Sentinel-1 (radar) bands with the Sentinel-2 bands",),
        published_stats=stats_by_key(
            _SO2SAT_BANDS, (0, 0.2156), (0.1295, 0.0414), (0.0001, 0.2142), (0.1172, 0.052), (0, 0.5442),
            (0.1138, 0.0733), (-0.0001, 0.5328), (0.0615, 5.4568), (0.1272, 0.0693), (0.3435, 11.8128),
            (0.1707, 0.075), (0.0006, 3.7719), (0.1928, 0.0856), (0.1855, 0.0865), (0.0032, 2.4939),
            (0.2073, 0.094), (0.1768, 0.1024), (0.1285, 0.0923),
        ),
    ),
    GeoBenchSet(
        name="m-brick-kiln",
        task="classification",
        classes=("not brick kiln", "brick kiln"),
        image_size=64,
        split_sizes=(15063, 999, 999),
        released_bands=sentinel2_bands(),
        actual_bands=dict(zip(SENTINEL2_KEYS, _BRICK_KILN_BANDS, strict=True)),
        units="dn",
        display=REFLECTANCE_DISPLAY_RANGE,
        gsd=10,
        licence="CC-BY-SA-4.0, SustainBench",
        known_issues=("the last three bands are an 8-bit true-colour image, in other units than the other bands",),
        published_stats=stats_by_key(
            sentinel2_bands(),
            (572.205, 190.09), (669, 234.367), (879.878, 272.815), (807.583, 358.861), (1127.9, 361.903),
            (1960.74, 721.657), (2075.83, 813.801), (2039.48, 789.61), (1625.46, 788.954), (1135.59, 692.586),
            (82.471, 36.0834), (89.8659, 27.5559), (68.4528, 23.7711),
        ),
    ),
    GeoBenchSet(
        name="m-forestnet",
        task="classification",
        classes=(
            "oil palm plantation", "timber plantation", "other large-scale plantations", "grassland shrubland",
            "small-scale agriculture", "small-scale mixed plantation", "small-scale oil palm plantation",
            "mining", "fish pond", "logging", "secondary forest", "other",
        ),
        image_size=332,
        split_sizes=(6464, 989, 993),
        released_bands=_LANDSAT8_BANDS,
        units="uint8",
        gsd=15,
        licence="CC-BY-4.0, ForestNet",
        location_format="lat_lon_date",
        date_source="name",
        has_placeholder_dates=True,
        known_issues=(
            "values are Landsat 8 stretched to 8 bits, not reflectance",
            "annual composites have the date 1 January",
        ),
        published_stats=stats_by_key(
            _LANDSAT8_BANDS, (72.376, 16.2839), (83.1816, 15.3587), (77.0862, 16.6665), (123.543, 16.9485),
            (91.0484, 14.2801), (74.3097, 13.2854),
        ),
    ),
    GeoBenchSet(
        name="m-eurosat",
        task="classification",
        classes=(
            "annual crop", "forest", "herbaceous vegetation", "highway", "industrial", "pasture",
            "permanent crop", "residential", "river", "sea or lake",
        ),
        image_size=64,
        split_sizes=(2000, 1000, 1000),
        released_bands=sentinel2_bands(),
        actual_bands=dict(zip(SENTINEL2_KEYS, _EUROSAT_BANDS, strict=True)),
        units="dn",
        display=REFLECTANCE_DISPLAY_RANGE,
        gsd=10,
        licence="CC-BY-4.0, EuroSAT",
        published_stats=stats_by_key(
            sentinel2_bands(), (1359.95, 251.332), (1125.53, 339.685), (1055, 396.733), (957.344, 592.838),
            (1219.67, 555.015), (2051.62, 852.505), (2433.6, 1081.57), (2360.1, 1115.12), (751.164, 404.572),
            (12.2881, 4.7966), (1848.9, 978.83), (1131.27, 745.284), (2665.44, 1223.88),
        ),
    ),
    GeoBenchSet(
        name="m-pv4ger",
        task="classification",
        classes=("no solar pv", "solar pv"),
        image_size=320,
        split_sizes=(11814, 999, 999),
        released_bands=rgb_bands(0.1),
        units="uint8",
        gsd=0.1,
        licence="MIT, 3D-PV-Locator",
        location_format="lat,lon",
        known_issues=(
            "latitude and longitude are swapped in many sample names; in Germany the larger value is the latitude",
        ),
        published_stats=stats_by_key(rgb_bands(0.1), (116.316, 44.5176), (119.375, 48.1189), (113.102, 54.0881)),
    ),
)  # fmt: skip


# Segmentation sets


SEGMENTATION_SETS = (
    GeoBenchSet(
        name="m-pv4ger-seg",
        task="segmentation",
        classes=("no solar pv", "solar pv"),
        image_size=320,
        split_sizes=(3000, 403, 403),
        released_bands=rgb_bands(0.1),
        units="uint8",
        gsd=0.1,
        licence="MIT, 3D-PV-Locator",
        location_format="lat,lon",
        known_issues=(
            "latitude and longitude are swapped in many sample names; in Germany the larger value is the latitude",
        ),
    ),
    GeoBenchSet(
        name="m-chesapeake-landcover",
        other_folder_name="m-chesapeake",
        task="segmentation",
        classes=(
            "water", "tree canopy or forest", "low vegetation or field", "barren land", "impervious, other",
            "impervious, roads", "no data",
        ),
        image_size=256,
        split_sizes=(3000, 1000, 1000),
        released_bands=dict(sorted({**rgb_bands(1), "NearInfrared": Band("NearInfrared", "nir", 0.876, 1)}.items())),
        units="uint8",
        divided_by_255=True,
        gsd=1,
        licence="CDLA-Permissive-1.0, Chesapeake Conservancy",
        nodata_class=6,
        known_issues=("values are 8-bit aerial photographs, not reflectance",),
    ),
    GeoBenchSet(
        name="m-cashew-plantation",
        other_folder_name="m-cashew-plant",
        task="segmentation",
        classes=(
            "no data", "well-managed plantation", "poorly-managed plantation", "non-plantation", "residential",
            "background", "uncertain",
        ),
        image_size=256,
        split_sizes=(1350, 400, 50),
        released_bands={**sentinel2_bands("B10"), **_CLOUD_BANDS},
        units="dn",
        display=REFLECTANCE_DISPLAY_RANGE,
        gsd=10,
        licence="CC-BY-4.0, Technoserve and Radiant Earth",
        nodata_class=0,
        date_source="key",
    ),
    GeoBenchSet(
        name="m-SA-crop-type",
        task="segmentation",
        classes=(
            "no data", "lucerne or medics", "planted pastures", "fallow", "wine grapes", "weeds",
            "small grain grazing", "wheat", "canola", "rooibos",
        ),
        image_size=256,
        split_sizes=(3000, 1000, 1000),
        released_bands={**sentinel2_bands("B10"), **_CLOUD_BANDS},
        units="uint8",
        gsd=10,
        licence="CC-BY-4.0, Western Cape Department of Agriculture and Radiant Earth",
        nodata_class=0,
        known_issues=(
            "values are Sentinel-2 stretched to 8 bits, not reflectance",
            "all files contain the same location",
        ),
    ),
    GeoBenchSet(
        name="m-nz-cattle",
        task="segmentation",
        classes=("no cattle", "cattle"),
        image_size=500,
        split_sizes=(524, 66, 65),
        released_bands=rgb_bands(0.1),
        units="uint8",
        gsd=0.1,
        licence="CC-BY-4.0, Abuhani et al.",
        location_format="lon,lat",
        date_source="key",
        has_placeholder_dates=True,
        known_issues=(
            "only the year of the dates is known: files contain 1 January",
            "sample names contain the longitude before the latitude",
        ),
    ),
    GeoBenchSet(
        name="m-NeonTree",
        other_folder_name="m-neontree",
        task="segmentation",
        classes=("no tree", "tree"),
        image_size=400,
        split_sizes=(270, 94, 93),
        released_bands=dict(
            sorted({**rgb_bands(0.1), "Canopy Height Model": Band("CHM", "canopy_height", gsd=1)}.items())
        ),
        unread_keys={"Neon": "hyperspectral cube at 1 m without wavelengths"},
        units="uint8",
        gsd=0.1,
        licence="CC-BY-4.0, NeonTreeEvaluation",
        known_issues=("canopy height is in metres; its 1 m pixels are repeated to 0.1 m (nearest neighbour)",),
    ),
)  # fmt: skip
