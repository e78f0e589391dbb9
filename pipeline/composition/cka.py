"""Similarity of the features of two backbones: linear centred kernel alignment (CKA)."""

from collections.abc import Mapping
from itertools import combinations_with_replacement, permutations, product
from math import factorial, prod

import numpy as np
import pandas as pd

# The unbiased estimate needs at least this many samples.
MIN_SAMPLES = 4
# A rank correlation of fewer pairs is not computed.
MIN_PAIRS = 4
# More orders of the backbones (those of eight and more) are sampled.
MAX_PERMUTATIONS = 10_000


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


def correlation_with_gain(pairs: pd.DataFrame) -> tuple[float, float, int]:
    """Correlate CKA and gain within datasets, and test the correlation by a permutation of the backbones.

    Values are ranked within each dataset, because CKA and gain of different datasets have different levels. A
    permutation exchanges the names of the backbones in all CKA matrices, and is the same for all datasets: pairs that
    share a backbone, and the same pair on several datasets, are not independent (docs/decisions/composition.md).
    Backbones are exchanged only with those that ran on the same datasets.

    Args:
        pairs: one row per dataset and pair of backbones: dataset, model (`a+b`), cka, gain.

    Returns:
        Spearman's rank correlation within datasets, its two-sided p-value, and the number of permutations: the
        p-value cannot be below 1 divided by it.

    Raises ValueError for fewer than four pairs, or if one quantity does not vary within any dataset.

    Source: Mantel, The detection of disease clustering and a generalized regression approach, Cancer Research 27,
    1967.
    """
    dataset, dataset_names = pd.factorize(pairs.dataset)
    ranks = pairs.groupby(dataset)[["cka", "gain"]].rank()
    ranks -= ranks.groupby(dataset).transform("mean")
    scale = np.sqrt((ranks**2).sum().prod())
    if len(pairs) < MIN_PAIRS or scale == 0:
        raise ValueError(f"a rank correlation needs at least {MIN_PAIRS} pairs that differ; there are {len(pairs)}")
    member, names = pd.factorize(pairs.model.str.split("+").explode())
    a, b = member.reshape(-1, 2).T
    cka = np.zeros((len(dataset_names), len(names), len(names)))
    cka[dataset, a, b] = cka[dataset, b, a] = ranks.cka
    orders = _backbone_orders(cka.any(axis=2))
    statistics = cka[dataset[:, None], orders[:, a].T, orders[:, b].T].T @ ranks.gain.to_numpy()
    p_value = (np.abs(statistics) >= np.abs(statistics[0]) * (1 - 1e-9)).mean()
    return float(statistics[0] / scale), float(p_value), len(orders)


def _backbone_orders(ran: np.ndarray) -> np.ndarray:
    """Return all orders of the backbones, (order, backbone), the first unchanged.

    More than `MAX_PERMUTATIONS` orders are sampled.

    Args:
        ran: (dataset, backbone); backbones exchange places only with those that ran on the same datasets.
    """
    _, group = np.unique(ran, axis=1, return_inverse=True)
    groups = [np.flatnonzero(group.ravel() == number) for number in range(group.max() + 1)]
    orders = np.empty((min(MAX_PERMUTATIONS, prod(factorial(len(group)) for group in groups)), ran.shape[1]), int)
    if len(orders) < MAX_PERMUTATIONS:
        for order, parts in zip(orders, product(*map(permutations, groups)), strict=True):
            order[np.concatenate(groups)] = np.concatenate(parts)
        return orders
    generator, orders[0] = np.random.default_rng(0), np.arange(ran.shape[1])
    for order in orders[1:]:
        order[np.concatenate(groups)] = np.concatenate([generator.permutation(group) for group in groups])
    return orders
