"""The report's part on the composition search."""

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.composition import cka as similarity
from pipeline.composition.result import CompositionResult
from pipeline.report import figures, page
from pipeline.report.significance import SIGNIFICANCE_LEVEL

PROBES = {"logistic": "logistic regression", "knn": "nearest neighbours"}


def composition_section(searched: Mapping[str, CompositionResult], summary: pd.DataFrame, folder: Path) -> str:
    """HTML; pictures are written to `folder` too.

    Args:
        searched: by data set.
        summary: of the full protocol's runs.
    """
    parts = [
        "<h2>Composition search</h2><p>Every ensemble of the backbones below by a quick probe on the validation "
        "split; random controls are left aside unless compose.backbones names them. Probe: logistic regression by "
        "L-BFGS (or nearest neighbours, if so said) on the frozen features, concatenated; of masks, on their pixels. "
        "Its scores are of another protocol than the test scores beside them, and only rank. The best few ensembles "
        "were then run by the full protocol; their test scores are in the first table too.</p>"
    ]
    for dataset, one in searched.items():
        if one.subsets.empty:
            why = " ".join(one.skipped) or "The grid's backbones are random controls."
            parts.append(f"<p>{html.escape(f'{dataset}: nothing to compose. {why}')}</p>")
            continue
        tested = summary[(summary.dataset == dataset) & (summary.protocol == "frozen")]
        caption = f"{dataset}: {len(one.subsets)} ensembles. Probe: {PROBES[one.probe]}, frozen, validation."
        parts.append(page.html_table(_subsets(one.subsets, tested), caption))
        if len(one.greedy):
            steps = one.greedy.assign(score=one.greedy.score.map("{:.3f}".format))
            what = (
                "layers added one by one for as long as the probe's validation score rose (frozen features); of all "
                "that the stores hold, also what heads.levels and heads.linear leave out"
            )
            if "segmentation" in set(tested.task):
                what += "; scored on the pixels drawn for the probe, not on whole masks as the ensembles are"
            parts.append(page.html_table(steps, f"{dataset}: {what}"))
    return "".join(parts) + _alike(searched, folder)


def cka_gain_relation(searched: Mapping[str, CompositionResult]) -> tuple[pd.DataFrame, str]:
    """Pairs of backbones (dataset, model, cka, gain), and a sentence on whether low CKA foretells gain."""
    tables = [one.subsets.assign(dataset=dataset) for dataset, one in searched.items() if len(one.subsets)]
    pairs = pd.concat(tables, ignore_index=True)
    pairs = pairs[pairs.members == 2]
    where = f"{len(pairs)} pairs of backbones on {pairs.dataset.nunique()} data sets"
    try:
        rank, p = similarity.correlation_with_gain(pairs.cka.to_numpy(), pairs.gain.to_numpy())
    except ValueError as error:
        return pairs, f"Whether low CKA foretells gain cannot be asked of {where}: {error}."
    says = "no such relation can be seen" if p >= SIGNIFICANCE_LEVEL else "unlike gain more" if rank < 0 else "alike gain more"
    return pairs, (
        f"Does low CKA foretell gain? Over {where}, Spearman's rank correlation of CKA and gain is {rank:+.2f} "
        f"(permutation p = {p:.2f}): {says}. Below zero would mean that unlike backbones gain more. Pairs that share "
        "a backbone or a data set are not independent, gains are over the better of two noisy scores, and so few "
        "pairs can show only a very strong relation."
    )


def _subsets(subsets: pd.DataFrame, tested: pd.DataFrame) -> pd.DataFrame:
    """Every cell text; the test score of those that the full protocol was run on, whatever their members' order."""
    scores = {
        frozenset(row.model.split("+")): f"{page.format_score(row)} ({row.low:.3f}–{row.high:.3f})"
        for row in tested.itertuples()
    }
    metric = tested.metric.iloc[0] if len(tested) else "score"
    return pd.DataFrame(
        {
            "ensemble": subsets.model,
            "channels": subsets.channels.astype(str),
            f"probe, validation {metric}": subsets.score.map("{:.3f}".format),
            "gain over its best member": [_finite(value, "{:+.3f}") for value in subsets.gain],
            "mean CKA of its pairs": [_finite(value, "{:.2f}") for value in subsets.cka],
            f"full protocol (frozen), test {metric}": [
                scores.get(frozenset(model.split("+")), "–") for model in subsets.model
            ],
        }
    )


def _finite(value: float, form: str) -> str:
    return form.format(value) if np.isfinite(value) else "–"


def _alike(searched: Mapping[str, CompositionResult], folder: Path) -> str:
    tables = [one.cka.assign(dataset=dataset) for dataset, one in searched.items() if len(one.cka)]
    if not tables:
        return ""
    figures.draw_cka_matrices(pd.concat(tables, ignore_index=True), folder / "cka.png")
    pairs, sentence = cka_gain_relation(searched)
    figures.draw_gain_against_cka(pairs, f"Does low CKA foretell gain? n = {len(pairs)}", folder / "cka_gain.png")
    return (
        "<h3>How alike the backbones are</h3><p>Linear CKA without bias (Kornblith et al. 2019; Nguyen et al. 2021) "
        "of standardised features, level by level (of classification sets their mean vectors), and of all that a "
        "head reads side by side. 1: the same up to rotation; 0: unrelated.</p>"
        + page.embedded_image(folder / "cka.png", "Linear CKA between backbones, a panel a level")
        + f"<p>{html.escape(sentence)}</p>"
        + page.embedded_image(folder / "cka_gain.png", "Gain of joining two backbones against their CKA")
    )
