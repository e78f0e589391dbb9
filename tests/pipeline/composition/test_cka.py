import numpy as np
import pytest
from scipy.stats import spearmanr

from pipeline.composition.cka import correlation_with_gain, linear_cka


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def cka(step=None, **features):
    """(name, name), in batches of `step` samples."""
    count = len(next(iter(features.values())))

    def batches():
        for start in range(0, count, step or count):
            yield {name: values[start : start + (step or count)] for name, values in features.items()}

    names, matrix = linear_cka(batches)
    assert names == list(features)
    return matrix


def test_a_rotation_and_a_scale_change_nothing(generator):
    one = generator.normal(size=(200, 12))
    rotation, _ = np.linalg.qr(generator.normal(size=(12, 12)))
    np.testing.assert_allclose(cka(one=one, other=7 + 3 * one @ rotation), np.ones((2, 2)), atol=1e-12)


def test_unrelated_features_are_unlike_though_there_are_more_channels_than_samples(generator):
    drawn = [
        cka(one=generator.normal(size=(60, 300)), other=generator.normal(size=(60, 300)))[0, 1] for _ in range(5)
    ]
    assert abs(np.mean(drawn)) < 0.02
    # What the estimate with bias would have said.
    one, other = (values - values.mean(0) for values in generator.normal(size=(2, 60, 300)))
    norms = [np.linalg.norm(left.T @ right) for left, right in ((one, other), (one, one), (other, other))]
    assert norms[0] ** 2 / (norms[1] * norms[2]) > 0.8


def test_it_is_the_unbiased_hsic_of_the_gram_matrices(generator):
    """Equation 3 of Nguyen, Raghu and Kornblith (arXiv 2010.15327), written out."""
    one = generator.normal(size=(40, 9))
    other = one[:, :4] + generator.normal(size=(40, 4))
    n = 40

    def hsic(left, right):
        grams = [values @ values.T for values in (left, right)]
        for gram in grams:
            np.fill_diagonal(gram, 0)
        k, m = grams
        return (np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()) / (
            n * (n - 3)
        )

    expected = hsic(one, other) / np.sqrt(hsic(one, one) * hsic(other, other))
    assert cka(one=one, other=other)[0, 1] == pytest.approx(expected, rel=1e-9)


def test_batches_make_no_difference(generator):
    features = {name: 100 + generator.normal(size=(97, width)) for name, width in (("a", 5), ("b", 8), ("c", 3))}
    np.testing.assert_allclose(cka(step=10, **features), cka(**features), atol=1e-10)


def test_too_few_samples(generator):
    with pytest.raises(ValueError, match="at least 4 samples; there are 3"):
        cka(one=generator.normal(size=(3, 2)), other=generator.normal(size=(3, 2)))


def test_the_rank_correlation_is_scipys_and_its_p_value_that_of_all_orders(generator):
    alike, gain = generator.normal(size=(2, 7))
    rank, p = correlation_with_gain(alike, gain)
    assert rank == pytest.approx(spearmanr(alike, gain).statistic)
    assert 0 < p <= 1
    rank, p = correlation_with_gain(np.arange(7.0), -(np.arange(7.0) ** 3))
    assert rank == pytest.approx(-1)
    assert p == pytest.approx(2 / 5040)  # of the 7! orders, this one and its reverse


@pytest.mark.parametrize(("alike", "gain"), [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [0, 0, 0, 0])])
def test_too_few_pairs_say_nothing(alike, gain):
    with pytest.raises(ValueError, match="at least four pairs that differ"):
        correlation_with_gain(np.array(alike), np.array(gain))
