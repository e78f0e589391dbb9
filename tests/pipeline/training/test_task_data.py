"""Task data: in memory and streamed, every fusion, class weights, refusals, and principal axes."""

import dataclasses
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from threadpoolctl import threadpool_limits
from torch.nn.functional import adaptive_avg_pool2d

from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import StoreSchema
from pipeline.composition import search
from pipeline.config import CompositionConfig, FcnHeadConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.heads.config import HeadConfig
from pipeline.tasks import IGNORE, Classification
from pipeline.training import feature_loader, loop, task_data
from pipeline.training.feature_loader import SplitData, StreamedFeatures
from pipeline.training.loop import HParams, TrainSchedule
from pipeline.training.predictions import predict_logits
from pipeline.training.protocol import count_split, score_split, train_heads
from pipeline.training.task_data import TaskData
from tests.errors import raises
from tests.pipeline.training.test_feature_loader import write_store

HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 20, 16), UPerNetHeadConfig(4, 3, 4), FcnHeadConfig(30, 4))
HPARAMS = [HParams(1e-2, 1e-3, 0), HParams(3e-3, 1e-1, 1)]
FUSIONS = ["concat", "average", "film", "dot"]
# Sides of the levels: a pyramid, a transformer's four levels of one grid, and three levels.
GRIDS = {"pyramid": (16, 8, 4, 2), "flat": (4, 4, 4, 4), "three": (8, 4, 2)}
ROWS = np.arange(600)


@pytest.fixture(scope="module")
def make_stores(task_images, feature_store):
    """Function from a task to the path of its images store, and the paths of three feature stores by name."""

    @lru_cache
    def make(task):
        images, generator = task_images(task), torch.Generator().manual_seed(0)
        label = torch.from_numpy(images.label.values.astype(np.int64))
        maps = (label[:, None] if label.ndim == 3 else label[:, :, None, None].expand(-1, -1, 16, 16)) % IGNORE
        paths = {}
        for name, sides in GRIDS.items():
            levels = [adaptive_avg_pool2d(maps.float().repeat(1, 4, 1, 1), side) for side in sides]
            levels = [level + torch.randn(level.shape, generator=generator) for level in levels]
            arrays = {f"level{index}/features": level.numpy() for index, level in enumerate(levels)}
            arrays |= {f"pooled/mean_level{index}": level.mean((2, 3)).numpy() for index, level in enumerate(levels)}
            paths[name] = feature_store(name, arrays, images).location
        return Path(images.encoding["source"]), paths

    return make


def load(make_stores, task="segmentation", names=("pyramid", "flat"), splits=("train", "val"), **changes):
    images_path, stores = make_stores(task)
    heads = dataclasses.replace(HEADS, **changes)
    return task_data.load({stores[name]: None for name in names}, images_path, heads, splits, "cpu")


@pytest.mark.parametrize("task", ["segmentation", "multilabel"])
def test_load_streamed_and_in_memory_have_the_same_counts(make_stores, task):
    """Also, a head that is trained among others on streamed features equals the head alone."""
    in_memory, streamed = load(make_stores, task), load(make_stores, task, max_feature_gb=0.0)
    assert isinstance(streamed.splits["train"].inputs, StreamedFeatures)
    group = train_heads(in_memory, HPARAMS)
    np.testing.assert_array_equal(*(count_split(data, group, "val") for data in (in_memory, streamed)))
    together, alone = train_heads(streamed, HPARAMS), train_heads(streamed, HPARAMS[1:])
    head, head_alone = together.independent_heads()[-1], alone.independent_heads()[0]
    for values, expected in zip(head.parameters(), head_alone.parameters(), strict=True):
        actual = values[-1:] if alone.is_stacked else values
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_fit_of_streamed_features_has_one_order_for_all_seeds(make_stores):
    """In memory two seeds differ in the order of samples; streamed, with one start, they are equal."""
    data = load(make_stores, "multilabel", max_feature_gb=0.0)
    hparams, schedule = [HParams(1e-2, 0.0, seed) for seed in (0, 1)], TrainSchedule(30, 32)
    train = data.splits["train"]
    assert not torch.equal(*(loop.batch_order(len(train.label), schedule, seed) for seed in (0, 1)))
    create_group = data.head_config.create_group
    same_start = loop.fit(lambda seeds: create_group([0, 0]), train, data.task, hparams, schedule)
    assert torch.equal(same_start.weights[0][0], same_start.weights[0][1])


