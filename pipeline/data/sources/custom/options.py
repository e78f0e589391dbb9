"""What a block of one's own data may say in params.yaml, and what of it cannot be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.bands import FULL_SCALE, Band
from pipeline.config import DatasetConfig, Float
from pipeline.data.image_store import IGNORE, parse_timestamp
from pipeline.errors import UserError

# More is no reflectance, and longer no optical wavelength in micrometres: each is another unit.
_REFLECTANCE, _LONGEST = 2.0, 50.0
# Atmospheric correction may leave reflectances a little below 0, but not so far below in the mean.
_DARKEST = 0.05


@dataclass(frozen=True)
class CustomOptions:
    """`options` of a block in params.yaml.

    `images` and `labels` are patterns below `folder`: images are rasters, of all bands or one file a band; labels a
    CSV file, masks, or polygons. `unlabelled` is a pattern of further images of the same bands and units, without
    labels: students alone learn from them. `bands` are described in the files' order, wavelengths in micrometres; one
    without is no optical band. `units` are dn (reflectance x 10000), reflectance, uint8 or display; `display` are the
    reflectances shown as black and white. `split` is by `blocks` of ground, at `random`, or in the table's `column`
    of that name. `layer` is the polygons', of a file with several. `ignore` is the masks' value that does not count;
    `purity` the share of a chip that its class must cover, where chips are classified by masks or polygons. `time` is
    when all was taken.
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


def validate_options(options: CustomOptions, dataset: DatasetConfig, where: str) -> None:
    """Refuse what does not fit together, before any file is opened."""
    if options.units not in FULL_SCALE:
        raise UserError(f"{where}: units '{options.units}' are not known. Known units: {', '.join(FULL_SCALE)}.")
    if options.split not in ("blocks", "random", "column"):
        raise UserError(f"{where}: split is '{options.split}'; it must be blocks, random or column.")
    if options.split == "column" and not is_table(options):
        raise UserError(f"{where}: split is column, and only a CSV of labels has columns.")
    if lacking := _lacking(options, dataset):
        raise UserError(f"{where} lacks: {'; '.join(lacking)}.")
    low, high = options.display if len(options.display) == 2 else (0.0, 0.0 if options.display else 1.0)
    if not -1 <= low < high <= _REFLECTANCE:
        raise UserError(
            f"{where}: display is {list(options.display)}; write it as [low, high], in reflectance, as [0.0, 0.3]."
        )
    if not 0 < options.purity <= 1:
        raise UserError(f"{where}: purity is {options.purity:g}; it is a share of a chip, above 0 and at most 1.")
    if twice := {name for name in options.classes if options.classes.count(name) > 1}:
        raise UserError(f"{where}: classes name '{min(twice)}' twice; name each once, in the order of their numbers.")
    if len(options.classes) > IGNORE and not is_table(options):
        raise UserError(f"{where} has {len(options.classes)} classes; masks hold {IGNORE} at most.")
    if options.gsd <= 0:
        raise UserError(f"{where}: gsd is {options.gsd:g}; it is in metres, and positive.")
    _check_bands(options.bands, where)
    parse_timestamp(options.time, f"{where}: time")


def _lacking(options: CustomOptions, dataset: DatasetConfig) -> list[str]:
    """The keys that such data need and the block does not give, in words."""
    lacks = {
        "splits, the shares of train, val and test": options.split != "column" and not dataset.splits,
        "block, the side in pixels of the squares of ground dealt to the splits whole": (
            options.split == "blocks" and not dataset.block
        ),
        "chip, the side in pixels of the chips to cut": not is_table(options) and not dataset.chip,
    }
    return [key for key, lacking in lacks.items() if lacking]


def is_table(options: CustomOptions) -> bool:
    return options.labels.lower().endswith(".csv")


def _check_bands(bands: Sequence[Band], where: str) -> None:
    if not bands:
        raise UserError(f"{where}: bands is empty. Describe every band of the files, in their order.")
    for band in bands:
        if not math.isnan(band.wavelength) and not 0 < band.wavelength < _LONGEST:
            raise UserError(
                f"{where}: band {band.name} has the wavelength {band.wavelength:g}; wavelengths are in micrometres, "
                "such as 0.665 for red. Leave it out for what is no optical band."
            )
        if band.gsd <= 0:
            raise UserError(f"{where}: band {band.name} has the gsd {band.gsd:g}; it is in metres, and positive.")


def check_band_means(options: CustomOptions, means: np.ndarray) -> None:
    """Refuse units that the pixels cannot have; values that would do for several are believed."""
    for band, mean in zip(options.bands, means, strict=True):
        full = FULL_SCALE[options.units]
        if band.is_optical and mean < -_DARKEST * full:
            raise UserError(
                f"Band {band.name} has the mean {mean:.5g}, and no light is below 0. Is there a value for pixels "
                "without data that the files do not declare? Write it into them (gdal_edit.py -a_nodata VALUE)."
            )
        if band.is_optical and mean > _REFLECTANCE * full:
            raise UserError(
                f"Band {band.name} has the mean {mean:.5g}, and in {options.units}, as units says, "
                f"{FULL_SCALE[options.units]:g} is full. Other units: dn (reflectance x 10000), reflectance, uint8, "
                "display."
            )
