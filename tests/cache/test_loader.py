"""Minibatches from several stores: the right rows, in reused memory, however they are asked for."""

import threading

import numpy as np
import pytest
import torch
from small_store import SAMPLES, everything, layout, write
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from cache.errors import StoreError
from cache.loader import FeatureDataset, shuffled_batches
from cache.reader import FeatureStore
from cache.schema import StoreSchema


@pytest.fixture(params=["none", "zstd"])
def stores(request, tmp_path):
    """Two stores of the same samples; the second has a level of another grid."""
    first = layout(codec=request.param)
    write(tmp_path / "a", first)
    second = StoreSchema(**{**first.__dict__, "levels": first.levels[:1], "pooled": {"mean": 3}})
    write(tmp_path / "b", second, seed=1)
    fused = np.concatenate(
        [everything(first, "level0/features"), everything(second, "level0/features", seed=1)], axis=1
    )
    a, b = (FeatureStore(tmp_path / name / "store.zarr") for name in "ab")
    return a, b, fused.astype("float16")


def fields(a, b):
    return {
        "fused": [(a, "level0/features"), (b, "level0/features")],
        "deep": [(a, "level1/features")],
        "vector": [(b, "pooled/mean")],
    }


@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["from disk", "held in memory"])
def test_an_epoch_has_every_row_once_and_the_right_values(stores, budget):
    a, b, fused = stores
    train = a.rows("train")
    batches = FeatureDataset(fields(a, b), train, budget=budget)
    assert batches.in_memory == bool(budget)
    seen = []
    for index, batch in batches.stream(shuffled_batches(train, 16, seed=0)):
        np.testing.assert_array_equal(batch["fused"], fused[index])
        np.testing.assert_array_equal(batch["deep"], a.read("level1/features", index))
        np.testing.assert_array_equal(batch["vector"], b.read("pooled/mean", index))
        seen += index.tolist()
    assert sorted(seen) == train.tolist()
    assert seen != train.tolist()


def test_memory_is_reused_and_bounded(stores):
    a, b, _ = stores
    made = []

    def empty(shape, dtype):
        made.append(shape)
        return np.empty(shape, dtype)

    batches = FeatureDataset(fields(a, b), empty=empty)
    for _ in batches.stream(shuffled_batches(batches.rows, 8, seed=0)):
        pass
    assert len(made) == 2 * 3  # two buffers of three fields for nineteen batches
    assert max(shape[0] for shape in made) == 8


def test_orders_differ_by_epoch_and_repeat_by_seed():
    rows = np.arange(100)
    first, again, later = (np.concatenate(list(shuffled_batches(rows, 7, 3, epoch))) for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != later).any()
    assert sorted(later) == rows.tolist()


def test_leaving_early_ends_the_thread_and_errors_arrive(stores):
    a, b, _ = stores
    batches = FeatureDataset(fields(a, b))
    before = threading.active_count()
    for _ in batches.stream(shuffled_batches(batches.rows, 4, seed=0)):
        break
    list(batches.stream([]))
    with pytest.raises(StoreError, match="has samples 0 to 149; asked for 3 to 150"):
        list(batches.stream([np.array([3]), np.array([3, 150])]))
    assert threading.active_count() == before  # batches as small as these need no pool


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("whole_batches", [True, False])
def test_a_torch_dataloader_reads_the_same(stores, workers, whole_batches):
    a, b, fused = stores
    train = a.rows("train")
    batches = FeatureDataset(fields(a, b) | {"row": [(a, "pooled/mean_level0")]}, train)
    list(batches.stream([train[:4]]))  # worker processes are forked after threads were used
    if whole_batches:
        sampler = BatchSampler(RandomSampler(batches), 16, drop_last=False)
        loader = DataLoader(batches, sampler=sampler, batch_size=None, num_workers=workers)
    else:
        loader = DataLoader(batches, batch_size=16, shuffle=True, num_workers=workers)
    expected = {tuple(row) for row in a.read("pooled/mean_level0", train).tolist()}
    seen = set()
    for batch in loader:
        assert isinstance(batch["fused"], torch.Tensor)
        for row, values in zip(batch["row"], batch["fused"], strict=True):
            seen.add(tuple(row.tolist()))
            place = next(i for i in train if a.read("pooled/mean_level0", [i])[0].tolist() == row.tolist())
            np.testing.assert_array_equal(values, fused[place])
    assert seen == expected


def test_one_sample_and_new_memory(stores):
    a, b, fused = stores
    batches = FeatureDataset(fields(a, b), a.rows("test"))
    assert len(batches) == SAMPLES // 3
    np.testing.assert_array_equal(batches[2]["fused"], fused[a.rows("test")[2]])
    first = batches.get(np.array([3]))["fused"]
    kept = first.copy()
    batches.get(np.array([6]))
    np.testing.assert_array_equal(first, kept)


def test_views_by_name(tmp_path):
    described = layout(views=("identity", "rot90"))
    write(tmp_path, described)
    features = FeatureStore(tmp_path / "store.zarr")
    expected = everything(described, "level0/features").astype("float16")
    for budget in (0, 1 << 30):
        for number, view in enumerate(described.views):
            batches = FeatureDataset({"x": [(features, "level0/features")]}, view=view, budget=budget)
            np.testing.assert_array_equal(batches.get(np.array([7, 140]))["x"], expected[[7, 140], number])


def test_stores_that_do_not_belong_together_are_refused(stores, tmp_path):
    a, _, _ = stores
    described = layout()
    names = list(described.sample)
    names[0], names[1] = names[1], names[0]
    write(tmp_path / "c", StoreSchema(**{**described.__dict__, "sample": tuple(names)}))
    swapped = FeatureStore(tmp_path / "c/store.zarr")
    with pytest.raises(StoreError, match="differ in 'sample' at row 0"):
        FeatureDataset({"x": [(a, "level0/features"), (swapped, "level0/features")]})
    with pytest.raises(StoreError, match=r"'x' cannot be joined along channels: .*\(5, 8, 8\).*\(7, 4, 4\)"):
        FeatureDataset({"x": [(a, "level0/features"), (a, "level1/features")]})


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_memory_and_disk_refuse_and_accept_the_same(stores, budget):
    a, _, _ = stores
    fields = {"x": [(a, "level0/features")]}
    batches = FeatureDataset(fields, a.rows("train"), budget=budget)
    with pytest.raises(StoreError, match="Sample 0 is not among the rows"):
        batches.get(np.array([1, 0]))
    assert batches.get([])["x"].shape == (0, 5, 8, 8)
    assert batches[[]]["x"].shape == (0, 5, 8, 8)
    for rows, said in ((a.split == "train", "A mask becomes one by np.flatnonzero"), ([-1], "asked for -1 to -1")):
        with pytest.raises(StoreError, match=said):
            FeatureDataset(fields, rows, budget=budget)
    for none in ({}, {"x": []}):
        with pytest.raises(StoreError, match="Batches need fields"):
            FeatureDataset(none, budget=budget)


def test_an_order_that_fails_fails_after_what_it_gave(stores):
    a, _, _ = stores

    def order():
        yield np.array([3])
        raise KeyError("sampler")

    epoch = FeatureDataset({"x": [(a, "level0/features")]}).stream(order())
    assert next(epoch)[0].tolist() == [3]
    with pytest.raises(KeyError, match="sampler"):
        next(epoch)
