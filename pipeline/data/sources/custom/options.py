"""Options of custom data in params.yaml, and names of classes."""

import math
import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from pipeline.bands import FULL_SCALE, Band
from pipeline.config import RULES, DatasetConfig, Float, PositiveFloat, UniqueNames
from pipeline.data.image_store import parse_timestamp
from pipeline.errors import UserError
from pipeline.tasks import IGNORE

# Mean reflectances outside these limits are in another unit. Atmospheric correction leaves some slightly below 0.
MIN_MEAN_REFLECTANCE, MAX_REFLECTANCE = -0.05, 2.0
NUMBER = re.compile(r"[+-]?\d{1,30}(\.\d{0,30})?", re.ASCII)


def _check_display(display: tuple[float, ...]) -> tuple[float, ...]:
    low, high = display if len(display) == 2 else (0.0, 0.0 if display else 1.0)
    if not -1 <= low < high <= MAX_REFLECTANCE:
        raise ValueError("write it as [low, high], in reflectance, such as [0.0, 0.3]")
    return display


@dataclass(frozen=True, config=RULES)
class CustomOptions:
    """`datasets.*.options` of custom data. Patterns of files are relative to `folder`."""

    folder: str
    """Folder of the files."""
    images: str
    """Pattern of the rasters, with all bands in a file or one file per band."""
    labels: str
    """Pattern of a CSV file, masks, or polygons."""
    bands: Annotated[tuple[Band, ...], Field(min_length=1)]
    """Every band, in the order of the files."""
    units: Literal["dn", "reflectance", "uint8", "display"]
    """Units of the pixels; `dn` is reflectance x 10000."""
    unlabelled: str = ""
    """Pattern of further images of the same bands and units without labels, used by students only."""
    classes: UniqueNames = ()
    """Names of the classes; required for masks, whose values are their indices."""
    label_column: str = "label"
    """Column of the CSV file, or of the polygons, with the class."""
    layer: str = ""
    """Layer of the polygons, in a file with several."""
    gsd: PositiveFloat = math.nan
    """Ground sampling distance in metres; that of the finest band by default."""
    display: Annotated[tuple[Float, ...], AfterValidator(_check_display)] = ()
    """Reflectances displayed as black and as white."""
    split: Literal["blocks", "random", "column"] = "blocks"
    """By spatial blocks, at random, or by the CSV file's column `split`."""
    ignore: int | None = None
    """Value of the masks that does not count."""
    purity: Annotated[PositiveFloat, Field(le=1)] = 0.6
    """Fraction of a chip that its class must cover, where masks or polygons classify chips."""
    time: str = ""
    """When all images were taken, in UTC."""
    licence: str = "not stated"
    """Written into the images store."""
    source: str = "own data"
    """Written into the images store."""
    skip_bad: bool = False
    """Whether to skip samples that cannot be read."""

    @property
    def is_table(self) -> bool:
        """Whether the labels are a CSV file."""
        return self.labels.lower().endswith(".csv")


def validate_options(options: CustomOptions, dataset: DatasetConfig, key: str) -> None:
    """Refuse options that do not fit together; `key` is that of the dataset's block, such as `datasets.x`."""
    if options.split == "column" and not options.is_table:
        raise UserError(
            f"{key}: split is column, which needs a CSV file as labels.",
            key=f"{key}.options.split", value="column", allowed=("blocks", "random"),
        )  # fmt: skip
    required = {
        "splits, the fractions of train, val and test": options.split == "column" or dataset.splits,
        "block, the side in pixels of the spatial blocks that are assigned whole to splits":
            options.split != "blocks" or dataset.block,
        "chip, the side in pixels of the chips": options.is_table or dataset.chip,
    }  # fmt: skip
    if missing := [name for name, is_given in required.items() if not is_given]:
        names = tuple(name.split(",")[0] for name in missing)
        raise UserError(f"{key} lacks: {'; '.join(missing)}.", key=f"{key}.{names[0]}", value=names)
    if len(options.classes) > IGNORE and not options.is_table:
        raise UserError(
            f"{key}: {len(options.classes)} classes are listed; masks allow {IGNORE}.",
            key=f"{key}.options.classes", value=len(options.classes),
        )  # fmt: skip
    parse_timestamp(options.time, f"{key}.options.time")


def check_band_means(options: CustomOptions, means: np.ndarray) -> None:
    """Refuse a mean of an optical band over all samples, (band,), that is impossible in the stated units."""
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
    """Return names of classes, sorted; `origin` is for the message, such as "The labels of labels.csv".

    Raises UserError for names that differ only in capitals, or are the same number: they are probably one class.
    """
    by_normalized: dict[str, str] = {}
    for name in sorted(names):
        normalized = f"{Decimal(name).normalize():f}" if NUMBER.fullmatch(name) else name.casefold()
        other = by_normalized.setdefault(normalized, name)
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
