import numpy as np
import pytest

from pipeline.composition import probes
from pipeline.tasks import Classification


@pytest.fixture
def clouds():
    """Inputs (300, 6) of three overlapping classes, 0, 2 and 3, and their labels."""
    label = np.repeat([0, 2, 3], [120, 90, 90])
    return np.random.default_rng(0).normal(size=(300, 6)) + np.eye(6)[label] * 1.5, label


def test_fit_logistic_minimizes_the_penalized_loss_and_never_predicts_a_class_absent_in_training(clouds):
    """The gradient of mean cross-entropy plus penalty / 2 times the squared weights is zero."""
    (inputs, label), task = clouds, Classification(5)
    for penalty, probe in zip(probes.PENALTIES, probes.fit_logistic(task, inputs, label), strict=True):
        error = task.probabilities(probe.logits(inputs)) - np.eye(5)[label]
        gradient = error.T @ inputs / len(inputs) + penalty * probe.weight
        assert np.abs(gradient).max() < 2e-3
        assert set(task.predict(probe.logits(10 * inputs))) <= {0, 2, 3}


def test_fit_logistic_of_two_classes_and_of_one(clouds):
    (inputs, label), task = clouds, Classification(2)
    two_classes = probes.fit_logistic(task, inputs, (label == 2).astype(int))
    assert (task.predict(two_classes[2].logits(inputs)) == (label == 2)).mean() > 0.8
    one_class = probes.fit_logistic(task, inputs, np.full(300, 1))
    assert (task.predict(one_class[0].logits(inputs)) == 1).all()


def test_predict_knn_votes_among_the_nearest(clouds):
    inputs, label = clouds
    votes = np.bincount(label[np.argsort(np.linalg.norm(inputs - inputs[7], axis=1))[: probes.NEIGHBOURS]])
    assert probes.predict_knn(inputs, label, inputs[[7]])[0] == votes.argmax()
    multi_hot = np.stack([label == 0, label != 2], axis=1).astype(int)
    for n_classes in (1, 2):
        assert probes.predict_knn(inputs, multi_hot[:, :n_classes], inputs[:4]).shape == (4, n_classes)
