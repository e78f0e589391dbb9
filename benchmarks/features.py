"""Feature stores for the benchmarks, of the sample chips and their rotated and flipped copies.

Needs `data/images` and `data/weights`, which `make run` leaves. The stores stay in data/benchmarks.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import xarray as xr
from tqdm import tqdm

from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema, level_array
from cache.writer import Writer
from pipeline import config
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.data import image_store
from pipeline.data.augmentation import VIEWS

FOLDER = Path("data/benchmarks")
SHARD_SIZE = 64


def feature_store(dataset: str, backbone: str, size: int, n_views: int) -> FeatureStore:
    """Open a store of all levels of every chip and its copies; write it first if it does not exist.

    Args:
        n_views: number of copies of each chip, each of which is a sample.
        size: side in pixels to which chips are resized.
    """
    path = FOLDER / f"{dataset}-{backbone}-{size}px-{n_views}x.zarr"
    if not path.exists():
        _write(path, dataset, backbone, size, n_views)
    return FeatureStore(path)


def change_images(images: xr.Dataset, rows=slice(None), **changes) -> image_store.ImageDataset:
    """Return some rows of an images store in memory, with changed fields."""
    variables = [name for name in ("label", "split", "lat", "lon", "time") if name in images.variables]
    attributes = ("classes", "task", "units", "gsd", "licence", "source", "display")
    fields = {name: images.attrs[name] for name in attributes if name in images.attrs}
    fields |= {name: images[name].values[rows] for name in ("image", "sample", *variables)}
    return image_store.ImageDataset(**{**fields, "bands": image_store.image_bands(images), **changes})


def repeat_store(features: FeatureStore, times: int) -> FeatureStore:
    """Open a store of the same features repeated under other names; write it first if it does not exist."""
    path = features.location.with_suffix(f".times{times}.zarr")
    if not path.exists():
        count, root = len(features.sample) // SHARD_SIZE * SHARD_SIZE, features.root
        schema = StoreSchema(
            sample=tuple(f"{name}-{copy}" for copy in range(times) for name in features.sample[:count]),
            split=("train",) * (count * times), pooled={}, dtype="float16", shard_size=SHARD_SIZE,
            levels=tuple(
                LevelSchema(*features.array(level_array(level)).shape, root[level].attrs["stride"], "repeated")
                for level in features.levels
            ),
        )  # fmt: skip
        writer = Writer(FOLDER / "scratch-repeated", schema, path, {"repeated": times})
        for shard in tqdm(writer.claim_shards(), desc=path.name, total=schema.n_shards, file=sys.stderr):
            start = shard * SHARD_SIZE % count
            maps = read_levels(features, start, start + SHARD_SIZE)
            writer.write(shard, {level_array(level): values for level, values in maps.items()})
        writer.finish()
    return FeatureStore(path)


def read_levels(features: FeatureStore, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
    """Return the features of some samples by level."""
    index = np.arange(len(features.sample))[start:stop]
    return {level: features.read(level_array(level), index) for level in features.levels}


def _write(path: Path, dataset: str, name: str, size: int, n_views: int) -> None:
    backbone = dataclasses.replace(config.load().backbone(name), input_size=size)
    images = image_store.open_images(Path(f"data/images/{dataset}.zarr"))
    spec = get_spec(backbone)
    preprocessor = preprocessing.make_preprocessor(images, name, backbone, spec)
    network = create_backbone(backbone, spec, preprocessor.input_bands, Path(f"data/weights/{name}"))
    encoder = Encoder(preprocessor, network, "cpu")
    chips = images.image.values
    views = list(VIEWS.items())[:n_views]
    pyramid = encoder(chips[:1])
    schema = StoreSchema(
        sample=tuple(f"{sample}-{view}" for view, _ in views for sample in images.sample.values),
        split=("train",) * (len(chips) * n_views),
        levels=tuple(
            LevelSchema(*level.shape[1:], stride, layer)
            for level, stride, layer in zip(pyramid.levels, spec.strides, spec.layers, strict=True)
        ),
        pooled={}, dtype="float16", shard_size=SHARD_SIZE,
    )  # fmt: skip
    shutil.rmtree(FOLDER / "scratch", ignore_errors=True)
    provenance = {"backbone": name, "images_sha256": images.attrs["content_sha256"]}
    writer = Writer(FOLDER / "scratch", schema, path, provenance)
    all_chips = np.concatenate([transform(chips) for _, transform in views])
    for shard in tqdm(writer.claim_shards(), desc=path.name, total=schema.n_shards, file=sys.stderr):
        levels = encoder(all_chips[schema.rows(shard)]).levels
        writer.write(shard, {level_array(index): level for index, level in enumerate(levels)})
    writer.finish()
