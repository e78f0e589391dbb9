"""Custom data: images with a table of labels, images with masks, or a scene with labelled polygons.

The form follows from the files that `labels` matches: a CSV file, rasters, or another format, which geopandas reads.

- options.py: the options in params.yaml, and names of classes.
- rasters.py: images, their files, and reading by windows.
- labels.py: polygons, masks, or a CSV file.
- samples.py: chips, their assignment to splits, and images without labels.
"""

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.config import DatasetConfig, Params, parse
from pipeline.data.download import file_sha256
from pipeline.data.image_store import SPLITS, UNLABELLED, LazyImageDataset
from pipeline.data.sources.custom.labels import MaskLabels, PolygonLabels, pair_masks, read_polygons, read_table
from pipeline.data.sources.custom.options import CustomOptions, check_band_means, is_table, validate_options
from pipeline.data.sources.custom.rasters import RasterImage, find_files, open_image, open_scene_files, sidecar_files
from pipeline.data.sources.custom.samples import (
    Chip,
    CustomSampleReader,
    assign_splits,
    read_all,
    unlabelled_files,
    unlabelled_samples,
)
from pipeline.data.splits import chip_corners
from pipeline.errors import UserError
from pipeline.tasks import get_task

__all__ = ["OPTIONAL_KEYS", "REQUIRED_KEYS", "CustomOptions", "Options", "fetch", "prepare", "validate_options"]

REQUIRED_KEYS = ("task",)
OPTIONAL_KEYS = ("chip", "block", "splits")
Options = CustomOptions
RASTER_SUFFIXES = (".tif", ".tiff", ".png", ".jp2", ".vrt", ".img")


@dataclass
class LabelledChips:
    """All labelled chips before they are selected, the names of the classes, and notes for the store."""

    reader: CustomSampleReader
    classes: Sequence[str]
    notes: list[str] = field(default_factory=list)


def fetch(dataset: DatasetConfig, params: Params) -> dict:
    """Return a digest of all files, which stay where they are."""
    options = parse(CustomOptions, dataset.options, "options")
    folder = Path(options.folder)
    files = [
        *find_files(folder, options.images),
        *find_files(folder, options.labels),
        *unlabelled_files(options, folder),
    ]
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
    """Return the chips as a lazy dataset; unlabelled chips come last.

    Raises:
        UserError: files, labels or options that do not fit together.
    """
    options = parse(CustomOptions, dataset.options, "options")
    folder = Path(options.folder)
    unlabelled_paths = unlabelled_files(options, folder)  # checked before the labelled images, which may take long
    labelled = (
        _read_table_chips(options, dataset, folder) if is_table(options) else _crop_chips(options, dataset, folder)
    )
    reader, classes, notes = labelled.reader, labelled.classes, labelled.notes
    selected, class_areas = _select_chips(labelled, options, dataset)
    splits, overlap_notes = assign_splits(reader, selected, class_areas, options.split, dataset)
    notes += overlap_notes
    notes += _missing_class_notes(classes, np.stack([class_areas[name] for name in selected]), np.array(splits))
    unlabelled: dict[str, Chip] = {}
    if unlabelled_paths:
        split_of_chip = dict(zip(selected, splits, strict=True))
        unlabelled, unlabelled_notes = unlabelled_samples(unlabelled_paths, options, reader, split_of_chip)
        notes += unlabelled_notes
    reader = replace(reader, chips=selected | unlabelled)
    chips = list(reader.chips.values())
    notes += _image_notes(chips)
    is_located = all(chip.image.crs for chip in chips)
    first = chips[0].image
    height, width = (reader.chip_size, reader.chip_size) if reader.chip_size else (first.height, first.width)
    return LazyImageDataset(
        sample=list(reader.chips),
        split=[*splits, *[UNLABELLED] * len(unlabelled)],
        bands=options.bands,
        classes=classes,
        task=dataset.task,
        units=options.units,
        gsd=options.gsd if not math.isnan(options.gsd) else min(band.gsd for band in options.bands),
        licence=options.licence,
        source=options.source,
        display=options.display or None,
        notes=notes,
        crs=[chip.image.crs for chip in chips] if is_located else None,
        transform=np.array([_chip_transform(chip, reader) for chip in chips]) if is_located else None,
        read_sample=reader,
        check_band_means=functools.partial(check_band_means, options),
        shape=(len(options.bands), height, width),
        dtype=np.result_type(*{chip.image.dtype for chip in chips}),
    )


