"""Small stores of synthetic features with known information about the classes."""

from functools import lru_cache

import numpy as np
import pytest

from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline.bands import Band
from pipeline.data import image_writer
from pipeline.data.image_store import ImageDataset, open_images
from pipeline.tasks import IGNORE

COUNT, SIDE = 120, 16


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=(COUNT, *shape)).astype(np.float32)


@pytest.fixture(scope="session")
def task_images(tmp_path_factory):
    """Function from a task's name to an opened images store; half of the samples are train."""

    @lru_cache
    def make(task):
        generator = np.random.default_rng(0)
        split = ["train", "val", "train", "test"] * (COUNT // 4)
        mask = generator.integers(3, size=(COUNT, 4, 4)).repeat(4, axis=1).repeat(4, axis=2)
        label = {
            "classification": generator.integers(4, size=COUNT),
            "multilabel": generator.integers(2, size=(COUNT, 2)),
            "segmentation": np.where(generator.random(mask.shape) < 0.3, IGNORE, mask),
        }[task]
        classes = ["a", "b", "c", "d"][: {"classification": 4, "multilabel": 2, "segmentation": 3}[task]]
        folder = tmp_path_factory.mktemp(task)
        dataset = ImageDataset(
            image=np.zeros((COUNT, 1, SIDE, SIDE), np.uint8), label=label,
            sample=[f"s{i:03d}" for i in range(COUNT)], split=split, bands=[Band("red", "red", 0.665, 1.0)],
            classes=classes, task=task, units="uint8", gsd=1.0, licence="none", source="made",
        )  # fmt: skip
        image_writer.write(dataset, folder / "scratch", folder / "images.zarr")
        return open_images(folder / "images.zarr")

    return make


def write_store(path, arrays, images, views=(), shard_size=64):
    """Write arrays by name, of all samples of `images`, to a feature store."""
    levels = [values.shape[-3:] for key, values in sorted(arrays.items()) if key.startswith("level")]
    schema = StoreSchema(
        sample=tuple(images.sample.values.tolist()), split=tuple(images.split.values.tolist()),
        levels=tuple(LevelSchema(*shape, images.sizes["x"] // shape[-1], "x") for shape in levels),
        pooled={key[7:]: values.shape[-1] for key, values in arrays.items() if key.startswith("pooled/")},
        dtype="float32", shard_size=shard_size, views=views,
    )  # fmt: skip
    writer = Writer(path.with_suffix(".scratch"), schema, path, {"images_sha256": images.attrs["content_sha256"]})
    for shard in writer.pending_shards():
        writer.write(shard, {key: values[schema.rows(shard)] for key, values in arrays.items()})
    writer.finish()


@pytest.fixture(scope="session")
def feature_store(tmp_path_factory):
    """Function from a name, arrays by name, and images, to a feature store of their samples."""

    def write(name, arrays, images):
        path = tmp_path_factory.mktemp("features") / f"{name}.zarr"
        write_store(path, arrays, images)
        return FeatureStore(path)

    return write


@pytest.fixture(scope="session")
def informative_chips(task_images, feature_store):
    """Feature stores by name, and their images of four classes.

    `high` tells the first bit of the class, `low` the second. `none` and its multiple `copy` tell nothing.
    """
    images = task_images("classification")
    bits = np.stack([images.label.values // 2, images.label.values % 2], axis=1)
    informative = {
        name: {"pooled/mean_level0": noise(i, 3), "pooled/mean_level1": noise(10 + i, 2) + 6 * bits[:, [i % 2]]}
        for i, name in enumerate(["high", "low"])
    }
    none = {"pooled/mean_level0": noise(20, 3), "pooled/mean_level1": noise(21, 2)}
    stores = {**informative, "none": none, "copy": {key: 2 * values for key, values in none.items()}}
    return {name: feature_store(name, arrays, images) for name, arrays in stores.items()}, images


@pytest.fixture(scope="session")
def informative_masks(task_images, feature_store):
    """Feature stores by name, and their images.

    `fine` has the classes on a 4 x 4 grid, `coarse` their means on 2 x 2.
    """
    images = task_images("segmentation")
    classes = np.random.default_rng(0).integers(3, size=(COUNT, 4, 4))  # as drawn by `task_images`
    one_hot = np.eye(3)[classes].transpose(0, 3, 1, 2).astype(np.float32)
    half = one_hot.reshape(COUNT, 3, 2, 2, 2, 2).mean(axis=(3, 5))
    stores = {
        "fine": {"level0/features": 3 * one_hot + noise(0, 3, 4, 4), "level1/features": 5 + noise(1, 2, 2, 2)},
        "coarse": {"level0/features": noise(2, 4, 2, 2), "level1/features": 100 + 50 * half[:, :, :1, :1]},
    }
    for arrays in stores.values():
        arrays |= {f"pooled/mean_level{i}": arrays[f"level{i}/features"].mean((2, 3)) for i in range(2)}
    return {name: feature_store(name, arrays, images) for name, arrays in stores.items()}, images
