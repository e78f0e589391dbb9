"""Composition search: every ensemble of the backbones by a quick probe, and which of them deserve more.

The paper (arXiv 2506.20174) composes by hand and leaves the search to future work. Training and validation samples
alone are read here; the test split chooses nothing.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr
from threadpoolctl import threadpool_limits

from cache.reader import FeatureStore
from pipeline import config
from pipeline.composition import cka as similarity
from pipeline.composition import points
from pipeline.composition.points import Layer
from pipeline.composition.probes import Probe, mask_scores
from pipeline.errors import UserError
from pipeline.training import feature_inputs
from pipeline.training.task_data import task_from_store

Names = tuple[str, ...]


@dataclass(frozen=True)
class CompositionResult:
    """What the search found on one data set: `table`, `similarities` and, if asked for, `greedy` below."""

    subsets: pd.DataFrame
    cka: pd.DataFrame
    greedy: pd.DataFrame
    probe: str


def search(
    members: Mapping[str, FeatureStore],
    labelled: xr.Dataset,
    heads: config.HeadsConfig,
    described: config.CompositionConfig,
) -> CompositionResult:
    """Probe every ensemble of `members` on the validation split, and measure how alike they are.

    A probe reads its members' standardised features side by side, whatever `heads.fusion` is.

    Args:
        members: the backbones' stores, aligned.
        labelled: the images store they were made from.
        heads: which pooled vectors the head reads, and so the probe.
    """
    task = task_from_store(labelled)
    first = next(iter(members.values()))
    segmentation = task.type == "segmentation"
    most = points.MAX_PIXELS if segmentation else points.MAX_CHIPS
    rows = {
        "train": first.rows("train", min(1.0, most / len(first.rows("train")))),
        "val": first.rows("val"),
    }
    label = {split: labelled.label[index].values for split, index in rows.items()}
    layers = {name: _layers(name, store, heads, segmentation) for name, store in members.items()}
    if segmentation:
        taken = {
            split: points.pixel_samples(members, rows[split], label[split], task.ignore_value, seed)
            for seed, split in enumerate(rows)
        }
    else:
        taken = {split: points.chip_samples(members, rows[split], label[split]) for split in rows}
    _check_enough_samples({split: len(one.label) for split, one in taken.items()}, "labelled pixels" if segmentation else "samples")
    probe = Probe(taken["train"], taken["val"], task, "logistic" if segmentation else described.probe)
    wanted = {names: [layer for name in names for layer in layers[name]] for names in all_subsets(list(members))}
    with _side_by_side() as each:
        fitted = dict(zip(wanted, each(probe.fit, wanted.values()), strict=True))
    if segmentation:
        linear = {names: (wanted[names], one) for names, (_, one) in fitted.items()}
        scores = mask_scores(linear, probe, members, rows["val"], label["val"])
    else:
        scores = {names: score for names, (score, _) in fitted.items()}
    cka = cka_table(probe, layers)
    widths = {name: sum(probe.width(layer) for layer in layers[name]) for name in members}
    return CompositionResult(
        rank_table(scores, cka, widths), cka, greedy_layers(probe, probe.layers if described.greedy else []), probe.kind
    )


def _check_enough_samples(counts: Mapping[str, int], what: str) -> None:
    """Refuse splits that nothing can be fitted on, or compared by, or scored on."""
    for split, least in (("train", similarity.MIN_SAMPLES), ("val", 1)):
        if counts[split] < least:
            raise UserError(
                f"The split {split} has {counts[split]} {what}, and the composition search needs at least {least}. "
                "Deal the splits otherwise (splits, seed and block of the data set in params.yaml), or add labels."
            )


def all_subsets(backbones: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset of the backbones, those of one member first, each in the order given."""
    return [chosen for size in range(1, len(backbones) + 1) for chosen in combinations(backbones, size)]


def top_k(subsets: pd.DataFrame, count: int) -> list[str]:
    """The best few ensembles of two or more members."""
    return subsets[subsets.members > 1].model.head(count).tolist()


def cka_table(probe: Probe, read: Mapping[str, Sequence[Layer]]) -> pd.DataFrame:
    """Linear CKA of every two backbones: level, one, other, cka.

    Level by level, finest first (of a classification set their mean vectors; a level that only one backbone has is
    left out), and last `all` that the head reads of each, side by side.

    Args:
        read: by backbone, the layers that a head reads.
    """
    levels: dict[str, dict[str, list[Layer]]] = {}
    for backbone, layer in probe.layers:
        if not layer.startswith("cls_"):
            levels.setdefault(layer.removeprefix("mean_"), {})[backbone] = [(backbone, layer)]
    rows = []
    for level, groups in [*levels.items(), ("all", read)]:
        if len(groups) > 1:
            names, matrix = probe.similarity(groups)
            rows += [
                {"level": level, "one": one, "other": other, "cka": matrix[i, j]}
                for i, one in enumerate(names)
                for j, other in enumerate(names)
            ]
    return pd.DataFrame(rows, columns=["level", "one", "other", "cka"])


def rank_table(scores: Mapping[tuple[str, ...], float], cka: pd.DataFrame, widths: Mapping[str, int]) -> pd.DataFrame:
    """One row an ensemble, best first.

    Returns:
        model, members (how many), channels, score (of the probe, on validation), gain (over its best member's
        score; none of a single one), cka (mean over its pairs, of all that the head reads).
    """
    pairs = cka[cka.level == "all"].set_index(["one", "other"]).cka
    rows = []
    for names, score in scores.items():
        alone = len(names) == 1
        rows.append(
            {"model": "+".join(names), "members": len(names), "channels": sum(widths[name] for name in names),
             "score": score,
             "gain": np.nan if alone else score - max(scores[(name,)] for name in names),
             "cka": np.nan if alone else np.mean([pairs[pair] for pair in combinations(names, 2)])}
        )  # fmt: skip
    # Of equals the one with fewer members is first.
    return pd.DataFrame(rows).sort_values(
        ["score", "members"], ascending=[False, True], kind="stable", ignore_index=True
    )


def greedy_layers(probe: Probe, candidates: Sequence[Layer]) -> pd.DataFrame:
    """Add the layer that helps validation most, one after another, for as long as it helps: layer, score."""
    chosen, best, rows = [], -np.inf, []
    while left := [layer for layer in candidates if layer not in chosen]:
        with _side_by_side() as each:
            scores = [score for score, _ in each(probe.fit, [[*chosen, layer] for layer in left])]
        if max(scores) <= best:
            break
        best = max(scores)
        chosen.append(left[int(np.argmax(scores))])
        rows.append({"backbone": chosen[-1][0], "layer": chosen[-1][1], "score": best})
    return pd.DataFrame(rows, columns=["backbone", "layer", "score"])


@contextmanager
def _side_by_side():
    """A `map` over probes, a core each.

    Several threads on one small product are slower than one (benchmarks/probes.py), and the last digits would depend
    on how many there are.
    """
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield pool.map


def _layers(name: str, store: FeatureStore, heads: config.HeadsConfig, segmentation: bool) -> list[Layer]:
    """What a head reads of a backbone: levels, or the pooled vectors that are its parameters."""
    if segmentation:
        fields = feature_inputs.select_levels([store], heads.levels)[0]
    else:
        fields = feature_inputs.select_pooled([store], heads.linear.pooled, heads.linear.tokens, heads.levels)[0]
    return [(name, array.removeprefix("pooled/").removesuffix("/features")) for _, array in fields]