def _select_chips(
    labelled: LabelledChips, options: CustomOptions, dataset: DatasetConfig
) -> tuple[dict[str, Chip], dict[str, np.ndarray]]:
    """Select the chips that can be used, and return them and the class areas of all chips.

    Raises:
        UserError: only one class, or no usable chip.
    """
    reader, notes, task = labelled.reader, labelled.notes, get_task(dataset.task)
    class_areas = read_all(reader.chips, lambda name: reader.class_areas(reader.chips[name]), options.skip_bad, notes)
    if len(labelled.classes) < 2 and not task.is_multilabel:
        raise UserError(
            f"There is one class, {', '.join(labelled.classes)}; at least two are needed. Pixels without a label do "
            "not count: for a background class, label some pixels as such.",
            key="classes", value=tuple(labelled.classes),
        )  # fmt: skip
    accepts_empty = not reader.crops_windows and task.is_multilabel
    selected = {name: reader.chips[name] for name, areas in class_areas.items() if areas.any() or accepts_empty}
    if len(selected) < len(class_areas):
        needs_purity = not (task.is_dense or task.is_multilabel)
        reason = f"where no class covers {options.purity:.0%}" if needs_purity else "without a label"
        notes.append(f"{len(class_areas) - len(selected)} of {len(class_areas)} chips {reason} are skipped")
    if not selected:
        raise UserError(
            f"No chip of {dataset.chip} px can be used ({notes[-1]}). Use smaller chips or another purity.",
            key="chip", value=dataset.chip,
        )  # fmt: skip
    return selected, class_areas


def _chip_transform(chip: Chip, reader: CustomSampleReader) -> tuple[float, ...]:
    """Affine coefficients of a chip."""
    if reader.chip_size and not reader.crops_windows:
        return chip.image.resampled_transform(reader.chip_size)
    return chip.image.window_transform(chip.row, chip.column)


def _image_notes(chips: Sequence[Chip]) -> list[str]:
    """Describe missing data, mixed dtypes and missing coordinate reference systems."""
    notes = []
    if any(chip.image.may_have_nodata for chip in chips):
        notes.append("where a band has no data, all bands have the mean of their chip's other pixels")
    dtypes = sorted({str(chip.image.dtype) for chip in chips})
    if len(dtypes) > 1:
        notes.append(f"images have {', '.join(dtypes)} values, and are stored as {np.result_type(*dtypes)}")
    if without_crs := {chip.image.paths[0] for chip in chips if not chip.image.crs}:
        notes.append(
            f"chips have no location: {len(without_crs)} images, such as {Path(min(without_crs)).name}, state no "
            "coordinate reference system"
        )
    return notes


def _missing_class_notes(classes: Sequence[str], class_areas: np.ndarray, splits: np.ndarray) -> list[str]:
    """Describe which splits lack which classes."""
    notes = []
    for split in SPLITS:
        areas = class_areas[splits == split].sum(axis=0)
        missing = [name for name, area in zip(classes, areas, strict=True) if not area]
        if missing:
            notes.append(f"the split {split} has nothing of {', '.join(missing)}")
    return notes


def _read_table_chips(options: CustomOptions, dataset: DatasetConfig, folder: Path) -> LabelledChips:
    """Make a chip of every image that the CSV file lists."""
    images = find_files(folder, options.images)
    task = get_task(dataset.task)
    if task.is_dense:
        raise UserError(
            "A table has one label per image; segmentation needs masks or polygons as labels.",
            key="labels", value=options.labels,
        )  # fmt: skip
    tables = find_files(folder, options.labels)
    if len(tables) > 1:
        raise UserError(
            f"labels matches {len(tables)} tables, {tables[0].name}, {tables[1].name}, ...; name one.",
            key="labels", value=options.labels, allowed=[path.name for path in tables],
        )  # fmt: skip
    columns = ("file", options.label_column, *(("split",) if options.split == "column" else ()))
    frame = read_table(tables[0], images, columns, options.classes, task.is_multilabel, options.skip_bad)
    notes, classes = frame.attrs["notes"], frame.attrs["classes"]
    rasters = read_all(frame.path, lambda path: open_image(Path(path), options.bands), options.skip_bad, notes)
    chips: dict[str, Chip] = {}
    sizes: dict[tuple[int, int], str] = {}
    for row in frame[frame.path.isin(rasters)].to_dict("records"):
        path, image = row["path"], rasters[row["path"]]
        sizes.setdefault((image.height, image.width), path)
        name = str(Path(path).relative_to(folder).with_suffix(""))
        if name in chips:
            raise UserError(
                f"{path} and {chips[name].image.paths[0]} differ only in their endings. Rename one.",
                key="images", value=name, path=path,
            )  # fmt: skip
        label = tuple(row["label"]) if task.is_multilabel else row["label"]
        chips[name] = Chip(image, 0, 0, label, row.get("time") or options.time, row.get("split", ""))
    if len(sizes) > 1 and not dataset.chip:
        examples = ", ".join(f"{path} has {h} x {w} px" for (h, w), path in list(sizes.items())[:3])
        raise UserError(
            f"Images differ in size: {examples}. Give a chip, in pixels, to which all are resampled.",
            key="chip", value=0, allowed=sizes,
        )  # fmt: skip
    if dataset.chip and sizes.keys() != {(dataset.chip, dataset.chip)}:
        notes.append(f"images resampled to {dataset.chip} px, bilinear")
    if unlisted := {str(path) for path in images} - {str(path) for path in frame.path}:
        notes.append(f"{len(unlisted)} of {len(images)} images have no row in the table and are skipped")
    if "split" in frame and options.split != "column":
        notes.append(f"the table's column split is not used, since split is {options.split}")
    reader = CustomSampleReader(chips, dataset.chip, dataset.task, len(classes), purity=0, read_mask=None)
    return LabelledChips(reader, classes, notes)


