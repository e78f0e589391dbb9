"""Samples of custom data: chips of images, how they are read, and how they are assigned to splits.

Images without labels are samples of the split `unlabelled`: students learn from the teacher's predictions on them.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import rasterio
from rasterio.windows import Window

from pipeline.config import DatasetConfig
from pipeline.data import splits
from pipeline.data.image_store import SPLITS, Sample, parse_timestamp
from pipeline.data.sources.custom.labels import ReadMask
from pipeline.data.sources.custom.options import CustomOptions
from pipeline.data.sources.custom.rasters import RasterImage, find_files, is_georeferenced, open_image
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, get_task

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


# Chips


@dataclass(frozen=True)
class Chip:
    """A window of an image, with its upper left corner in pixels, or the whole image.

    Attributes:
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


def crop_chips(image: RasterImage, prefix: str, chip_size: int, **fields) -> dict[str, Chip]:
    """Return the chips of an image by name, with further fields of `Chip`."""
    return {
        f"{prefix}r{row:05d}c{column:05d}": Chip(image, row, column, **fields)
        for row, column in splits.chip_corners(image.height, image.width, chip_size).tolist()
    }


def check_equal_sizes(images: Sequence[RasterImage]) -> None:
    """Refuse images of several sizes, which must be resampled."""
    height, width = images[0].height, images[0].width
    for image in images:
        if (image.height, image.width) != (height, width):
            raise UserError(
                f"{image.paths[0]} has {image.height} x {image.width} px, and {images[0].paths[0]} has {height} x "
                f"{width} px. Give a chip, in pixels, to which all are resampled.",
                key="chip", value=(image.height, image.width), allowed=[(height, width)], path=image.paths[0],
            )  # fmt: skip


@dataclass(frozen=True)
class CustomSampleReader:
    """Reads a sample by its name.

    Attributes:
        chip_size: side of a chip in pixels; 0 for whole images as they are.
        purity: fraction of a chip that its class must cover, for classification from masks.
        read_mask: reads the classes of a window's pixels; None if chips have labels from a table.
    """

    chips: dict[str, Chip]
    chip_size: int
    task: str
    n_classes: int
    purity: float
    read_mask: ReadMask | None

    @property
    def crops_windows(self) -> bool:
        """Whether chips are windows of images; else they are whole images, resampled to `chip_size`."""
        return self.read_mask is not None

    @property
    def needs_purity(self) -> bool:
        """Whether a chip is used only if a class covers enough of it."""
        task = get_task(self.task)
        return not (task.is_dense or task.is_multilabel)

    def __call__(self, name: str) -> Sample:
        """Read a sample; a damaged file, or a chip without a valid pixel, raises UserError."""
        chip = self.chips[name]
        height, width = self._size(chip)
        lat, lon = chip.image.latlon(chip.row + height / 2, chip.column + width / 2)
        window, size = (self.window(chip), 0) if self.crops_windows else (None, self.chip_size)
        pixels, is_valid = chip.image.read(window, size)
        if not is_valid.any():
            raise UserError(
                f"{chip.image.paths[0]}: chip {name} has no data; every pixel is nodata in some band.",
                key=name, path=chip.image.paths[0],
            )  # fmt: skip
        pixels = splits.fill_nodata(pixels, is_valid)
        label: np.ndarray | np.int64
        if not chip.is_labelled:
            label = get_task(self.task).missing_label(self.n_classes, pixels.shape[1:])
        elif self.crops_windows:
            label = get_task(self.task).label_from_mask(self._valid_mask(chip, is_valid), self.n_classes)
        else:
            label = np.array(chip.label)
        return Sample(pixels, label, lat, lon, parse_timestamp(chip.time, "the time"))

    def window(self, chip: Chip) -> Window:
        """Return the window of a chip in its image."""
        return Window(chip.column, chip.row, self.chip_size, self.chip_size)

    def transform(self, chip: Chip) -> tuple[float, ...]:
        """Return the affine coefficients of a chip as it is stored."""
        if self.chip_size and not self.crops_windows:
            change = rasterio.Affine.scale(chip.image.width / self.chip_size, chip.image.height / self.chip_size)
        else:
            change = rasterio.Affine.translation(chip.column, chip.row)
        return tuple(chip.image.transform @ change)[:6]

    def footprint(self, chip: Chip) -> splits.Footprint:
        """Return the location of a chip."""
        image = chip.image
        transform = image.transform if image.crs or is_georeferenced(image) else None
        return splits.Footprint(image.paths, image.crs, transform, chip.row, chip.column, *self._size(chip))

    def class_areas(self, chip: Chip) -> np.ndarray:
        """Return the area of each class in a chip, (class,); zeros for a chip that cannot be used."""
        task = get_task(self.task)
        if not self.crops_windows:
            areas = np.zeros(self.n_classes)
            areas[task.classes_present(np.asarray(chip.label))] = 1
            return areas
        mask = self._valid_mask(chip, chip.image.is_valid(self.window(chip)))
        areas = np.bincount(mask[mask != IGNORE], minlength=self.n_classes).astype(float)
        if self.needs_purity and areas.max() < self.purity * mask.size:
            return np.zeros(self.n_classes)
        return areas

    def _valid_mask(self, chip: Chip, is_valid: np.ndarray) -> np.ndarray:
        """Classes of a chip's pixels, with `IGNORE` where there is no data."""
        assert self.read_mask is not None, "only chips that are windows have masks"
        return np.where(is_valid, self.read_mask(chip.image, self.window(chip)), IGNORE).astype(np.uint8)

    def _size(self, chip: Chip) -> tuple[int, int]:
        """Height and width of a chip in pixels of its image."""
        return (self.chip_size, self.chip_size) if self.crops_windows else (chip.image.height, chip.image.width)


