"""Samples of custom data: chips of images, how they are read, and how they are assigned to splits."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import rasterio
from rasterio.windows import Window

from pipeline.config import DatasetConfig
from pipeline.data.image_store import SPLITS, Sample, parse_timestamp
from pipeline.data.sources.custom.rasters import RasterImage, is_georeferenced
from pipeline.data.splits import Footprint, assign_blocks_to_splits, fill_nodata, merge_blocks, overlapping_pairs
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, get_task

# Random assignments tried, times the number of blocks: with ten thousand blocks, fewer than 20,000 suffice.
DRAWS_TIMES_BLOCKS = 4_000_000
MIN_DRAWS, MAX_DRAWS = 200, 20000
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Chip:
    """A window of an image, or the whole image.

    Attributes:
        image: the image.
        row, column: upper left corner in pixels.
        label: class index, or multi-hot vector, from a table; None if there is none.
        time: acquisition time in UTC as text; empty if unknown.
        split: from a table; empty if unknown.
        is_labelled: whether it has a label, from a table or a mask.
    """

    image: RasterImage
    row: int = 0
    column: int = 0
    label: int | tuple[int, ...] | None = None
    time: str = ""
    split: str = ""
    is_labelled: bool = True


@dataclass(frozen=True)
class CustomSampleReader:
    """Reads a sample by its name.

    Attributes:
        chips: by name.
        chip_size: side of a chip in pixels; 0 for whole images as they are.
        task: name of the task.
        n_classes: number of classes.
        purity: fraction of a chip that its class must cover, for classification from masks.
        read_mask: reads the classes of a window's pixels; None if chips have labels of their own.
    """

    chips: dict[str, Chip]
    chip_size: int
    task: str
    n_classes: int
    purity: float
    read_mask: Callable[[RasterImage, Window], np.ndarray] | None

    @property
    def crops_windows(self) -> bool:
        """Whether chips are windows of images; else they are whole images, resampled to `chip_size`."""
        return self.read_mask is not None

    def __call__(self, name: str, out: np.ndarray | None = None) -> Sample:
        """Read a sample; `out` is not used.

        Raises:
            UserError: a file is damaged, or the chip has no valid pixel.
        """
        chip = self.chips[name]
        lat, lon = chip.image.latlon(*self._centre(chip))
        time = parse_timestamp(chip.time, "the time")
        pixels, is_valid = (
            chip.image.read(self.window(chip)) if self.crops_windows else chip.image.read(size=self.chip_size)
        )
        if not is_valid.any():
            raise UserError(
                f"{chip.image.paths[0]}: chip {name} has no data; every pixel is nodata in some band.",
                key=name, path=chip.image.paths[0],
            )  # fmt: skip
        pixels = fill_nodata(pixels, is_valid)
        if not chip.is_labelled:
            label = get_task(self.task).missing_label(self.n_classes, pixels.shape[1:])
        elif self.crops_windows:
            label = get_task(self.task).label_from_mask(self._valid_mask(chip, is_valid), self.n_classes)
        else:
            label = np.array(chip.label)
        return Sample(pixels, label, lat, lon, time)

    def window(self, chip: Chip) -> Window:
        """Return the window of a chip in its image."""
        return Window(chip.column, chip.row, self.chip_size, self.chip_size)

    def footprint(self, chip: Chip) -> Footprint:
        """Return the location of a chip."""
        image = chip.image
        is_located = bool(image.crs) or is_georeferenced(image.transform, image.height)
        height, width = self._size(chip)
        return Footprint(
            image.paths, image.crs, image.transform if is_located else None, chip.row, chip.column, height, width
        )

    def class_areas(self, chip: Chip) -> np.ndarray:
        """Return how much of each class a chip has, (class,); zeros for a chip that cannot be used."""
        task = get_task(self.task)
        if not self.crops_windows:
            areas = np.zeros(self.n_classes)
            areas[task.classes_present(np.asarray(chip.label))] = 1
            return areas
        mask = self._valid_mask(chip, chip.image.is_valid(self.window(chip)))
        areas = np.bincount(mask[mask != IGNORE], minlength=self.n_classes).astype(float)
        needs_purity = not (task.is_dense or task.is_multilabel)
        if needs_purity and areas.max() < self.purity * mask.size:
            return np.zeros(self.n_classes)
        return areas

    def _valid_mask(self, chip: Chip, is_valid: np.ndarray) -> np.ndarray:
        """Classes of a chip's pixels, with `IGNORE` where there is no data."""
        assert self.read_mask is not None, "only chips that are windows have masks"
        return np.where(is_valid, self.read_mask(chip.image, self.window(chip)), IGNORE).astype(np.uint8)

    def _size(self, chip: Chip) -> tuple[int, int]:
        """Height and width of a chip in pixels of its image."""
        return (self.chip_size, self.chip_size) if self.crops_windows else (chip.image.height, chip.image.width)

    def _centre(self, chip: Chip) -> tuple[float, float]:
        height, width = self._size(chip)
        return chip.row + height / 2, chip.column + width / 2


