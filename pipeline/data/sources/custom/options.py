"""Options of custom data in params.yaml, and names of classes."""

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from pipeline.bands import FULL_SCALE, Band
from pipeline.config import DatasetConfig, Float
from pipeline.data.image_store import parse_timestamp
from pipeline.errors import UserError
from pipeline.tasks import IGNORE

SPLIT_RULES = ("blocks", "random", "column")
# Reflectances above this, and wavelengths in micrometres above this, are in another unit.
MAX_REFLECTANCE, MAX_WAVELENGTH = 2.0, 50.0
# Atmospheric correction may leave reflectances slightly below 0, but not as far below in the mean.
MIN_MEAN_REFLECTANCE = -0.05
NUMBER = re.compile(r"[+-]?\d{1,30}(\.\d{0,30})?", re.ASCII)


@dataclass(frozen=True)
class CustomOptions:
    """`datasets.*.options` of custom data.

    Attributes:
        folder: of the files.
        images: pattern below `folder` of the rasters, with all bands in a file or one file per band.
        labels: pattern below `folder` of a CSV file, masks, or polygons.
        bands: in the order of the files; wavelengths in micrometres; without a wavelength a band is not optical.
        units: `dn` (reflectance x 10000), `reflectance`, `uint8` or `display`.
        unlabelled: pattern of further images of the same bands and units without labels, used by students only.
        classes: names of the classes; required for masks, whose values are their indices.
        label_column: column of the CSV file, or of the polygons, with the class.
        layer: of the polygons, in a file with several layers.
        gsd: ground sampling distance in metres; that of the finest band by default.
        display: reflectances displayed as black and as white.
        split: by spatial `blocks`, at `random`, or by the CSV file's `column` split.
        ignore: value of the masks that does not count.
        purity: fraction of a chip that its class must cover, where masks or polygons classify chips.
        time: when all images were taken, in UTC.
        licence, source: written into the images store.
        skip_bad: skip samples that cannot be read.
    """

    folder: str
    images: str
    labels: str
    bands: tuple[Band, ...]
    units: str
    unlabelled: str = ""
    classes: tuple[str, ...] = ()
    label_column: str = "label"
    layer: str = ""
    gsd: Float = math.nan
    display: tuple[Float, ...] = ()
    split: str = "blocks"
    ignore: int | None = None
    purity: Float = 0.6
    time: str = ""
    licence: str = "not stated"
    source: str = "own data"
    skip_bad: bool = False


def is_table(options: CustomOptions) -> bool:
    """Whether the labels are a CSV file."""
    return options.labels.lower().endswith(".csv")


def validate_options(options: CustomOptions, dataset: DatasetConfig, key: str) -> None:
    """Check that options fit together, before any file is opened.

    Args:
        key: of the dataset's block, such as `datasets.x`, for messages.

    Raises:
        UserError: the key, its value and what is allowed.
    """

    def refuse(option: str, value: object, problem: str, allowed: Iterable | None = None) -> None:
        raise UserError(f"{key}: {problem}", key=f"{key}.options.{option}", value=value, allowed=allowed)

    if options.units not in FULL_SCALE:
        refuse(
            "units", options.units, f"units '{options.units}' are not known. Known units: {', '.join(FULL_SCALE)}.",
            FULL_SCALE,
        )  # fmt: skip
    if options.split not in SPLIT_RULES:
        refuse("split", options.split, f"split is '{options.split}'; use blocks, random or column.", SPLIT_RULES)
    if options.split == "column" and not is_table(options):
        refuse("split", "column", "split is column, which needs a CSV file as labels.", ("blocks", "random"))
    if missing := _missing_keys(options, dataset):
        raise UserError(
            f"{key} lacks: {'; '.join(f'{name}, {meaning}' for name, meaning in missing.items())}.",
            key=f"{key}.{next(iter(missing))}", value=tuple(missing),
        )  # fmt: skip
    low, high = options.display if len(options.display) == 2 else (0.0, 0.0 if options.display else 1.0)
    if not -1 <= low < high <= MAX_REFLECTANCE:
        refuse(
            "display", options.display,
            f"display is {list(options.display)}; write it as [low, high], in reflectance, such as [0.0, 0.3].",
        )  # fmt: skip
    if not 0 < options.purity <= 1:
        refuse(
            "purity", options.purity, f"purity is {options.purity:g}; it is a fraction of a chip, above 0, at most 1."
        )
    if repeated := {name for name in options.classes if options.classes.count(name) > 1}:
        refuse(
            "classes", min(repeated),
            f"classes name '{min(repeated)}' twice; name each once, in the order of the masks' values.",
        )  # fmt: skip
    if len(options.classes) > IGNORE and not is_table(options):
        refuse(
            "classes",
            len(options.classes),
            f"{len(options.classes)} classes are listed; masks allow {IGNORE}.",
        )
    if options.gsd <= 0:
        refuse("gsd", options.gsd, f"gsd is {options.gsd:g}; it is in metres, above 0.")
    if not options.bands:
        refuse("bands", (), "bands is empty. Describe every band of the files, in their order.")
    for index, band in enumerate(options.bands):
        if not math.isnan(band.wavelength) and not 0 < band.wavelength < MAX_WAVELENGTH:
            refuse(
                f"bands[{index}].wavelength", band.wavelength,
                f"band {band.name} has the wavelength {band.wavelength:g}; wavelengths are in micrometres, such as "
                "0.665 for red. Remove it if the band is not optical.",
            )  # fmt: skip
        if band.gsd <= 0:
            refuse(
                f"bands[{index}].gsd",
                band.gsd,
                f"band {band.name} has the gsd {band.gsd:g}; it is in metres, above 0.",
            )
    parse_timestamp(options.time, f"{key}.options.time")


