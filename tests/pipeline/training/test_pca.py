"""Linear heads in principal axes: uncorrelated there, the same outside, and better where channels go together."""

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
from pipeline.training import feature_inputs, pca, task_data
from pipeline.training.evaluate import evaluate, predict_logits
from pipeline.training.feature_loader import SplitData, StreamedFeatures
from pipeline.training.head_trainer import HParams, TrainSchedule

TRAINING = np.arange(300)
TASK = Classification(2)


@pytest.fixture(scope="module")
def bands(image_dataset, tmp_path_factory):
    """Chips' mean spectra, which are strongly correlated, with one band twice, as a store of 400 vectors."""
    image = image_dataset("sample-landuse").image[:400].astype(np.float32)
    spectra = image.mean(axis=(2, 3))
    spectra = np.concatenate([spectra, spectra[:, 4:5]], axis=1)
    folder = tmp_path_factory.mktemp("bands")
    splits = ["train" if place in TRAINING else "val" for place in range(len(spectra))]
    layout = StoreSchema(
        tuple(f"{place:03d}" for place in range(len(spectra))), tuple(splits), (),
        {"mean_first": 4, "mean_rest": spectra.shape[1] - 4}, "float32", 100,
    )  # fmt: skip
    writer = Writer(folder / "scratch", layout, folder / "bands.zarr", {})
    drawn = {"pooled/mean_first": spectra[:, :4], "pooled/mean_rest": spectra[:, 4:]}
    for shard in writer.claim_shards():
        writer.write(shard, {name: values[layout.rows(shard)] for name, values in drawn.items()})
    writer.finish()
    store = FeatureStore(folder / "bands.zarr")
    fields = [(store, name) for name in drawn]
    return fields, [feature_inputs.channel_stats(field, TRAINING) for field in fields]


def inputs_of(bands, rows=TRAINING) -> torch.Tensor:
    fields, by = bands
    return torch.cat(
        [feature_inputs.read_standardized(field, rows, each) for field, each in zip(fields, by, strict=True)], dim=1
    )


def turns_of(bands) -> list[torch.Tensor]:
    return pca.principal_axes(*bands, TRAINING)


def test_features_are_uncorrelated_in_their_axes_and_flat_ones_are_zero(bands):
    turns = turns_of(bands)
    plain = inputs_of(bands).split([4, len(turns[1])], dim=1)
    for values, one in zip(plain, turns, strict=True):
        kept = one.abs().sum(dim=0) > 0
        torch.testing.assert_close(one[:, kept].T @ one[:, kept], torch.eye(int(kept.sum())), atol=1e-5, rtol=0)
        moved = (values @ one)[:, kept].double()
        apart = moved.T @ moved / len(moved)
        assert (apart - apart.diag().diag()).abs().max() < 1e-4 * apart.diag().max()
        assert (apart.diag() > pca.FLAT).all()
        before = values.double().T @ values.double() / len(values)
        assert (before - before.diag().diag()).abs().max() > 0.5, "or there was nothing to turn"
    assert not turns[1][:, 0].any(), "two of the channels are one band"


def test_axes_do_not_depend_on_how_many_threads_there_are(bands):
    one = turns_of(bands)
    with threadpool_limits(2):
        assert all(torch.equal(*pair) for pair in zip(one, turns_of(bands), strict=True))


def test_a_head_turned_back_says_the_same(bands):
    turns, plain = turns_of(bands), inputs_of(bands)
    group = StackedLinear([plain.shape[1]], 5, [0, 1])
    ((_, wanted),) = group.forward_heads(pca.rotate(plain, turns), None)
    wanted = wanted.detach().clone()
    pca.rotate_back(group, turns)
    ((_, said),) = group.forward_heads(plain, None)
    torch.testing.assert_close(said, wanted, atol=1e-5, rtol=1e-5)


def test_streamed_vectors_are_turned_like_those_in_memory(bands):
    fields, by = bands
    turns = turns_of(bands)
    stream = StreamedFeatures(fields, by, TRAINING, "cpu", is_pooled=True)
    rows = torch.arange(len(TRAINING)).split(64)
    said = torch.cat([batch.clone() for batch in pca.rotate(stream, turns).batches(rows)])
    torch.testing.assert_close(said, pca.rotate(inputs_of(bands), turns))
    plain = torch.cat([batch.clone() for batch in stream.batches(rows)])
    assert torch.equal(plain, inputs_of(bands)), "the stream itself is not turned"


def test_a_small_difference_of_two_bands_is_learnt_sooner(bands):
    """What tells the classes apart is how two neighbouring bands differ: little of what either varies."""
    plain = inputs_of(bands)
    difference = plain[:, 5] - plain[:, 4]
    assert difference.var() < 0.1 * plain[:, 5].var()
    label = (difference > difference.median()).long()
    names = [f"{place}" for place in TRAINING]
    part = SplitData(plain, label, names)
    blueprint = HeadConfig("linear", "concat", (((plain.shape[1],),),), 2)
    right = []
    for turns in ((), turns_of(bands)):
        train = task_data.make_trainer({"train": part}, TASK, TrainSchedule(200, 32), blueprint, turns)
        group = train([HParams(rate, 1e-2, 0) for rate in (1e-3, 1e-2, 1e-1)])
        counts = evaluate(group, part, TASK, 32)
        right.append((predict_logits(group, plain).argmax(axis=2) == label.numpy()).mean(axis=1).max())
        assert counts.shape[:2] == (3, len(plain))
    assert right[1] > right[0] + 0.02


def test_channels_that_differ_by_little_are_still_told_apart():
    """Correlated above .999, as neighbouring bands are: no axis of theirs is flat."""
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, 1500)
    first = generator.normal(size=1500)
    second = first + 0.04 * (2 * label - 1 + 0.3 * generator.normal(size=1500))
    values = np.stack([first, second, generator.normal(size=1500)], axis=1)
    assert np.corrcoef(values[:, 0], values[:, 1])[0, 1] > 0.999
    field = (_Array(values.astype(np.float32)), "pooled/x")
    rows = np.arange(1500)
    by = feature_inputs.channel_stats(field, rows)
    turns = pca.principal_axes([field], [by], rows)
    part = SplitData(
        feature_inputs.read_standardized(field, rows, by), torch.from_numpy(label), [str(row) for row in rows]
    )
    blueprint = HeadConfig("linear", "concat", (((3,),),), 2)
    train = task_data.make_trainer({"train": part}, TASK, TrainSchedule(600, 32), blueprint, turns)
    said = predict_logits(train([HParams(rate, 1e-2, 0) for rate in (1e-2, 1e-1)]), part.inputs).argmax(axis=2)
    assert (said == label).mean(axis=1).max() > 0.98


class _Array:
    """A store of one array, as `fusion` reads it."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self.values[rows].copy()
