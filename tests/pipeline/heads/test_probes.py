import numpy as np
import pytest

from pipeline.heads import probes


@pytest.fixture
def clouds():
    """Three classes, of which 4, 3 and 3 tenths, that overlap in six channels of float64."""
    generator = np.random.default_rng(0)
    label = np.repeat([0, 2, 3], [120, 90, 90])
    return generator.normal(size=(300, 6)) + np.eye(6)[label] * 1.5, label


def test_it_is_the_minimum_of_the_penalised_loss(clouds):
    """The gradient of mean cross-entropy plus half the penalty times the squared weights is zero there."""
    inputs, label = clouds
    for penalty, linear in zip(probes.PENALTIES, probes.fit_logistic("classification", inputs, label, 5), strict=True):
        logits = linear.logits(inputs)
        chance = np.exp(logits - logits.max(1, keepdims=True))
        error = chance / chance.sum(1, keepdims=True) - np.eye(5)[label]
        gradient = error.T @ inputs / len(inputs) + penalty * linear.weight
        assert np.abs(gradient).max() < 2e-3


def test_a_class_that_training_lacks_is_never_said(clouds):
    inputs, label = clouds
    for linear in probes.fit_logistic("classification", inputs, label, 5):
        assert linear.weight.shape == (5, 6)
        assert set(probes.predicted("classification", linear.logits(10 * inputs))) <= {0, 2, 3}


def test_two_classes_and_one(clouds):
    inputs, label = clouds
    two = probes.fit_logistic("classification", inputs, (label == 2).astype(int), 2)
    accuracy = (probes.predicted("classification", two[2].logits(inputs)) == (label == 2)).mean()
    assert accuracy > 0.8
    one = probes.fit_logistic("classification", inputs, np.full(300, 1), 2)
    assert (probes.predicted("classification", one[0].logits(inputs)) == 1).all()


def test_multilabel_is_a_regression_a_class(clouds):
    inputs, label = clouds
    hot = np.stack([label == 0, label != 2, np.ones(300)], axis=1).astype(int)
    together = probes.fit_logistic("multilabel", inputs, hot, 3)
    alone = probes.fit_logistic("classification", inputs, hot[:, 1], 2)
    for joint, single in zip(together, alone, strict=True):
        said = probes.predicted("multilabel", joint.logits(inputs))
        assert said.shape == (300, 3)
        assert (said[:, 1] == probes.predicted("classification", single.logits(inputs))).all()
        assert (said[:, 2] == 1).all()


def test_neighbours_vote(clouds):
    inputs, label = clouds
    assert (probes.predict_knn(inputs, label, inputs) == label).mean() > 0.8
    distance = np.linalg.norm(inputs - inputs[7], axis=1)
    votes = np.bincount(label[np.argsort(distance)[: probes.NEIGHBOURS]])
    assert probes.predict_knn(inputs, label, inputs[[7]])[0] == votes.argmax()
    hot = np.stack([label == 0, label != 2], axis=1).astype(int)
    assert probes.predict_knn(inputs, hot, inputs[:4]).shape == (4, 2)
    assert probes.predict_knn(inputs, hot[:, :1], inputs[:4]).shape == (4, 1), "a multi-label set of one class"


def test_the_same_again(clouds):
    inputs, label = clouds
    first, second = (probes.fit_logistic("classification", inputs.astype(np.float32), label, 4) for _ in range(2))
    assert all((a.weight == b.weight).all() and (a.bias == b.bias).all() for a, b in zip(first, second, strict=True))
