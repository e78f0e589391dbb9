"""The batch that is found where none is given; on a GPU in test_gpu.py."""

import pytest

from pipeline.extraction import batch


@pytest.mark.parametrize(
    ("most", "room", "found"), [(64, 1e9, 64), (48, 1e9, 32), (64, 160, 16), (64, 159, 8), (64, 1, 1)]
)
def test_a_batch_is_doubled_until_the_next_may_not_fit(most, room, found):
    tried = []

    def needs(count):
        tried.append(count)
        return 10 * count

    assert batch._doubled(most, room, needs) == found
    assert max(tried) <= found  # what may not fit is not tried


def test_a_store_keeps_to_the_batch_that_was_found_first(tmp_path):
    place = tmp_path / "scratch/batch"
    assert batch.agreed(place, lambda: 16) == 16
    assert batch.agreed(place, lambda: pytest.fail("it is known")) == 16
    assert [path.name for path in place.parent.iterdir()] == ["batch"]
