import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from pipeline.config import HeadsConfig, LinearHeadConfig, SearchConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, Classification, Segmentation, counts_from_table
from pipeline.training import protocol, task_data
from pipeline.training.feature_loader import StreamedFeatures
from tests.errors import raises

HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=60, batch=20), UPerNetHeadConfig(channels=4, steps=4, batch=4)
)
SEARCH = SearchConfig(trials=4, trials_per_round=2, seed=0, learning_rate=(1e-2, 1e-1), weight_decay=(1e-3, 1e-1))
METADATA = {"dataset": "d", "model": "m", "weights": "none"}
BEST = {"learning_rate": 0.05, "weight_decay": 0.01}


def load(stores_and_images, names, splits=("train", "val", "test"), heads=HEADS):
    stores, images = stores_and_images
    paths = {stores[name].location: None for name in names}
    return task_data.load(paths, Path(images.encoding["source"]), heads, splits, "cpu")


@pytest.fixture(params=["chips", "masks"])
def data(request, informative_chips, informative_masks):
    """Data of one backbone, for a linear and a dense head."""
    return load(informative_chips, ["high"]) if request.param == "chips" else load(informative_masks, ["fine"])


@pytest.fixture
def set_diverging(monkeypatch):
    """Function after whose call the heads of these indices have NaN weights once they are trained."""

    def set_heads(*heads):
        def train(data, hparams):
            group = train_heads(data, hparams)
            if group.is_stacked:
                for parameter in group.parameters():
                    parameter.data[list(heads)] = math.nan
            else:
                for head in heads:
                    next(group.heads[head].parameters()).data.fill_(math.nan)
            return group

        monkeypatch.setattr(protocol, "train_heads", train)

    train_heads = protocol.train_heads
    return set_heads


def test_tune_prints_a_line_a_round(informative_chips, capsys):
    tuned = protocol.tune(load(informative_chips, ["high", "low"], ("train", "val")), SEARCH, "d m")
    assert len(tuned["trials"]) == 4
    assert capsys.readouterr().out.count("d m: 2 trials") == 2


@pytest.mark.parametrize("max_feature_gb", [4.0, 0.0], ids=["in memory", "streamed"])
def test_train_and_test_of_chips_scores_as_sklearn_on_the_test_split(informative_chips, max_feature_gb):
    data = load(informative_chips, ["high", "low"], heads=dataclasses.replace(HEADS, max_feature_gb=max_feature_gb))
    assert isinstance(data.splits["test"].inputs, StreamedFeatures) == (max_feature_gb == 0)
    result = protocol.train_and_test(data, BEST, 3, METADATA)
    assert len(result.runs) == 3
    expected = METADATA | BEST | {"protocol": "frozen", "metric": "accuracy", "n_test": 30, "task": "classification"}
    assert result.runs.iloc[0].to_dict().items() >= expected.items()
    images = informative_chips[1]
    is_test = images.split.values == "test"
    for seed, table in result.predicted.groupby("seed"):
        assert table["sample"].tolist() == images.sample.values[is_test].tolist()
        assert table.label.tolist() == images.label.values[is_test].tolist()
        assert result.runs.score[seed] == pytest.approx(accuracy_score(table.label, table.predicted))
        probabilities = np.stack(table.probability)
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
        assert (probabilities.argmax(1) == table.predicted).all()
    assert result.runs.score.mean() > 0.9
    # Predictions and counts are computed by different code.
    _, counts = counts_from_table(result.predicted, Classification(4))
    np.testing.assert_array_equal(counts, protocol.count_split(data, result.group, "test"))


def test_train_and_test_of_masks_has_confusion_matrices(informative_masks):
    data = load(informative_masks, ["fine", "coarse"])
    result = protocol.train_and_test(data, BEST, 2, METADATA)
    samples, counts = counts_from_table(result.predicted, Segmentation(3))
    assert samples == data.splits["test"].sample
    assert counts.sum() == 2 * (data.splits["test"].label != IGNORE).sum()
    assert Segmentation(3).score(counts.sum(1)).tolist() == result.runs.score.tolist()
    assert not any(math.isnan(value) for value in result.runs.val_score)


def test_tune_with_extreme_bounds_chooses_a_finite_trial(informative_chips):
    data = load(informative_chips, ["high"], ("train", "val"))
    config = dataclasses.replace(
        SEARCH, trials=8, trials_per_round=8, learning_rate=(0.1, 1.0), weight_decay=(1.0, 300.0)
    )
    tuned = protocol.tune(data, config, "d m")
    scores = {trial["learning_rate"] * trial["weight_decay"]: trial["score"] for trial in tuned["trials"]}
    assert max(scores) > 20  # every step multiplies the weights by less than -19
    assert scores[max(scores)] == 0
    result = protocol.train_and_test(load(informative_chips, ["high"]), tuned["best"], 2, METADATA)
    assert np.isfinite(np.stack(result.predicted.probability)).all()


def test_train_and_test_with_a_diverged_seed_is_refused(data, set_diverging):
    set_diverging(1)
    with raises(UserError, "1 of 3", "search.learning_rate", value=[1]):
        protocol.train_and_test(data, BEST, 3, METADATA)


def test_tune_does_not_choose_diverged_trials(data, set_diverging):
    set_diverging(1)
    tuned = protocol.tune(data, SEARCH, "d m")
    assert [trial.get("diverged", False) for trial in tuned["trials"]] == [False, True] * 2
    assert tuned["best"]["learning_rate"] in {tuned["trials"][index]["learning_rate"] for index in (0, 2)}
    set_diverging(0, 1)
    with raises(UserError, "4", key="learning_rate, weight_decay"):
        protocol.tune(data, SEARCH, "d m")


def test_train_and_test_describes_the_head(informative_chips, informative_masks):
    def describe(data):
        (head,) = set(protocol.train_and_test(data, BEST, 2, METADATA).runs["head"])
        return head

    assert describe(load(informative_chips, ["high", "low"])) == "linear, concat, mean_level0, mean_level1"
    heads = dataclasses.replace(HEADS, fusion="average", levels=(-1,), class_weights="balanced")
    fused = describe(load(informative_masks, ["fine", "coarse"], heads=heads))
    assert fused == "upernet of 4 channels, average, level1, balanced class weights"
    alone = describe(load(informative_masks, ["fine"], heads=heads))
    assert alone == "upernet of 4 channels, level1, balanced class weights"