def _crop_chips(options: CustomOptions, dataset: DatasetConfig, folder: Path) -> LabelledChips:
    """Crop images with masks, or a scene with polygons, into chips."""
    image_paths, label_paths = find_files(folder, options.images), find_files(folder, options.labels)
    if common := {*image_paths} & {*label_paths}:
        raise UserError(
            f"images ({options.images}) and labels ({options.labels}) both match {min(common)}.",
            key="labels", value=options.labels, path=min(common),
        )  # fmt: skip
    if any(path.suffix.lower() == ".shp" for path in label_paths):  # metadata may be named like another file
        label_paths = [path for path in label_paths if not path.name.lower().endswith(".shp.xml")]
    notes: list[str] = []
    read_mask: MaskLabels | PolygonLabels
    if label_paths[0].suffix.lower() in RASTER_SUFFIXES:
        images, read_mask, classes = _open_masks(options, image_paths, label_paths, notes)
    else:
        images, read_mask, classes = _open_polygons(options, image_paths, label_paths, notes)
    chips = {}
    has_unique_names = len({image.name for image in images}) == len(images)
    for image in images:
        image_name = image.name if has_unique_names else str(Path(image.paths[0]).relative_to(folder).with_suffix(""))
        prefix = f"{image_name}_" if len(images) > 1 else ""
        for row, column in chip_corners(image.height, image.width, dataset.chip).tolist():
            chips[f"{prefix}r{row:05d}c{column:05d}"] = Chip(image, row, column, time=options.time)
    if small := [image.name for image in images if min(image.height, image.width) < dataset.chip]:
        notes.append(f"{len(small)} images, such as {small[0]}, are smaller than a chip and are skipped")
    if not chips:
        raise UserError(
            f"No image has {dataset.chip} px on both sides. Use smaller chips.", key="chip", value=dataset.chip
        )
    reader = CustomSampleReader(chips, dataset.chip, dataset.task, len(classes), options.purity, read_mask)
    return LabelledChips(reader, classes, notes)


def _open_masks(
    options: CustomOptions, image_paths: Sequence[Path], mask_paths: Sequence[Path], notes: list[str]
) -> tuple[list[RasterImage], MaskLabels, tuple[str, ...]]:
    """Return the images that have masks, the reader of the masks, and the classes."""
    if not options.classes:
        raise UserError(
            "Masks contain class indices without names: list the classes, from the one of value 0.", key="classes"
        )
    mask_of_image = pair_masks(image_paths, mask_paths, options.skip_bad, notes)
    images = read_all(map(Path, mask_of_image), lambda path: open_image(path, options.bands), options.skip_bad, notes)
    return list(images.values()), MaskLabels(mask_of_image, options.classes, options.ignore), options.classes


def _open_polygons(
    options: CustomOptions, image_paths: Sequence[Path], label_paths: Sequence[Path], notes: list[str]
) -> tuple[list[RasterImage], PolygonLabels, tuple[str, ...]]:
    """Return the scene, the reader of the polygons, and the classes."""
    scene = open_scene_files(image_paths, options.bands)
    if len({path.with_suffix("") for path in label_paths}) > 1:
        raise UserError(
            f"labels matches {len(label_paths)} files, {label_paths[0].name}, {label_paths[1].name}, ...; name one.",
            key="labels", value=options.labels, allowed=[path.name for path in label_paths],
        )  # fmt: skip
    path = next((path for path in label_paths if path.suffix.lower() == ".shp"), label_paths[0])
    polygons, polygon_notes = read_polygons(path, scene, options.label_column, options.classes, options.layer)
    notes += polygon_notes
    notes.append("where polygons overlap the smaller one counts; outside all polygons there is no label")
    if resampled := scene.resampled_bands():
        notes.append(f"{', '.join(resampled)} resampled to the finest grid by nearest neighbour")
    return [scene], polygons, polygons.classes
