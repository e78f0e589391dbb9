"""Further images of one's own, without labels: students learn what their teachers say of them (pipeline/distill)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.data.sources.custom.ground import overlaps_between
from pipeline.data.sources.custom.options import CustomOptions
from pipeline.data.sources.custom.rasters import RasterImage
from pipeline.data.sources.custom.samples import Chip, CustomSampleReader, footprint, read_all
from pipeline.data.sources.custom.scenes import find_files, open_image, open_scene_files
from pipeline.data.splits import chip_corners
from pipeline.errors import UserError


def unlabelled_files(options: CustomOptions, folder: Path) -> list[Path]:
    """The files that `unlabelled` fits; none if it is not given.

    Raises:
        UserError: nothing fits, or a file is one of the images or labels.
    """
    if not options.unlabelled:
        return []
    found = find_files(folder, options.unlabelled)
    for name, pattern in (("images", options.images), ("labels", options.labels)):
        known = {path.resolve() for path in find_files(folder, pattern)}
        if both := [path for path in found if path.resolve() in known]:
            raise UserError(
                f"unlabelled ({options.unlabelled}) and {name} ({pattern}) both fit {len(both)} files, such as "
                f"{both[0].relative_to(folder)}. An image has labels or none: keep those without in a folder of "
                "their own, which unlabelled alone names."
            )
    return found


def unlabelled_samples(
    paths: Sequence[Path], options: CustomOptions, reader: CustomSampleReader, deal: Mapping[str, str]
) -> tuple[dict[str, Chip], list[str]]:
    """Chips of the unlabelled images, cut as the labelled ones are, by names that no labelled one has; and notes.

    Args:
        paths: what `further` found.
        reader: of the labelled chips.
        deal: by name, the split of those that are used.

    Raises:
        UserError: images that cannot be read, that differ from the labelled ones, or of which no chip can be cut.
    """
    labelled, notes = [reader.chips[name] for name in deal], []
    pictures = _pictures(paths, options, len(labelled[0].image.paths), notes)
    _check_metadata(pictures, labelled, options)
    chips = {}
    for one in pictures:
        # With its ending, which no labelled image's name has.
        name = str(Path(one.paths[0]).relative_to(options.folder))
        if reader.read_mask:
            for row, column in chip_corners(one.height, one.width, reader.chip_size).tolist():
                chips[f"{name}_r{row:05d}c{column:05d}"] = Chip(one, row, column, None, options.time, labelled=False)
        else:
            _check_size(one, labelled[0].image, reader.chip_size)
            chips[name] = Chip(one, label=None, time=options.time, labelled=False)
    kept = _with_data(chips, reader, options, notes) if reader.read_mask else chips
    if not kept:
        raise UserError(
            f"No image of unlabelled ({options.unlabelled}) has {reader.chip_size} x {reader.chip_size} px, all with data. "
            "Use smaller chips or other images."
        )
    return kept, notes + _overlap_note(kept, reader, deal)


def _pictures(paths: Sequence[Path], options: CustomOptions, each_has: int, notes: list[str]) -> list[RasterImage]:
    """All bands in each file; or, where the labelled scene is a file a band, a scene in each folder."""
    if each_has == 1:
        return list(read_all(paths, lambda path: open_image(path, options.bands), options.skip_bad, notes).values())
    folders = dict.fromkeys(path.parent for path in paths)
    inside = {folder: [path for path in paths if path.parent == folder] for folder in folders}
    return list(read_all(folders, lambda one: open_scene_files(inside[one], options.bands), options.skip_bad, notes).values())


def _check_metadata(pictures: Sequence[RasterImage], labelled: Sequence[Chip], options: CustomOptions) -> None:
    """Refuse what would take place or time from the labelled images: backbones are told them if all have them."""
    nowhere = [one for one in pictures if not one.crs]
    if nowhere and all(chip.image.crs for chip in labelled):
        raise UserError(
            f"{nowhere[0].paths[0]} states no coordinate reference system, and the labelled images all do. Backbones "
            "are told places only where all images have one, so the labelled ones would lose theirs. Give it one, or "
            "leave it out of unlabelled."
        )
    if not options.time and all(chip.time for chip in labelled):
        raise UserError(
            "The labelled images all have a time, and those of unlabelled have none. Backbones are told times only "
            "where all images have one, so the labelled ones would lose theirs. State theirs as time in the options."
        )


def _check_size(one: RasterImage, first: RasterImage, size: int) -> None:
    if not size and (one.height, one.width) != (first.height, first.width):
        raise UserError(
            f"{one.paths[0]}, of unlabelled, has {one.height} x {one.width} px, and {first.paths[0]} has "
            f"{first.height} x {first.width} px. Give a chip, in pixels, to which all are resampled."
        )


def _with_data(
    chips: Mapping[str, Chip], reader: CustomSampleReader, options: CustomOptions, notes: list[str]
) -> dict[str, Chip]:
    """Chips of which every pixel holds data: a mask can ignore others, and a teacher's answers cannot."""
    whole = read_all(
        chips, lambda name: chips[name].image.is_valid(reader.window(chips[name])).all(), options.skip_bad, notes
    )
    kept = {name: chips[name] for name, yes in whole.items() if yes}
    if gone := len(whole) - len(kept):
        notes.append(f"{gone} of {len(chips)} unlabelled chips have pixels without data, and are left out")
    return kept


def _overlap_note(chips: Mapping[str, Chip], reader: CustomSampleReader, deal: Mapping[str, str]) -> list[str]:
    """What to say of ground of val and test that unlabelled chips show."""
    size = reader.chip_size if reader.read_mask else 0
    held = [footprint(reader.chips[name], size) for name, split in deal.items() if split != "train"]
    count = len(np.unique(overlaps_between([footprint(chip, size) for chip in chips.values()], held)[:, 0]))
    said = f"{count} of {len(chips)} unlabelled chips share ground with val or test"
    return [f"{said}: students see its pixels, though not its labels"] if count else []
