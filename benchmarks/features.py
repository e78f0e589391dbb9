"""Feature stores for the benchmarks: a real backbone's features of the real sample chips and their turned copies.

Needs `data/images` and `data/weights` (`make run` leaves them) and keeps what it makes in data/benchmarks.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline import config
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.data import image_store
from pipeline.data.augmentation import VIEWS

FOLDER = Path("data/benchmarks")
BATCH = 64


def store(dataset: str, backbone: str, size: int, copies: int) -> FeatureStore:
    """A store of all levels of every chip in `copies` views, each a sample of its own.

    Args:
        size: side in pixels to which chips are resized.
    """
    path = FOLDER / f"{dataset}-{backbone}-{size}px-{copies}x.zarr"
    if not path.exists():
        _make(path, dataset, backbone, size, copies)
    return FeatureStore(path)


def remade(opened, rows=slice(None), **changes) -> image_store.ImageDataset:
    """Images in memory: those of some rows of an images store, with some of what is said of them changed."""
    variables = [name for name in ("label", "split", "lat", "lon", "time") if name in opened.variables]
    attributes = ("classes", "task", "units", "gsd", "licence", "source", "display")
    said = {name: opened.attrs[name] for name in attributes if name in opened.attrs}
    said |= {name: opened[name].values[rows] for name in ("image", "sample", *variables)}
    return image_store.ImageDataset(**{**said, "bands": preprocessing.image_bands(opened), **changes})


def repeated(features: FeatureStore, times: int) -> FeatureStore:
    """A store of the same features so many times over, under other names."""
    path = features.location.with_suffix(f".times{times}.zarr")
    if not path.exists():
        count, root = len(features.sample) // 64 * 64, features.root
        layout = StoreSchema(
            sample=tuple(f"{name}-{again}" for again in range(times) for name in features.sample[:count]),
            split=("train",) * (count * times), pooled={}, dtype="float16", shard_size=64,
            levels=tuple(
                LevelSchema(*features.array(f"{level}/features").shape, root[level].attrs["stride"], "repeated")
                for level in features.levels
            ),
        )  # fmt: skip
        writer = Writer(FOLDER / "scratch-repeated", layout, path, {"repeated": times})
        for shard in tqdm(writer.claim_shards(), desc=path.name, total=layout.n_shards, file=sys.stderr):
            start = shard * 64 % count
            maps = values(features, start, start + 64)
            writer.write(shard, {f"{level}/features": one for level, one in maps.items()})
        writer.finish()
    return FeatureStore(path)


def values(features: FeatureStore, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
    """Every level's features of some samples."""
    index = np.arange(len(features.sample))[start:stop]
    return {level: features.read(f"{level}/features", index) for level in features.levels}


def _make(path: Path, dataset: str, backbone: str, size: int, copies: int) -> None:
    described = config.load()
    chosen = described.backbone(backbone)
    opened = image_store.open_images(Path(f"data/images/{dataset}.zarr"))
    chosen = dataclasses.replace(chosen, input_size=size)
    declared = get_spec(chosen)
    given = preprocessing.make_preprocessor(opened, backbone, chosen, declared)
    encoder = Encoder(given, create_backbone(chosen, declared, given.input_bands, Path(f"data/weights/{backbone}")), "cpu")
    chips = opened.image.values
    turns = list(VIEWS.items())[:copies]
    pyramid = encoder(chips[:1])
    layout = StoreSchema(
        sample=tuple(f"{name}-{view}" for view, _ in turns for name in opened.sample.values),
        split=("train",) * (len(chips) * copies),
        levels=tuple(
            LevelSchema(*level.shape[1:], stride, layer)
            for level, stride, layer in zip(pyramid.levels, declared.strides, declared.layers, strict=True)
        ),
        pooled={}, dtype="float16", shard_size=64,
    )  # fmt: skip
    shutil.rmtree(FOLDER / "scratch", ignore_errors=True)
    provenance = {"backbone": backbone, "images_sha256": opened.attrs["content_sha256"]}
    writer = Writer(FOLDER / "scratch", layout, path, provenance)
    everything = np.concatenate([turn(chips) for _, turn in turns])
    for shard in tqdm(writer.claim_shards(), desc=path.name, total=layout.n_shards, file=sys.stderr):
        levels = encoder(everything[layout.rows(shard)]).levels
        writer.write(shard, {f"level{number}/features": level for number, level in enumerate(levels)})
    writer.finish()
