"""Cells from real labels: in memory and streamed, joined in every way, with weights, and what is refused."""

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
from pipeline.training import loop, task_data
from pipeline.training.feature_loader import StreamedFeatures
from pipeline.training.head_trainer import HParams, TrainSchedule
from pipeline.training.protocol import count_split, train_heads

HEADS = HeadsConfig(LinearHeadConfig("all", "mean", 60, 32), UPerNetHeadConfig(8, 6, 4), FcnHeadConfig(40, 4))
SETTINGS = [HParams(1e-2, 1e-3, 0), HParams(3e-3, 1e-1, 1)]
# A pyramid, a transformer's four levels of one grid, and three levels.
GRIDS = {"pyramid": (32, 16, 8, 4), "flat": (8, 8, 8, 8), "three": (16, 8, 4)}


@pytest.fixture(scope="module")
def made(image_dataset, tmp_path_factory):
    """From a task to its images store, and the stores of three backbones: bands averaged over cells, and powers."""
    found = {}

    def make(task: str):
        if task not in found:
            tiles = image_dataset("sample-landuse-seg", **({} if task == "segmentation" else {"task": task}))
            folder = tmp_path_factory.mktemp(task)
            image_writer.write(tiles, folder / "scratch", folder / "images.zarr")
            digest = image_store.open_images(folder / "images.zarr").attrs["content_sha256"]
            made = {name: store(folder, name, tiles, sides, digest) for name, sides in GRIDS.items()}
            found[task] = folder / "images.zarr", made
        return found[task]

    return make


