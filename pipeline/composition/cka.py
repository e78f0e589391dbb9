"""Similarity of the features of two backbones: linear centred kernel alignment (CKA)."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from scipy.stats import permutation_test, rankdata

# The unbiased estimate needs at least this many samples.
MIN_SAMPLES = 4
# A rank correlation of fewer pairs is not computed.
MIN_PAIRS = 4


def linear_cka(batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]) -> tuple[list[str], np.ndarray]:
    """Compute the debiased linear CKA between every two sets of features of the same samples.

    1: the same features up to rotation and scale. 0: unrelated features; the unbiased estimate can be slightly below
    0. The biased estimate would be high for unrelated features if there are as many channels as samples, as here.

    Args:
        batches: returns batches of features (sample, channel) by name. It is called twice and must return the same
            samples each time. Only one batch and one matrix (channel, channel) per pair are in memory.

    Returns:
        The names, and the similarities float64 (name, name).

    Raises:
        ValueError: there are fewer than four samples.

    Sources: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, arXiv 1905.00414;
    the unbiased HSIC of Song et al., JMLR 13, 2012, as used for CKA by Nguyen, Raghu and Kornblith, ICLR 2021, arXiv
    2010.15327, here summed exactly over samples instead of averaged over minibatches.
    """
    count, sums = 0, {}
    for batch in batches():
        count += len(next(iter(batch.values())))
        for name, values in batch.items():
            sums[name] = sums.get(name, 0) + values.sum(axis=0, dtype=np.float64)
    if count < MIN_SAMPLES:
        raise ValueError(f"Unbiased CKA needs at least {MIN_SAMPLES} samples; there are {count}.")
    names = list(sums)
    cross: dict[tuple[int, int], np.ndarray] = {}
    norms, products = np.zeros(len(names)), np.zeros((len(names), len(names)))
    for batch in batches():
        centred = [batch[name] - sums[name] / count for name in names]
        squared = np.stack([np.square(values).sum(axis=1) for values in centred])
        norms += squared.sum(axis=1)
        products += squared @ squared.T
        for i, values in enumerate(centred):
            for j in range(i + 1):
                cross[i, j] = cross.get((i, j), 0) + values.T @ centred[j]
    hsic = np.empty_like(products)
    for (i, j), matrix in cross.items():
        hsic[i, j] = hsic[j, i] = np.square(matrix).sum()
    # Remove the products of each sample with itself, which bias the estimate.
    hsic += np.outer(norms, norms) / ((count - 1) * (count - 2)) - products * count / (count - 2)
    scale = np.sqrt(np.maximum(np.diag(hsic), np.finfo(float).tiny))
    return names, hsic / np.outer(scale, scale)


def correlation_with_gain(cka: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """Compute Spearman's rank correlation of CKA and gain over pairs, and its p-value.

    The p-value is that of a two-sided permutation test, which assumes independent pairs. Pairs that share a backbone
    or a dataset are not independent, so the p-value is too small if anything.

    Args:
        cka, gain: similarity and gain of every pair, (pair,).

    Raises:
        ValueError: there are fewer than four pairs, or all values of one quantity are equal.
    """
    if len(cka) < MIN_PAIRS or min(np.ptp(cka), np.ptp(gain)) == 0:
        raise ValueError(f"a rank correlation needs at least {MIN_PAIRS} pairs that differ; there are {len(cka)}")
    ranks = [rankdata(values) - (len(cka) + 1) / 2 for values in (cka, gain)]
    scale = np.sqrt(np.square(ranks[0]).sum() * np.square(ranks[1]).sum())

    def correlation(permuted_ranks, axis):
        return (permuted_ranks * ranks[1]).sum(axis=axis) / scale

    result = permutation_test(
        (ranks[0],), correlation, permutation_type="pairings", vectorized=True, n_resamples=50_000, rng=0
    )
    return float(result.statistic), float(result.pvalue)
