"""The average of members' probabilities."""

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import UserError
from pipeline.report import significance
from pipeline.report.controls import average_members
from pipeline.tasks import Classification, MultiLabel
from pipeline.training import predictions
from tests.errors import raises
from tests.pipeline.report.conftest import make_runs

SAMPLES = [f"s{i:02d}" for i in range(50)]


def make_tables(task, label):
    """Predictions of two members on two seeds, and their probabilities."""
    logits = np.random.default_rng(0).normal(size=(2, 2, len(SAMPLES), task.n_classes))
    tables = [predictions.prediction_table(SAMPLES, label, member, task) for member in logits]
    return tables, task.probabilities(logits, axis=3)


def test_average_members_averages_seed_by_seed_and_scores_once_more():
    label = np.random.default_rng(1).integers(3, size=len(SAMPLES))
    (a, b), probabilities = make_tables(Classification(3), label)
    ensemble = make_runs("d", "a+b", "p+p", [0.1, 0.2], classes=3)
    runs, predicted = average_members([a, b.sample(frac=1, random_state=0)], ensemble)
    expected = probabilities.mean(axis=0).argmax(axis=-1)
    assert np.stack(predicted.predicted).reshape(2, -1).tolist() == expected.tolist()
    assert runs.score.tolist() == pytest.approx((expected == label).mean(axis=1))
    assert runs.model.unique().tolist() == ["a+b, averaged"]
    assert runs[["val_score", "learning_rate", "weight_decay"]].isna().all(axis=None)
    assert significance.model_kind(*runs.loc[0, ["model", "weights", "protocol"]]) in significance.CONTROLS


def test_average_members_of_a_multilabel_task_predicts_above_one_half():
    label = np.random.default_rng(1).integers(2, size=(len(SAMPLES), 3))
    tables, probabilities = make_tables(MultiLabel(3), label)
    runs = make_runs("d", "a+b", "p+p", [0.1, 0.2], classes=3, task="multilabel")
    _, predicted = average_members(tables, runs)
    actual = np.stack(predicted.predicted).reshape(2, len(SAMPLES), 3)
    np.testing.assert_array_equal(actual, probabilities.mean(axis=0) > 0.5)


def test_average_members_tested_with_other_seeds_is_refused():
    tables, _ = make_tables(Classification(2), np.zeros(len(SAMPLES), int))
    runs = make_runs("d", "a+b", "p+p", [0.1, 0.2])
    with raises(UserError, value="a+b"):
        average_members([tables[0], tables[1].query("seed == 0")], runs)
    with raises(UserError, value="a+b"):
        average_members([tables[0], pd.concat([tables[1][1:], tables[1][:1].assign(sample="x")])], runs)