def read_all(keys: Iterable[Key], read: Callable[[Key], Value], skip_bad: bool, notes: list[str]) -> dict[Key, Value]:
    """Read a value for every key.

    Args:
        skip_bad: skip keys that cannot be read and add a note on each.

    Raises:
        UserError: a key cannot be read and `skip_bad` is false, or none can be read.
    """
    values: dict[Key, Value] = {}
    last_error = None
    for key in keys:
        try:
            values[key] = read(key)
        except UserError as error:
            if not skip_bad:
                raise
            last_error = error
            notes += [f"skipped: {error}"] if f"skipped: {error}" not in notes else []
    if last_error and not values:
        raise last_error
    return values


def assign_splits(
    reader: CustomSampleReader,
    chips: Mapping[str, Chip],
    class_areas: Mapping[str, np.ndarray],
    rule: str,
    dataset: DatasetConfig,
) -> tuple[list[str], list[str]]:
    """Assign every chip to a split.

    Args:
        chips: by name.
        class_areas: of every chip, (class,).
        rule: `blocks` assigns spatial blocks whole, and blocks with overlapping chips together; `random` assigns
            chips; `column` takes each chip's own split.

    Returns:
        The split of every chip, and a note if chips of different splits overlap.

    Raises:
        UserError: too few blocks, or a chip without a valid split.
    """
    pairs = overlapping_pairs([reader.footprint(chip) for chip in chips.values()])
    splits = np.array(_assign(chips, class_areas, pairs, rule, dataset))
    across = pairs[splits[pairs[:, 0]] != splits[pairs[:, 1]]]
    if not len(across):
        return splits.tolist(), []
    names = list(chips)
    return splits.tolist(), [
        f"{len(np.unique(across))} chips overlap with one of another split, such as "
        f"{' and '.join(names[index] for index in across[0])}"
    ]


def _assign(
    chips: Mapping[str, Chip],
    class_areas: Mapping[str, np.ndarray],
    pairs: np.ndarray,
    rule: str,
    dataset: DatasetConfig,
) -> list[str]:
    """Return the split of every chip by a rule, given the pairs of overlapping chips."""
    if rule == "column":
        for name, chip in chips.items():
            if chip.split not in SPLITS:
                raise UserError(
                    f"The split of {name} is '{chip.split}'; it must be one of {', '.join(SPLITS)}.",
                    key="split", value=chip.split, allowed=SPLITS,
                )  # fmt: skip
        return [chip.split for chip in chips.values()]
    if rule == "random":
        block_ids: list[object] = list(chips)
    else:
        block_ids = [_block_id(chip, chips, dataset.block) for chip in chips.values()]
    block = merge_blocks([str(block_id) for block_id in block_ids], pairs if rule == "blocks" else pairs[:0])
    n_blocks = block.max() + 1
    if n_blocks < len(SPLITS) <= len(set(block_ids)):
        raise UserError(
            f"The images overlap so much that they form {n_blocks} connected areas, and {len(SPLITS)} splits need at "
            "least one each. Use images that overlap less, state the splits yourself (split: column, with a table of "
            "labels), or accept overlapping splits (split: random).",
            key="split", value=int(n_blocks), allowed=("column", "random"),
        )  # fmt: skip
    block_areas = np.zeros((n_blocks, len(next(iter(class_areas.values())))))
    np.add.at(block_areas, block, np.stack([class_areas[name] for name in chips]))
    n_draws = int(np.clip(DRAWS_TIMES_BLOCKS // n_blocks, MIN_DRAWS, MAX_DRAWS))
    split_of_block = assign_blocks_to_splits(block_areas, dataset.splits, dataset.seed, n_draws)
    return [SPLITS[split] for split in split_of_block[block]]


def _block_id(chip: Chip, chips: Mapping[str, Chip], block_size: int) -> tuple:
    """Return the spatial block of a chip, on one grid for all images of a CRS."""
    image = chip.image
    if not image.crs:
        if image.height < 2 * block_size and image.width < 2 * block_size and len(chips) > 1:
            return (image.paths,)
        return (image.paths, chip.row // block_size, chip.column // block_size)
    origin = next(other.image for other in chips.values() if other.image.crs == image.crs)
    column, row = ~rasterio.Affine(*origin.transform) @ image.xy(chip.row, chip.column)
    return (image.crs, math.floor(column / block_size + 1e-6), math.floor(row / block_size + 1e-6))
