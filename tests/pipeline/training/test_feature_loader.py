"""Batches as tensors, streamed or in memory, on this machine's device."""

import numpy as np
import pytest
from small_store import all_values, small_schema, write_store

from cache.loader import shuffled_batches
from cache.reader import FeatureStore
from pipeline.device import resolve_device
from pipeline.training.feature_loader import FeatureLoader


@pytest.mark.parametrize("device_name", ["cpu", "auto"])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_feature_loader_epoch_has_every_training_sample_once(tmp_path, device_name, budget):
    device = resolve_device(device_name)
    write_store(tmp_path)
    store = FeatureStore(tmp_path / "store.zarr")
    expected = all_values(small_schema(), "level0/features").astype("float16")
    train_rows = store.rows("train")
    loader = FeatureLoader({"x": [(store, "level0/features")]}, train_rows, device=device, budget=budget)
    assert loader.in_memory == bool(budget)
    rows = []
    for index, batch in loader.stream(shuffled_batches(train_rows, 16, seed=0)):
        assert batch["x"].device.type == device
        np.testing.assert_array_equal(batch["x"].cpu(), expected[index])
        rows += index.tolist()
    assert sorted(rows) == train_rows.tolist()
