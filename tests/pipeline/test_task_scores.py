"""Counts and scores against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

from pipeline import tasks


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_confusion_counts_of_chips_give_sklearns_accuracy(generator):
    label, predicted = generator.integers(5, size=(2, 400))
    counts = tasks.confusion_counts(predicted, label, 5)
    assert counts.shape == (400, 25)
    assert counts.sum(0).reshape(5, 5).tolist() == confusion_matrix(label, predicted).tolist()
    assert tasks.accuracy(counts.sum(0), 5) == pytest.approx(accuracy_score(label, predicted))


def test_confusion_counts_of_masks_with_ignored_pixels_give_sklearns_mean_iou(generator):
    label, predicted = generator.integers(4, size=(2, 6, 20, 20))
    label[:, :5] = 255
    counts = tasks.confusion_counts(predicted, label, 4, ignore_value=255)
    valid = label != 255
    expected = jaccard_score(label[valid], predicted[valid], average="macro")
    assert counts.sum() == valid.sum()
    assert tasks.mean_iou(counts.sum(0), 4) == pytest.approx(expected)


def test_mean_iou_of_absent_classes_does_not_change(generator):
    label, predicted = generator.integers(3, size=(2, 2, 10, 10))
    scores = [tasks.mean_iou(tasks.confusion_counts(predicted, label, n).sum(0), n) for n in (3, 7)]
    assert scores[0] == pytest.approx(scores[1])


def test_multilabel_counts_give_sklearns_micro_f1(generator):
    label, predicted = generator.integers(2, size=(2, 300, 6))
    counts = tasks.multilabel_counts(predicted, label)
    assert counts.shape == (300, 18)
    assert tasks.micro_f1(counts.sum(0), 6) == pytest.approx(f1_score(label, predicted, average="micro"))


def test_accuracy_of_several_heads_is_each_heads_own(generator):
    label, predicted = generator.integers(3, size=(2, 4, 50))
    counts = np.stack([tasks.confusion_counts(*pair, 3) for pair in zip(predicted, label, strict=True)])
    np.testing.assert_allclose(tasks.accuracy(counts.sum(1), 3), (label == predicted).mean(1))
