"""Your own data: GeoTIFFs with a table of labels, images with masks, or one scene with labelled polygons.

Which of the three is told by what `labels` names: a CSV file, rasters, or anything else that geopandas reads.

options.py has what a block may say; scenes.py finds the files of each picture, and rasters.py reads its pixels;
table.py, masks.py and labels.py (polygons) read labels, and names.py has their classes' names; chips.py is a sample
and its split, ground.py where samples overlap; unlabelled.py has the images that students alone see.
"""

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config import DatasetConfig, Params, parse
from pipeline.data.download import file_sha256
from pipeline.data.image_store import UNLABELLED, LazyImageDataset
from pipeline.data.sources.custom.csv_labels import read_table
from pipeline.data.sources.custom.mask_labels import MaskLabels, pair_masks
from pipeline.data.sources.custom.options import CustomOptions, check_band_means, is_table, validate_options
from pipeline.data.sources.custom.polygon_labels import read_polygons
from pipeline.data.sources.custom.samples import Chip, CustomSampleReader, assign_splits, read_all
from pipeline.data.sources.custom.scenes import find_files, open_image, open_scene_files, sidecar_files
from pipeline.data.sources.custom.unlabelled import unlabelled_files, unlabelled_samples
from pipeline.data.splits import SPLITS, chip_corners
from pipeline.errors import UserError

__all__ = ["REQUIRED_KEYS", "OPTIONAL_KEYS", "CustomOptions", "validate_options", "fetch", "prepare"]

REQUIRED_KEYS = ("task",)
OPTIONAL_KEYS = ("chip", "block", "splits")
Options = CustomOptions
_RASTERS = (".tif", ".tiff", ".png", ".jp2", ".vrt", ".img")


def fetch(dataset: DatasetConfig, params: Params) -> dict:
    """A digest of all files; they stay where they are."""
    options = parse(CustomOptions, dataset.options, "options")
    folder = Path(options.folder)
    found = [*find_files(folder, options.images), *find_files(folder, options.labels), *unlabelled_files(options, folder)]
    total = hashlib.sha256()
    for path in dict.fromkeys(one for named in found for one in sidecar_files(named)):
        total.update(f"{os.path.relpath(path, folder)} {file_sha256(path)}\n".encode())
    return {
        "source": options.source,
        "licence": options.licence,
        "folder": options.folder,
        "files": len(found),
        "content_sha256": total.hexdigest(),
    }


def prepare(raw: Path, dataset: DatasetConfig) -> LazyImageDataset:
    """The chips as a stream, split by blocks of ground unless another rule is given; the unlabelled come last."""
    options = parse(CustomOptions, dataset.options, "options")
    folder = Path(options.folder)
    paths = unlabelled_files(options, folder)
    if is_table(options):
        reader, notes, classes = _from_table(options, dataset, folder)
    else:
        reader, notes, classes = _from_masks(options, dataset, folder)
    areas = read_all(reader.chips, lambda name: reader.class_areas(reader.chips[name]), options.skip_bad, notes)
    if len(classes) < 2 and dataset.task != "multilabel":
        raise UserError(
            f"There is one class, {', '.join(classes)}, and nothing to tell it from. Ground without a label does not "
            "count: for a background, label some ground as such."
        )
    kept = [name for name, area in areas.items() if area.any() or (not reader.read_mask and dataset.task == "multilabel")]
    if len(kept) < len(areas):
        why = f"where no class covers {options.purity:.0%}" if dataset.task == "classification" else "without a label"
        notes.append(f"{len(areas) - len(kept)} of {len(areas)} chips {why} are left out")
    if not kept:
        raise UserError(
            f"No chip of {dataset.chip} px can be used ({notes[-1]}). Use smaller chips or another purity."
        )
    deal, shared = assign_splits(
        {name: reader.chips[name] for name in kept}, areas, reader.chip_size if reader.read_mask else 0, options.split, dataset
    )
    notes += [shared] if shared else []
    notes += _absent(classes, np.stack([areas[name] for name in kept]), np.array(deal))
    more = {}
    if paths:
        more, said = unlabelled_samples(paths, options, reader, dict(zip(kept, deal, strict=True)))
        notes += said
    reader = replace(reader, chips={name: reader.chips[name] for name in kept} | more)
    chips = list(reader.chips.values())
    first = chips[0].image
    height, width = (reader.chip_size, reader.chip_size) if reader.chip_size else (first.height, first.width)
    if any(chip.image.may_have_nodata for chip in chips):
        notes.append("where some band has no data, all have the mean of their chip's other pixels")
    if len(kinds := sorted({str(chip.image.dtype) for chip in chips})) > 1:
        notes.append(f"images have {', '.join(kinds)} values, and are stored as {np.result_type(*kinds)}")
    located = all(chip.image.crs for chip in chips)
    if nowhere := {chip.image.paths[0] for chip in chips if not chip.image.crs}:
        notes.append(
            f"chips keep no place on the map: {len(nowhere)} images, such as {Path(min(nowhere)).name}, state no "
            "coordinate reference system"
        )
    return LazyImageDataset(
        sample=list(reader.chips),
        split=[*deal, *[UNLABELLED] * len(more)],
        bands=options.bands,
        classes=classes,
        task=dataset.task,
        units=options.units,
        gsd=options.gsd if not math.isnan(options.gsd) else min(band.gsd for band in options.bands),
        licence=options.licence,
        source=options.source,
        display=options.display or None,
        notes=notes,
        crs=[chip.image.crs for chip in chips] if located else None,
        transform=np.array([
            chip.image.resampled_transform(reader.chip_size) if reader.chip_size and not reader.read_mask
            else chip.image.window_transform(chip.row, chip.column) for chip in chips
        ]) if located else None,
        read_sample=reader,
        check_band_means=functools.partial(check_band_means, options),
        shape=(len(options.bands), height, width),
        dtype=np.result_type(*{chip.image.dtype for chip in chips}),
    )  # fmt: skip