def _missing_keys(options: CustomOptions, dataset: DatasetConfig) -> dict[str, str]:
    """Required keys that are absent, with their meaning."""
    missing = {}
    if options.split != "column" and not dataset.splits:
        missing["splits"] = "the fractions of train, val and test"
    if options.split == "blocks" and not dataset.block:
        missing["block"] = "the side in pixels of the spatial blocks that are assigned whole to splits"
    if not is_table(options) and not dataset.chip:
        missing["chip"] = "the side in pixels of the chips"
    return missing


def check_band_means(options: CustomOptions, means: np.ndarray) -> None:
    """Check that the mean of each band is possible in the stated units.

    Args:
        means: over all samples, (band,).

    Raises:
        UserError: a mean below 0 or far above the full scale.
    """
    full_scale = FULL_SCALE[options.units]
    for band, mean in zip(options.bands, means, strict=True):
        if band.is_optical and mean < MIN_MEAN_REFLECTANCE * full_scale:
            raise UserError(
                f"Band {band.name} has the mean {mean:.5g}, and optical bands are not negative. Do the files have a "
                "nodata value that they do not declare? Declare it with: gdal_edit.py -a_nodata VALUE",
                key=band.name, value=float(mean),
            )  # fmt: skip
        if band.is_optical and mean > MAX_REFLECTANCE * full_scale:
            raise UserError(
                f"Band {band.name} has the mean {mean:.5g}, but the full scale of the units {options.units} is "
                f"{full_scale:g}. Other units: dn (reflectance x 10000), reflectance, uint8, display.",
                key="units", value=options.units, allowed=FULL_SCALE,
            )  # fmt: skip


# Names of classes


def unique_class_names(names: Iterable[str], origin: str) -> list[str]:
    """Return names of classes, sorted.

    Args:
        origin: of the names, for the message, such as "The labels of labels.csv".

    Raises:
        UserError: two names differ only in capitals, or are the same number, so that they are probably one class.
    """
    by_normalized: dict[str, str] = {}
    for name in sorted(names):
        other = by_normalized.setdefault(_normalize(name), name)
        if other != name:
            raise UserError(
                f"{origin} have the classes '{other}' and '{name}', which differ only in capitals or in how a number "
                "is written. Write them alike, or, if they are two classes, list all classes in the options.",
                key="classes", value=name, allowed=[other],
            )  # fmt: skip
    return list(by_normalized.values())


def normalize_unicode(name: str) -> str:
    """Strip a name and compose its accents, which macOS and some editors store as separate characters."""
    return unicodedata.normalize("NFC", name.strip())


def _normalize(name: str) -> str:
    """Remove capitals, and write a number in its shortest form."""
    return f"{Decimal(name).normalize():f}" if NUMBER.fullmatch(name) else name.casefold()
