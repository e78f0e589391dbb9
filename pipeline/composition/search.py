"""Search over ensembles: score every subset of the backbones by a quick probe and select the best.

The paper (arXiv 2506.20174) chooses its ensembles by hand and leaves the search to future work. The search reads the
training and validation splits only, never the test split. Its result is written to files, which the report reads.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr
from threadpoolctl import threadpool_limits

from cache.reader import FeatureStore
from pipeline import config
from pipeline.composition import CompositionResult, cka, probes
from pipeline.composition.probes import Layer, Probe
from pipeline.errors import UserError
from pipeline.tasks import Task
from pipeline.training import feature_loader
from pipeline.training.task_data import task_from_store

# Names of the backbones of an ensemble.
Ensemble = tuple[str, ...]


def search(
    stores: Mapping[str, FeatureStore],
    images: xr.Dataset,
    heads: config.HeadsConfig,
    composition: config.CompositionConfig,
) -> CompositionResult:
    """Probe every ensemble on the validation split and select the best.

    The similarity of the backbones is measured too. A probe reads the standardized features of an ensemble
    concatenated, whatever `heads.fusion` is.

    Args:
        stores: aligned feature stores by backbone.
        images: the images store that they were extracted from.
        heads: selects the levels and pooled vectors that a head, and so the probe, reads.
        composition: the probe, the number of ensembles to select, and whether to add layers greedily.

    Raises:
        UserError: a split has too few labels.
    """
    task = task_from_store(images)
    rows = _select_rows(next(iter(stores.values())), task)
    label = {split: images.label[index].values for split, index in rows.items()}
    if task.is_dense:
        train, val = (
            probes.pixel_samples(stores, rows[split], label[split], seed) for seed, split in enumerate(rows)
        )
    else:
        train, val = (probes.chip_samples(stores, rows[split], label[split]) for split in rows)
    _check_enough_samples({"train": len(train.label), "val": len(val.label)}, task)
    layers = {backbone: _head_layers(backbone, store, heads, task) for backbone, store in stores.items()}
    ensembles = {
        ensemble: [layer for backbone in ensemble for layer in layers[backbone]]
        for ensemble in all_subsets(list(stores))
    }

    probe = Probe(train, val, task, "logistic" if task.is_dense else composition.probe)
    with _probe_pool() as pool:
        fitted = dict(zip(ensembles, pool.map(probe.fit, ensembles.values()), strict=True))
    if task.is_dense:
        linear_probes = {ensemble: (ensembles[ensemble], linear) for ensemble, (_, linear) in fitted.items()}
        scores = probes.mask_scores(linear_probes, probe, stores, rows["val"], label["val"])
    else:
        scores = {ensemble: score for ensemble, (score, _) in fitted.items()}

    similarity = cka_table(probe, layers)
    widths = {backbone: sum(probe.width(layer) for layer in layers[backbone]) for backbone in stores}
    subsets = rank_table(scores, similarity, widths)
    return CompositionResult(
        backbones=tuple(stores),
        probe=probe.method,
        subsets=subsets,
        cka=similarity,
        greedy=greedy_layers(probe, probe.layers if composition.greedy else []),
        selected=tuple(subsets[subsets.members > 1].model.head(composition.top_k)),
    )


def _select_rows(store: FeatureStore, task: Task) -> dict[str, np.ndarray]:
    """Select the rows of the validation split, and of the training split or a random part of it."""
    max_samples = probes.MAX_PIXELS if task.is_dense else probes.MAX_CHIPS
    return {
        "train": store.rows("train", min(1.0, max_samples / len(store.rows("train")))),
        "val": store.rows("val"),
    }


def _check_enough_samples(counts: Mapping[str, int], task: Task) -> None:
    """Refuse splits that are too small to fit, compare or score probes."""
    noun = "labelled pixels" if task.is_dense else "samples"
    for split, minimum in (("train", cka.MIN_SAMPLES), ("val", 1)):
        if counts[split] < minimum:
            raise UserError(
                f"The split {split} has {counts[split]} {noun}, and the composition search needs at least {minimum}. "
                "Change 'splits', 'seed' or 'block' of the dataset in params.yaml, or add labels.",
                key=split,
                value=counts[split],
            )


def _head_layers(backbone: str, store: FeatureStore, heads: config.HeadsConfig, task: Task) -> list[Layer]:
    """List the layers that a head reads of a backbone: levels if the task is dense, else pooled vectors."""
    if task.is_dense:
        arrays = feature_loader.select_levels([store], heads.levels)[0]
    else:
        arrays = feature_loader.select_pooled([store], heads.linear.pooled, heads.linear.tokens, heads.levels)[0]
    return [Layer(backbone, array) for _, array in arrays]


@contextmanager
def _probe_pool() -> Iterator[ThreadPoolExecutor]:
    """Provide a pool that fits one probe per CPU core.

    BLAS gets one thread: several threads on one small product are slower (LAB.md), and rounding would depend on their
    number.
    """
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield pool


def all_subsets(backbones: Sequence[str]) -> list[Ensemble]:
    """List all non-empty subsets of the backbones, the smallest first, each in the given order."""
    return [subset for size in range(1, len(backbones) + 1) for subset in combinations(backbones, size)]


def cka_table(probe: Probe, head_layers: Mapping[str, Sequence[Layer]]) -> pd.DataFrame:
    """Compute the linear CKA of every two backbones.

    Rows come level by level, the finest first. Classification datasets are compared by the mean vectors of the
    levels. Levels of a single backbone are omitted. The last rows, `all`, compare the concatenation of all layers
    that a head reads (`head_layers`, by backbone).

    Returns:
        Columns level, backbone_a, backbone_b, cka.
    """
    groups_of_level: dict[str, dict[str, Sequence[Layer]]] = {}
    for layer in probe.layers:
        if not layer.name.startswith("cls_"):
            groups_of_level.setdefault(layer.name.removeprefix("mean_"), {})[layer.backbone] = [layer]
    groups_of_level["all"] = dict(head_layers)
    rows = [
        {"level": level, "backbone_a": backbone_a, "backbone_b": backbone_b, "cka": value}
        for level, groups in groups_of_level.items()
        if len(groups) > 1
        for (backbone_a, backbone_b), value in probe.similarity(groups).stack().items()
    ]
    return pd.DataFrame(rows, columns=["level", "backbone_a", "backbone_b", "cka"])


def rank_table(scores: Mapping[Ensemble, float], similarity: pd.DataFrame, widths: Mapping[str, int]) -> pd.DataFrame:
    """Rank the ensembles, the best first; on ties the one with fewer members is first.

    Args:
        scores: validation scores of the probes.
        similarity: the result of `cka_table`.
        widths: number of channels of each backbone.

    Returns:
        Columns model; members (their number); channels; score; gain (score minus the best member's, NaN for a single
        backbone); cka (mean over the pairs of members, of all that the head reads, NaN for a single backbone).
    """
    pairs = similarity[similarity.level == "all"].set_index(["backbone_a", "backbone_b"]).cka
    table = pd.DataFrame(
        {
            "model": "+".join(ensemble),
            "members": len(ensemble),
            "channels": sum(widths[name] for name in ensemble),
            "score": score,
            "gain": score - max(scores[(name,)] for name in ensemble) if len(ensemble) > 1 else np.nan,
            "cka": np.mean([pairs[pair] for pair in combinations(ensemble, 2)]) if len(ensemble) > 1 else np.nan,
        }
        for ensemble, score in scores.items()
    )
    return table.sort_values(["score", "members"], ascending=[False, True], kind="stable", ignore_index=True)


def greedy_layers(probe: Probe, candidates: Sequence[Layer]) -> pd.DataFrame:
    """Add the layer that raises the validation score most, until no layer raises it.

    Returns:
        One row per added layer, with columns backbone, layer, score.
    """
    chosen: list[Layer] = []
    best_score, rows = -np.inf, []
    while remaining := [layer for layer in candidates if layer not in chosen]:
        with _probe_pool() as pool:
            scores = [score for score, _ in pool.map(probe.fit, [[*chosen, layer] for layer in remaining])]
        if max(scores) <= best_score:
            break
        best_score = max(scores)
        chosen.append(remaining[int(np.argmax(scores))])
        rows.append({"backbone": chosen[-1].backbone, "layer": chosen[-1].name, "score": best_score})
    return pd.DataFrame(rows, columns=["backbone", "layer", "score"])