def _absent(classes: Sequence[str], areas: np.ndarray, deal: np.ndarray) -> list[str]:
    """What to say of classes that a split has none of."""
    found = {}
    for split in SPLITS:
        for name, area in zip(classes, areas[deal == split].sum(axis=0), strict=True):
            if not area:
                found.setdefault(split, []).append(name)
    return [f"the split {split} has nothing of {', '.join(names)}" for split, names in found.items()]


def _from_table(options: CustomOptions, dataset: DatasetConfig, folder: Path):
    images = find_files(folder, options.images)
    several = dataset.task == "multilabel"
    if dataset.task == "segmentation":
        raise UserError("A table gives a label an image; segmentation needs masks or polygons as labels.")
    paths = find_files(folder, options.labels)
    if len(paths) > 1:
        raise UserError(f"labels fits {len(paths)} tables, {paths[0].name}, {paths[1].name}, ...; name one.")
    needed = ("file", options.label_column, *(("split",) if options.split == "column" else ()))
    frame = read_table(paths[0], images, needed, options.classes, several, options.skip_bad)
    chips, sizes, notes = {}, {}, frame.attrs["notes"]
    pictures = read_all(frame.path, lambda path: open_image(Path(path), options.bands), options.skip_bad, notes)
    for row in frame[frame.path.isin(pictures)].to_dict("records"):
        one = pictures[row["path"]]
        sizes.setdefault((one.height, one.width), row["path"])
        name = str(Path(row["path"]).relative_to(folder).with_suffix(""))
        if name in chips:
            raise UserError(
                f"{row['path']} and {chips[name].picture.paths[0]} differ in their endings alone. Rename one."
            )
        label = tuple(row["label"]) if several else row["label"]
        chips[name] = Chip(one, 0, 0, label, row.get("time") or options.time, row.get("split", ""))
    if len(sizes) > 1 and not dataset.chip:
        said = ", ".join(f"{path} has {h} x {w} px" for (h, w), path in list(sizes.items())[:3])
        raise UserError(f"Images differ in size: {said}. Give a chip, in pixels, to which all are resampled.")
    if dataset.chip and sizes.keys() != {(dataset.chip, dataset.chip)}:
        notes.append(f"images resampled to {dataset.chip} px, bilinear")
    classes = frame.attrs["classes"]
    if unlisted := {str(path) for path in images} - {str(path) for path in frame.path}:
        notes.append(f"{len(unlisted)} of {len(images)} images have no row in the table and are left out")
    if "split" in frame and options.split != "column":
        notes.append(f"the table's column split is not used, since split is {options.split}")
    return CustomSampleReader(chips, dataset.chip, dataset.task, len(classes), 0, None), notes, classes


def _from_masks(options: CustomOptions, dataset: DatasetConfig, folder: Path):
    images, given = find_files(folder, options.images), find_files(folder, options.labels)
    if both := {*images} & {*given}:
        raise UserError(f"images ({options.images}) and labels ({options.labels}) both fit {min(both)}.")
    if any(one.suffix.lower() == ".shp" for one in given):  # whose metadata may have a name like another file's
        given = [one for one in given if not one.name.lower().endswith(".shp.xml")]
    if given[0].suffix.lower() in _RASTERS:
        if not options.classes:
            raise UserError("Masks have numbers and no names: list the classes, from the one of value 0.")
        notes = []
        pairs = pair_masks(images, given, options.skip_bad, notes)
        mask = MaskLabels(pairs, options.classes, options.ignore)
        read = read_all(map(Path, pairs), lambda path: open_image(path, options.bands), options.skip_bad, notes)
        pictures = list(read.values())
        classes = options.classes
    else:
        pictures = [open_scene_files(images, options.bands)]
        if len({path.with_suffix("") for path in given}) > 1:
            raise UserError(f"labels fits {len(given)} files, {given[0].name}, {given[1].name}, ...; name one.")
        path = next((one for one in given if one.suffix.lower() == ".shp"), given[0])
        mask, notes = read_polygons(path, pictures[0], options.label_column, options.classes, options.layer)
        notes.append("where polygons overlap the smaller one counts; where none lies, there is no label")
        if brought := pictures[0].resampled_bands():
            notes.append(f"{', '.join(brought)} brought to the finest grid by nearest neighbour")
        classes = mask.classes
    chips = {}
    unique = len({one.name for one in pictures}) == len(pictures)
    for one in pictures:
        whose = one.name if unique else str(Path(one.paths[0]).relative_to(folder).with_suffix(""))
        for row, column in chip_corners(one.height, one.width, dataset.chip).tolist():
            name = f"r{row:05d}c{column:05d}"
            chips[f"{whose}_{name}" if len(pictures) > 1 else name] = Chip(one, row, column, time=options.time)
    if small := [one.name for one in pictures if min(one.height, one.width) < dataset.chip]:
        notes.append(f"{len(small)} images, such as {small[0]}, are smaller than a chip and are left out")
    if not chips:
        raise UserError(f"No image has {dataset.chip} px on both sides. Use smaller chips.")
    return CustomSampleReader(chips, dataset.chip, dataset.task, len(classes), options.purity, mask), notes, classes