def read_all(
    keys: Iterable[Key], read: Callable[[Key], Value], options: CustomOptions, notes: list[str]
) -> dict[Key, Value]:
    """Read a value for every key; with `skip_bad`, skip and note keys that cannot be read, if one can."""
    values: dict[Key, Value] = {}
    last_error = None
    for key in keys:
        try:
            values[key] = read(key)
        except UserError as error:
            if not options.skip_bad:
                raise
            last_error = error
            notes += [f"skipped: {error}"] if f"skipped: {error}" not in notes else []
    if last_error and not values:
        raise last_error
    return values


# Splits


def assign_splits(
    reader: CustomSampleReader,
    class_areas: Mapping[str, np.ndarray],
    rule: str,
    dataset: DatasetConfig,
    notes: list[str],
) -> dict[str, str]:
    """Return the split of every chip; add a note if chips of different splits overlap.

    Args:
        class_areas: of the chips that are used, (class,).
        rule: `blocks` assigns spatial blocks whole, and blocks with overlapping chips together; `random` assigns
            chips; `column` uses the split of each chip in the table.

    Raises UserError for too few blocks, or a chip without a valid split.
    """
    names = list(class_areas)
    chips = [reader.chips[name] for name in names]
    pairs = splits.overlapping_pairs([reader.footprint(chip) for chip in chips])
    if rule == "column":
        for name, chip in zip(names, chips, strict=True):
            if chip.split not in SPLITS:
                raise UserError(
                    f"The split of {name} is '{chip.split}'; it must be one of {', '.join(SPLITS)}.",
                    key="split", value=chip.split, allowed=SPLITS,
                )  # fmt: skip
        split_of_chip = np.array([chip.split for chip in chips])
    else:
        is_random = rule == "random"
        block_ids = names if is_random else [str(_block_id(chip, chips, dataset.block)) for chip in chips]
        block = splits.merge_blocks(block_ids, pairs[:0] if is_random else pairs)
        n_blocks = block.max() + 1
        if n_blocks < len(SPLITS) <= len(set(block_ids)):
            raise UserError(
                f"The images overlap so much that they form {n_blocks} connected areas, and {len(SPLITS)} splits "
                "need at least one each. Use images that overlap less, state the splits (split: column, with a "
                "table of labels), or accept overlapping splits (split: random).",
                key="split", value=int(n_blocks), allowed=("column", "random"),
            )  # fmt: skip
        block_areas = np.zeros((n_blocks, reader.n_classes))
        np.add.at(block_areas, block, np.stack(list(class_areas.values())))
        split_of_block = splits.assign_blocks_to_splits(block_areas, dataset.splits, dataset.seed)
        split_of_chip = np.array(SPLITS)[split_of_block[block]]
    across = pairs[split_of_chip[pairs[:, 0]] != split_of_chip[pairs[:, 1]]]
    if len(across):
        examples = " and ".join(names[index] for index in across[0])
        notes.append(f"{len(np.unique(across))} chips overlap with one of another split, such as {examples}")
    return dict(zip(names, split_of_chip.tolist(), strict=True))


