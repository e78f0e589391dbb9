"""Training statistics and principal components, against NumPy and scikit-learn on the whole array."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.decomposition import PCA
from small_store import open_store, shard_values, small_schema

from cache import statistics
from cache.errors import StoreError
from cache.statistics import principal_components, project
from tests.errors import raises


def training_maps(features, level):
    """All training maps in all views as they are read, float64 (map, channel, y, x)."""
    rows = features.rows("train")
    maps = [features.read(f"{level}/features", rows, view) for view in features.view or [None]]
    return np.concatenate(maps).astype("float64")


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("views", [(), ("identity", "flip_x")], ids=["plain", "views"])
def test_training_statistics_are_those_of_what_is_read(tmp_path, codec, views):
    schema = small_schema(codec=codec, views=views, shard_size=16)
    # Shards without a training sample, and with one.
    split = ("test",) * 32 + ("train",) + ("val",) * 40 + schema.split[73:]
    features = open_store(tmp_path, replace(schema, split=split))
    for level in ("level0", "level1"):
        maps = training_maps(features, level)
        mean, std = features.statistics(level)
        assert mean.dtype == std.dtype == np.float64
        np.testing.assert_allclose(mean, maps.mean(axis=(0, 2, 3)), rtol=0, atol=1e-13)
        np.testing.assert_allclose(std, maps.std(axis=(0, 2, 3)), rtol=1e-13)


def test_training_statistics_keep_a_small_spread_around_a_large_mean(tmp_path):
    """The mean of squares minus the square of the mean would give zero or less."""

    def make_values(schema, shard, seed):
        values = shard_values(schema, shard, seed)
        return {name: np.float32(1e4) + np.float32(0.01) * array for name, array in values.items()}

    features = open_store(tmp_path, small_schema(dtype="float32"), make_values=make_values)
    expected = training_maps(features, "level0").std(axis=(0, 2, 3))
    np.testing.assert_allclose(features.statistics("level0")[1], expected, rtol=1e-9)


def test_training_statistics_show_a_single_nan(tmp_path):
    def make_values(schema, shard, seed):
        values = shard_values(schema, shard, seed)
        values["level0/features"][1, 2, 0, 0] = np.nan
        return values

    features = open_store(tmp_path, make_values=make_values)
    mean, std = features.statistics("level0")
    assert np.isnan(mean).tolist() == np.isnan(std).tolist() == [False, False, True, False, False]


def test_training_statistics_without_training_samples_are_nan(tmp_path):
    features = open_store(tmp_path, replace(small_schema(), split=("test",) * 150))
    assert np.isnan(features.statistics("level0")).all()


@pytest.mark.parametrize("values_per_read", [10, 1 << 22], ids=["a sample per block", "one block"])
def test_principal_components_equal_scikit_learn(tmp_path, monkeypatch, values_per_read):
    monkeypatch.setattr(statistics, "_VALUES_PER_READ", values_per_read)
    features = open_store(tmp_path)
    with raises(StoreError, 5, 6400, key="n_components", value=6):
        principal_components(features, "level0", 6)
    pca = principal_components(features, "level0", 3)
    cells = training_maps(features, "level0").transpose(0, 2, 3, 1).reshape(-1, 5)
    exact = PCA(3).fit(cells)
    np.testing.assert_allclose(pca.explained_variance_ratio_, exact.explained_variance_ratio_, rtol=0.05)
    maps = features.read("level0/features", [3, 77])
    reduced = project(pca, maps)
    assert reduced.shape == (2, 3, 8, 8)
    assert reduced.dtype == np.float32
    np.testing.assert_allclose(reduced[1, :, 4, 6], pca.transform(maps[1:, :, 4, 6].astype("float64"))[0], rtol=1e-5)
