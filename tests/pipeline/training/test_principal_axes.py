"""Linear heads in principal axes: uncorrelated inputs, the same logits, and faster training."""

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from cache.schema import StoreSchema
from pipeline.heads.config import HeadConfig
from pipeline.heads.linear import StackedLinear
from pipeline.tasks import Classification
from pipeline.training import feature_loader, task_data
from pipeline.training.feature_loader import SplitData
from pipeline.training.loop import HParams, TrainSchedule
from pipeline.training.predictions import predict_logits
from pipeline.training.protocol import train_heads
from pipeline.training.task_data import TaskData
from tests.pipeline.training.test_feature_loader import write_store

ROWS = np.arange(600)


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


def test_rotate_back_of_a_head_keeps_its_logits(inputs, rotations):
    group = StackedLinear([10], 5, [0, 1])
    expected = predict_logits(group, task_data.rotate(inputs, rotations))
    task_data.rotate_back(group, rotations)
    np.testing.assert_allclose(predict_logits(group, inputs), expected, atol=1e-5, rtol=1e-5)


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
