"""Sentences on the significance of score differences, and on the composition search and distillation."""

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
import pandas as pd

from pipeline.composition import CompositionResult
from pipeline.composition.cka import correlation_with_gain
from pipeline.report import significance
from pipeline.report.significance import Draws, ModelKind, PairedDifference, Verdict, paired_difference

# Appended to the name of a frozen model to name its fine-tuned version.
FINE_TUNED_SUFFIX = ", fine-tuned"
PAIR_COLUMNS = [
    "dataset", "protocol", "model_a", "model_b", "metric", "difference", "samples_low", "samples_high", "seeds_low",
    "seeds_high", "low", "high", "p", "p_holm", "verdict", "sentence",
]  # fmt: skip


def key_comparisons(summary: pd.DataFrame, draws: Draws) -> list[str]:
    """Compare models with their references, one sentence each.

    Compared are ensembles with their best members, networks with the controls, and fine-tuned models with the frozen
    model, which is the only comparison of two protocols. The best member is the one with the best validation score,
    so the test split selects nothing.
    """
    sentences = []
    for (dataset, _), table in summary.groupby(["dataset", "protocol"], sort=False):
        table = table.set_index("model")
        for model, reference, description in (*_best_members(table), *_controls(table), *_frozen_models(table)):
            if reference is None:
                sentences.append(f"{dataset}: {description}")
            else:
                result = paired_difference(draws[dataset, model], draws[dataset, reference])
                sentence = _verdict_sentence(table.loc[model], model, f"{reference} ({description})", result)
                sentences.append(f"{dataset}: {sentence}.")
    return sentences


def _best_members(table: pd.DataFrame) -> Iterator[tuple[str, str | None, str]]:
    """Yield each ensemble, its best member or their average, and a description; or None and the reason."""
    for model in table[table.kind == ModelKind.ENSEMBLE].index:
        members = model.split("+")
        if missing := [name for name in members if name not in table.index]:
            reason = f"{model} is not compared with its members, because the grid lacks {', '.join(missing)}."
            yield model, None, reason
        else:
            yield model, table.loc[members].val_mean.idxmax(), "its best member on validation"
        if (average := model + significance.AVERAGE_SUFFIX) in table.index:
            yield model, average, "control: the average of its members' probabilities"


