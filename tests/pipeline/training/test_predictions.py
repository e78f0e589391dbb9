"""Scores recomputed from what is kept of every test sample, by scikit-learn and torchmetrics."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.metrics import accuracy_score, f1_score
from torchmetrics.classification import MulticlassJaccardIndex

from pipeline.errors import UserError
from pipeline.tasks import Classification, MultiLabel, Segmentation
from pipeline.training import predictions

NAMES = ["s2", "s0", "s1", "s3"]


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def kept(table, path):
    """The table as it comes back from disk, its rows in another order."""
    table.sample(frac=1, random_state=0).to_parquet(path / "predictions.parquet")
    return pd.read_parquet(path / "predictions.parquet")


def test_classes(generator, tmp_path):
    logits, label = generator.normal(size=(3, 4, 5)).astype(np.float32), generator.integers(5, size=4)
    table = kept(predictions.prediction_table(NAMES, label, logits, "classification"), tmp_path)
    samples, counts = predictions.counts_from_table(table, "classification", 5)
    assert samples == sorted(NAMES)
    scores = Classification(5).score(counts.sum(1))
    assert scores == pytest.approx([accuracy_score(label, one.argmax(1)) for one in logits])
    row = table[(table.seed == 1) & (table["sample"] == "s0")].iloc[0]
    np.testing.assert_allclose(row.probability, softmax(logits[1, 1].astype(float)), rtol=1e-5)
    assert counts[1, 0].argmax() == label[1] * 5 + row.predicted


def test_several_labels(generator, tmp_path):
    logits, label = generator.normal(size=(2, 4, 3)), generator.integers(2, size=(4, 3))
    table = kept(predictions.prediction_table(NAMES, label, logits, "multilabel"), tmp_path)
    _, counts = predictions.counts_from_table(table, "multilabel", 3)
    scores = MultiLabel(3).score(counts.sum(1))
    assert scores == pytest.approx([f1_score(label, one > 0, average="micro") for one in logits])
    row = table[(table.seed == 1) & (table["sample"] == "s1")].iloc[0]
    np.testing.assert_allclose(row.probability, expit(logits[1, 2]), rtol=1e-6)


def test_masks(generator, tmp_path):
    label, said = generator.integers(3, size=(4, 8, 8)), generator.integers(3, size=(2, 4, 8, 8))
    label[:, :2] = 255
    each = np.stack([Segmentation(3).counts(one, label) for one in said])
    table = kept(predictions.confusion_table(NAMES, each), tmp_path)
    samples, counts = predictions.counts_from_table(table, "segmentation", 3)
    np.testing.assert_array_equal(counts, each[:, [NAMES.index(name) for name in samples]])
    theirs = MulticlassJaccardIndex(3, ignore_index=255)
    scores = Segmentation(3).score(counts.sum(1))
    assert scores == pytest.approx([float(theirs(torch.tensor(one), torch.tensor(label))) for one in said])


def test_a_diverged_head_is_no_result(generator):
    logits = generator.normal(size=(3, 4, 5)).astype(np.float32)
    logits[2, 1, 0] = np.nan
    with pytest.raises(UserError, match=r"with 1 of 3 seeds \(2\), at .* smaller ones: search.learning_rate"):
        predictions.prediction_table(NAMES, generator.integers(5, size=4), logits, "classification")
