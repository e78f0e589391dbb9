"""Scores recomputed from stored predictions, by scikit-learn and torchmetrics."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.metrics import accuracy_score, f1_score
from torchmetrics.classification import MulticlassJaccardIndex

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


def test_prediction_table_of_classification_gives_sklearns_accuracy(generator, tmp_path):
    logits, label = generator.normal(size=(3, 4, 5)).astype(np.float32), generator.integers(5, size=4)
    table = write_and_read(predictions.prediction_table(NAMES, label, logits, Classification(5)), tmp_path)
    samples, counts = counts_from_table(table, Classification(5))
    assert samples == sorted(NAMES)
    scores = Classification(5).score(counts.sum(1))
    assert scores == pytest.approx([accuracy_score(label, head_logits.argmax(1)) for head_logits in logits])
    row = table[(table.seed == 1) & (table["sample"] == "s0")].iloc[0]
    np.testing.assert_allclose(row.probability, softmax(logits[1, 1].astype(float)), rtol=1e-5)
    assert counts[1, 0].argmax() == label[1] * 5 + row.predicted


def test_prediction_table_of_multilabel_gives_sklearns_micro_f1(generator, tmp_path):
    logits, label = generator.normal(size=(2, 4, 3)), generator.integers(2, size=(4, 3))
    table = write_and_read(predictions.prediction_table(NAMES, label, logits, MultiLabel(3)), tmp_path)
    _, counts = counts_from_table(table, MultiLabel(3))
    scores = MultiLabel(3).score(counts.sum(1))
    assert scores == pytest.approx([f1_score(label, head_logits > 0, average="micro") for head_logits in logits])
    row = table[(table.seed == 1) & (table["sample"] == "s1")].iloc[0]
    np.testing.assert_allclose(row.probability, expit(logits[1, 2]), rtol=1e-6)


def test_confusion_table_gives_torchmetrics_mean_iou(generator, tmp_path):
    label, predicted = generator.integers(3, size=(4, 8, 8)), generator.integers(3, size=(2, 4, 8, 8))
    label[:, :2] = IGNORE
    counts_of_seed = np.stack([Segmentation(3).counts(masks, label) for masks in predicted])
    table = write_and_read(predictions.confusion_table(NAMES, counts_of_seed), tmp_path)
    samples, counts = counts_from_table(table, Segmentation(3))
    np.testing.assert_array_equal(counts, counts_of_seed[:, [NAMES.index(name) for name in samples]])
    reference = MulticlassJaccardIndex(3, ignore_index=IGNORE)
    expected = [float(reference(torch.tensor(masks), torch.tensor(label))) for masks in predicted]
    assert Segmentation(3).score(counts.sum(1)) == pytest.approx(expected)


def test_prediction_table_of_a_diverged_head_is_refused(generator):
    logits = generator.normal(size=(3, 4, 5)).astype(np.float32)
    logits[2, 1, 0] = np.nan
    with raises(UserError, "search.learning_rate", "search.weight_decay", value=[2]):
        predictions.prediction_table(NAMES, generator.integers(5, size=4), logits, Classification(5))
