"""Descriptions of GEO-Bench's six segmentation sets.

Source: classes and keys from GEO-Bench's converters.
"""

from pipeline.bands import Band
from pipeline.data.sources.geobench.spec import REFLECTANCE_DISPLAY_RANGE, GeoBenchSet, rgb_bands, sentinel2_bands

_CLOUD_BANDS = {"Cloud Probability": Band("CLP", "cloud_probability", gsd=10)}

SETS = (
    GeoBenchSet(
        name="m-pv4ger-seg",
        folder_names=("m-pv4ger-seg",),
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
        folder_names=("m-chesapeake-landcover", "m-chesapeake"),
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
        folder_names=("m-cashew-plantation", "m-cashew-plant"),
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
        folder_names=("m-SA-crop-type",),
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
        folder_names=("m-nz-cattle",),
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
        folder_names=("m-NeonTree", "m-neontree"),
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
