"""Your own data: GeoTIFFs with a table of labels, images with masks, or one scene with labelled polygons.

Which of the three is told by what `labels` names: a CSV file, rasters, or anything else that geopandas reads.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.archives import digest
from pipeline.bands import FULL_SCALE, Band
from pipeline.chips import corners
from pipeline.datasets.own import labels
from pipeline.datasets.own.chips import Chip, Reader, splits
from pipeline.datasets.own.rasters import files, picture, scene
from pipeline.errors import UserError
from pipeline.images import Stream
from pipeline.params import Dataset, Params
from pipeline.records import build

NEEDS = ("task",)
TAKES = ("chip", "block", "splits")
_RASTERS = (".tif", ".tiff", ".png", ".jp2", ".vrt", ".img")


@dataclass(frozen=True)
class Options:
    """`options` of a block in params.yaml.

    `images` and `labels` are patterns below `folder`: images are rasters, of all bands or one file a band; labels a
    CSV file, masks, or polygons. `bands` are described in the files' order, wavelengths in micrometres; one without
    is no optical band. `units` are dn (reflectance x 10000), reflectance, uint8 or display; `display` are the
    reflectances shown as black and white. `split` is by `blocks` of ground, at `random`, or in the table's `column`
    of that name. `ignore` is the masks' value that does not count; `purity` the share of a chip that its class must
    cover, where chips are classified by masks or polygons. `time` is when all was taken.
    """

    folder: str
    images: str
    labels: str
    bands: tuple[Band, ...]
    units: str
    classes: tuple[str, ...] = ()
    label_column: str = "label"
    gsd: float = math.nan
    display: tuple[float, ...] = ()
    split: str = "blocks"
    ignore: int | None = None
    purity: float = 0.6
    time: str = ""
    licence: str = "not stated"
    source: str = "own data"
    skip_bad: bool = False


def check(options: Options, dataset: Dataset, where: str) -> None:
    """Refuse what does not fit together, before any file is opened."""
    if options.units not in FULL_SCALE:
        raise UserError(f"{where}: units '{options.units}' are not known. Known units: {', '.join(FULL_SCALE)}.")
    if options.split not in ("blocks", "random", "column"):
        raise UserError(f"{where}: split is '{options.split}'; it must be blocks, random or column.")
    if options.split == "column" and not options.labels.endswith(".csv"):
        raise UserError(f"{where}: split is column, and only a CSV of labels has columns.")
    if options.split != "column" and not dataset.splits:
        raise UserError(f"{where} lacks: splits. Give the shares of train, val and test.")
    if options.split == "blocks" and not dataset.block:
        raise UserError(
            f"{where} lacks: block, the side in pixels of the squares of ground dealt to the splits whole."
        )
    if not options.labels.endswith(".csv") and not dataset.chip:
        raise UserError(f"{where} lacks: chip, the side in pixels of the chips to cut.")
    if options.display and len(options.display) != 2:
        raise UserError(f"{where}: display is {list(options.display)}; it must be [low, high].")
    try:
        np.datetime64(options.time or "NaT")
    except ValueError:
        raise UserError(
            f"{where}: time is '{options.time}'; write it as 2017-02-16 or 2017-02-16T10:21:01."
        ) from None


def fetch(dataset: Dataset, params: Params) -> dict:
    """A digest of all files; they stay where they are."""
    options = build(Options, dataset.options, "options")
    folder = Path(options.folder)
    found = [*files(folder, options.images), *files(folder, options.labels)]
    total = hashlib.sha256()
    for path in found:
        total.update(f"{path.relative_to(folder)} {digest(path)}\n".encode())
    return {
        "source": options.source,
        "licence": options.licence,
        "folder": options.folder,
        "files": len(found),
        "content_sha256": total.hexdigest(),
    }


def prepare(raw: Path, dataset: Dataset) -> Stream:
    """The chips as a stream, split by blocks of ground unless another rule is given."""
    options = build(Options, dataset.options, "options")
    folder = Path(options.folder)
    if options.labels.endswith(".csv"):
        reader, notes, classes = _from_table(options, dataset, folder)
    else:
        reader, notes, classes = _from_masks(options, dataset, folder)
    areas = {name: reader.areas(chip) for name, chip in reader.chips.items()}
    kept = [name for name, area in areas.items() if area.any() or (not reader.mask and dataset.task == "multilabel")]
    if len(kept) < len(areas):
        why = f"where no class covers {options.purity:.0%}" if dataset.task == "classification" else "without a label"
        notes.append(f"{len(areas) - len(kept)} of {len(areas)} chips {why} are left out")
    if not kept:
        raise UserError(
            f"No chip of {dataset.chip} px can be used ({notes[-1]}). Use smaller chips or another purity."
        )
    deal = splits({name: reader.chips[name] for name in kept}, areas, options.split, dataset)
    first = reader.chips[kept[0]].picture
    height, width = (reader.size, reader.size) if reader.size else (first.height, first.width)
    located = all(reader.chips[name].picture.crs for name in kept) and (reader.mask or not reader.size)
    return Stream(
        sample=kept,
        split=deal,
        bands=options.bands,
        classes=classes,
        task=dataset.task,
        units=options.units,
        gsd=options.gsd if not math.isnan(options.gsd) else min(band.gsd for band in options.bands),
        licence=options.licence,
        source=options.source,
        display=options.display or None,
        notes=notes,
        crs=[reader.chips[name].picture.crs for name in kept] if located else None,
        transform=np.array(
            [reader.chips[name].picture.window_transform(reader.chips[name].row, reader.chips[name].column)
             for name in kept]
        ) if located else None,
        read=reader,
        shape=(len(options.bands), height, width),
        dtype=first.dtype,
    )  # fmt: skip


def _from_table(options: Options, dataset: Dataset, folder: Path):
    images = files(folder, options.images)
    several = dataset.task == "multilabel"
    if dataset.task == "segmentation":
        raise UserError("A table gives a label an image; segmentation needs masks or polygons as labels.")
    paths = files(folder, options.labels)
    frame = labels.table(paths[0], images, options.label_column, options.classes, several)
    chips, sizes = {}, {}
    for row in frame.to_dict("records"):
        one = picture(Path(row["path"]), options.bands)
        sizes.setdefault((one.height, one.width), row["path"])
        name = str(Path(row["path"]).relative_to(folder).with_suffix(""))
        label = tuple(row["label"]) if several else row["label"]
        chips[name] = Chip(one, 0, 0, label, row.get("time") or options.time, row.get("split", ""))
    if len(sizes) > 1 and not dataset.chip:
        said = ", ".join(f"{path} has {h} x {w} px" for (h, w), path in list(sizes.items())[:3])
        raise UserError(f"Images differ in size: {said}. Give a chip, in pixels, to which all are resampled.")
    classes = frame.attrs["classes"]
    notes = [f"images resampled to {dataset.chip} px, bilinear"] if dataset.chip else []
    return Reader(chips, dataset.chip, dataset.task, len(classes), 0, None), notes, classes


def _from_masks(options: Options, dataset: Dataset, folder: Path):
    images, given = files(folder, options.images), files(folder, options.labels)
    if given[0].suffix.lower() in _RASTERS:
        if not options.classes:
            raise UserError("Masks have numbers and no names: list the classes, from the one of value 0.")
        pictures = [picture(path, options.bands) for path in images]
        mask, notes = labels.Masks(labels.pair(images, given), options.classes, options.ignore), []
        classes = options.classes
    else:
        pictures = [scene(images, options.bands)]
        mask, notes = labels.polygons(given[0], pictures[0], options.label_column, options.classes)
        notes.append("where polygons overlap the smaller one counts; where none lies, there is no label")
        if len(pictures[0].paths) > 1:
            notes.append("coarser bands brought to the finest grid by nearest neighbour")
        classes = mask.classes
    chips = {}
    for one in pictures:
        for row, column in corners(one.height, one.width, dataset.chip).tolist():
            name = f"r{row:05d}c{column:05d}"
            chips[f"{one.name}_{name}" if len(pictures) > 1 else name] = Chip(one, row, column, time=options.time)
    if not chips:
        raise UserError(f"No image has {dataset.chip} px on both sides. Use smaller chips.")
    return Reader(chips, dataset.chip, dataset.task, len(classes), options.purity, mask), notes, classes
