import numpy as np
import pytest

from pipeline.composition import probes
from pipeline.tasks import Classification, MultiLabel


@pytest.fixture
def clouds():
    """Inputs (300, 6) of three overlapping classes, 0, 2 and 3, and their labels."""
    generator = np.random.default_rng(0)
    label = np.repeat([0, 2, 3], [120, 90, 90])
    return generator.normal(size=(300, 6)) + np.eye(6)[label] * 1.5, label


def test_fit_logistic_minimises_the_penalised_loss(clouds):
    """The gradient of mean cross-entropy plus penalty / 2 times the squared weights is zero."""
    inputs, label = clouds
    fitted = probes.fit_logistic(Classification(5), inputs, label)
    for penalty, probe in zip(probes.PENALTIES, fitted, strict=True):
        probability = Classification(5).probabilities(probe.logits(inputs))
        error = probability - np.eye(5)[label]
        gradient = error.T @ inputs / len(inputs) + penalty * probe.weight
        assert np.abs(gradient).max() < 2e-3


def test_fit_logistic_never_predicts_a_class_absent_in_training(clouds):
    inputs, label = clouds
    for probe in probes.fit_logistic(Classification(5), inputs, label):
        assert probe.weight.shape == (5, 6)
        assert set(Classification(5).predict(probe.logits(10 * inputs))) <= {0, 2, 3}


def test_fit_logistic_of_two_classes_and_of_one(clouds):
    inputs, label = clouds
    task = Classification(2)
    two_classes = probes.fit_logistic(task, inputs, (label == 2).astype(int))
    assert (task.predict(two_classes[2].logits(inputs)) == (label == 2)).mean() > 0.8
    one_class = probes.fit_logistic(task, inputs, np.full(300, 1))
    assert (task.predict(one_class[0].logits(inputs)) == 1).all()


def test_fit_logistic_of_multilabel_is_one_regression_per_class(clouds):
    inputs, label = clouds
    multi_hot = np.stack([label == 0, label != 2, np.ones(300)], axis=1).astype(int)
    together = probes.fit_logistic(MultiLabel(3), inputs, multi_hot)
    alone = probes.fit_logistic(Classification(2), inputs, multi_hot[:, 1])
    for joint, single in zip(together, alone, strict=True):
        predicted = MultiLabel(3).predict(joint.logits(inputs))
        assert predicted.shape == (300, 3)
        assert (predicted[:, 1] == Classification(2).predict(single.logits(inputs))).all()
        assert (predicted[:, 2] == 1).all()


def test_predict_knn_votes_among_the_nearest(clouds):
    inputs, label = clouds
    assert (probes.predict_knn(inputs, label, inputs) == label).mean() > 0.8
    distance = np.linalg.norm(inputs - inputs[7], axis=1)
    votes = np.bincount(label[np.argsort(distance)[: probes.NEIGHBOURS]])
    assert probes.predict_knn(inputs, label, inputs[[7]])[0] == votes.argmax()
    multi_hot = np.stack([label == 0, label != 2], axis=1).astype(int)
    assert probes.predict_knn(inputs, multi_hot, inputs[:4]).shape == (4, 2)
    assert probes.predict_knn(inputs, multi_hot[:, :1], inputs[:4]).shape == (4, 1), "multi-label with one class"


def test_fit_logistic_is_deterministic(clouds):
    inputs, label = clouds
    runs = [probes.fit_logistic(Classification(4), inputs.astype(np.float32), label) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert (first.weight == second.weight).all()
        assert (first.bias == second.bias).all()
