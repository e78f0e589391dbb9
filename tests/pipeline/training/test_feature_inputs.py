import numpy as np
import pytest
import torch

from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline.training import feature_inputs


@pytest.fixture
def stores(tmp_path):
    """Two backbones of other scales and grids on the same 40 samples."""
    made, generator = [], np.random.default_rng(0)
    for name, scale, side in (("a", 1000.0, 8), ("b", 0.01, 4)):
        layout = StoreSchema(
            sample=tuple(f"s{i}" for i in range(40)),
            split=("train",) * 30 + ("test",) * 10,
            levels=(LevelSchema(3, side, side, 4, "x"), LevelSchema(2, side // 2, side // 2, 8, "y")),
            pooled={"mean_level0": 3, "mean_level1": 2},
            dtype="float32",
            shard_size=16,
        )
        writer = Writer(tmp_path / f"scratch-{name}", layout, tmp_path / f"{name}.zarr", {})
        for shard in writer.pending_shards():
            count = layout.rows(shard).stop - layout.rows(shard).start
            levels = {
                f"level{i}/features": (level.channels, level.height, level.width)
                for i, level in enumerate(layout.levels)
            }
            shapes = levels | {"pooled/mean_level0": (3,), "pooled/mean_level1": (2,)}
            drawn = {key: scale * (5 + generator.normal(size=(count, *shape))) for key, shape in shapes.items()}
            drawn["level0/features"][:, 1] = scale  # a dead channel
            writer.write(shard, drawn)
        writer.finish()
        made.append(FeatureStore(tmp_path / f"{name}.zarr"))
    return made


def test_each_backbone_is_standardised_with_its_own_training_statistics(stores):
    training, test = np.arange(30), np.arange(30, 40)
    fused = feature_inputs.read_pooled(stores, "all", "mean", training, training)
    assert fused.shape == (30, 10)
    torch.testing.assert_close(fused.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(fused.std(0, unbiased=False), torch.ones(10), atol=1e-4, rtol=0)
    raw = stores[0].read("pooled/mean_level0", np.arange(40))
    expected = (raw[30:] - raw[:30].mean(0)) / raw[:30].std(0)
    np.testing.assert_allclose(
        feature_inputs.read_pooled(stores, "all", "mean", test, training)[:, :3], expected, atol=1e-4
    )


def test_last_takes_the_deepest_vector_of_each(stores):
    rows = np.arange(30)
    every, last = (
        feature_inputs.read_pooled(stores, "all", "mean", rows, rows),
        feature_inputs.read_pooled(stores, "last", "mean", rows, rows),
    )
    torch.testing.assert_close(last, every[:, [3, 4, 8, 9]])


def test_levels_are_standardised_each_on_its_own_grid(stores):
    members = feature_inputs.select_levels(stores)
    assert [[name for _, name in member] for member in members] == [["level0/features", "level1/features"]] * 2
    rows = np.arange(30)
    for (field, _), side in zip(members, (8, 4), strict=True):
        level = feature_inputs.read_standardized(field, rows, feature_inputs.channel_stats(field, rows))
        assert level.shape == (30, 3, side, side)
        torch.testing.assert_close(level[:, [0, 2]].mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
        assert (level[:, 1] == 0).all(), "a dead channel"


def test_some_levels_alone(stores):
    names = [[name for _, name in member] for member in feature_inputs.select_levels(stores, (-1,))]
    assert names == [["level1/features"]] * 2
    names = [[name for _, name in member] for member in feature_inputs.select_pooled(stores, "all", "mean", (0,))]
    assert names == [["pooled/mean_level0"]] * 2
    with pytest.raises(StoreError, match="asks for level 2, and a member of this model has 2: level0, level1"):
        feature_inputs.select_levels(stores, (0, 2))


def test_heads_see_the_identity_of_a_store_with_views(tmp_path):
    layout = StoreSchema(
        sample=tuple(f"s{i}" for i in range(20)),
        split=("train",) * 20,
        levels=(LevelSchema(3, 4, 4, 4, "x"),),
        pooled={"mean_level0": 3},
        dtype="float32",
        shard_size=8,
        views=("identity", "flip_x"),
    )
    writer = Writer(tmp_path / "scratch", layout, tmp_path / "v.zarr", {})
    drawn = {key: np.random.default_rng(0).normal(size=(20, *shape)) for key, shape in layout.shapes().items()}
    for shard in writer.claim_shards():
        writer.write(shard, {key: values[layout.rows(shard)] for key, values in drawn.items()})
    writer.finish()
    store, index = FeatureStore(tmp_path / "v.zarr"), np.arange(20)
    [[field]] = feature_inputs.select_levels([store])
    level = feature_inputs.read_standardized(field, index, feature_inputs.channel_stats(field, index))
    mean, std = (values[:, None, None] for values in store.statistics("level0"))
    np.testing.assert_allclose(level, (drawn["level0/features"][:, 0] - mean) / std, atol=1e-5)
    vector = drawn["pooled/mean_level0"][:, 0]
    fused = feature_inputs.read_pooled([store], "all", "mean", index, index)
    np.testing.assert_allclose(fused, (vector - vector.mean(0)) / vector.std(0), atol=1e-5)


@pytest.mark.parametrize(
    ("which", "tokens", "expected"),
    [
        ("all", "mean", ["mean_level0", "mean_level1"]),
        ("all", "cls", ["cls_level0", "cls_level1"]),
        ("last", "both", ["mean_level1", "cls_level1"]),
        ("last", "cls", ["cls_level1"]),
    ],
)
def test_class_tokens_where_there_are_any(which, tokens, expected):
    means, both = ["mean_level0", "mean_level1"], ["mean_level0", "mean_level1", "cls_level0", "cls_level1"]
    assert feature_inputs._chosen(both, which, tokens) == expected
    assert feature_inputs._chosen(means, which, tokens) == (means if which == "all" else means[-1:])
    assert feature_inputs._chosen(["mean_std"], which, tokens) == ["mean_std"]


def test_a_byte_that_flips_into_no_number_is_told(stores):
    path = next((stores[0].location / "pooled/mean_level1").glob("c.0.*"))
    values = np.frombuffer(path.read_bytes(), "<f4").copy()
    values[5] = np.nan
    path.write_bytes(values.tobytes())
    words = "pooled/mean_level1 has values that are no numbers. Check the store with: .*; if it is whole"
    with pytest.raises(StoreError, match=words):
        feature_inputs.read_pooled([FeatureStore(stores[0].location)], "all", "mean", np.arange(30), np.arange(30))
