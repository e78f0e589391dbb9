"""Descriptions of GEO-Bench's six classification sets.

Sources: classes and keys from GEO-Bench's converters; published means and standard deviations from torchgeo-bench.
"""

from pipeline.bands import Band
from pipeline.data.sources.geobench.spec import (
    REFLECTANCE_DISPLAY_RANGE,
    SENTINEL2_BANDS,
    SENTINEL2_KEYS,
    GeoBenchSet,
    rgb_bands,
    sentinel2_bands,
    stats_by_key,
)


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

SETS = (
    GeoBenchSet(
        name="m-bigearthnet",
        folder_names=("m-bigearthnet",),
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
        folder_names=("m-so2sat",),
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
        folder_names=("m-brick-kiln",),
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
        folder_names=("m-forestnet",),
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
        folder_names=("m-eurosat",),
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
        folder_names=("m-pv4ger",),
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
