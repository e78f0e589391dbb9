"""Linear heads in principal axes: uncorrelated inputs, the same logits, and faster training."""

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from cache.reader import FeatureStore
from cache.schema import StoreSchema
from cache.writer import Writer
from pipeline.heads.config import HeadConfig
from pipeline.heads.linear import StackedLinear
from pipeline.tasks import Classification
from pipeline.training import feature_loader, task_data
from pipeline.training.feature_loader import SplitData, StreamedFeatures
from pipeline.training.loop import HParams, TrainSchedule
from pipeline.training.predictions import evaluate, predict_logits
from pipeline.training.protocol import train_heads
from pipeline.training.task_data import TaskData

TRAIN_ROWS = np.arange(300)


@pytest.fixture(scope="module")
def spectra(image_dataset, tmp_path_factory):
    """Arrays of 400 chips' mean spectra, strongly correlated, one band twice; and their statistics."""
    image = image_dataset("sample-landuse").image[:400].astype(np.float32)
    values = image.mean(axis=(2, 3))
    values = np.concatenate([values, values[:, 4:5]], axis=1)
    folder = tmp_path_factory.mktemp("bands")
    splits = ["train" if row in TRAIN_ROWS else "val" for row in range(len(values))]
    schema = StoreSchema(
        tuple(f"{row:03d}" for row in range(len(values))), tuple(splits), (),
        {"mean_first": 4, "mean_rest": values.shape[1] - 4}, "float32", 100,
    )  # fmt: skip
    writer = Writer(folder / "scratch", schema, folder / "bands.zarr", {})
    arrays = {"pooled/mean_first": values[:, :4], "pooled/mean_rest": values[:, 4:]}
    for shard in writer.claim_shards():
        writer.write(shard, {name: array[schema.rows(shard)] for name, array in arrays.items()})
    writer.finish()
    store_arrays = [(FeatureStore(folder / "bands.zarr"), name) for name in arrays]
    return store_arrays, [feature_loader.channel_stats(array, TRAIN_ROWS) for array in store_arrays]


def read_inputs(spectra) -> torch.Tensor:
    arrays, stats = spectra
    parts = [feature_loader.read_standardized(*pair) for pair in zip(arrays, [TRAIN_ROWS] * 2, stats, strict=True)]
    return torch.cat(parts, dim=1)


def train_linear(split: SplitData, steps: int, rotations: list[torch.Tensor], hparams: list[HParams]):
    """Train linear heads on two classes, in the axes `rotations` if there are any."""
    config = HeadConfig("linear", "concat", (((split.inputs.shape[1],),),), 2)
    data = TaskData({"train": split}, Classification(2), [], [], [], rotations, config, TrainSchedule(steps, 32))
    return train_heads(data, hparams)


def test_principal_axes_of_correlated_channels_are_orthonormal_and_uncorrelated(spectra):
    rotations = task_data.principal_axes(*spectra, TRAIN_ROWS)
    parts = read_inputs(spectra).split([4, len(rotations[1])], dim=1)
    for values, rotation in zip(parts, rotations, strict=True):
        is_axis = rotation.abs().sum(dim=0) > 0
        axes = rotation[:, is_axis]
        torch.testing.assert_close(axes.T @ axes, torch.eye(int(is_axis.sum())), atol=1e-5, rtol=0)
        rotated = (values @ axes).double()
        covariance = rotated.T @ rotated / len(rotated)
        off_diagonal = covariance - covariance.diag().diag()
        assert off_diagonal.abs().max() < 1e-4 * covariance.diag().max()
        assert (covariance.diag() > task_data.MIN_VARIANCE).all()
        before = values.double().T @ values.double() / len(values)
        assert (before - before.diag().diag()).abs().max() > 0.5, "the channels were correlated"
    assert not rotations[1][:, 0].any(), "two of the channels are the same band"


