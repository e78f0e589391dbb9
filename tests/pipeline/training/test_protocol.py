"""The frozen protocol, its search, and scores recomputed from stored predictions."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from pipeline.config import HeadsConfig, LinearHeadConfig, SearchConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.tasks import IGNORE, Classification, MultiLabel, Segmentation, counts_from_table
from pipeline.training import predictions, protocol, task_data
from pipeline.training.feature_loader import StreamedFeatures
from tests.errors import raises

HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=60, batch=20), UPerNetHeadConfig(channels=4, steps=4, batch=4)
)
SHORT = SearchConfig(trials=4, trials_per_round=2, seed=0, learning_rate=(1e-2, 1e-1), weight_decay=(1e-3, 1e-1))
LONG = SearchConfig(trials=16, trials_per_round=4, seed=0, learning_rate=(1e-4, 1e-1), weight_decay=(1e-6, 1e-1))
METADATA = {"dataset": "d", "model": "m", "weights": "none"}
BEST = {"learning_rate": 0.05, "weight_decay": 0.01}
NAMES = ["s2", "s0", "s1", "s3"]


def load(stores_and_images, names, splits=("train", "val", "test"), **changes):
    stores, images = stores_and_images
    paths, heads = {stores[name].location: None for name in names}, dataclasses.replace(HEADS, **changes)
    return task_data.load(paths, Path(images.encoding["source"]), heads, splits, "cpu")


class PeakedScore:
    """Best at a learning rate of 0.01; records the rounds, and fails after `n_rounds`."""

    def __init__(self, n_rounds=math.inf):
        self.rounds, self.n_rounds = [], n_rounds

    def __call__(self, all_hparams):
        if len(self.rounds) >= self.n_rounds:
            raise KeyboardInterrupt
        self.rounds.append(all_hparams)
        return [-((math.log10(hparams.learning_rate) + 2) ** 2) for hparams in all_hparams]


@pytest.fixture(scope="module")
def uninterrupted():
    """Score and result of a search."""
    score = PeakedScore()
    return score, protocol.search(score, LONG)


def decay_rate(hparams):
    return hparams["learning_rate"] * hparams["weight_decay"]


@pytest.mark.parametrize("max_feature_gb", [4.0, 0.0], ids=["in memory", "streamed"])
def test_train_and_test_of_chips_scores_as_sklearn_on_the_test_split(informative_chips, max_feature_gb):
    data = load(informative_chips, ["high", "low"], max_feature_gb=max_feature_gb)
    assert isinstance(data.splits["test"].inputs, StreamedFeatures) == (max_feature_gb == 0)
    result = protocol.train_and_test(data, BEST, 3, METADATA)
    expected = {"protocol": "frozen", "metric": "accuracy", "n_test": 30, "task": "classification"}
    expected |= METADATA | BEST | {"head": "linear, concat, mean_level0, mean_level1"}
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
    changes = {"fusion": "average", "levels": (-1,), "class_weights": "balanced"}
    data = load(informative_masks, ["fine", "coarse"], **changes)
    result = protocol.train_and_test(data, BEST, 2, METADATA)
    assert set(result.runs["head"]) == {"upernet of 4 channels, average, level1, balanced class weights"}
    samples, counts = counts_from_table(result.predicted, Segmentation(3))
    assert samples == data.splits["test"].sample
    assert counts.sum() == 2 * (data.splits["test"].label != IGNORE).sum()
    assert Segmentation(3).score(counts.sum(1)).tolist() == result.runs.score.tolist()
    assert not any(math.isnan(value) for value in result.runs.val_score)


def test_tune_with_extreme_bounds_chooses_a_finite_trial(informative_chips):
    data = load(informative_chips, ["high"])
    bounds = {"learning_rate": (0.1, 1.0), "weight_decay": (1.0, 300.0)}
    tuned = protocol.tune(data, dataclasses.replace(SHORT, trials=8, trials_per_round=8, **bounds), "d m")
    scores = {decay_rate(trial): trial["score"] for trial in tuned["trials"]}
    assert max(scores) > 20  # every step multiplies the weights by less than -19
    assert scores[max(scores)] == 0
    result = protocol.train_and_test(data, tuned["best"], 2, METADATA)
    assert set(result.runs["head"]) == {"linear, mean_level0, mean_level1"}
    assert np.isfinite(np.stack(result.predicted.probability)).all()


@pytest.mark.parametrize("kind", ["chips", "masks"])
def test_diverged_heads_are_not_chosen_and_diverged_seeds_are_refused(request, monkeypatch, capsys, kind):
    data = load(request.getfixturevalue(f"informative_{kind}"), ["high" if kind == "chips" else "fine"])
    train_heads, diverging = protocol.train_heads, [1]

    def train_and_diverge(data, hparams):
        group = train_heads(data, hparams)
        for head in diverging:
            weights = group.weights[0][head] if group.is_stacked else next(group.heads[head].parameters())
            weights.data.fill_(math.nan)
        return group

    monkeypatch.setattr(protocol, "train_heads", train_and_diverge)
    with raises(UserError, "1 of 3", "search.learning_rate", value=[1]):
        protocol.train_and_test(data, BEST, 3, METADATA)
    tuned = protocol.tune(data, SHORT, "d m")
    assert capsys.readouterr().out.count("d m: 2 trials") == 2, "a line of progress a round"
    assert [trial.get("diverged", False) for trial in tuned["trials"]] == [False, True] * 2
    assert tuned["best"]["learning_rate"] in {tuned["trials"][index]["learning_rate"] for index in (0, 2)}
    diverging.append(0)
    with raises(UserError, "4", key="learning_rate, weight_decay"):
        protocol.tune(data, SHORT, "d m")


def test_search_finds_the_peak_within_bounds_with_one_seed(uninterrupted):
    score, result = uninterrupted
    assert [len(hparams) for hparams in score.rounds] == [4, 4, 4, 4]
    assert 0.004 < result["best"]["learning_rate"] < 0.025
    trials = [hparams for hparams_of_round in score.rounds for hparams in hparams_of_round]
    assert all(1e-4 <= hparams.learning_rate <= 1e-1 for hparams in trials)
    assert all(1e-6 <= hparams.weight_decay <= 1e-1 for hparams in trials)
    assert {hparams.seed for hparams in trials} == {0}
    assert len({hparams.learning_rate for hparams in trials}) == 16
    scores = [trial["score"] for trial in result["trials"]]
    assert result["score"] == max(scores)
    assert sum(scores[8:]) > sum(scores[:8]), "the sampler learns from the first half"


@pytest.mark.parametrize("n_rounds", [1, 3])
def test_search_killed_is_resumed_after_its_last_whole_round(tmp_path, uninterrupted, n_rounds):
    before, after, study_path = PeakedScore(n_rounds), PeakedScore(), tmp_path / "studies/one.json"
    with pytest.raises(KeyboardInterrupt):
        protocol.search(before, LONG, study_path, cache_key="lite0")
    assert len(json.loads(study_path.read_text())["trials"]) == 4 * n_rounds
    score, result = uninterrupted
    assert protocol.search(after, LONG, study_path, cache_key="lite0") == result
    assert before.rounds + after.rounds == score.rounds
    assert protocol.search(before, LONG, study_path, cache_key="lite0") == result, "no more trials are needed"


def test_search_with_another_key_or_a_damaged_study_starts_again(tmp_path):
    study_path, score = tmp_path / "one.json", PeakedScore()
    result = protocol.search(score, LONG, study_path, cache_key="lite0")
    protocol.search(score, LONG, study_path, cache_key="other features")
    assert len(score.rounds) == 8
    for n_rounds, content in ((12, study_path.read_bytes()[:40]), (16, b"\xff\xfe no text")):
        study_path.write_bytes(content)
        assert protocol.search(score, LONG, study_path, cache_key="lite0") == result
        assert len(score.rounds) == n_rounds


@pytest.mark.parametrize("weight_decay", [(1e-6, 1e-1), (1e-2, 100.0)])
def test_search_with_ties_chooses_the_strongest_decay_that_does_not_grow(weight_decay):
    """AdamW subtracts learning rate times weight decay of every weight; above 2 weights grow."""
    config = dataclasses.replace(LONG, learning_rate=(1e-2, 1.0), weight_decay=weight_decay, trials=32)
    result = protocol.search(lambda trials: [0.5] * len(trials), config)
    rates = [decay_rate(trial) for trial in result["trials"]]
    assert (max(rates) > 2) == (weight_decay[1] > 2)
    assert abs(1 - decay_rate(result["best"])) == min(abs(1 - rate) for rate in rates)


def write_and_read(table, folder):
    """The table as read from a file, with its rows in another order."""
    table.sample(frac=1, random_state=0).to_parquet(folder / "predictions.parquet")
    return pd.read_parquet(folder / "predictions.parquet")


@pytest.mark.parametrize("task", [Classification(3), MultiLabel(3)], ids=["classification", "multilabel"])
def test_prediction_table_gives_sklearns_scores_and_scipys_probabilities(tmp_path, task):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, 4, 3)).astype(np.float32)
    label = generator.integers(2, size=(4, 3)) if task.is_multilabel else generator.integers(3, size=4)
    table = write_and_read(predictions.prediction_table(NAMES, label, logits, task), tmp_path)
    samples, counts = counts_from_table(table, task)
    assert samples == sorted(NAMES)
    score = partial(f1_score, average="micro") if task.is_multilabel else accuracy_score
    expected = [score(label, values > 0 if task.is_multilabel else values.argmax(1)) for values in logits]
    assert task.score(counts.sum(1)) == pytest.approx(expected)
    row = table[(table.seed == 1) & (table["sample"] == "s0")].iloc[0]
    probability = (expit if task.is_multilabel else softmax)(logits[1, 1].astype(float))
    np.testing.assert_allclose(row.probability, probability, rtol=1e-5)
    np.testing.assert_array_equal(row.label, label[1])


def test_confusion_table_gives_sklearns_mean_iou(tmp_path):
    generator = np.random.default_rng(0)
    label, predicted = generator.integers(3, size=(4, 8, 8)), generator.integers(3, size=(2, 4, 8, 8))
    label[:, :2] = IGNORE
    counts_of_seed = np.stack([Segmentation(3).counts(masks, label) for masks in predicted])
    table = write_and_read(predictions.confusion_table(NAMES, counts_of_seed), tmp_path)
    samples, counts = counts_from_table(table, Segmentation(3))
    np.testing.assert_array_equal(counts, counts_of_seed[:, [NAMES.index(name) for name in samples]])
    valid = label != IGNORE
    expected = [jaccard_score(label[valid], masks[valid], average="macro") for masks in predicted]
    assert Segmentation(3).score(counts.sum(1)) == pytest.approx(expected)


def test_prediction_table_of_a_diverged_head_is_refused():
    logits = np.random.default_rng(0).normal(size=(3, 4, 5))
    logits[2, 1, 0] = np.nan
    with raises(UserError, "search.learning_rate", "search.weight_decay", value=[2]):
        predictions.prediction_table(NAMES, np.arange(4), logits, Classification(5))
