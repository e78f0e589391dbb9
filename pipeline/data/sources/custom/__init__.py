"""Custom data: images with a table of labels, images with masks, or a scene with labelled polygons.

The form follows from the files that `labels` matches: a CSV file, rasters, or another format, which geopandas reads.
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
from pipeline.data.image_store import SPLITS, UNLABELLED, LazyImageDataset
from pipeline.data.sources.custom import labels, samples
from pipeline.data.sources.custom.options import CustomOptions, check_band_means, validate_options
from pipeline.data.sources.custom.rasters import find_files, open_image, sidecar_files
from pipeline.data.sources.custom.samples import Chip, CustomSampleReader, read_all
from pipeline.errors import UserError
from pipeline.tasks import get_task

__all__ = ["OPTIONAL_KEYS", "REQUIRED_KEYS", "CustomOptions", "Options", "fetch", "prepare", "validate_options"]

REQUIRED_KEYS = ("task",)
OPTIONAL_KEYS = ("chip", "block", "splits")
Options = CustomOptions
RASTER_SUFFIXES = (".tif", ".tiff", ".png", ".jp2", ".vrt", ".img")


def fetch(dataset: DatasetConfig, params: Params) -> dict:
    """Return a digest of all files, which stay where they are."""
    options = parse(CustomOptions, dataset.options, "options")
    folder = Path(options.folder)
    patterns = [pattern for pattern in (options.images, options.labels, options.unlabelled) if pattern]
    files = [path for pattern in patterns for path in find_files(folder, pattern)]
    digest = hashlib.sha256()
    for path in dict.fromkeys(sidecar for file in files for sidecar in sidecar_files(file)):
        digest.update(f"{os.path.relpath(path, folder)} {file_sha256(path)}\n".encode())
    return {
        "source": options.source,
        "licence": options.licence,
        "folder": options.folder,
        "files": len(files),
        "content_sha256": digest.hexdigest(),
    }


def prepare(raw: Path, dataset: DatasetConfig) -> LazyImageDataset:
    """Return the chips as a lazy dataset; unlabelled chips come last."""
    options, notes = parse(CustomOptions, dataset.options, "options"), []
    unlabelled_paths = samples.unlabelled_files(options)  # checked before the labelled images, which may take long
    open_labelled = _read_table_chips if options.is_table else _crop_chips
    reader, classes = open_labelled(options, dataset, notes)
    class_areas = _usable_class_areas(reader, classes, options, notes)
    split_of_chip = samples.assign_splits(reader, class_areas, options.split, dataset, notes)
    _note_missing_classes(classes, class_areas, split_of_chip, notes)
    chips = {name: reader.chips[name] for name in split_of_chip}
    if unlabelled_paths:
        chips |= samples.unlabelled_samples(unlabelled_paths, options, reader, split_of_chip, notes)
    reader = replace(reader, chips=chips)
    images = [chip.image for chip in chips.values()]
    dtypes = sorted({str(image.dtype) for image in images})
    if any(image.may_have_nodata for image in images):
        notes.append("where a band has no data, all bands have the mean of their chip's other pixels")
    if len(dtypes) > 1:
        notes.append(f"images have {', '.join(dtypes)} values, and are stored as {np.result_type(*dtypes)}")
    if without_crs := {image.paths[0] for image in images if not image.crs}:
        notes.append(
            f"chips have no location: {len(without_crs)} images, such as {Path(min(without_crs)).name}, state no "
            "coordinate reference system"
        )
    side = reader.chip_size
    return LazyImageDataset(
        sample=list(chips),
        split=[split_of_chip.get(name, UNLABELLED) for name in chips],
        bands=options.bands, classes=classes, task=dataset.task, units=options.units,
        gsd=options.gsd if not math.isnan(options.gsd) else min(band.gsd for band in options.bands),
        licence=options.licence, source=options.source, display=options.display or None, notes=notes,
        crs=None if without_crs else [image.crs for image in images],
        transform=None if without_crs else np.array([reader.transform(chip) for chip in chips.values()]),
        read_sample=reader,
        check_band_means=functools.partial(check_band_means, options),
        shape=(len(options.bands), side or images[0].height, side or images[0].width),
        dtype=np.result_type(*dtypes),
    )  # fmt: skip


def _usable_class_areas(
    reader: CustomSampleReader, classes: Sequence[str], options: CustomOptions, notes: list[str]
) -> dict[str, np.ndarray]:
    """Return the class areas of the chips that can be used; one class, or no such chip, raises UserError."""
    task = get_task(reader.task)
    class_areas = read_all(reader.chips, lambda name: reader.class_areas(reader.chips[name]), options, notes)
    if len(classes) < 2 and not task.is_multilabel:
        raise UserError(
            f"There is one class, {', '.join(classes)}; at least two are needed. Pixels without a label do not "
            "count: for a background class, label some pixels as such.",
            key="classes", value=tuple(classes),
        )  # fmt: skip
    accepts_empty = not reader.crops_windows and task.is_multilabel
    usable = {name: areas for name, areas in class_areas.items() if areas.any() or accepts_empty}
    if len(usable) < len(class_areas):
        reason = f"where no class covers {options.purity:.0%}" if reader.needs_purity else "without a label"
        notes.append(f"{len(class_areas) - len(usable)} of {len(class_areas)} chips {reason} are skipped")
    if not usable:
        raise UserError(
            f"No chip of {reader.chip_size} px can be used ({notes[-1]}). Use smaller chips or another purity.",
            key="chip", value=reader.chip_size,
        )  # fmt: skip
    return usable


def _note_missing_classes(
    classes: Sequence[str], class_areas: dict[str, np.ndarray], split_of_chip: dict[str, str], notes: list[str]
) -> None:
    """Add notes on splits that lack classes."""
    for split in SPLITS:
        areas = sum((class_areas[name] for name, chip_split in split_of_chip.items() if chip_split == split), 0)
        missing = [name for name, area in zip(classes, np.broadcast_to(areas, len(classes)), strict=True) if not area]
        if missing:
            notes.append(f"the split {split} has nothing of {', '.join(missing)}")


def _read_table_chips(
    options: CustomOptions, dataset: DatasetConfig, notes: list[str]
) -> tuple[CustomSampleReader, tuple[str, ...]]:
    """Make a chip of every image that the CSV file lists; return their reader and the classes."""
    folder, task = Path(options.folder), get_task(dataset.task)
    images, tables = find_files(folder, options.images), find_files(folder, options.labels)
    if task.is_dense:
        raise UserError(
            "A table has one label per image; segmentation needs masks or polygons as labels.",
            key="labels", value=options.labels,
        )  # fmt: skip
    _refuse_several(tables, options)
    table, classes = labels.read_table(tables[0], images, options, task.is_multilabel, notes)
    rasters = read_all(table.path, lambda path: open_image([Path(path)], options.bands), options, notes)
    chips: dict[str, Chip] = {}
    for row in table[table.path.isin(rasters)].to_dict("records"):
        path = row["path"]
        name = str(Path(path).relative_to(folder).with_suffix(""))
        if name in chips:
            raise UserError(
                f"{path} and {chips[name].image.paths[0]} differ only in their endings. Rename one.",
                key="images", value=name, path=path,
            )  # fmt: skip
        label = tuple(row["label"]) if task.is_multilabel else row["label"]
        chips[name] = Chip(rasters[path], 0, 0, label, row.get("time") or options.time, row.get("split", ""))
    if not dataset.chip:
        samples.check_equal_sizes(list(rasters.values()))
    elif any((image.height, image.width) != (dataset.chip, dataset.chip) for image in rasters.values()):
        notes.append(f"images resampled to {dataset.chip} px, bilinear")
    if unlisted := {*map(str, images)} - {*table.path}:
        notes.append(f"{len(unlisted)} of {len(images)} images have no row in the table and are skipped")
    if "split" in table and options.split != "column":
        notes.append(f"the table's column split is not used, since split is {options.split}")
    return CustomSampleReader(chips, dataset.chip, dataset.task, len(classes), 0, None), classes


def _crop_chips(
    options: CustomOptions, dataset: DatasetConfig, notes: list[str]
) -> tuple[CustomSampleReader, tuple[str, ...]]:
    """Crop images with masks, or a scene with polygons, into chips; return their reader and the classes."""
    folder = Path(options.folder)
    image_paths, label_paths = find_files(folder, options.images), find_files(folder, options.labels)
    if common := {*image_paths} & {*label_paths}:
        raise UserError(
            f"images ({options.images}) and labels ({options.labels}) both match {min(common)}.",
            key="labels", value=options.labels, path=min(common),
        )  # fmt: skip
    read_mask: labels.ReadMask
    if label_paths[0].suffix.lower() in RASTER_SUFFIXES:
        if not options.classes:
            raise UserError(
                "Masks contain class indices without names: list the classes, from the one of value 0.", key="classes"
            )
        mask_of_image = labels.pair_masks(image_paths, label_paths, options.skip_bad, notes)
        opened = read_all(mask_of_image, lambda path: open_image([Path(path)], options.bands), options, notes)
        images, classes = list(opened.values()), options.classes
        read_mask = functools.partial(labels.read_mask, mask_of_image, len(classes), options.ignore)
    else:
        # Other files of a format, and metadata, have the name of the polygons.
        shapefiles = [path for path in label_paths if path.suffix.lower() == ".shp"]
        label_paths = [path for path in label_paths if not (shapefiles and path.name.lower().endswith(".shp.xml"))]
        _refuse_several(label_paths, options)
        images = [open_image(image_paths, options.bands)]
        read_mask, classes = labels.read_polygons((shapefiles or label_paths)[0], images[0], options, notes)
        if resampled := images[0].resampled_bands():
            notes.append(f"{', '.join(resampled)} resampled to the finest grid by nearest neighbour")
    chips: dict[str, Chip] = {}
    has_unique_names = len({image.name for image in images}) == len(images)
    for image in images:
        path = Path(image.paths[0]).relative_to(folder).with_suffix("")
        prefix = f"{path.name if has_unique_names else path}_" if len(images) > 1 else ""
        chips |= samples.crop_chips(image, prefix, dataset.chip, time=options.time)
    if small := [image.name for image in images if min(image.height, image.width) < dataset.chip]:
        notes.append(f"{len(small)} images, such as {small[0]}, are smaller than a chip and are skipped")
    if not chips:
        raise UserError(
            f"No image has {dataset.chip} px on both sides. Use smaller chips.", key="chip", value=dataset.chip
        )
    return CustomSampleReader(chips, dataset.chip, dataset.task, len(classes), options.purity, read_mask), classes


def _refuse_several(paths: Sequence[Path], options: CustomOptions) -> None:
    if len({path.with_suffix("") for path in paths}) > 1:
        raise UserError(
            f"labels matches {len(paths)} files, {paths[0].name}, {paths[1].name}, ...; name one.",
            key="labels", value=options.labels, allowed=[path.name for path in paths],
        )  # fmt: skip
