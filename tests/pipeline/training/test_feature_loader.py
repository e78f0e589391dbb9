"""Batches as tensors, from disk and from the device's memory, on the device this machine trains on."""

import numpy as np
import pytest
from small_store import all_values, small_schema, write_store

from cache.loader import shuffled_batches
from cache.reader import FeatureStore
from pipeline import device as compute
from pipeline.training.feature_loader import FeatureLoader


@pytest.mark.parametrize("chosen", ["cpu", "auto"])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_an_epoch_on_the_device(tmp_path, chosen, budget):
    device = compute.resolve_device(chosen)
    write_store(tmp_path)
    features = FeatureStore(tmp_path / "store.zarr")
    expected = all_values(small_schema(), "level0/features").astype("float16")
    train = features.rows("train")
    feed = FeatureLoader({"x": [(features, "level0/features")]}, train, device=device, budget=budget)
    assert feed.in_memory == bool(budget)
    seen = []
    for index, batch in feed.stream(shuffled_batches(train, 16, seed=0)):
        assert batch["x"].device.type == device
        np.testing.assert_array_equal(batch["x"].cpu(), expected[index])
        seen += index.tolist()
    assert sorted(seen) == train.tolist()
