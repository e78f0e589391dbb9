"""Similarity of the features of two backbones: linear centred kernel alignment (CKA)."""

from collections.abc import Mapping
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
from scipy.stats import PermutationMethod, pearsonr, rankdata

# The unbiased estimate needs at least this many samples.
MIN_SAMPLES = 4
# A rank correlation of fewer pairs is not computed.
MIN_PAIRS = 4


def linear_cka(features: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Compute the debiased linear CKA between every two sets of features of the same samples.

    1: the same features up to rotation and scale. 0: unrelated features; the unbiased estimate can be slightly below
    0. The biased estimate would be high for unrelated features if there are as many channels as samples, as here.

    From features (sample, channel) by name to similarities (name, name); ValueError for fewer than four samples.

    Sources: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, arXiv 1905.00414;
    the unbiased HSIC of Song et al., JMLR 13, 2012, as used for CKA by Nguyen, Raghu and Kornblith, ICLR 2021, arXiv
    2010.15327, here over all samples instead of averaged over minibatches.
    """
    names, n_samples = list(features), len(next(iter(features.values())))
    if n_samples < MIN_SAMPLES:
        raise ValueError(f"Unbiased CKA needs at least {MIN_SAMPLES} samples; there are {n_samples}.")

    def centred(name: str) -> np.ndarray:
        return features[name] - features[name].mean(axis=0, dtype=np.float64)

    squared_norms = pd.DataFrame({name: np.square(centred(name)).sum(axis=1) for name in names})
    hsic = pd.DataFrame(0.0, names, names)
    for name_a, name_b in combinations_with_replacement(names, 2):
        norms_a, norms_b = squared_norms[name_a], squared_norms[name_b]
        value = np.square(centred(name_a).T @ centred(name_b)).sum()
        # Remove the products of each sample with itself, which bias the estimate.
        value += norms_a.sum() * norms_b.sum() / ((n_samples - 1) * (n_samples - 2))
        value -= norms_a @ norms_b * n_samples / (n_samples - 2)
        hsic.loc[name_a, name_b] = hsic.loc[name_b, name_a] = value
    scale = np.sqrt(np.maximum(np.diag(hsic), np.finfo(float).tiny))
    return hsic / np.outer(scale, scale)


def correlation_with_gain(cka: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """Compute Spearman's rank correlation of CKA and gain (pair,), and its p-value.

    The p-value is that of a two-sided permutation test, which assumes independent pairs. Pairs that share a backbone
    or a dataset are not independent, so the p-value is too small if anything. Fewer than four pairs, or all values of
    one quantity equal, raise ValueError.
    """
    if len(cka) < MIN_PAIRS or min(np.ptp(cka), np.ptp(gain)) == 0:
        raise ValueError(f"a rank correlation needs at least {MIN_PAIRS} pairs that differ; there are {len(cka)}")
    method = PermutationMethod(n_resamples=50_000, rng=0)
    result = pearsonr(rankdata(gain), rankdata(cka), method=method)
    return float(result.statistic), float(result.pvalue)
