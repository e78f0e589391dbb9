"""Sentences on the significance of score differences, and on the composition search and distillation."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.composition.cka import correlation_with_gain
from pipeline.composition.search import CompositionResult
from pipeline.report.significance import (
    FROZEN,
    SIGNIFICANCE_LEVEL,
    BootstrapSamples,
    ModelKind,
    PairedDifference,
    Verdict,
    gain_recovered,
    holm_adjusted,
    paired_difference,
    pairwise_differences,
)

# Bootstrap samples by dataset and model.
Draws = Mapping[tuple[str, str], BootstrapSamples]
# Appended to the name of a frozen model to name its fine-tuned version.
FINE_TUNED_SUFFIX = ", fine-tuned"
PAIR_COLUMNS = [
    "dataset", "protocol", "model_a", "model_b", "metric", "difference", "samples_low", "samples_high", "seeds_low",
    "seeds_high", "low", "high", "p", "p_holm", "verdict", "sentence",
]  # fmt: skip


class Comparison(NamedTuple):
    """A key comparison; `role` describes the reference, such as the best member of an ensemble."""

    model: str
    reference: str
    role: str


def key_comparisons(summary: pd.DataFrame, draws: Draws) -> list[str]:
    """Compare models with their references, one sentence each.

    Compared are ensembles with their best members, networks with the controls, and fine-tuned models with the frozen
    model, which is the only comparison of two protocols. The best member is the one with the best validation score,
    so the test split selects nothing.

    Args:
        summary: as `significance.summarize_runs` returns it.
        draws: bootstrap samples of each (dataset, model).
    """
    sentences = []
    for (dataset, _), table in summary.groupby(["dataset", "protocol"], sort=False):
        table = table.set_index("model")
        for comparison in _ensembles_with_members(table):
            if isinstance(comparison, str):
                sentences.append(f"{dataset}: {comparison}")
            else:
                sentences.append(_comparison_sentence(table, draws, dataset, comparison))
        for comparison in (*_networks_with_controls(table), *_fine_tuned_with_frozen(table)):
            sentences.append(_comparison_sentence(table, draws, dataset, comparison))
    return sentences


def _ensembles_with_members(table: pd.DataFrame) -> Iterator[Comparison | str]:
    """Yield each ensemble's comparison with its best member, or the reason if it has none."""
    for model in table[table.kind == ModelKind.ENSEMBLE].index:
        members = model.split("+")
        if missing := [name for name in members if name not in table.index]:
            yield f"{model} is not compared with its members, because the grid lacks {', '.join(missing)}."
        else:
            yield Comparison(model, table.loc[members].val_mean.idxmax(), "its best member on validation")


def _networks_with_controls(table: pd.DataFrame) -> Iterator[Comparison]:
    for model in table[table.kind.isin([ModelKind.ENSEMBLE, ModelKind.PRETRAINED])].index:
        for control in table[table.kind == ModelKind.BAND_STATISTICS].index:
            if control not in model.split("+"):
                yield Comparison(model, control, "the band-statistics control")
        for control in table[table.kind == ModelKind.RANDOM].index:
            if control.removesuffix("_random") == model:
                yield Comparison(model, control, "the same network with random weights")


def _fine_tuned_with_frozen(table: pd.DataFrame) -> Iterator[Comparison]:
    for model in table[table.kind == ModelKind.FINE_TUNED].index:
        role = f"the frozen model; protocols: {table.loc[model].protocol} and {FROZEN}"
        yield Comparison(model, model.removesuffix(FINE_TUNED_SUFFIX), role)


def _comparison_sentence(table: pd.DataFrame, draws: Draws, dataset: str, comparison: Comparison) -> str:
    model, reference, role = comparison
    result = paired_difference(draws[dataset, model], draws[dataset, reference])
    return f"{dataset}: {_verdict_sentence(table.loc[model], model, f'{reference} ({role})', result)}."


