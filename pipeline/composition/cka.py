"""How alike two backbones' features are: linear centred kernel alignment (CKA)."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from scipy.stats import permutation_test, rankdata

# Samples that CKA without bias needs.
MIN_SAMPLES = 4


def linear_cka(batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]) -> tuple[list[str], np.ndarray]:
    """Debiased linear CKA between every two of several sets of features of the same samples.

    1 means the same up to rotation and scale, 0 unrelated (and, being free of bias, now and then a little below).
    Biased CKA calls unrelated features alike wherever there are as many channels as samples, as there are here.

    Args:
        batches: called twice, each time gives batches of the same samples, by name (sample, channel). Nothing but a
            batch and one (channel, channel) matrix a pair is held, so a cache of any size may be streamed.

    Returns:
        the names, and (name, name).

    Raises:
        ValueError: fewer than four samples.

    Sources: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, arXiv 1905.00414;
    the unbiased HSIC of Song et al., JMLR 13, 2012, as Nguyen, Raghu and Kornblith, ICLR 2021, arXiv 2010.15327,
    use it for CKA, here summed over samples exactly instead of averaged over minibatches.
    """
    count, sums = 0, {}
    for batch in batches():
        count += len(next(iter(batch.values())))
        for name, values in batch.items():
            sums[name] = sums.get(name, 0) + values.sum(axis=0, dtype=np.float64)
    if count < MIN_SAMPLES:
        raise ValueError(f"CKA without bias needs at least {MIN_SAMPLES} samples; there are {count}.")
    names = list(sums)
    cross: dict[tuple[int, int], np.ndarray] = {}
    norms, products = np.zeros(len(names)), np.zeros((len(names), len(names)))
    for batch in batches():
        centred = [batch[name] - sums[name] / count for name in names]
        squared = np.stack([np.square(values).sum(axis=1) for values in centred])
        norms += squared.sum(axis=1)
        products += squared @ squared.T
        for i, ours in enumerate(centred):
            for j in range(i + 1):
                cross[i, j] = cross.get((i, j), 0) + ours.T @ centred[j]
    hsic = np.empty_like(products)
    for (i, j), matrix in cross.items():
        hsic[i, j] = hsic[j, i] = np.square(matrix).sum()
    # The terms that a sample's product with itself brings in.
    hsic += np.outer(norms, norms) / ((count - 1) * (count - 2)) - products * count / (count - 2)
    scale = np.sqrt(np.maximum(np.diag(hsic), np.finfo(float).tiny))
    return names, hsic / np.outer(scale, scale)


def correlation_with_gain(alike: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """Spearman's rank correlation between similarity and gain, and its two-sided permutation p-value.

    The p-value takes the pairs as independent, which pairs that share a backbone or a data set are not: it is, if
    anything, too small.

    Raises:
        ValueError: fewer than four pairs, or all alike or of equal gain; nothing can be said of them.
    """
    if len(alike) < 4 or min(np.ptp(alike), np.ptp(gain)) == 0:
        raise ValueError(f"a rank correlation needs at least four pairs that differ; there are {len(alike)}")
    ranks = [rankdata(values) - (len(alike) + 1) / 2 for values in (alike, gain)]
    scale = np.sqrt(np.square(ranks[0]).sum() * np.square(ranks[1]).sum())

    def correlation(permuted, axis):
        return (permuted * ranks[1]).sum(axis=axis) / scale

    tested = permutation_test(
        (ranks[0],), correlation, permutation_type="pairings", vectorized=True, n_resamples=50_000, rng=0
    )
    return float(tested.statistic), float(tested.pvalue)
