import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from pipeline import metrics


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_accuracy_is_scikit_learns(generator):
    label, predicted = generator.integers(5, size=(2, 400))
    counts = metrics.counts("classification", predicted, label, 5, None)
    assert counts.shape == (400, 25)
    assert metrics.score("classification", counts.sum(0), 5) == pytest.approx(accuracy_score(label, predicted))


def test_mean_iou_is_scikit_learns_and_ignores(generator):
    label, predicted = generator.integers(4, size=(2, 6, 20, 20))
    label[:, :5] = 255
    counts = metrics.counts("segmentation", predicted, label, 4, 255)
    valid = label != 255
    expected = jaccard_score(label[valid], predicted[valid], average="macro")
    assert metrics.score("segmentation", counts.sum(0), 4) == pytest.approx(expected)


def test_a_class_that_never_occurs_does_not_count(generator):
    label, predicted = generator.integers(3, size=(2, 2, 10, 10))
    few = metrics.score("segmentation", metrics.counts("segmentation", predicted, label, 3, None).sum(0), 3)
    many = metrics.score("segmentation", metrics.counts("segmentation", predicted, label, 7, None).sum(0), 7)
    assert few == pytest.approx(many)


def test_micro_f1_is_scikit_learns(generator):
    label, predicted = generator.integers(2, size=(2, 300, 6))
    counts = metrics.counts("multilabel", predicted, label, 6, None)
    expected = f1_score(label, predicted, average="micro")
    assert metrics.score("multilabel", counts.sum(0), 6) == pytest.approx(expected)


def test_scores_of_many_at_once(generator):
    label, predicted = generator.integers(3, size=(2, 4, 50))
    counts = np.stack(
        [metrics.counts("classification", p, t, 3, None) for p, t in zip(predicted, label, strict=True)]
    )
    together = metrics.score("classification", counts.sum(1), 3)
    np.testing.assert_allclose(together, (label == predicted).mean(1))
