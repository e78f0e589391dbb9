"""Moments and principal components against numpy and scikit-learn on everything at once."""

import dataclasses

import numpy as np
import pytest
from sklearn.decomposition import PCA
from small_store import everything, layout, write

from cache import statistics
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.statistics import channel_statistics, principal_components, project


@pytest.fixture(params=[10, 1 << 22], ids=["a sample a block", "one block"])
def block(request, monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK", request.param)


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.usefixtures("block")
def test_training_statistics(tmp_path, codec):
    write(tmp_path, layout(codec=codec))
    features = FeatureStore(tmp_path / "store.zarr")
    training = features.read("level0/features", features.rows("train")).astype("float64")
    mean, std = features.statistics("level0")
    assert mean.dtype == std.dtype == np.float64
    np.testing.assert_allclose(mean, training.mean(axis=(0, 2, 3)), atol=1e-13)
    np.testing.assert_allclose(std, training.std(axis=(0, 2, 3)), rtol=1e-13)
    test = features.read("level0/features", features.rows("test")).astype("float64")
    np.testing.assert_allclose(
        channel_statistics(features, "level0", "test")[0], test.mean(axis=(0, 2, 3)), atol=1e-13
    )


@pytest.mark.parametrize("codec", ["none", "bitround4", "int8"])
@pytest.mark.parametrize("views", [(), ("identity", "flip_x")])
def test_what_passes_the_writer_has_the_statistics_of_what_is_stored(tmp_path, codec, views):
    described = layout(codec=codec, views=views, shard=16)
    # Shards without a training sample, and with one.
    split = ("test",) * 32 + ("train",) + ("val",) * 40 + described.split[73:]
    write(tmp_path, dataclasses.replace(described, split=split))
    features = FeatureStore(tmp_path / "store.zarr")
    for level in ("level0", "level1"):
        mean, std = channel_statistics(features, level)
        np.testing.assert_allclose(features.statistics(level)[0], mean, rtol=0, atol=1e-13)
        np.testing.assert_allclose(features.statistics(level)[1], std, rtol=1e-13)


@pytest.mark.usefixtures("block")
def test_a_small_spread_about_a_large_mean_is_not_lost(tmp_path):
    """Where the mean of squares less the square of the mean would give zero, or less."""
    described = layout(dtype="float32")
    offset = np.float32(1e4)

    def given(described, shard, seed):
        drawn = np.random.default_rng(shard)
        rows = described.rows(shard)
        return {
            name: offset + drawn.normal(0, 0.01, (rows.stop - rows.start, *shape)).astype("float32")
            for name, shape in described.shapes().items()
        }

    write(tmp_path, described, given=given)
    features = FeatureStore(tmp_path / "store.zarr")
    training = features.read("level0/features", features.rows("train")).astype("float64")
    np.testing.assert_allclose(features.statistics("level0")[1], training.std(axis=(0, 2, 3)), rtol=1e-9)


def test_statistics_are_over_all_views(tmp_path):
    described = layout(views=("identity", "flip_x"))
    write(tmp_path, described)
    features = FeatureStore(tmp_path / "store.zarr")
    training = everything(described, "level0/features").astype("float16")[features.rows("train")].astype("float64")
    np.testing.assert_allclose(features.statistics("level0")[0], training.mean(axis=(0, 1, 3, 4)), atol=1e-13)
    np.testing.assert_allclose(
        channel_statistics(features, "level0", view="flip_x")[0], training[:, 1].mean(axis=(0, 2, 3)), atol=1e-13
    )


def test_one_missing_value_shows(tmp_path):
    def given(described, shard, seed):
        rows = described.rows(shard)
        made = {name: np.ones((rows.stop - rows.start, *shape)) for name, shape in described.shapes().items()}
        made["level0/features"][1, 2, 0, 0] = np.nan
        return made

    write(tmp_path, given=given)
    mean, std = FeatureStore(tmp_path / "store.zarr").statistics("level0")
    assert np.isnan(mean).tolist() == np.isnan(std).tolist() == [False, False, True, False, False]


def test_more_components_than_there_are(tmp_path):
    write(tmp_path)
    with pytest.raises(StoreError, match="6 components were asked for of 5 channels in 6400 cells"):
        principal_components(FeatureStore(tmp_path / "store.zarr"), "level0", 6)


@pytest.mark.usefixtures("block")
def test_principal_components_are_scikit_learns(tmp_path):
    write(tmp_path)
    features = FeatureStore(tmp_path / "store.zarr")
    pca = principal_components(features, "level0", 3)
    training = features.read("level0/features", features.rows("train")).astype("float64")
    cells = training.transpose(0, 2, 3, 1).reshape(-1, 5)
    whole = PCA(3).fit(cells)
    np.testing.assert_allclose(pca.explained_variance_ratio_, whole.explained_variance_ratio_, rtol=0.05)
    maps = features.read("level0/features", [3, 77])
    reduced = project(pca, maps)
    assert reduced.shape == (2, 3, 8, 8)
    assert reduced.dtype == np.float32
    np.testing.assert_allclose(reduced[1, :, 4, 6], pca.transform(maps[1:, :, 4, 6].astype("float64"))[0], rtol=1e-5)
