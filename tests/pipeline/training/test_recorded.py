"""Steps that read all that changes from the device's memory: what a GPU records, launched here kernel by kernel."""

import pytest
import torch

from pipeline.training import fit
from pipeline.training.fit import Data
from pipeline.training.recorded import Recorded
from tests.pipeline.training.test_fit import SETTINGS, linear, upernet, weights


@pytest.fixture
def unrecorded(monkeypatch):
    """Train as a GPU does, but for recording."""
    monkeypatch.setattr(Recorded, "__call__", Recorded.once)

    def in_memory(lane, data, recipe, validation):
        list(fit._repeated(lane, fit._steps(lane, data, recipe, None), validation))

    return lambda: monkeypatch.setattr(fit, "_in_memory", in_memory)


@pytest.mark.parametrize("seeds", [(0, 1, 2), (5, 5, 5)])
def test_linear_heads_are_those_of_plain_steps(unrecorded, points, seeds):
    settings = [
        fit.Setting(one.learning_rate, one.weight_decay, seed) for one, seed in zip(SETTINGS, seeds, strict=True)
    ]
    plain = linear(*points, settings)
    unrecorded()
    ours = linear(*points, settings)
    for head in range(3):
        torch.testing.assert_close(weights(ours, head), weights(plain, head), rtol=1e-4, atol=1e-6)


def test_dense_heads_are_those_of_plain_steps(unrecorded, maps):
    plain = upernet(*maps, SETTINGS)[0]
    unrecorded()
    ours = upernet(*maps, SETTINGS)[0]
    for head in range(3):
        apart = (weights(ours, head) - weights(plain, head)).norm() / weights(plain, head).norm()
        assert apart < 1e-3


def test_heads_that_stop_stop_at_the_same_step(unrecorded, points, maps):
    more = {"patience": 2, "validation": Data(*maps), "steps": 60}
    plain = upernet(*maps, SETTINGS, **more)[0]
    unrecorded()
    ours = upernet(*maps, SETTINGS, **more)[0]
    for head in range(3):
        apart = (weights(ours, head) - weights(plain, head)).norm() / weights(plain, head).norm()
        assert apart < 1e-2


def test_a_step_reads_the_next_rows_and_the_next_rate():
    seen = []
    orders = torch.arange(24).view(4, 2, 3)
    steps = Recorded(lambda index, factor: seen.append((index.tolist(), factor.item())), orders, [0.1, 0.2, 0.3, 0.4])
    for _ in range(4):
        steps.once()
    assert [index for index, _ in seen] == orders.tolist()
    assert [factor for _, factor in seen] == pytest.approx([0.1, 0.2, 0.3, 0.4])
