"""Scores recomputed from stored predictions, by scikit-learn."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from pipeline.errors import UserError
from pipeline.tasks import IGNORE, Classification, MultiLabel, Segmentation, counts_from_table
from pipeline.training import predictions
from tests.errors import raises

NAMES = ["s2", "s0", "s1", "s3"]


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def write_and_read(table, folder):
    """The table as read from a file, with its rows in another order."""
    table.sample(frac=1, random_state=0).to_parquet(folder / "predictions.parquet")
    return pd.read_parquet(folder / "predictions.parquet")


@pytest.mark.parametrize("task", [Classification(3), MultiLabel(3)], ids=["classification", "multilabel"])
def test_prediction_table_gives_sklearns_scores_and_scipys_probabilities(generator, tmp_path, task):
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


def test_confusion_table_gives_sklearns_mean_iou(generator, tmp_path):
    label, predicted = generator.integers(3, size=(4, 8, 8)), generator.integers(3, size=(2, 4, 8, 8))
    label[:, :2] = IGNORE
    counts_of_seed = np.stack([Segmentation(3).counts(masks, label) for masks in predicted])
    table = write_and_read(predictions.confusion_table(NAMES, counts_of_seed), tmp_path)
    samples, counts = counts_from_table(table, Segmentation(3))
    np.testing.assert_array_equal(counts, counts_of_seed[:, [NAMES.index(name) for name in samples]])
    valid = label != IGNORE
    expected = [jaccard_score(label[valid], masks[valid], average="macro") for masks in predicted]
    assert Segmentation(3).score(counts.sum(1)) == pytest.approx(expected)


def test_prediction_table_of_a_diverged_head_is_refused(generator):
    logits = generator.normal(size=(3, 4, 5)).astype(np.float32)
    logits[2, 1, 0] = np.nan
    with raises(UserError, "search.learning_rate", "search.weight_decay", value=[2]):
        predictions.prediction_table(NAMES, generator.integers(5, size=4), logits, Classification(5))