@pytest.mark.parametrize("max_feature_gb", [0.0, 4.0], ids=["streamed", "in memory"])
def test_load_with_patience_adds_the_validation_split_and_fcn_learns(make_stores, max_feature_gb):
    changes = {"segmentation": "fcn", "fcn": FcnHeadConfig(40, 4, patience=2), "max_feature_gb": max_feature_gb}
    data = load(make_stores, splits=("train",), **changes)
    assert set(data.splits) == {"train", "val"}
    hparams = [HParams(learning_rate, 1e-4, 0) for learning_rate in (1e-9, 3e-2)]
    untrained, trained = score_split(data, train_heads(data, hparams), "val")
    assert trained > untrained + 0.1


@pytest.mark.parametrize("fusion", FUSIONS)
def test_train_heads_of_different_grids_works_with_every_fusion(make_stores, fusion):
    for task in ("multilabel", "segmentation"):
        data = load(make_stores, task, tuple(GRIDS), fusion=fusion)
        assert count_split(data, train_heads(data, HPARAMS[:1]), "val").shape[0] == 1
    sides = [level.shape[-1] for level in data.splits["val"].inputs]
    assert sides == [side for sides in GRIDS.values() for side in sides], "in memory on their own grids"


def test_train_heads_of_one_backbone_is_the_same_with_every_fusion(make_stores):
    datas = [load(make_stores, "multilabel", ("pyramid",), fusion=fusion) for fusion in FUSIONS]
    groups = [train_heads(data, HPARAMS).state_dict() for data in datas]
    assert all(torch.equal(group[name], groups[0][name]) for group in groups for name in groups[0])


@pytest.mark.parametrize("split", ["train", "val"])
def test_load_of_a_split_without_a_labelled_pixel_is_refused(make_stores, tmp_path, split):
    images_path, stores = make_stores("segmentation")
    shutil.copytree(images_path, tmp_path / "images.zarr")
    label = zarr.open_group(tmp_path / "images.zarr", mode="r+")["label"]
    label[FeatureStore(stores["pyramid"]).rows(split)] = IGNORE
    with raises(UserError, split, IGNORE, key="split", value=split):
        task_data.load({stores["pyramid"]: None}, tmp_path / "images.zarr", HEADS, ("train", "val"), "cpu")


@pytest.mark.parametrize(("task", "value"), [("segmentation", np.nan), ("multilabel", np.inf)])
def test_load_of_non_finite_features_is_refused_in_any_split(make_stores, task_images, tmp_path, task, value):
    images_path, stores = make_stores(task)
    path = tmp_path / "damaged.zarr"
    shutil.copytree(stores["pyramid"], path)
    name = "level0/features" if task == "segmentation" else "pooled/mean_level0"
    array = zarr.open_group(path, mode="r+")[name]
    values = array[:]
    values[FeatureStore(path).rows("val")[0]].flat[0] = value
    array[:] = values
    with raises(StoreError, key=name, path=path):
        task_data.load({path: None}, images_path, HEADS, ("train", "val"), "cpu")
    heads = dataclasses.replace(HEADS, max_feature_gb=0.0)
    streamed = task_data.load({path: None}, images_path, heads, ("train", "val"), "cpu")
    with raises(StoreError, key=name, path=path):
        count_split(streamed, streamed.head_config.create_group([0]), "val")
    config = CompositionConfig((), "logistic", 2, False)
    with raises(StoreError, key=name, path=path):
        search.search({"damaged": FeatureStore(path)}, task_images(task), HEADS, config)


