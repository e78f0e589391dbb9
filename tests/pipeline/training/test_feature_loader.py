"""Selection and standardization of arrays; batches as tensors on this machine's device."""

import numpy as np
import pytest
import torch
from small_store import all_values, small_schema, write_store

from cache.errors import StoreError
from cache.loader import shuffled_batches
from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline.device import resolve_device
from pipeline.training import feature_loader
from pipeline.training.feature_loader import FeatureLoader
from tests.errors import raises


@pytest.fixture
def stores(tmp_path):
    """Stores of two backbones of different scale and grid, of the same 40 samples."""
    stores, generator = [], np.random.default_rng(0)
    for name, scale, side in (("a", 1000.0, 8), ("b", 0.01, 4)):
        levels = (LevelSchema(3, side, side, 4, "x"), LevelSchema(2, side // 2, side // 2, 8, "y"))
        samples, split = tuple(f"s{i}" for i in range(40)), ("train",) * 30 + ("test",) * 10
        schema = StoreSchema(samples, split, levels, {"mean_level0": 3, "mean_level1": 2}, "float32", 64)
        writer = Writer(tmp_path / f"scratch-{name}", schema, tmp_path / f"{name}.zarr", {})
        values = {key: scale * (5 + generator.normal(size=(40, *shape))) for key, shape in schema.shapes().items()}
        values["level0/features"][:, 1] = scale  # a dead channel
        writer.write(0, values)
        writer.finish()
        stores.append(FeatureStore(tmp_path / f"{name}.zarr"))
    return stores


def read(array, rows, train_rows):
    return feature_loader.read_standardized(array, rows, feature_loader.channel_stats(array, train_rows))


def test_read_standardized_of_pooled_uses_the_training_split(stores):
    train, test, array = np.arange(30), np.arange(30, 40), (stores[0], "pooled/mean_level0")
    stored = stores[0].read("pooled/mean_level0", np.arange(40))
    for rows in (train, test):
        expected = (stored[rows] - stored[:30].mean(0)) / stored[:30].std(0)
        np.testing.assert_allclose(read(array, rows, train), expected, atol=1e-4)


def test_read_standardized_of_levels_has_each_backbones_grid(stores):
    arrays = feature_loader.select_levels(stores)
    assert [[name for _, name in member] for member in arrays] == [["level0/features", "level1/features"]] * 2
    rows = np.arange(30)
    for (array, _), side in zip(arrays, (8, 4), strict=True):
        level = read(array, rows, rows)
        assert level.shape == (30, 3, side, side)
        torch.testing.assert_close(level[:, [0, 2]].mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
        assert (level[:, 1] == 0).all(), "a dead channel"


def test_read_standardized_of_a_store_with_views_is_the_identity_view(tmp_path):
    samples = tuple(f"s{i}" for i in range(20))
    levels, views = (LevelSchema(3, 4, 4, 4, "x"),), ("identity", "flip_x")
    schema = StoreSchema(samples, ("train",) * 20, levels, {"mean_level0": 3}, "float32", 32, views=views)
    writer = Writer(tmp_path / "scratch", schema, tmp_path / "v.zarr", {})
    values = {key: np.random.default_rng(0).normal(size=(20, *shape)) for key, shape in schema.shapes().items()}
    writer.write(0, values)
    writer.finish()
    store, rows = FeatureStore(tmp_path / "v.zarr"), np.arange(20)
    mean, std = (stats[:, None, None] for stats in store.statistics("level0"))  # of all views
    level = values["level0/features"][:, 0]
    np.testing.assert_allclose(read((store, "level0/features"), rows, rows), (level - mean) / std, atol=1e-5)
    vector = values["pooled/mean_level0"][:, 0]
    pooled = read((store, "pooled/mean_level0"), rows, rows)
    np.testing.assert_allclose(pooled, (vector - vector.mean(0)) / vector.std(0), atol=1e-5)


def test_read_standardized_of_a_damaged_store_with_nan_is_refused(stores):
    path = next((stores[0].location / "pooled/mean_level1").glob("c.0.*"))
    values = np.frombuffer(path.read_bytes(), "<f4").copy()
    values[5] = np.nan
    path.write_bytes(values.tobytes())
    with raises(StoreError, "cache.verify", key="pooled/mean_level1", path=stores[0].location):
        read((FeatureStore(stores[0].location), "pooled/mean_level1"), np.arange(30), np.arange(30))


def test_select_of_some_levels(stores):
    names = [[name for _, name in member] for member in feature_loader.select_levels(stores, (-1,))]
    assert names == [["level1/features"]] * 2
    names = [[name for _, name in member] for member in feature_loader.select_pooled(stores, "all", "mean", (0,))]
    assert names == [["pooled/mean_level0"]] * 2
    with raises(StoreError, "level0", "level1", key="heads.levels", value=2, allowed=range(-2, 2)):
        feature_loader.select_levels(stores, (0, 2))


@pytest.mark.parametrize(
    ("depth", "tokens", "expected"),
    [
        ("all", "mean", ["mean_level0", "mean_level1"]),
        ("all", "cls", ["cls_level0", "cls_level1"]),
        ("last", "both", ["mean_level1", "cls_level1"]),
        ("last", "cls", ["cls_level1"]),
    ],
)
def test_select_pooled_names_takes_means_where_there_are_no_class_tokens(depth, tokens, expected):
    means, both = ["mean_level0", "mean_level1"], ["mean_level0", "mean_level1", "cls_level0", "cls_level1"]
    assert feature_loader._select_pooled_names(both, depth, tokens, ()) == expected
    assert feature_loader._select_pooled_names(means, depth, tokens, ()) == (means if depth == "all" else means[-1:])
    assert feature_loader._select_pooled_names(["mean_std"], depth, tokens, ()) == ["mean_std"]


@pytest.mark.parametrize("std", [0.0, 1e-42, 1e-6])
def test_to_mean_scale_of_a_dead_channel_is_zero(std):
    mean, scale = feature_loader.to_mean_scale(np.array([1.0, 1.0]), np.array([std, 2.0]))
    assert (mean.dtype, scale.dtype) == (np.float32, np.float32)
    assert scale.tolist() == [0, 0.5]


@pytest.mark.parametrize("device_name", ["cpu", "auto"])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_feature_loader_epoch_has_every_training_sample_once(tmp_path, device_name, budget):
    device = resolve_device(device_name)
    write_store(tmp_path)
    store = FeatureStore(tmp_path / "store.zarr")
    expected = all_values(small_schema(), "level0/features").astype("float16")
    train_rows = store.rows("train")
    loader = FeatureLoader({"x": [(store, "level0/features")]}, train_rows, device=device, budget=budget)
    rows = []
    for index, batch in loader.stream(shuffled_batches(train_rows, 16, seed=0)):
        assert batch["x"].device.type == device
        np.testing.assert_array_equal(batch["x"].cpu(), expected[index])
        rows += index.tolist()
    assert sorted(rows) == train_rows.tolist()
