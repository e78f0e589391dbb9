"""Images without labels: students learn from the teacher's predictions on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.data.sources.custom.options import CustomOptions
from pipeline.data.sources.custom.rasters import RasterImage, find_files, open_image, open_scene_files
from pipeline.data.sources.custom.samples import Chip, CustomSampleReader, read_all
from pipeline.data.splits import chip_corners, overlaps_between
from pipeline.errors import UserError


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
        f"{count} of {len(chips)} unlabelled chips overlap with val or test: students are given their pixels, but "
        "not their labels"
    ]
