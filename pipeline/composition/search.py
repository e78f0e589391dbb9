"""Search over ensembles: score every subset of the backbones by a quick probe and select the best.

The paper (arXiv 2506.20174) chooses its ensembles by hand and leaves the search to future work. The search reads the
training and validation splits only, never the test split. Its result is written to files, which the report reads.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, combinations

import numpy as np
import pandas as pd
import xarray as xr
from threadpoolctl import threadpool_limits

from cache.reader import FeatureStore
from cache.schema import layer_name
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
    stores: Mapping[str, FeatureStore], images: xr.Dataset,
    heads: config.HeadsConfig, composition: config.CompositionConfig,
) -> CompositionResult:  # fmt: skip
    """Probe every ensemble on validation, select the best, and measure the backbones' similarity.

    A probe reads the standardized features that a head would, concatenated, whatever `heads.fusion` is. `stores` are
    aligned, by backbone, and `images` is their images store. A split of too few labels raises UserError.
    """
    task = task_from_store(images)
    store, max_samples = next(iter(stores.values())), probes.MAX_PIXELS if task.is_dense else probes.MAX_CHIPS
    fraction = min(1.0, max_samples / len(store.rows("train")))
    rows = {"train": store.rows("train", fraction), "val": store.rows("val")}
    label = {split: images.label[index].values for split, index in rows.items()}
    if task.is_dense:
        train, val = (
            probes.pixel_samples(stores, rows[split], label[split], seed) for seed, split in enumerate(rows)
        )
    else:
        train, val = (probes.chip_samples(stores, rows[split], label[split]) for split in rows)
    _check_enough_samples({"train": len(train.label), "val": len(val.label)}, task)
    arrays = feature_loader.select_arrays(list(stores.values()), heads, task.is_dense)
    layers = {name: [Layer(name, array) for _, array in member] for name, member in zip(stores, arrays, strict=True)}
    subsets = chain.from_iterable(combinations(stores, size) for size in range(1, len(stores) + 1))
    ensembles = {subset: list(chain.from_iterable(layers[name] for name in subset)) for subset in subsets}

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
    ranked = rank_table(scores, similarity, widths)
    return CompositionResult(
        backbones=tuple(stores),
        probe=probe.method,
        subsets=ranked,
        cka=similarity,
        greedy=greedy_layers(probe, probe.layers if composition.greedy else []),
        selected=tuple(ranked[ranked.members > 1].model.head(composition.top_k)),
    )


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


@contextmanager
def _probe_pool() -> Iterator[ThreadPoolExecutor]:
    """Provide a pool that fits one probe per CPU core.

    BLAS gets one thread: several threads on one small product are slower (LAB.md), and rounding would depend on their
    number.
    """
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield pool


def cka_table(probe: Probe, head_layers: Mapping[str, Sequence[Layer]]) -> pd.DataFrame:
    """Compute the linear CKA of every two backbones: level, backbone_a, backbone_b, cka.

    Rows come level by level, the finest first. Classification datasets are compared by the mean vectors of the
    levels. Levels of a single backbone are omitted. The last rows, `all`, compare the concatenation of all layers
    that a head reads (`head_layers`, by backbone).
    """
    groups_of_level: dict[str, dict[str, Sequence[Layer]]] = {}
    for layer in probe.layers:
        name = layer_name(layer.array)
        if not name.startswith("cls_"):
            groups_of_level.setdefault(name.removeprefix("mean_"), {})[layer.backbone] = [layer]
    groups_of_level["all"] = dict(head_layers)
    rows = [
        {"level": level, "backbone_a": backbone_a, "backbone_b": backbone_b, "cka": value}
        for level, groups in groups_of_level.items()
        if len(groups) > 1
        for (backbone_a, backbone_b), value in probe.similarity(groups).stack().items()
    ]
    return pd.DataFrame(rows, columns=["level", "backbone_a", "backbone_b", "cka"])


def rank_table(scores: Mapping[Ensemble, float], similarity: pd.DataFrame, widths: Mapping[str, int]) -> pd.DataFrame:
    """Rank the ensembles by validation score, the best first; on ties the one with fewer members is first.

    Args:
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
    """Add the layer that raises the score most until none does: backbone, layer, score of each step."""
    chosen: list[Layer] = []
    best_score, rows = -np.inf, []
    while remaining := [layer for layer in candidates if layer not in chosen]:
        with _probe_pool() as pool:
            scores = [score for score, _ in pool.map(probe.fit, [[*chosen, layer] for layer in remaining])]
        if max(scores) <= best_score:
            break
        best_score, layer = max(scores), remaining[int(np.argmax(scores))]
        chosen.append(layer)
        rows.append({"backbone": layer.backbone, "layer": layer_name(layer.array), "score": best_score})
    return pd.DataFrame(rows, columns=["backbone", "layer", "score"])