def test_principal_axes_with_more_threads_have_the_same_bytes(spectra):
    rotations = task_data.principal_axes(*spectra, TRAIN_ROWS)
    with threadpool_limits(2):
        again = task_data.principal_axes(*spectra, TRAIN_ROWS)
    assert all(torch.equal(*pair) for pair in zip(rotations, again, strict=True))


def test_rotate_back_of_a_head_keeps_its_logits(spectra):
    rotations, inputs = task_data.principal_axes(*spectra, TRAIN_ROWS), read_inputs(spectra)
    group = StackedLinear([inputs.shape[1]], 5, [0, 1])
    ((_, expected),) = group.forward_heads(task_data.rotate(inputs, rotations), None)
    expected = expected.detach().clone()
    task_data.rotate_back(group, rotations)
    ((_, logits),) = group.forward_heads(inputs, None)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_rotate_of_streamed_features_equals_those_in_memory(spectra):
    arrays, stats = spectra
    rotations = task_data.principal_axes(*spectra, TRAIN_ROWS)
    stream = StreamedFeatures(arrays, stats, TRAIN_ROWS, "cpu", is_pooled=True)
    rows = torch.arange(len(TRAIN_ROWS)).split(64)
    rotated = torch.cat([batch.clone() for batch in task_data.rotate(stream, rotations).batches(rows)])
    torch.testing.assert_close(rotated, task_data.rotate(read_inputs(spectra), rotations))
    plain = torch.cat([batch.clone() for batch in stream.batches(rows)])
    assert torch.equal(plain, read_inputs(spectra)), "the stream itself does not change"


def test_training_in_principal_axes_learns_a_small_difference_of_two_bands_sooner(spectra):
    """The classes differ by the difference of two neighbouring bands, which has little of their variance."""
    inputs = read_inputs(spectra)
    difference = inputs[:, 5] - inputs[:, 4]
    assert difference.var() < 0.1 * inputs[:, 5].var()
    label = (difference > difference.median()).long()
    split = SplitData(inputs, label, [f"{row}" for row in TRAIN_ROWS])
    hparams = [HParams(learning_rate, 1e-2, 0) for learning_rate in (1e-3, 1e-2, 1e-1)]
    accuracy = []
    for rotations in ([], task_data.principal_axes(*spectra, TRAIN_ROWS)):
        group = train_linear(split, 200, rotations, hparams)
        assert evaluate(group, split, Classification(2), 32).shape[:2] == (3, len(inputs))
        predicted = predict_logits(group, inputs).argmax(axis=2)
        accuracy.append((predicted == label.numpy()).mean(axis=1).max())
    assert accuracy[1] > accuracy[0] + 0.02


def test_principal_axes_of_nearly_equal_channels_keep_their_difference():
    """Channels correlated above 0.999, as neighbouring bands are, have no axis below `MIN_VARIANCE`."""
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, 1500)
    first = generator.normal(size=1500)
    second = first + 0.04 * (2 * label - 1 + 0.3 * generator.normal(size=1500))
    values = np.stack([first, second, generator.normal(size=1500)], axis=1)
    assert np.corrcoef(values[:, 0], values[:, 1])[0, 1] > 0.999
    array, rows = (_ArrayStore(values.astype(np.float32)), "pooled/x"), np.arange(1500)
    stats = feature_loader.channel_stats(array, rows)
    rotations = task_data.principal_axes([array], [stats], rows)
    inputs = feature_loader.read_standardized(array, rows, stats)
    split = SplitData(inputs, torch.from_numpy(label), [str(row) for row in rows])
    group = train_linear(split, 600, rotations, [HParams(rate, 1e-2, 0) for rate in (1e-2, 1e-1)])
    predicted = predict_logits(group, inputs).argmax(axis=2)
    assert (predicted == label).mean(axis=1).max() > 0.98


class _ArrayStore:
    """A store of one pooled array in memory."""

    level_arrays = ()

    def __init__(self, values: np.ndarray):
        self.values = values

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self.values[rows].copy()
