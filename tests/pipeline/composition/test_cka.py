import numpy as np
import pytest
from scipy.stats import spearmanr

from pipeline.composition.cka import MIN_PAIRS, MIN_SAMPLES, correlation_with_gain, linear_cka
from tests.errors import raises


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def cka_matrix(batch_size=None, **features):
    """Similarities (name, name), computed in batches of `batch_size` samples."""
    n_samples = len(next(iter(features.values())))
    batch_size = batch_size or n_samples

    def batches():
        for start in range(0, n_samples, batch_size):
            yield {name: values[start : start + batch_size] for name, values in features.items()}

    names, matrix = linear_cka(batches)
    assert names == list(features)
    return matrix


def test_linear_cka_is_invariant_to_rotation_scale_and_offset(generator):
    a = generator.normal(size=(200, 12))
    rotation, _ = np.linalg.qr(generator.normal(size=(12, 12)))
    np.testing.assert_allclose(cka_matrix(a=a, b=7 + 3 * a @ rotation), np.ones((2, 2)), atol=1e-12)


def test_linear_cka_unrelated_features_with_more_channels_than_samples_is_zero(generator):
    values = [
        cka_matrix(a=generator.normal(size=(60, 300)), b=generator.normal(size=(60, 300)))[0, 1] for _ in range(5)
    ]
    assert abs(np.mean(values)) < 0.02
    # The biased estimate is high.
    a, b = (values - values.mean(0) for values in generator.normal(size=(2, 60, 300)))
    norms = [np.linalg.norm(left.T @ right) for left, right in ((a, b), (a, a), (b, b))]
    assert norms[0] ** 2 / (norms[1] * norms[2]) > 0.8


def test_linear_cka_equals_the_unbiased_hsic_of_gram_matrices(generator):
    """Equation 3 of Nguyen, Raghu and Kornblith (arXiv 2010.15327), written out."""
    a = generator.normal(size=(40, 9))
    b = a[:, :4] + generator.normal(size=(40, 4))
    n = 40

    def hsic(left, right):
        grams = [values @ values.T for values in (left, right)]
        for gram in grams:
            np.fill_diagonal(gram, 0)
        k, m = grams
        return (np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()) / (
            n * (n - 3)
        )

    expected = hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))
    assert cka_matrix(a=a, b=b)[0, 1] == pytest.approx(expected, rel=1e-9)


def test_linear_cka_does_not_depend_on_the_batches(generator):
    features = {name: 100 + generator.normal(size=(97, width)) for name, width in (("a", 5), ("b", 8), ("c", 3))}
    np.testing.assert_allclose(cka_matrix(batch_size=10, **features), cka_matrix(**features), atol=1e-10)


def test_linear_cka_too_few_samples_is_refused(generator):
    with raises(ValueError, MIN_SAMPLES, 3):
        cka_matrix(a=generator.normal(size=(3, 2)), b=generator.normal(size=(3, 2)))


def test_correlation_with_gain_equals_scipy_and_permutes_all_orders(generator):
    cka, gain = generator.normal(size=(2, 7))
    rank, p = correlation_with_gain(cka, gain)
    assert rank == pytest.approx(spearmanr(cka, gain).statistic)
    assert 0 < p <= 1
    rank, p = correlation_with_gain(np.arange(7.0), -(np.arange(7.0) ** 3))
    assert rank == pytest.approx(-1)
    assert p == pytest.approx(2 / 5040)  # this order and its reverse, of 7! orders


@pytest.mark.parametrize(("cka", "gain"), [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [0, 0, 0, 0])])
def test_correlation_with_gain_too_few_or_equal_pairs_is_refused(cka, gain):
    with raises(ValueError, MIN_PAIRS, len(cka)):
        correlation_with_gain(np.array(cka), np.array(gain))