def store(folder, name, tiles, sides, digest):
    image = torch.from_numpy(tiles.image[:, :8].astype(np.float32) / 3000)
    levels = [torch.nn.functional.adaptive_avg_pool2d(image ** (1 + place), side) for place, side in enumerate(sides)]
    layout = StoreSchema(
        tuple(tiles.sample), tuple(tiles.split),
        tuple(LevelSchema(8, side, side, 128 // side, str(place)) for place, side in enumerate(sides)),
        {f"mean_level{place}": 8 for place in range(len(sides))}, "float16", 32,
    )  # fmt: skip
    writer = Writer(folder / f"scratch-{name}", layout, folder / f"{name}.zarr", {"images_sha256": digest})
    drawn = {f"level{place}/features": level.numpy() for place, level in enumerate(levels)}
    drawn |= {f"pooled/mean_level{place}": level.mean((2, 3)).numpy() for place, level in enumerate(levels)}
    for shard in writer.claim_shards():
        writer.write(shard, {key: values[layout.rows(shard)] for key, values in drawn.items()})
    writer.finish()
    return folder / f"{name}.zarr"


def load(made, task="segmentation", names=("pyramid", "flat"), splits=("train", "val"), **changes):
    pictures, stores = made(task)
    return task_data.load(
        {stores[name]: None for name in names}, pictures, dataclasses.replace(HEADS, **changes), splits, "cpu"
    )


def score(cell, group, split="val"):
    return cell.task.score(count_split(cell, group, split).sum(1))


@pytest.mark.parametrize("task", ["segmentation", "multilabel"])
def test_streamed_features_are_those_in_memory(made, task):
    """Heads evaluated on either have the same counts; a head among others, streamed, is the head alone."""
    held, streamed = load(made, task), load(made, task, max_feature_gb=0.0)
    assert isinstance(streamed.splits["train"].inputs, StreamedFeatures)
    group = train_heads(held, SETTINGS)
    for split in ("train", "val"):
        np.testing.assert_array_equal(count_split(held, group, split), count_split(streamed, group, split))
    together, alone = train_heads(streamed, SETTINGS), train_heads(streamed, SETTINGS[1:])
    for both, one in zip(together.independent_heads()[-1].parameters(), alone.independent_heads()[0].parameters(), strict=True):
        torch.testing.assert_close(both[-1:] if alone.is_stacked else both, one, rtol=1e-3, atol=1e-4)


def test_streamed_batches_come_in_one_order_for_every_seed(made):
    """Two seeds in memory differ in their order of samples; streamed, with one start, they do not differ at all."""
    cell = load(made, "multilabel", max_feature_gb=0.0)
    seeds = [HParams(1e-2, 0.0, seed) for seed in (0, 1)]
    group = train_heads(cell, seeds)
    part, recipe = cell.splits["train"], TrainSchedule(60, 32)
    begun = [loop.batch_order(len(part.label), recipe, seed)[0].tolist() for seed in (0, 1)]
    assert begun[0] != begun[1]
    shared = loop.fit(lambda seeds: type(group)([64], 7, [0 for _ in seeds]), part, cell.task, seeds, recipe)
    assert torch.equal(shared.weights[0][0], shared.weights[0][1])


def test_streamed_heads_stop_too(made):
    cell = load(made, max_feature_gb=0.0, segmentation="fcn", fcn=FcnHeadConfig(40, 4, patience=1))
    held = load(made, segmentation="fcn", fcn=FcnHeadConfig(40, 4, patience=1))
    assert "val" in load(made, splits=("train",), segmentation="fcn", fcn=FcnHeadConfig(40, 4, patience=1)).splits
    for one in (cell, held):
        assert np.isfinite(score(one, train_heads(one, SETTINGS))).all()


@pytest.mark.parametrize("fusion", ["concat", "average", "film", "dot"])
@pytest.mark.parametrize("task", ["segmentation", "multilabel"])
def test_members_of_other_grids_and_numbers_of_levels_join_in_every_way(made, task, fusion):
    cell = load(made, task, ("pyramid", "flat", "three"), fusion=fusion)
    group = train_heads(cell, SETTINGS)
    assert count_split(cell, group, "val").shape[0] == 2
    if task == "segmentation":
        assert [tuple(level.shape[-2:]) for level in cell.splits["val"].inputs] == [
            (side, side) for name in ("pyramid", "flat", "three") for side in GRIDS[name]
        ], "held on their own grids"


@pytest.mark.parametrize("fusion", ["average", "film", "dot"])
def test_fusion_changes_nothing_of_one_member(made, fusion):
    alone, fused = (load(made, "multilabel", ("pyramid",), fusion=one) for one in ("concat", fusion))
    ours, theirs = (count_split(one, train_heads(one, SETTINGS), "val") for one in (alone, fused))
    np.testing.assert_array_equal(ours, theirs)
    weights = [train_heads(one, SETTINGS).state_dict() for one in (alone, fused)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_masks_without_a_label_is_refused(made, tmp_path, split):
    pictures, stores = made("segmentation")
    shutil.copytree(pictures, tmp_path / "images.zarr")
    label = zarr.open_group(tmp_path / "images.zarr", mode="r+")["label"]
    label[np.flatnonzero(image_store.open_images(pictures).split.values == split)] = image_store.IGNORE
    with pytest.raises(UserError, match=f"The split {split} has .* masks and no labelled pixel"):
        task_data.load({stores["pyramid"]: None}, tmp_path / "images.zarr", HEADS, ("train", "val"), "cpu")


@pytest.mark.parametrize("task", ["segmentation", "multilabel"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused_in_any_split(made, tmp_path, task, value):
    pictures, stores = made(task)
    shutil.copytree(stores["pyramid"], tmp_path / "odd.zarr")
    row = int(np.flatnonzero(image_store.open_images(pictures).split.values == "val")[0])
    name = "level0/features" if task == "segmentation" else "pooled/mean_level0"
    array = zarr.open_group(tmp_path / "odd.zarr", mode="r+")[name]
    values = array[:]
    values[(row, *[0] * (values.ndim - 1))] = value
    array[:] = values
    with pytest.raises(StoreError, match=f"odd.zarr: {name} has values that are no numbers"):
        task_data.load({tmp_path / "odd.zarr": None}, pictures, HEADS, ("train", "val"), "cpu")
    heads = dataclasses.replace(HEADS, max_feature_gb=0.0)
    streamed = task_data.load({tmp_path / "odd.zarr": None}, pictures, heads, ("train", "val"), "cpu")
    with pytest.raises(StoreError, match=f"odd.zarr: {name} has values that are no numbers"):
        count_split(streamed, train_heads(streamed, SETTINGS), "val")
    members = {"odd": FeatureStore(tmp_path / "odd.zarr")}
    described = CompositionConfig((), "logistic", 2, False)
    with pytest.raises(StoreError, match=f"odd.zarr: {name} has values that are no numbers"):
        search.search(members, image_store.open_images(pictures), HEADS, described)


def test_the_linear_probe_learns(made):
    cell = load(made, segmentation="fcn", fcn=FcnHeadConfig(150, 8))
    before, after = (score(cell, train_heads(cell, [HParams(rate, 1e-4, 0)]), "train")[0] for rate in (1e-9, 1e-2))
    assert after > before + 0.1


def test_chosen_levels(made):
    cell = load(made, levels=(0, -1))
    assert [tuple(level.shape[-2:]) for level in cell.splits["val"].inputs] == [(32, 32), (4, 4), (8, 8), (8, 8)]
    assert load(made, "multilabel", levels=(-1,)).splits["val"].inputs.shape[1] == 16
    with pytest.raises(StoreError, match="asks for level 3, and a member of this model has 3"):
        load(made, names=("pyramid", "three"), levels=(3,))


def test_balanced_weights_follow_the_training_split(made):
    cell = load(made, class_weights="balanced")
    label = cell.splits["train"].label
    count = label[label != 255].long().bincount(minlength=cell.task.n_classes)
    assert torch.tensor(cell.task.class_weights)[count > 0] @ count[count > 0].float() == pytest.approx(count.sum().item())
    rarest = int(torch.where(count > 0, count, count.max()).argmin())
    assert cell.task.class_weights[rarest] == max(cell.task.class_weights)
    with pytest.raises(UserError, match="this set is multi-label"):
        load(made, "multilabel", class_weights="balanced")
