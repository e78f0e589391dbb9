"""Task data from real labels: in memory and streamed, every fusion, class weights, and refusals."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import zarr

from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline.composition import search
from pipeline.config import CompositionConfig, FcnHeadConfig, HeadsConfig, LinearHeadConfig, UPerNetHeadConfig
from pipeline.data import image_store, image_writer
from pipeline.errors import UserError
from pipeline.tasks import IGNORE
from pipeline.training import loop, task_data
from pipeline.training.feature_loader import StreamedFeatures
from pipeline.training.loop import HParams, TrainSchedule
from pipeline.training.protocol import count_split, score_split, train_heads
from tests.errors import raises

HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 60, 32), UPerNetHeadConfig(8, 6, 4), FcnHeadConfig(40, 4))
HPARAMS = [HParams(1e-2, 1e-3, 0), HParams(3e-3, 1e-1, 1)]
# Sides of the levels: a pyramid, a transformer's four levels of one grid, and three levels.
GRIDS = {"pyramid": (32, 16, 8, 4), "flat": (8, 8, 8, 8), "three": (16, 8, 4)}


@pytest.fixture(scope="module")
def make_stores(image_dataset, tmp_path_factory):
    """Function from a task to the path of its images store, and the paths of three feature stores by name."""
    paths = {}

    def make(task: str):
        if task not in paths:
            tiles = image_dataset("sample-landuse-seg", **({} if task == "segmentation" else {"task": task}))
            folder = tmp_path_factory.mktemp(task)
            image_writer.write(tiles, folder / "scratch", folder / "images.zarr")
            digest = image_store.open_images(folder / "images.zarr").attrs["content_sha256"]
            stores = {name: write_store(folder, name, tiles, sides, digest) for name, sides in GRIDS.items()}
            paths[task] = folder / "images.zarr", stores
        return paths[task]

    return make


def write_store(folder, name, tiles, sides, digest):
    """Write a feature store of the bands' powers, averaged over the cells of each level."""
    image = torch.from_numpy(tiles.image[:, :8].astype(np.float32) / 3000)
    levels = [torch.nn.functional.adaptive_avg_pool2d(image ** (1 + index), side) for index, side in enumerate(sides)]
    schema = StoreSchema(
        tuple(tiles.sample), tuple(tiles.split),
        tuple(LevelSchema(8, side, side, 128 // side, str(index)) for index, side in enumerate(sides)),
        {f"mean_level{index}": 8 for index in range(len(sides))}, "float16", 32,
    )  # fmt: skip
    writer = Writer(folder / f"scratch-{name}", schema, folder / f"{name}.zarr", {"images_sha256": digest})
    arrays = {f"level{index}/features": level.numpy() for index, level in enumerate(levels)}
    arrays |= {f"pooled/mean_level{index}": level.mean((2, 3)).numpy() for index, level in enumerate(levels)}
    for shard in writer.claim_shards():
        writer.write(shard, {key: values[schema.rows(shard)] for key, values in arrays.items()})
    writer.finish()
    return folder / f"{name}.zarr"


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
    for split in ("train", "val"):
        counts = [count_split(data, group, split) for data in (in_memory, streamed)]
        np.testing.assert_array_equal(*counts)
    together, alone = train_heads(streamed, HPARAMS), train_heads(streamed, HPARAMS[1:])
    head, head_alone = together.independent_heads()[-1], alone.independent_heads()[0]
    for values, expected in zip(head.parameters(), head_alone.parameters(), strict=True):
        actual = values[-1:] if alone.is_stacked else values
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_fit_of_streamed_features_has_one_order_for_all_seeds(make_stores):
    """In memory two seeds differ in the order of samples; streamed, with one start, they are equal."""
    data = load(make_stores, "multilabel", max_feature_gb=0.0)
    hparams = [HParams(1e-2, 0.0, seed) for seed in (0, 1)]
    group = train_heads(data, hparams)
    train, schedule = data.splits["train"], TrainSchedule(60, 32)
    first_batches = [loop.batch_order(len(train.label), schedule, seed)[0].tolist() for seed in (0, 1)]
    assert first_batches[0] != first_batches[1]
    same_start = loop.fit(lambda seeds: type(group)([64], 7, [0 for _ in seeds]), train, data.task, hparams, schedule)
    assert torch.equal(same_start.weights[0][0], same_start.weights[0][1])


@pytest.mark.parametrize("max_feature_gb", [0.0, 4.0], ids=["streamed", "in memory"])
def test_load_with_patience_adds_the_validation_split(make_stores, max_feature_gb):
    changes = {"segmentation": "fcn", "fcn": FcnHeadConfig(40, 4, patience=1), "max_feature_gb": max_feature_gb}
    data = load(make_stores, splits=("train",), **changes)
    assert set(data.splits) == {"train", "val"}
    assert np.isfinite(score_split(data, train_heads(data, HPARAMS), "val")).all()


@pytest.mark.parametrize("fusion", ["concat", "average", "film", "dot"])
@pytest.mark.parametrize("task", ["segmentation", "multilabel"])
def test_train_heads_of_different_grids_works_with_every_fusion(make_stores, task, fusion):
    names = ("pyramid", "flat", "three")
    data = load(make_stores, task, names, fusion=fusion)
    assert count_split(data, train_heads(data, HPARAMS), "val").shape[0] == 2
    if task == "segmentation":
        sides = [level.shape[-1] for level in data.splits["val"].inputs]
        assert sides == [side for name in names for side in GRIDS[name]], "in memory on their own grids"


@pytest.mark.parametrize("fusion", ["average", "film", "dot"])
def test_train_heads_of_one_backbone_is_the_same_with_every_fusion(make_stores, fusion):
    groups = []
    for name in ("concat", fusion):
        data = load(make_stores, "multilabel", ("pyramid",), fusion=name)
        groups.append(train_heads(data, HPARAMS))
    states = [group.state_dict() for group in groups]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    np.testing.assert_array_equal(*(count_split(data, group, "val") for group in groups))


@pytest.mark.parametrize("split", ["train", "val"])
def test_load_of_a_split_without_a_labelled_pixel_is_refused(make_stores, tmp_path, split):
    images_path, stores = make_stores("segmentation")
    shutil.copytree(images_path, tmp_path / "images.zarr")
    label = zarr.open_group(tmp_path / "images.zarr", mode="r+")["label"]
    label[np.flatnonzero(image_store.open_images(images_path).split.values == split)] = IGNORE
    with raises(UserError, split, IGNORE, key="split", value=split):
        task_data.load({stores["pyramid"]: None}, tmp_path / "images.zarr", HEADS, ("train", "val"), "cpu")


@pytest.mark.parametrize("task", ["segmentation", "multilabel"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_load_of_non_finite_features_is_refused_in_any_split(make_stores, tmp_path, task, value):
    images_path, stores = make_stores(task)
    path = tmp_path / "damaged.zarr"
    shutil.copytree(stores["pyramid"], path)
    row = int(np.flatnonzero(image_store.open_images(images_path).split.values == "val")[0])
    name = "level0/features" if task == "segmentation" else "pooled/mean_level0"
    array = zarr.open_group(path, mode="r+")[name]
    values = array[:]
    values[(row, *[0] * (values.ndim - 1))] = value
    array[:] = values
    with raises(StoreError, key=name, path=path):
        task_data.load({path: None}, images_path, HEADS, ("train", "val"), "cpu")
    heads = dataclasses.replace(HEADS, max_feature_gb=0.0)
    streamed = task_data.load({path: None}, images_path, heads, ("train", "val"), "cpu")
    with raises(StoreError, key=name, path=path):
        count_split(streamed, train_heads(streamed, HPARAMS), "val")
    config = CompositionConfig((), "logistic", 2, False)
    with raises(StoreError, key=name, path=path):
        search.search({"damaged": FeatureStore(path)}, image_store.open_images(images_path), HEADS, config)


def test_train_heads_of_fcn_learns(make_stores):
    data = load(make_stores, segmentation="fcn", fcn=FcnHeadConfig(150, 8))
    before, after = (
        score_split(data, train_heads(data, [HParams(learning_rate, 1e-4, 0)]), "train")[0]
        for learning_rate in (1e-9, 1e-2)
    )
    assert after > before + 0.1


def test_load_of_some_levels(make_stores):
    data = load(make_stores, levels=(0, -1))
    assert [level.shape[-1] for level in data.splits["val"].inputs] == [32, 4, 8, 8]
    assert load(make_stores, "multilabel", levels=(-1,)).splits["val"].inputs.shape[1] == 16
    with raises(StoreError, key="heads.levels", value=3, allowed=range(-3, 3)):
        load(make_stores, names=("pyramid", "three"), levels=(3,))


def test_load_with_balanced_weights_makes_classes_equal(make_stores):
    data = load(make_stores, class_weights="balanced")
    label, weights = data.splits["train"].label, torch.tensor(data.task.class_weights)
    count = label[label != IGNORE].long().bincount(minlength=data.task.n_classes)
    is_present = count > 0
    assert weights[is_present] @ count[is_present].float() == pytest.approx(count.sum().item())
    shares = weights[is_present] * count[is_present]
    torch.testing.assert_close(shares, shares.mean().expand_as(shares))
    with raises(UserError, "multi-label", key="heads.class_weights", value="balanced", allowed=["none"]):
        load(make_stores, "multilabel", class_weights="balanced")
