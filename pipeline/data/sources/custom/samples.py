"""Chips of one's own images: read one by one, and dealt to the splits."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import rasterio
from rasterio.windows import Window

from pipeline.config import DatasetConfig
from pipeline.data.image_store import IGNORE, Sample, missing_label, parse_timestamp
from pipeline.data.sources.custom.ground import Place, merge_blocks, overlapping_pairs
from pipeline.data.sources.custom.rasters import RasterImage
from pipeline.data.splits import SPLITS, assign_blocks_to_splits, fill_nodata
from pipeline.errors import UserError

# Deals of blocks that are tried, times their number: ten thousand blocks need no twenty thousand deals.
_DEALS = 4_000_000


@dataclass(frozen=True)
class Chip:
    """A sample: a window of a picture, or all of it, with its label where a table gives it.

    Attributes:
        split: by the table.
        labelled: whether it has a label at all, of the table or of a mask.
    """

    image: RasterImage
    row: int = 0
    column: int = 0
    label: int | tuple[int, ...] | None = None
    time: str = ""
    split: str = ""
    labelled: bool = True


@dataclass(frozen=True)
class CustomSampleReader:
    """From a chip's name to its sample.

    Attributes:
        size: the chip's side in pixels; 0 for whole pictures as they are.
        mask: labels of the pixels of a window, or None where chips have their own.
    """

    chips: dict[str, Chip]
    chip_size: int
    task: str
    n_classes: int
    purity: float
    read_mask: Callable[[RasterImage, Window], np.ndarray] | None

    def __call__(self, name: str, out: np.ndarray | None = None) -> Sample:
        chip = self.chips[name]
        lat, lon = chip.image.latlon(*_centre(chip, self.chip_size if self.read_mask else 0))
        time = parse_timestamp(chip.time, "the time")
        image, valid = chip.image.read(self.window(chip)) if self.read_mask else chip.image.read(size=self.chip_size)
        if not valid.any():
            raise UserError(f"{chip.image.paths[0]} has no data here: every pixel is nodata in some band.")
        image = fill_nodata(image, valid)
        if not chip.labelled:
            label = missing_label(self.task, self.n_classes, image.shape[1:])
        else:
            label = self.label(chip, valid) if self.read_mask else np.array(chip.label)
        return Sample(image, label, lat, lon, time)

    def window(self, chip: Chip) -> Window:
        return Window(chip.column, chip.row, self.chip_size, self.chip_size)

    def label(self, chip: Chip, valid: np.ndarray) -> np.ndarray:
        """The label of a chip with a mask: that, the class that covers it, or the classes in it."""
        mask = self._labels(chip, valid)
        if self.task == "segmentation":
            return mask
        areas = np.bincount(mask[mask != IGNORE], minlength=self.n_classes)
        return np.int64(areas.argmax()) if self.task == "classification" else (areas > 0).astype(np.uint8)

    def class_areas(self, chip: Chip) -> np.ndarray:
        """How much of each class a chip has; nothing for one that cannot be used."""
        if not self.read_mask:
            one = np.zeros(self.n_classes)
            one[np.flatnonzero(chip.label) if self.task == "multilabel" else [chip.label]] = 1
            return one
        mask = self._labels(chip, chip.image.is_valid(self.window(chip)))
        areas = np.bincount(mask[mask != IGNORE], minlength=self.n_classes).astype(float)
        if self.task == "classification" and areas.max() < self.purity * mask.size:
            return np.zeros(self.n_classes)
        return areas

    def _labels(self, chip: Chip, valid: np.ndarray) -> np.ndarray:
        """Labels of a chip's pixels, of those that hold data."""
        return np.where(valid, self.read_mask(chip.image, self.window(chip)), IGNORE).astype(np.uint8)


def read_all(names: Iterable, read: Callable, skip_bad: bool, notes: list[str]) -> dict:
    """What is read of each, without those that cannot be if they may be left out; the notes say which.

    Raises:
        UserError: one cannot be read, and may not be left out; or none can.
    """
    found, wrong = {}, None
    for name in names:
        try:
            found[name] = read(name)
        except UserError as error:
            if not skip_bad:
                raise
            wrong = error
            notes += [f"left out: {error}"] if f"left out: {error}" not in notes else []
    if wrong and not found:
        raise wrong
    return found


def assign_splits(
    chips: Mapping[str, Chip], areas: Mapping[str, np.ndarray], size: int, rule: str, dataset: DatasetConfig
) -> tuple[list[str], str]:
    """The split of every chip, by a rule: `blocks` of ground, `random`, or its own `column`; and what to say of it.

    Blocks whose chips overlap, as those of overlapping images do, are dealt as one; the other rules say how many do.

    Args:
        size: a chip's side in pixels; 0 for whole pictures.
    """
    pairs = overlapping_pairs([footprint(chip, size) for chip in chips.values()])
    deal = np.array(_assign(chips, areas, pairs, rule, dataset))
    across = pairs[deal[pairs[:, 0]] != deal[pairs[:, 1]]]
    names = list(chips)
    said = f"{len(np.unique(across))} chips share ground with one of another split" if len(across) else ""
    return deal.tolist(), f"{said}, such as {' and '.join(names[place] for place in across[0])}" if said else ""


def footprint(chip: Chip, size: int) -> Place:
    """Where a chip lies; of a whole picture `size` is 0."""
    whole = (chip.image.height, chip.image.width)
    return (chip.image, chip.row, chip.column, *((size, size) if size else whole))


def _assign(chips, areas, pairs: np.ndarray, rule: str, dataset: DatasetConfig) -> list[str]:
    if rule == "column":
        for name, chip in chips.items():
            if chip.split not in SPLITS:
                raise UserError(f"The split of {name} is '{chip.split}'; it must be one of {', '.join(SPLITS)}.")
        return [chip.split for chip in chips.values()]
    homes = list(chips) if rule == "random" else [_block_id(chip, chips, dataset.block) for chip in chips.values()]
    block = merge_blocks([str(home) for home in homes], pairs if rule == "blocks" else pairs[:0])
    count = block.max() + 1
    if count < len(SPLITS) <= len(set(homes)):
        raise UserError(
            f"The images overlap so much that their ground hangs together in {count} of the {len(SPLITS)} pieces "
            "that the splits need at least; a split would see another's ground. Take images that overlap less, state "
            "their splits yourself (split: column, with a table of labels), or accept it (split: random)."
        )
    counts = np.zeros((count, len(next(iter(areas.values())))))
    np.add.at(counts, block, np.stack([areas[name] for name in chips]))
    draws = int(np.clip(_DEALS // count, 200, 20000))
    deal = assign_blocks_to_splits(counts, dataset.splits, dataset.seed, draws)
    return [SPLITS[split] for split in deal[block]]


def _block_id(chip: Chip, chips: Mapping[str, Chip], block: int) -> tuple:
    """The block of ground that a chip lies in, on one grid for all pictures of a CRS."""
    origin = next(one.image for one in chips.values() if one.image.crs == chip.image.crs)
    if not chip.image.crs:
        if chip.image.height < 2 * block and chip.image.width < 2 * block and len(chips) > 1:
            return (chip.image.paths,)
        return (chip.image.paths, chip.row // block, chip.column // block)
    column, row = ~rasterio.Affine(*origin.transform) @ chip.image.xy(chip.row, chip.column)
    return (chip.image.crs, math.floor(column / block + 1e-6), math.floor(row / block + 1e-6))


def _centre(chip: Chip, size: int) -> tuple[float, float]:
    height, width = (size, size) if size else (chip.image.height, chip.image.width)
    return chip.row + height / 2, chip.column + width / 2
