"""Probes and similarity of features, against scikit-learn, scipy and formulas."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from pipeline.composition import probes
from pipeline.composition.cka import MAX_PERMUTATIONS, MIN_PAIRS, MIN_SAMPLES, correlation_with_gain, linear_cka
from pipeline.tasks import Classification
from tests.errors import raises


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


def test_linear_cka_is_invariant_to_rotation_scale_and_offset():
    generator = np.random.default_rng(0)
    a = generator.normal(size=(200, 12))
    rotation, _ = np.linalg.qr(generator.normal(size=(12, 12)))
    similarity = linear_cka({"a": a, "b": 7 + 3 * a @ rotation})
    assert similarity.index.tolist() == similarity.columns.tolist() == ["a", "b"]
    np.testing.assert_allclose(similarity, np.ones((2, 2)), atol=1e-12)


def test_linear_cka_unrelated_features_with_more_channels_than_samples_is_zero():
    """The biased estimate would be above .8."""
    generator = np.random.default_rng(0)
    pairs = generator.normal(size=(5, 2, 60, 300))
    assert abs(np.mean([linear_cka({"a": a, "b": b}).loc["a", "b"] for a, b in pairs])) < 0.02


def test_linear_cka_equals_the_unbiased_hsic_of_gram_matrices():
    """Equation 3 of Nguyen, Raghu and Kornblith (arXiv 2010.15327), written out."""
    generator = np.random.default_rng(0)
    n = 40
    a = 100 + generator.normal(size=(n, 9))
    b = a[:, :4] + generator.normal(size=(n, 4))

    def hsic(left, right):
        grams = [values @ values.T for values in (left - left.mean(0), right - right.mean(0))]
        for gram in grams:
            np.fill_diagonal(gram, 0)
        k, m = grams
        return np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()

    expected = hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))
    assert linear_cka({"a": a, "b": b}).loc["a", "b"] == pytest.approx(expected, rel=1e-9)


def test_linear_cka_too_few_samples_is_refused():
    with raises(ValueError, MIN_SAMPLES, 3):
        linear_cka({"a": np.eye(3)})


def random_pairs(generator: np.random.Generator, n_backbones: int, datasets: str) -> pd.DataFrame:
    """Pairs of backbones with unrelated CKA and gain, which both depend on the dataset and the backbones."""
    pairs = list(combinations(range(n_backbones), 2))
    of_backbone, of_pair = generator.normal(size=(2, n_backbones)), generator.normal(size=(2, len(pairs)))
    tables = []
    for dataset in datasets:
        level, noise = 2 * generator.normal(size=(2, 1)), 0.7 * generator.normal(size=(2, len(pairs)))
        cka, gain = level + of_backbone[:, pairs].sum(axis=2) + of_pair + noise
        names = [f"b{a}+b{b}" for a, b in pairs]
        tables.append(pd.DataFrame({"dataset": dataset, "model": names, "cka": cka, "gain": gain}))
    return pd.concat(tables, ignore_index=True)


def test_correlation_with_gain_of_unrelated_values_is_significant_in_5_percent():
    """A test that takes the pairs of all datasets as exchangeable is significant far too often."""
    generator, significant = np.random.default_rng(0), []
    for _ in range(100):
        pairs = random_pairs(generator, 5, "abc")
        p_pooled = spearmanr(pairs.cka, pairs.gain).pvalue
        significant.append((p_pooled <= 0.05, correlation_with_gain(pairs)[1] <= 0.05))
    pooled_rate, rate = np.mean(significant, axis=0)
    assert pooled_rate > 0.2
    assert 0 < rate < 0.1


def test_correlation_with_gain_ranks_within_datasets_and_permutes_all_backbones():
    pairs = random_pairs(np.random.default_rng(0), 4, "a")
    correlation, p, n_permutations = correlation_with_gain(pairs)
    assert correlation == pytest.approx(spearmanr(pairs.cka, pairs.gain).statistic)
    assert n_permutations == 24
    assert 1 / 24 <= p <= 1
    pairs = pd.concat([pairs, random_pairs(np.random.default_rng(1), 5, "b")])
    pairs["gain"] = 3 - pairs.cka + 100 * (pairs.dataset == "b")
    correlation, p, n_permutations = correlation_with_gain(pairs)
    assert correlation == pytest.approx(-1)
    assert p == pytest.approx(1 / 24), "the fifth backbone ran on b only, and keeps its place"
    assert n_permutations == 24


def test_correlation_with_gain_samples_the_permutations_of_many_backbones():
    pairs = random_pairs(np.random.default_rng(0), 8, "ab")
    assert correlation_with_gain(pairs)[1:] == correlation_with_gain(pairs)[1:]
    assert correlation_with_gain(pairs)[2] == MAX_PERMUTATIONS < 40_320
    assert correlation_with_gain(pairs.assign(gain=pairs.cka))[1] < 0.001


@pytest.mark.parametrize(("cka", "gain"), [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [0, 0, 0, 0])])
def test_correlation_with_gain_too_few_or_equal_pairs_is_refused(cka, gain):
    with raises(ValueError, MIN_PAIRS, len(cka)):
        correlation_with_gain(pd.DataFrame({"dataset": "d", "model": "a+b", "cka": cka, "gain": gain}))