def _block_id(chip: Chip, chips: Sequence[Chip], block_size: int) -> tuple:
    """Return the spatial block of a chip, on one grid for all images of a CRS."""
    image = chip.image
    if not image.crs:
        if image.height < 2 * block_size and image.width < 2 * block_size and len(chips) > 1:
            return (image.paths,)
        return (image.paths, chip.row // block_size, chip.column // block_size)
    origin = next(other.image for other in chips if other.image.crs == image.crs)
    column, row = ~origin.transform @ (image.transform @ (chip.column, chip.row))
    return (image.crs, math.floor(column / block_size + 1e-6), math.floor(row / block_size + 1e-6))


# Images without labels


def unlabelled_files(options: CustomOptions) -> list[Path]:
    """Find the files that `unlabelled` matches, none of which may be one of the images or labels."""
    if not options.unlabelled:
        return []
    folder = Path(options.folder)
    files = find_files(folder, options.unlabelled)
    for name, pattern in (("images", options.images), ("labels", options.labels)):
        labelled_files = {path.resolve() for path in find_files(folder, pattern)}
        if common := [path for path in files if path.resolve() in labelled_files]:
            raise UserError(
                f"unlabelled ({options.unlabelled}) and {name} ({pattern}) both match {len(common)} files, such as "
                f"{common[0].relative_to(folder)}. Move images without labels to a folder of their own and let "
                "unlabelled alone match it.",
                key="unlabelled", value=options.unlabelled, path=common[0],
            )  # fmt: skip
    return files


def unlabelled_samples(
    paths: Sequence[Path],
    options: CustomOptions,
    reader: CustomSampleReader,
    split_of_chip: Mapping[str, str],
    notes: list[str],
) -> dict[str, Chip]:
    """Make chips of the unlabelled images, as of the labelled ones, with names that no labelled chip has.

    Args:
        reader: of the labelled chips.
        split_of_chip: split of every labelled chip that is used, by name.

    Raises UserError for images that cannot be read, that differ from the labelled ones, or that have no chip.
    """
    labelled = [reader.chips[name] for name in split_of_chip]
    # A folder is an image if the labelled scene has a file per band.
    is_one_file = len(labelled[0].image.paths) == 1
    files_of_image: dict[Path, list[Path]] = {}
    for path in paths:
        files_of_image.setdefault(path if is_one_file else path.parent, []).append(path)
    opened = read_all(files_of_image, lambda key: open_image(files_of_image[key], options.bands), options, notes)
    images = list(opened.values())
    _check_metadata(images, labelled, options)
    # With the file's ending, which names of labelled chips lack.
    names = [str(Path(image.paths[0]).relative_to(options.folder)) for image in images]
    chips: dict[str, Chip] = {}
    if reader.crops_windows:
        for name, image in zip(names, images, strict=True):
            chips |= crop_chips(image, f"{name}_", reader.chip_size, time=options.time, is_labelled=False)
        # Unlike masks, a teacher's predictions ignore no pixel.
        areas = {name: reader.window(chip) for name, chip in chips.items()}
        is_valid = read_all(chips, lambda name: chips[name].image.is_valid(areas[name]).all(), options, notes)
        if invalid := [name for name, all_valid in is_valid.items() if not all_valid]:
            notes.append(f"{len(invalid)} of {len(chips)} unlabelled chips have pixels without data, and are skipped")
        chips = {name: chips[name] for name, all_valid in is_valid.items() if all_valid}
    else:
        if not reader.chip_size:
            check_equal_sizes([labelled[0].image, *images])
        chips = {
            name: Chip(image, time=options.time, is_labelled=False) for name, image in zip(names, images, strict=True)
        }
    if not chips:
        raise UserError(
            f"No image of unlabelled ({options.unlabelled}) has a chip of {reader.chip_size} x {reader.chip_size} px "
            "in which all pixels are valid. Use smaller chips or other images.",
            key="unlabelled", value=options.unlabelled,
        )  # fmt: skip
    evaluated = [reader.footprint(reader.chips[name]) for name, split in split_of_chip.items() if split != "train"]
    pairs = splits.overlaps_between([reader.footprint(chip) for chip in chips.values()], evaluated)
    if count := len(np.unique(pairs[:, 0])):
        notes.append(
            f"{count} of {len(chips)} unlabelled chips overlap with val or test: students are trained on their "
            "pixels, but not on their labels"
        )
    return chips


def _check_metadata(images: Sequence[RasterImage], labelled: Sequence[Chip], options: CustomOptions) -> None:
    """Refuse images that lack a location or time that all labelled images have.

    Backbones are given locations and times only if all images have them.
    """
    without_crs = [image for image in images if not image.crs]
    if without_crs and all(chip.image.crs for chip in labelled):
        path = without_crs[0].paths[0]
        raise UserError(
            f"{path} states no coordinate reference system, and the labelled images all do. Backbones are given "
            "locations only if all images have one, so the labelled images would lose theirs. Add a coordinate "
            "reference system, or exclude the file from unlabelled.",
            key="unlabelled", value="crs", path=path,
        )  # fmt: skip
    if not options.time and all(chip.time for chip in labelled):
        raise UserError(
            "The labelled images all have a time, and those of unlabelled have none. Backbones are given times only "
            "if all images have one, so the labelled images would lose theirs. Give the time of the unlabelled "
            "images as time in the options.",
            key="unlabelled", value="time",
        )  # fmt: skip
