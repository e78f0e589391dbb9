import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from pipeline.config import HeadsConfig, LinearHeadConfig, SearchConfig, UPerNetHeadConfig
from pipeline.errors import UserError
from pipeline.tasks import Segmentation
from pipeline.training import predictions, protocol, task_data
from pipeline.training.feature_loader import StreamedFeatures

HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=100, batch=20), UPerNetHeadConfig(channels=4, steps=10, batch=4)
)
SEARCH = SearchConfig(trials=4, trials_per_round=2, seed=0, learning_rate=(1e-2, 1e-1), weight_decay=(1e-3, 1e-1))
TOLD = {"dataset": "d", "model": "m", "weights": "none"}


def load(given, names, splits=("train", "val", "test"), heads=HEADS):
    members, like = given
    stores = {members[name].location: None for name in names}
    return task_data.load(stores, Path(like.encoding["source"]), heads, splits, "cpu")


def test_chips_searched_trained_and_kept(informative_chips, capsys):
    cell = load(informative_chips, ["high", "low"], ("train", "val"))
    tuned = protocol.tune(cell, SEARCH, "d m")
    assert len(tuned["trials"]) == 4
    assert capsys.readouterr().out.count("d m: 2 trials, best on validation") == 2
    tested = protocol.train_and_test(load(informative_chips, ["high", "low"]), tuned["best"], 3, TOLD)
    runs, kept = tested.runs, tested.predicted
    assert len(runs) == 3
    assert set(runs.protocol) == {"frozen"}
    assert runs.iloc[0].to_dict().items() >= {**TOLD, **tuned["best"], "metric": "accuracy", "n_test": 30}.items()
    like = informative_chips[1]
    names = like.sample.values[like.split.values == "test"].tolist()
    for seed, table in kept.groupby("seed"):
        assert table["sample"].tolist() == names
        assert table.label.tolist() == like.label.values[like.split.values == "test"].tolist()
        assert runs.score[seed] == pytest.approx(accuracy_score(table.label, table.predicted))
        chances = np.stack(table.probability)
        np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)
        assert (chances.argmax(1) == table.predicted).all()
    assert runs.score.mean() > 0.9


def test_the_kept_counts_are_those_of_the_evaluation(informative_chips):
    """Predictions are made apart from `Cell.counts`; both must say the same."""
    from pipeline.training.head_trainer import HParams

    cell = load(informative_chips, ["high", "none"])
    group = protocol.train_heads(cell, [HParams(0.05, 0.01, seed) for seed in range(3)])
    kept = protocol.train_and_test(cell, {"learning_rate": 0.05, "weight_decay": 0.01}, 3, TOLD).predicted
    _, counts = predictions.counts_from_table(kept, "classification", 4)
    np.testing.assert_array_equal(counts, protocol.count_split(cell, group, "test"))


def test_masks_keep_their_confusion(informative_masks):
    cell = load(informative_masks, ["fine", "coarse"])
    tested = protocol.train_and_test(cell, {"learning_rate": 0.01, "weight_decay": 0.01}, 2, TOLD)
    runs, kept = tested.runs, tested.predicted
    samples, counts = predictions.counts_from_table(kept, "segmentation", 3)
    assert samples == cell.splits["test"].sample
    assert counts.sum() == 2 * (cell.splits["test"].label != 255).sum()
    assert Segmentation(3).score(counts.sum(1)).tolist() == runs.score.tolist()
    assert not any(math.isnan(value) for value in runs.val_score)


def test_streamed_chips_are_kept_as_those_in_memory(informative_chips):
    best = {"learning_rate": 0.05, "weight_decay": 0.01}
    cell = load(informative_chips, ["high", "low"], heads=dataclasses.replace(HEADS, max_feature_gb=0.0))
    assert isinstance(cell.splits["test"].inputs, StreamedFeatures)
    tested = protocol.train_and_test(cell, best, 2, TOLD)
    runs, kept = tested.runs, tested.predicted
    for seed, table in kept.groupby("seed"):
        assert runs.score[seed] == pytest.approx(accuracy_score(table.label, table.predicted))
    assert runs.score.mean() > 0.9


def test_a_search_whose_heads_all_but_diverge_takes_one_that_does_not(informative_chips):
    cell = load(informative_chips, ["high"], ("train", "val"))
    wild = dataclasses.replace(SEARCH, trials=8, parallel=8, learning_rate=(0.1, 1.0), weight_decay=(1.0, 300.0))
    tuned = protocol.tune(cell, wild, "d m")
    products = {one["learning_rate"] * one["weight_decay"]: one["score"] for one in tuned["trials"]}
    assert max(products) > 20  # which multiplies weights by less than -10 in every step
    assert products[max(products)] == 0
    tested = protocol.train_and_test(load(informative_chips, ["high"]), tuned["best"], 2, TOLD)
    assert np.isfinite(np.stack(tested.predicted.probability)).all()


def diverging(cell: task_data.TaskData, heads: set[int]) -> task_data.TaskData:
    """The same with some heads' weights no numbers once they are trained."""

    def train(settings):
        group = protocol.train_heads(cell, settings)
        for lane in group.independent_heads():
            for parameter in lane.parameters():
                if group.is_stacked:
                    parameter.data[[*heads]] = float("nan")
        if not group.is_stacked:
            for head in heads:
                next(group.heads[head].parameters()).data.fill_(float("nan"))
        return group

    return dataclasses.replace(cell, train=train)


@pytest.mark.parametrize("of", ["chips", "masks"])
def test_a_seed_that_diverged_is_no_score(informative_chips, informative_masks, of):
    cell = load(informative_chips, ["high"]) if of == "chips" else load(informative_masks, ["fine"])
    best = {"learning_rate": 0.01, "weight_decay": 0.01}
    with pytest.raises(UserError, match=r"diverged with 1 of 3 seeds \(1\), at"):
        protocol.train_and_test(diverging(cell, {1}), best, 3, TOLD)


@pytest.mark.parametrize("of", ["chips", "masks"])
def test_trials_that_diverged_are_not_chosen_and_a_search_of_them_alone_is_refused(informative_chips, informative_masks, of):
    cell = load(informative_chips, ["high"]) if of == "chips" else load(informative_masks, ["fine"])
    tuned = protocol.tune(diverging(cell, {1}), SEARCH, "d m")
    assert [trial.get("diverged", False) for trial in tuned["trials"]] == [False, True] * 2
    assert tuned["best"]["learning_rate"] in {tuned["trials"][place]["learning_rate"] for place in (0, 2)}
    with pytest.raises(UserError, match="All 4 trials diverged, at learning rates from 0.0"):
        protocol.tune(diverging(cell, {0, 1}), SEARCH, "d m")


def test_a_run_says_what_was_trained_on_what(informative_chips, informative_masks):
    best = {"learning_rate": 0.01, "weight_decay": 0.01}
    (head,) = set(protocol.train_and_test(load(informative_chips, ["high", "low"]), best, 2, TOLD).runs["head"])
    assert head.startswith("linear, concat, ")
    heads = dataclasses.replace(HEADS, fusion="average", levels=(-1,), class_weights="balanced")
    (head,) = set(protocol.train_and_test(load(informative_masks, ["fine", "coarse"], heads=heads), best, 2, TOLD).runs["head"])
    assert head.startswith("upernet of 4 channels, average, level")
    assert head.endswith(", balanced class weights")
    (head,) = set(protocol.train_and_test(load(informative_masks, ["fine"], heads=heads), best, 2, TOLD).runs["head"])
    assert "average" not in head, "one member is not fused"