def test_load_with_balanced_weights_makes_classes_equal(make_stores):
    data = load(make_stores, class_weights="balanced")
    label, weights = data.splits["train"].label, torch.tensor(data.task.class_weights)
    count = label[label != IGNORE].long().bincount(minlength=data.task.n_classes)
    torch.testing.assert_close(weights * count, (count.sum() / len(count)).expand_as(weights))
    with raises(UserError, "multi-label", key="heads.class_weights", value="balanced", allowed=["none"]):
        load(make_stores, "multilabel", class_weights="balanced")


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """Two arrays of strongly correlated channels, and their statistics.

    In the first, two channels differ by little (correlation above 0.999); in the second, two are equal.
    """
    generator, folder = np.random.default_rng(0), tmp_path_factory.mktemp("bands")
    base = generator.normal(size=(len(ROWS), 3))
    near = base[:, :1] + 0.04 * generator.choice([-1, 1], (len(ROWS), 1))
    values = {
        "pooled/mean_first": np.concatenate([base, near], axis=1),
        "pooled/mean_rest": np.concatenate([base @ generator.normal(size=(3, 4)), base[:, :1], base[:, :1]], axis=1),
    }
    widths = {name.removeprefix("pooled/"): array.shape[1] for name, array in values.items()}
    schema = StoreSchema(tuple(map(str, ROWS)), ("train",) * len(ROWS), (), widths, "float32", 1000)
    store = write_store(folder / "bands.zarr", schema, values)
    arrays = [(store, name) for name in values]
    return arrays, [feature_loader.channel_stats(array, ROWS) for array in arrays]


@pytest.fixture
def inputs(bands):
    """The standardized arrays, concatenated."""
    pairs = zip(*bands, strict=True)
    return torch.cat([feature_loader.read_standardized(array, ROWS, stats) for array, stats in pairs], dim=1)


@pytest.fixture
def rotations(bands):
    return task_data.principal_axes(*bands, ROWS)


def test_principal_axes_are_orthonormal_and_uncorrelated(inputs, rotations):
    for values, rotation in zip(inputs.split([4, 6], dim=1), rotations, strict=True):
        axes = rotation[:, rotation.abs().sum(dim=0) > 0]
        torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1]), atol=1e-5, rtol=0)
        rotated = (values @ axes).double()
        covariance = rotated.T @ rotated / len(rotated)
        assert (covariance - covariance.diag().diag()).abs().max() < 1e-4 * covariance.diag().max()
        assert (covariance.diag() > task_data.MIN_VARIANCE).all()
    assert rotations[0].any(dim=0).all(), "nearly equal channels keep their difference"
    assert not rotations[1][:, 0].any(), "two of the channels are equal"


def test_principal_axes_with_more_threads_have_the_same_bytes(bands, rotations):
    with threadpool_limits(2):
        assert all(map(torch.equal, rotations, task_data.principal_axes(*bands, ROWS)))


def test_train_heads_in_principal_axes_learns_a_small_difference_of_two_channels(inputs, rotations):
    label = (inputs[:, 3] > inputs[:, 0]).long()
    split, config = SplitData(inputs, label), HeadConfig("linear", "concat", (((10,),),), 2)
    hparams = [HParams(learning_rate, 1e-2, 0) for learning_rate in (1e-2, 1e-1)]
    accuracy = {}
    for name, axes in {"channels": [], "axes": rotations}.items():
        data = TaskData({"train": split}, Classification(2), [], [], [], axes, config, TrainSchedule(150, 32))
        predicted = predict_logits(train_heads(data, hparams), inputs).argmax(axis=2)
        accuracy[name] = (predicted == label.numpy()).mean(axis=1).max()
    assert accuracy["axes"] > 0.95
    assert accuracy["axes"] > accuracy["channels"] + 0.02
