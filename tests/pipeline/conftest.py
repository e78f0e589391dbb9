"""Small stores of made-up features whose worth is known."""

import numpy as np
import pytest

from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline.bands import Band
from pipeline.data import image_store

COUNT, SIDE = 120, 16


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=(COUNT, *shape)).astype(np.float32)


@pytest.fixture
def task_images(open_images):
    """From a task to an images store of that task; two in four samples train, one is val and one test."""

    def make(task):
        generator = np.random.default_rng(0)
        split = ["train", "val", "train", "test"] * (COUNT // 4)
        mask = generator.integers(3, size=(COUNT, 4, 4)).repeat(4, axis=1).repeat(4, axis=2)
        label = {
            "classification": generator.integers(4, size=COUNT),
            "multilabel": generator.integers(2, size=(COUNT, 2)),
            "segmentation": np.where(generator.random(mask.shape) < 0.3, image_store.IGNORE, mask),
        }[task]
        classes = ["a", "b", "c", "d"][: {"classification": 4, "multilabel": 2, "segmentation": 3}[task]]
        return open_images(
            image_store.ImageDataset(
                image=np.zeros((COUNT, 1, SIDE, SIDE), np.uint8), label=label,
                sample=[f"s{i:03d}" for i in range(COUNT)], split=split, bands=[Band("red", "red", 0.665, 1.0)],
                classes=classes, task=task, units="uint8", gsd=1.0, licence="none", source="made",
            )
        )  # fmt: skip

    return make


@pytest.fixture
def feature_store(tmp_path):
    """From a name and values by array to a feature store of the images' samples."""

    def write(name, values, like):
        levels = [value for key, value in sorted(values.items()) if key.startswith("level")]
        layout = StoreSchema(
            sample=tuple(like.sample.values.tolist()),
            split=tuple(like.split.values.tolist()),
            levels=tuple(LevelSchema(v.shape[1], *v.shape[2:], SIDE // v.shape[2], "x") for v in levels),
            pooled={key[7:]: value.shape[1] for key, value in values.items() if key.startswith("pooled/")},
            dtype="float32",
            shard_size=64,
        )
        made_from = {"images_sha256": like.attrs["content_sha256"]}
        writer = Writer(tmp_path / f"scratch-{name}", layout, tmp_path / f"{name}.zarr", made_from)
        for shard in writer.pending_shards():
            writer.write(shard, {key: value[layout.rows(shard)] for key, value in values.items()})
        writer.finish()
        return FeatureStore(tmp_path / f"{name}.zarr")

    return write


@pytest.fixture
def informative_chips(task_images, feature_store):
    """Four classes; `high` knows their first bit, `low` their second, `none` and `copy`, the same, nothing."""
    like = task_images("classification")
    bits = np.stack([like.label.values // 2, like.label.values % 2], axis=1)
    known = {
        name: {"pooled/mean_level0": noise(i, 3), "pooled/mean_level1": noise(10 + i, 2) + 6 * bits[:, [i % 2]]}
        for i, name in enumerate(["high", "low"])
    }
    nothing = {"pooled/mean_level0": noise(20, 3), "pooled/mean_level1": noise(21, 2)}
    stores = {**known, "none": nothing, "copy": {key: 2 * value for key, value in nothing.items()}}
    return {name: feature_store(name, values, like) for name, values in stores.items()}, like


@pytest.fixture
def informative_masks(task_images, feature_store):
    """`knows` has the classes on a grid of four, `coarse` a blur of them on two, both in levels with noise."""
    like = task_images("segmentation")
    hot = np.random.default_rng(0).integers(3, size=(COUNT, 4, 4))  # the masks' own, before they were enlarged
    hot = np.eye(3)[hot].transpose(0, 3, 1, 2).astype(np.float32)
    half = hot.reshape(COUNT, 3, 2, 2, 2, 2).mean(axis=(3, 5))
    knows = {"level0/features": 3 * hot + noise(0, 3, 4, 4), "level1/features": 5 + noise(1, 2, 2, 2)}
    coarse = {"level0/features": noise(2, 4, 2, 2), "level1/features": 100 + 50 * half[:, :, :1, :1]}
    for one in (knows, coarse):
        one |= {f"pooled/mean_level{i}": one[f"level{i}/features"].mean((2, 3)) for i in range(2)}
    return {name: feature_store(name, one, like) for name, one in (("knows", knows), ("coarse", coarse))}, like
