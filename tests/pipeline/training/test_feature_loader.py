"""Selection and standardization of arrays; batches as tensors on this machine's device."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache.errors import StoreError
from cache.loader import shuffled_batches
from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline.config import HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.device import resolve_device
from pipeline.training import feature_loader
from pipeline.training.feature_loader import channel_stats, read_standardized
from tests.errors import raises

HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 1, 1), UPerNetHeadConfig(4, 1, 4))
ROWS, TRAIN = np.arange(40), np.arange(30)
MEAN, BOTH = ["mean_level0", "mean_level1"], ["mean_level0", "mean_level1", "cls_level0", "cls_level1"]


def write_store(path, schema, values):
    writer = Writer(path.with_suffix(".scratch"), schema, path, {})
    writer.write(0, values)
    writer.finish()
    return FeatureStore(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores of two backbones of different scale and grid, of the same 40 samples."""
    stores, generator, folder = [], np.random.default_rng(0), tmp_path_factory.mktemp("stores")
    for name, scale, side in (("a", 1000.0, 8), ("b", 0.01, 4)):
        levels = (LevelSchema(3, side, side, 4, "x"), LevelSchema(2, side // 2, side // 2, 8, "y"))
        samples, split = tuple(f"s{i}" for i in range(40)), ("train",) * 30 + ("test",) * 10
        schema = StoreSchema(samples, split, levels, {"mean_level0": 3, "mean_level1": 2}, "float32", 64)
        values = {key: scale * (5 + generator.normal(size=(40, *shape))) for key, shape in schema.shapes().items()}
        values["level0/features"][:, 1] = scale  # a dead channel
        stores.append(write_store(folder / f"{name}.zarr", schema, values))
    return stores


def read(array, rows, train_rows):
    return read_standardized(array, rows, channel_stats(array, train_rows))


def selected_names(stores, is_dense, **changes):
    selected = feature_loader.select_arrays(stores, replace(HEADS, **changes), is_dense)
    return [[name.removeprefix("pooled/").removesuffix("/features") for _, name in member] for member in selected]


def test_read_standardized_of_pooled_uses_the_training_split(stores):
    stored = stores[0].read("pooled/mean_level0", ROWS)
    expected = (stored - stored[TRAIN].mean(0)) / stored[TRAIN].std(0)
    np.testing.assert_allclose(read((stores[0], "pooled/mean_level0"), ROWS, TRAIN), expected, atol=1e-4)


def test_read_standardized_of_levels_has_each_backbones_grid(stores):
    for store, side in zip(stores, (8, 4), strict=True):
        level = read((store, "level0/features"), TRAIN, TRAIN)
        assert level.shape == (30, 3, side, side)
        torch.testing.assert_close(level[:, [0, 2]].mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
        assert (level[:, 1] == 0).all(), "a dead channel"


def test_read_standardized_of_a_store_with_views_is_the_identity_view(tmp_path):
    samples, rows = tuple(f"s{i}" for i in range(20)), np.arange(20)
    levels, views = (LevelSchema(3, 4, 4, 4, "x"),), ("identity", "flip_x")
    schema = StoreSchema(samples, ("train",) * 20, levels, {"mean_level0": 3}, "float32", 32, views=views)
    values = {key: np.random.default_rng(0).normal(size=(20, *shape)) for key, shape in schema.shapes().items()}
    store = write_store(tmp_path / "v.zarr", schema, values)
    mean, std = (stats[:, None, None] for stats in store.statistics("level0"))  # of all views
    level = values["level0/features"][:, 0]
    np.testing.assert_allclose(read((store, "level0/features"), rows, rows), (level - mean) / std, atol=1e-5)
    vector = values["pooled/mean_level0"][:, 0]
    pooled = read((store, "pooled/mean_level0"), rows, rows)
    np.testing.assert_allclose(pooled, (vector - vector.mean(0)) / vector.std(0), atol=1e-5)


def test_channel_stats_of_non_finite_features_is_refused():
    values = np.full((30, 2), np.nan)
    store = SimpleNamespace(level_arrays=(), location=Path("a.zarr"), read=lambda name, rows: values)
    with raises(StoreError, "cache.verify", key="pooled/mean_level1", path="a.zarr"):
        channel_stats((store, "pooled/mean_level1"), TRAIN)


def test_select_arrays_of_some_levels(stores):
    assert selected_names(stores, is_dense=True) == [["level0", "level1"]] * 2
    assert selected_names(stores, is_dense=True, levels=(-1,)) == [["level1"]] * 2
    assert selected_names(stores, is_dense=False, levels=(0,)) == [["mean_level0"]] * 2
    with raises(StoreError, "level0", "level1", key="heads.levels", value=2, allowed=range(-2, 2)):
        selected_names(stores, is_dense=True, levels=(0, 2))


@pytest.mark.parametrize(
    ("depth", "tokens", "expected"),
    [("all", "mean", BOTH[:2]), ("all", "cls", BOTH[2:]), ("last", "both", BOTH[1::2]), ("last", "cls", BOTH[3:])],
)
def test_select_arrays_takes_means_where_there_are_no_class_tokens(depth, tokens, expected):
    stores = [SimpleNamespace(pooled=pooled) for pooled in (BOTH, MEAN, ["mean_std"])]
    linear = replace(HEADS.linear, pooled=depth, tokens=tokens)
    means = MEAN if depth == "all" else MEAN[1:]
    assert selected_names(stores, is_dense=False, linear=linear) == [expected, means, ["mean_std"]]


@pytest.mark.parametrize("std", [0.0, 1e-42, 1e-6])
def test_to_mean_scale_of_a_dead_channel_is_zero(std):
    mean, scale = feature_loader.to_mean_scale(np.array([1.0, 1.0]), np.array([std, 2.0]))
    assert (mean.dtype, scale.dtype) == (np.float32, np.float32)
    assert scale.tolist() == [0, 0.5]


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_feature_loader_epoch_has_every_training_sample_once(stores, budget):
    device, stored, rows = resolve_device("auto"), stores[0].read("level0/features", ROWS), []
    fields = {"x": [(stores[0], "level0/features")]}
    loader = feature_loader.FeatureLoader(fields, TRAIN, device=device, budget=budget)
    for index, batch in loader.stream(shuffled_batches(TRAIN, 16, seed=0)):
        assert batch["x"].device.type == device
        np.testing.assert_array_equal(batch["x"].cpu(), stored[index])
        rows += index.tolist()
    assert sorted(rows) == TRAIN.tolist()