def _controls(table: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Yield each network and control that it is compared with, and what the control is."""
    for model in table[table.kind.isin([ModelKind.ENSEMBLE, ModelKind.PRETRAINED])].index:
        for control, kind in table.kind.items():
            if kind == ModelKind.BAND_STATISTICS and control not in model.split("+"):
                yield model, control, "the band-statistics control"
        if (control := f"{model}_random") in table.index and table.kind[control] == ModelKind.RANDOM:
            yield model, control, "the same network with random weights"


def _frozen_models(table: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Yield each fine-tuned model, the frozen one, and their protocols."""
    for model, protocol in table.protocol[table.kind == ModelKind.FINE_TUNED].items():
        description = f"the frozen model; protocols: {protocol} and {significance.FROZEN}"
        yield model, model.removesuffix(FINE_TUNED_SUFFIX), description


def all_pairs(summary: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Compare every two models of one dataset and protocol, one row per pair.

    The difference is a minus b, with 95 % intervals over test samples, over seeds, and over both (low, high). p_holm
    is adjusted for all pairs of the dataset.
    """
    rows = []
    for (dataset, protocol), table in summary.groupby(["dataset", "protocol"], sort=False):
        table = table.set_index("model")
        pairs = list(combinations(table.index, 2))
        results = [paired_difference(draws[dataset, a], draws[dataset, b]) for a, b in pairs]
        adjusted = significance.holm_adjusted(np.array([result.p_value for result in results]))
        for (model_a, model_b), result, p_holm in zip(pairs, results, adjusted, strict=True):
            sentence = _verdict_sentence(table.loc[model_a], model_a, model_b, result)
            if result.verdict != Verdict.NOT_SIGNIFICANT and p_holm >= significance.SIGNIFICANCE_LEVEL:
                sentence += f"; not significant after Holm's correction for {len(pairs)} pairs"
            (samples_low, samples_high), (seeds_low, seeds_high) = result.samples_interval, result.seeds_interval
            rows.append(
                {"dataset": dataset, "protocol": protocol, "model_a": model_a, "model_b": model_b,
                 "metric": table.metric[model_a], "difference": result.difference, "samples_low": samples_low,
                 "samples_high": samples_high, "seeds_low": seeds_low, "seeds_high": seeds_high,
                 "low": result.interval[0], "high": result.interval[1], "p": result.p_value, "p_holm": p_holm,
                 "verdict": result.verdict.value, "sentence": f"{sentence}."}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def multiplicity_note(pairs: pd.DataFrame) -> str:
    """Explain how many of the pairs, as `all_pairs` returns them, may differ by chance."""
    significant = pairs[pairs.verdict != Verdict.NOT_SIGNIFICANT]
    n_by_chance = significance.SIGNIFICANCE_LEVEL * len(pairs)
    n_after_correction = int((significant.p_holm < significance.SIGNIFICANCE_LEVEL).sum())
    return (
        f"{len(pairs)} pairs are compared, each at the 95 % level. If no models differed, about "
        f"{n_by_chance:.2g} pairs would differ by chance. {len(significant)} pairs differ "
        f"significantly, and {n_after_correction} of them still do after Holm's correction for all pairs of their "
        "dataset. A comparison that was not planned should be significant after the correction too."
    )


def distillation_sentence(dataset: str, student: str, teacher: str, draws: Draws) -> str:
    """Describe the gain by distillation, and what fraction of the teacher's gain it is."""
    result = significance.gain_recovered(
        student=draws[dataset, f"{student} (distilled)"],
        baseline=draws[dataset, f"{student} (supervised)"],
        teacher=draws[dataset, teacher],
    )
    verdict, effect = result.student_gain.verdict, "does not differ significantly from"
    if verdict != Verdict.NOT_SIGNIFICANT:
        effect = f"is {verdict.value} than"
    teacher_gain, (low, high) = _gain(result.teacher_gain), result.interval
    recovery = {
        Verdict.BETTER: f"It recovers {result.fraction:.0%} of the teacher's gain over the supervised baseline (95 % "
        f"interval {low:.0%} to {high:.0%}); the teacher's gain is {teacher_gain}.",
        Verdict.WORSE: f"The teacher is worse than the supervised baseline ({teacher_gain}), so there is no gain to "
        "recover.",
        Verdict.NOT_SIGNIFICANT: f"The teacher does not differ significantly from the supervised baseline "
        f"({teacher_gain}), so the fraction of its gain that the student recovers cannot be estimated.",
    }[result.teacher_gain.verdict]
    return (
        f"{dataset}, student {student}, teacher {teacher}: The distilled student {effect} the supervised baseline: "
        f"{_gain(result.student_gain)}. {recovery}"
    )


def cka_gain_relation(compositions: Mapping[str, CompositionResult]) -> tuple[pd.DataFrame, str]:
    """Test whether ensembles of dissimilar backbones gain more; return the pairs and a sentence.

    Args:
        compositions: result of the composition search by dataset; at least one has ensembles.
    """
    subsets = [result.subsets.assign(dataset=dataset) for dataset, result in compositions.items() if result.backbones]
    pairs = pd.concat(subsets, ignore_index=True).query("members == 2")
    sample = f"{len(pairs)} pairs of backbones on {pairs.dataset.nunique()} datasets"
    try:
        correlation, p_value, n_permutations = correlation_with_gain(pairs)
    except ValueError as error:
        return pairs, f"The correlation of CKA and gain over {sample} cannot be computed: {error}."
    if p_value >= significance.SIGNIFICANCE_LEVEL:
        finding = "no significant correlation"
    else:
        finding = f"{'dissimilar' if correlation < 0 else 'similar'} backbones gain more"
    return pairs, (
        f"Spearman's rank correlation of CKA and gain within datasets, over {sample}, is {correlation:+.2f} (p = "
        f"{p_value:.2f} by {n_permutations} permutations of the backbones, so p cannot be below "
        f"{1 / n_permutations:.2g}): {finding}. A negative correlation means that ensembles of dissimilar backbones "
        "gain more. The gain is over the better of two noisy scores, and so few backbones reveal only a very strong "
        "correlation."
    )


def _verdict_sentence(row: pd.Series, model: str, reference: str, result: PairedDifference) -> str:
    """Compare a model, of this row of the summary, with a reference; the sentence has no full stop."""
    seeds = f"over the {row.runs} seeds only {_interval(result.seeds_interval)}"
    if row.runs == 1:
        seeds = "one seed, so the variation over seeds is unknown"
    size = (
        f"{result.difference:+.3f} {row.metric} (95 % interval {_interval(result.interval)}; over the {row.n_test} "
        f"test samples only {_interval(result.samples_interval)}; {seeds})"
    )
    if result.verdict == Verdict.NOT_SIGNIFICANT:
        return f"No significant difference between {model} and {reference}: {size}"
    return f"{model} is {result.verdict.value} than {reference} by {size}"


def _gain(result: PairedDifference) -> str:
    return f"{result.difference:+.3f}, 95 % interval {_interval(result.interval)}"


def _interval(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:+.3f} to {high:+.3f}"
