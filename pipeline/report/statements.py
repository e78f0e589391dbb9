"""What the scores can tell: a plain sentence for every pair of models, and first those that a reader came for."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from pipeline.report.significance import (
    SIGNIFICANCE_LEVEL,
    BootstrapSamples,
    PairedDifference,
    holm_adjusted,
    paired_difference,
    pairwise_differences,
)

Drawn = Mapping[tuple[str, str], BootstrapSamples]
# What a fine-tuned model is called beside the frozen one.
FINE_TUNED_SUFFIX = ", fine-tuned"


def key_comparisons(summary: pd.DataFrame, drawn: Drawn) -> list[str]:
    """Per data set: joined models against their best members, all networks against the controls, and fine-tuned
    models against themselves frozen, which is the one comparison of two protocols.

    The best member is the one with the best validation score, so the test split chooses nothing.

    Args:
        summary: as `report.summarise` gives it.
        drawn: of each (dataset, model).
    """
    said = []
    for (dataset, _), table in summary.groupby(["dataset", "protocol"], sort=False):
        table = table.set_index("model")
        for model in table[table.kind == "joined"].index:
            members = model.split("+")
            if absent := [name for name in members if name not in table.index]:
                said.append(
                    f"{dataset}: {model} is not compared with its members: {', '.join(absent)} not in the grid."
                )
            else:
                best = table.loc[members].val_mean.idxmax()
                said.append(_against(table, drawn, dataset, model, best, "its best member by validation"))
        for model in table[table.kind.isin(["joined", "pretrained"])].index:
            for control in table[table.kind == "baseline"].index:
                if control not in model.split("+"):
                    said.append(_against(table, drawn, dataset, model, control, "the raw-band baseline"))
            for control in table[table.kind == "random"].index:
                if control.removesuffix("_random") == model:
                    said.append(_against(table, drawn, dataset, model, control, "the same network untrained"))
        for model in table[table.kind == "fine-tuned"].index:
            frozen = model.removesuffix(FINE_TUNED_SUFFIX)
            what = f"itself frozen ({table.loc[model].protocol}: another protocol)"
            said.append(_against(table, drawn, dataset, model, frozen, what))
    return said


def all_pairs(summary: pd.DataFrame, drawn: Drawn) -> pd.DataFrame:
    """One row a pair of models of one data set and protocol.

    Returns:
        dataset, protocol, one, other, metric, gap, intervals over test samples, over seeds and over both, p, holm (p
        adjusted for all the pairs of that data set), verdict, sentence.
    """
    rows = []
    for (dataset, protocol), table in summary.groupby(["dataset", "protocol"], sort=False):
        table = table.set_index("model")
        gaps = pairwise_differences({model: drawn[dataset, model] for model in table.index})
        adjusted = holm_adjusted(np.array([gap.p for gap in gaps.values()]))
        for ((one, other), gap), p in zip(gaps.items(), adjusted, strict=True):
            rows.append(
                {"dataset": dataset, "protocol": protocol, "one": one, "other": other,
                 "metric": table.loc[one].metric, "gap": gap.mean, "samples_low": gap.samples[0],
                 "samples_high": gap.samples[1], "seeds_low": gap.seeds[0], "seeds_high": gap.seeds[1],
                 "low": gap.both[0], "high": gap.both[1], "p": gap.p, "holm": p, "verdict": gap.verdict,
                 "sentence": _pair(table, one, other, gap, p, len(gaps))}
            )  # fmt: skip
    columns = None if rows else ["dataset", "protocol", "one", "other", "verdict", "holm", "sentence"]
    return pd.DataFrame(rows, columns=columns)


def multiplicity_note(table: pd.DataFrame) -> str:
    """What so many comparisons may be worth."""
    told = table[table.verdict != "cannot be told"]
    return (
        f"{len(table)} pairs are compared, each at 95 %: about {SIGNIFICANCE_LEVEL * len(table):.2g} would seem to differ by "
        f"chance if none did. {len(told)} differ; {int((told.holm < SIGNIFICANCE_LEVEL).sum())} of them still do after Holm's "
        "correction for the pairs of their data set. A difference that was not asked about beforehand should pass "
        "that too."
    )


def _pair(table: pd.DataFrame, one: str, other: str, gap: PairedDifference, adjusted: float, count: int) -> str:
    says = {
        "better": f"{one} is better than {other}",
        "worse": f"{one} is worse than {other}",
        "cannot be told": f"{one} and {other} cannot be told apart with this test set",
    }[gap.verdict]
    lost = gap.verdict != "cannot be told" and adjusted >= SIGNIFICANCE_LEVEL
    after = f"; no longer so after Holm's correction for {count} pairs" if lost else ""
    return f"{says}: {_figures(table.loc[one], gap)}{after}."


def _against(table: pd.DataFrame, drawn: Drawn, dataset: str, ours: str, theirs: str, what: str) -> str:
    row, gap = table.loc[ours], paired_difference(drawn[dataset, ours], drawn[dataset, theirs])
    words = {
        "better": "better",
        "worse": "worse",
        "cannot be told": "cannot be told apart with this test set",
    }[gap.verdict]
    return f"{dataset}: {ours} against {theirs}, {what}: {_figures(row, gap)}: {words}."


def _figures(row: pd.Series, gap: PairedDifference) -> str:
    seeds = f"the {row.runs} seeds alone {_interval(gap.seeds)}" if row.runs > 1 else "one seed, so no spread known"
    return (
        f"{gap.mean:+.3f} {row.metric} (95 % interval {_interval(gap.both)}; the {row.n_test} test samples alone "
        f"{_interval(gap.samples)}, {seeds})"
    )


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"
