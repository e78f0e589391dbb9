import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from pipeline.tasks import Classification, MultiLabel, Segmentation


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_accuracy_is_scikit_learns(generator):
    label, predicted = generator.integers(5, size=(2, 400))
    counts = Classification(5).counts(predicted, label)
    assert counts.shape == (400, 25)
    assert Classification(5).score(counts.sum(0)) == pytest.approx(accuracy_score(label, predicted))


def test_mean_iou_is_scikit_learns_and_ignores(generator):
    label, predicted = generator.integers(4, size=(2, 6, 20, 20))
    label[:, :5] = 255
    counts = Segmentation(4).counts(predicted, label)
    valid = label != 255
    expected = jaccard_score(label[valid], predicted[valid], average="macro")
    assert Segmentation(4).score(counts.sum(0)) == pytest.approx(expected)


def test_a_class_that_never_occurs_does_not_count(generator):
    label, predicted = generator.integers(3, size=(2, 2, 10, 10))
    few = Segmentation(3).score(Segmentation(3).counts(predicted, label).sum(0))
    many = Segmentation(7).score(Segmentation(7).counts(predicted, label).sum(0))
    assert few == pytest.approx(many)


def test_micro_f1_is_scikit_learns(generator):
    label, predicted = generator.integers(2, size=(2, 300, 6))
    counts = MultiLabel(6).counts(predicted, label)
    expected = f1_score(label, predicted, average="micro")
    assert MultiLabel(6).score(counts.sum(0)) == pytest.approx(expected)


def test_scores_of_many_at_once(generator):
    label, predicted = generator.integers(3, size=(2, 4, 50))
    counts = np.stack(
        [Classification(3).counts(p, t) for p, t in zip(predicted, label, strict=True)]
    )
    together = Classification(3).score(counts.sum(1))
    np.testing.assert_allclose(together, (label == predicted).mean(1))
