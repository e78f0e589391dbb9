"""The batch that is found where none is given; on a GPU in test_gpu.py."""

import pytest
from small_store import shard_values, small_schema

from cache.writer import Writer
from pipeline.extraction import batch_size


@pytest.mark.parametrize(
    ("most", "room", "found"), [(64, 1e9, 64), (48, 1e9, 32), (64, 160, 16), (64, 159, 8), (64, 1, 1)]
)
def test_a_batch_is_doubled_until_the_next_may_not_fit(most, room, found):
    tried = []

    def needs(count):
        tried.append(count)
        return 10 * count

    assert batch_size._doubled(most, room, needs) == found
    assert max(tried) <= found  # what may not fit is not tried


def test_a_store_keeps_to_the_batch_that_was_found_first(tmp_path):
    place = tmp_path / "scratch/batch"
    assert batch_size.shared_choice(place, lambda: 16) == 16
    assert batch_size.shared_choice(place, lambda: pytest.fail("it is known")) == 16
    assert [path.name for path in place.parent.iterdir()] == ["batch"]


def test_a_late_worker_takes_the_batch_of_the_finished_store(tmp_path):
    said, described = {"backbone": "b", "bands": ("red",)}, small_schema(samples=8)
    writer = Writer(tmp_path / "scratch", described, tmp_path / "store.zarr", {**said, "batch": 16})
    writer.write(0, shard_values(described, 0))
    writer.finish()
    assert batch_size.batch_of_existing_store(tmp_path / "store.zarr", said, ("identity",)) == 16
    assert batch_size.batch_of_existing_store(tmp_path / "store.zarr", said, ("identity", "flip_x")) == 0
    assert batch_size.batch_of_existing_store(tmp_path / "store.zarr", {**said, "bands": ("nir",)}, ("identity",)) == 0
    assert batch_size.batch_of_existing_store(tmp_path / "none.zarr", said, ("identity",)) == 0
