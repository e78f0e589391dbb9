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
from pipeline.data.image_store import SPLITS, Sample, parse_timestamp
from pipeline.data.sources.custom.options import CustomOptions
from pipeline.data.sources.custom.rasters import (
    RasterImage,
    find_files,
    is_georeferenced,
    open_image,
    open_scene_files,
)
from pipeline.data.splits import (
    Footprint,
    assign_blocks_to_splits,
    chip_corners,
    fill_nodata,
    merge_blocks,
    overlapping_pairs,
    overlaps_between,
)
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, get_task

# Random assignments tried, times the number of blocks: with ten thousand blocks, fewer than 20,000 suffice.
DRAWS_TIMES_BLOCKS = 4_000_000
MIN_DRAWS, MAX_DRAWS = 200, 20000

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


# Chips


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
        read_mask: reads the classes of a window's pixels; None if chips have labels from a table.
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
        label: np.ndarray | np.int64
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
        """Return the area of each class in a chip, (class,); zeros for a chip that cannot be used."""
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


# Splits


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
            chips; `column` uses the split of each chip in the table.

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


# Images without labels


def unlabelled_files(options: CustomOptions, folder: Path) -> list[Path]:
    """Find the files that `unlabelled` matches; none if it is empty.

    Raises:
        UserError: nothing matches, or a file is also one of the images or labels.
    """
    if not options.unlabelled:
        return []
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
    paths: Sequence[Path], options: CustomOptions, reader: CustomSampleReader, split_of_chip: Mapping[str, str]
) -> tuple[dict[str, Chip], list[str]]:
    """Make chips of the unlabelled images, as of the labelled ones.

    Args:
        paths: from `unlabelled_files`.
        reader: of the labelled chips.
        split_of_chip: split of every labelled chip that is used, by name.

    Returns:
        Chips by names that no labelled chip has, and notes.

    Raises:
        UserError: images that cannot be read, that differ from the labelled ones, or that have no chip.
    """
    labelled, notes = [reader.chips[name] for name in split_of_chip], []
    images = _open_images(paths, options, len(labelled[0].image.paths), notes)
    _check_metadata(images, labelled, options)
    chips = {}
    for image in images:
        # With the file's ending, which names of labelled chips lack.
        name = str(Path(image.paths[0]).relative_to(options.folder))
        if reader.crops_windows:
            for row, column in chip_corners(image.height, image.width, reader.chip_size).tolist():
                chips[f"{name}_r{row:05d}c{column:05d}"] = Chip(
                    image, row, column, time=options.time, is_labelled=False
                )
        else:
            _check_size(image, labelled[0].image, reader.chip_size)
            chips[name] = Chip(image, time=options.time, is_labelled=False)
    chips = _select_valid(chips, reader, options, notes) if reader.crops_windows else chips
    if not chips:
        raise UserError(
            f"No image of unlabelled ({options.unlabelled}) has a chip of {reader.chip_size} x {reader.chip_size} px "
            "in which all pixels are valid. Use smaller chips or other images.",
            key="unlabelled", value=options.unlabelled,
        )  # fmt: skip
    return chips, notes + _overlap_note(chips, reader, split_of_chip)


def _open_images(paths: Sequence[Path], options: CustomOptions, n_files: int, notes: list[str]) -> list[RasterImage]:
    """Describe the images: one per file, or one per folder if the labelled scene has a file per band."""
    if n_files == 1:
        images = read_all(paths, lambda path: open_image(path, options.bands), options.skip_bad, notes)
        return list(images.values())
    files_of_folder: dict[Path, list[Path]] = {}
    for path in paths:
        files_of_folder.setdefault(path.parent, []).append(path)
    scenes = read_all(
        files_of_folder,
        lambda folder: open_scene_files(files_of_folder[folder], options.bands),
        options.skip_bad,
        notes,
    )
    return list(scenes.values())


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


def _check_size(image: RasterImage, labelled: RasterImage, chip_size: int) -> None:
    """Raise UserError for an image of another size than the labelled ones, if images are not resampled."""
    size, expected = (image.height, image.width), (labelled.height, labelled.width)
    if not chip_size and size != expected:
        raise UserError(
            f"{image.paths[0]}, of unlabelled, has {size[0]} x {size[1]} px, and {labelled.paths[0]} has "
            f"{expected[0]} x {expected[1]} px. Give a chip, in pixels, to which all are resampled.",
            key="chip", value=size, allowed=[expected], path=image.paths[0],
        )  # fmt: skip


def _select_valid(
    chips: Mapping[str, Chip], reader: CustomSampleReader, options: CustomOptions, notes: list[str]
) -> dict[str, Chip]:
    """Select chips in which every pixel is valid; unlike masks, a teacher's predictions ignore none."""

    def is_valid(name: str) -> bool:
        return bool(chips[name].image.is_valid(reader.window(chips[name])).all())

    valid = read_all(chips, is_valid, options.skip_bad, notes)
    selected = {name: chips[name] for name, all_valid in valid.items() if all_valid}
    if count := len(valid) - len(selected):
        notes.append(f"{count} of {len(chips)} unlabelled chips have pixels without data, and are skipped")
    return selected


def _overlap_note(
    chips: Mapping[str, Chip], reader: CustomSampleReader, split_of_chip: Mapping[str, str]
) -> list[str]:
    """Describe how many unlabelled chips overlap with chips of val or test."""
    evaluated = [reader.footprint(reader.chips[name]) for name, split in split_of_chip.items() if split != "train"]
    pairs = overlaps_between([reader.footprint(chip) for chip in chips.values()], evaluated)
    count = len(np.unique(pairs[:, 0]))
    if not count:
        return []
    return [
        f"{count} of {len(chips)} unlabelled chips overlap with val or test: students are trained on their pixels, "
        "but not on their labels"
    ]