def all_pairs(summary: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Compare every two models of one dataset and protocol.

    Returns:
        One row per pair. Columns: dataset, protocol, model_a, model_b, metric, difference (a minus b), its 95 %
        intervals over test samples (samples_low, samples_high), over seeds (seeds_low, seeds_high) and over both
        (low, high), p, p_holm (adjusted for all pairs of the dataset), verdict, sentence.
    """
    rows = []
    for (dataset, protocol), table in summary.groupby(["dataset", "protocol"], sort=False):
        table = table.set_index("model")
        results = pairwise_differences({model: draws[dataset, model] for model in table.index})
        adjusted = holm_adjusted(np.array([result.p_value for result in results.values()]))
        for ((model_a, model_b), result), p_holm in zip(results.items(), adjusted, strict=True):
            sentence = _verdict_sentence(table.loc[model_a], model_a, model_b, result)
            if result.verdict != Verdict.NOT_SIGNIFICANT and p_holm >= SIGNIFICANCE_LEVEL:
                sentence += f"; not significant after Holm's correction for {len(results)} pairs"
            rows.append(
                [
                    dataset, protocol, model_a, model_b, table.loc[model_a].metric, result.difference,
                    *result.samples_interval, *result.seeds_interval, *result.interval, result.p_value, p_holm,
                    result.verdict.value, f"{sentence}.",
                ]
            )  # fmt: skip
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def multiplicity_note(pairs: pd.DataFrame) -> str:
    """Explain how many of the pairs may differ by chance.

    Args:
        pairs: as `all_pairs` returns them.
    """
    significant = pairs[pairs.verdict != Verdict.NOT_SIGNIFICANT]
    n_after_correction = int((significant.p_holm < SIGNIFICANCE_LEVEL).sum())
    return (
        f"{len(pairs)} pairs are compared, each at the 95 % level. If no models differed, about "
        f"{SIGNIFICANCE_LEVEL * len(pairs):.2g} pairs would differ by chance. {len(significant)} pairs differ "
        f"significantly, and {n_after_correction} of them still do after Holm's correction for all pairs of their "
        "dataset. A comparison that was not planned should be significant after the correction too."
    )


def distillation_sentence(dataset: str, student: str, teacher: str, draws: Draws) -> str:
    """Describe the gain by distillation, and what fraction of the teacher's gain it is."""
    result = gain_recovered(
        student=draws[dataset, f"{student} (distilled)"],
        baseline=draws[dataset, f"{student} (supervised)"],
        teacher=draws[dataset, teacher],
    )
    effect = {
        Verdict.BETTER: "The distilled student is better than",
        Verdict.WORSE: "The distilled student is worse than",
        Verdict.NOT_SIGNIFICANT: "The distilled student does not differ significantly from",
    }[result.student_gain.verdict]
    effect = f"{effect} the supervised baseline: {_gain(result.student_gain)}."
    teacher_gain = _gain(result.teacher_gain)
    if result.fraction is not None and result.interval is not None:
        low, high = result.interval
        recovery = (
            f"It recovers {result.fraction:.0%} of the teacher's gain over the supervised baseline (95 % interval "
            f"{low:.0%} to {high:.0%}); the teacher's gain is {teacher_gain}."
        )
    elif result.teacher_gain.verdict == Verdict.WORSE:
        recovery = (
            f"The teacher is worse than the supervised baseline ({teacher_gain}), so there is no gain to recover."
        )
    else:
        recovery = (
            f"The teacher does not differ significantly from the supervised baseline ({teacher_gain}), so the "
            "fraction of its gain that the student recovers cannot be estimated."
        )
    return f"{dataset}, student {student}, teacher {teacher}: {effect} {recovery}"


def cka_gain_relation(compositions: Mapping[str, CompositionResult]) -> tuple[pd.DataFrame, str]:
    """Test whether ensembles of dissimilar backbones gain more.

    Args:
        compositions: result of the composition search by dataset; at least one has ensembles.

    Returns:
        The ensembles of two backbones (columns of `subsets`, and dataset), and a sentence.
    """
    tables = [
        result.subsets.assign(dataset=dataset) for dataset, result in compositions.items() if len(result.subsets)
    ]
    pairs = pd.concat(tables, ignore_index=True)
    pairs = pairs[pairs.members == 2]
    sample = f"{len(pairs)} pairs of backbones on {pairs.dataset.nunique()} datasets"
    try:
        correlation, p_value = correlation_with_gain(pairs.cka.to_numpy(), pairs.gain.to_numpy())
    except ValueError as error:
        return pairs, f"The correlation of CKA and gain over {sample} cannot be computed: {error}."
    if p_value >= SIGNIFICANCE_LEVEL:
        finding = "no significant correlation"
    else:
        finding = f"{'dissimilar' if correlation < 0 else 'similar'} backbones gain more"
    return pairs, (
        f"Spearman's rank correlation of CKA and gain over {sample} is {correlation:+.2f} (permutation p = "
        f"{p_value:.2f}): {finding}. A negative correlation means that ensembles of dissimilar backbones gain more. "
        "Pairs that share a backbone or a dataset are not independent, the gain is over the better of two noisy "
        "scores, and so few pairs reveal only a very strong correlation."
    )


def _verdict_sentence(row: pd.Series, model: str, reference: str, result: PairedDifference) -> str:
    """Compare a model with a reference; the sentence has no full stop.

    Args:
        row: of the model in the summary.
    """
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
    return f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"
