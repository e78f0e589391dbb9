"""Minibatches from several stores, through each of the three interfaces."""

import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_store import N_SAMPLES, all_values, open_store, small_schema
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from cache.errors import StoreError
from cache.loader import FeatureDataset, shuffled_batches
from tests.errors import raises

BUDGETS = pytest.mark.parametrize("budget", [0, 1 << 30], ids=["disk", "memory"])


@pytest.fixture(scope="module", params=["none", "zstd"])
def stores(request, tmp_path_factory):
    """Two stores of the same samples, the second with one level, and their concatenated first levels."""
    folder, first = tmp_path_factory.mktemp("stores"), small_schema(codec=request.param)
    second = replace(first, levels=first.levels[:1], pooled={"mean": 3})
    a, b = open_store(folder / "a", first), open_store(folder / "b", second, seed=1)
    values = [all_values(schema, "level0/features", seed) for seed, schema in enumerate((first, second))]
    return a, b, np.concatenate(values, axis=1).astype("float16")


def make_fields(a, b):
    return {
        "both": [(a, "level0/features"), (b, "level0/features")],
        "deep": [(a, "level1/features")],
        "vector": [(b, "pooled/mean")],
    }


@BUDGETS
def test_stream_yields_every_row_once_with_its_values(stores, budget):
    a, b, both = stores
    train = a.rows("train")
    dataset = FeatureDataset(make_fields(a, b), train, budget=budget)
    assert dataset.in_memory == bool(budget)
    streamed = []
    for index, batch in dataset.stream(shuffled_batches(train, 16, seed=0)):
        np.testing.assert_array_equal(batch["both"], both[index])
        np.testing.assert_array_equal(batch["deep"], a.read("level1/features", index))
        np.testing.assert_array_equal(batch["vector"], b.read("pooled/mean", index))
        streamed += index.tolist()
    assert sorted(streamed) == train.tolist()
    assert streamed != train.tolist()


def test_stream_reuses_memory(stores):
    a, b, _ = stores
    shapes = []
    dataset = FeatureDataset(make_fields(a, b), empty=lambda *args: shapes.append(args[0]) or np.empty(*args))
    list(dataset.stream(shuffled_batches(dataset.rows, 8, seed=0)))
    assert len(shapes) == 2 * 3  # two buffers of three fields for nineteen batches
    assert max(shape[0] for shape in shapes) == 8


def test_shuffled_batches_differ_by_epoch_and_repeat_by_seed():
    rows = np.arange(100)
    first, repeated, later = (np.concatenate(list(shuffled_batches(rows, 7, 3, epoch))) for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, repeated)
    assert (first != later).any()
    assert sorted(later) == rows.tolist()


def test_stream_left_early_or_failing_ends_its_thread(stores):
    def failing_order():
        yield np.array([3])
        raise KeyError("sampler")

    a, b, _ = stores
    dataset = FeatureDataset(make_fields(a, b))
    n_threads = threading.active_count()
    for _ in dataset.stream(shuffled_batches(dataset.rows, 4, seed=0)):
        break
    list(dataset.stream([]))
    with raises(StoreError, 0, 149, key="index", value=(3, 150)):
        list(dataset.stream([np.array([3]), np.array([3, 150])]))
    epoch = dataset.stream(failing_order())
    assert next(epoch)[0].tolist() == [3]
    with pytest.raises(KeyError, match="sampler"):
        next(epoch)
    assert threading.active_count() == n_threads  # batches as small as these need no pool


@pytest.mark.parametrize(("workers", "has_batch_sampler"), [(0, True), (2, True), (2, False)])
def test_torch_dataloader_reads_the_same(stores, workers, has_batch_sampler):
    a, b, both = stores
    train = a.rows("train")
    dataset = FeatureDataset(make_fields(a, b) | {"row": [(a, "pooled/mean_level0")]}, train)
    list(dataset.stream([train[:4]]))  # worker processes are forked after threads were used
    if has_batch_sampler:
        sampler = BatchSampler(RandomSampler(dataset), 16, drop_last=False)
        loader = DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers)
    else:
        loader = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=workers)
    rows = [tuple(row) for row in a.read("pooled/mean_level0", train).tolist()]
    loaded = set()
    for batch in loader:
        assert isinstance(batch["both"], torch.Tensor)
        for row, values in zip(batch["row"], batch["both"], strict=True):
            loaded.add(tuple(row.tolist()))
            np.testing.assert_array_equal(values, both[train[rows.index(tuple(row.tolist()))]])
    assert loaded == set(rows)


def test_get_returns_new_memory(stores):
    a, b, both = stores
    dataset = FeatureDataset(make_fields(a, b), a.rows("test"))
    assert len(dataset) == N_SAMPLES // 3
    np.testing.assert_array_equal(dataset[2]["both"], both[a.rows("test")[2]])
    first = dataset.get(np.array([3]))["both"]
    copy = first.copy()
    dataset.get(np.array([6]))
    np.testing.assert_array_equal(first, copy)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset)).get(np.array([3]))["both"], copy)


@BUDGETS
def test_get_with_a_view_returns_that_view(tmp_path, budget):
    schema = small_schema(views=("identity", "rot90"))
    features = open_store(tmp_path, schema)
    expected = all_values(schema, "level0/features").astype("float16")
    for number, view in enumerate(schema.views):
        dataset = FeatureDataset({"x": [(features, "level0/features")]}, view=view, budget=budget)
        np.testing.assert_array_equal(dataset.get(np.array([7, 140]))["x"], expected[[7, 140], number])


def test_dataset_of_stores_or_arrays_that_do_not_match_is_refused(stores, tmp_path):
    a, _, _ = stores
    schema = small_schema()
    swapped = open_store(tmp_path, replace(schema, sample=("s001", "s000", *schema.sample[2:])))
    with raises(StoreError, "s000", "s001", key="sample", value="s001"):
        FeatureDataset({"x": [(a, "level0/features"), (swapped, "level0/features")]})
    with raises(StoreError, "'x'", (5, 8, 8), (7, 4, 4), key="fields.x", value=[(5, 8, 8), (7, 4, 4)]):
        FeatureDataset({"x": [(a, "level0/features"), (a, "level1/features")]})


@BUDGETS
def test_memory_and_disk_refuse_and_accept_the_same(stores, budget):
    a, _, _ = stores
    fields = {"x": [(a, "level0/features")]}
    dataset = FeatureDataset(fields, a.rows("train"), budget=budget)
    with raises(StoreError, key="index", value=0):
        dataset.get(np.array([1, 0]))
    assert dataset.get([])["x"].shape == (0, 5, 8, 8)
    assert dataset[[]]["x"].shape == (0, 5, 8, 8)
    with raises(StoreError, "np.flatnonzero", key="index", value="bool"):
        FeatureDataset(fields, a.split == "train", budget=budget)
    with raises(StoreError, key="index", value=(-1, -1)):
        FeatureDataset(fields, [-1], budget=budget)
    for empty in ({}, {"x": []}):
        with raises(StoreError, key="fields", value=empty):
            FeatureDataset(empty, budget=budget)
