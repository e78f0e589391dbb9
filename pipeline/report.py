"""The report: scores as a table, sentences on what they can tell, box plots, and one self-contained page."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from pipeline.compare import bootstrap, difference, interval

COLOURS = {"joined": "#d95f02", "pretrained": "#1b9e77", "random": "#aaaaaa", "baseline": "#7570b3"}


def kind(model: str, weights: str) -> str:
    """What a model is: `joined`, `pretrained`, `random` (a control) or `baseline` (no network)."""
    if "random" in weights:
        return "random"
    if weights == "none":
        return "baseline"
    return "joined" if "+" in model else "pretrained"


def summarise(runs: pd.DataFrame, counts: Mapping[tuple[str, str], np.ndarray]) -> pd.DataFrame:
    """One row a dataset and model.

    Args:
        runs: one row a run, as the train stage writes them.
        counts: (run, sample, cells) of each (dataset, model).

    Returns:
        mean, std (over seeds), low and high (95 % bootstrap of the mean, over seeds and test samples).
    """
    rows = []
    for (dataset, model), group in runs.groupby(["dataset", "model"], sort=False):
        first = group.iloc[0]
        spread = group.score.std(ddof=1) if len(group) > 1 else float("nan")
        low, high = interval(bootstrap(first.task, counts[dataset, model], first.classes))
        rows.append(
            {"dataset": dataset, "model": model, "kind": kind(model, first.weights), "protocol": first.protocol,
             "metric": first.metric, "mean": group.score.mean(), "std": spread,
             "low": low, "high": high, "val_mean": group.val_score.mean(), "runs": len(group), "n_test": first.n_test,
             "weights": first.weights, "learning_rate": first.learning_rate, "weight_decay": first.weight_decay,
             "task": first.task, "classes": first.classes}
        )  # fmt: skip
    return pd.DataFrame(rows)


def findings(summary: pd.DataFrame, counts: Mapping[tuple[str, str], np.ndarray]) -> list[str]:
    """Plain sentences, per dataset: joined against its best member, and everything against the controls.

    The best member is the one with the best validation score, so the test split chooses nothing.
    """
    said = []
    for dataset, table in summary.groupby("dataset", sort=False):
        table = table.set_index("model")
        for model in table[table.kind == "joined"].index:
            members = model.split("+")
            if absent := [name for name in members if name not in table.index]:
                said.append(
                    f"{dataset}: {model} is not compared with its members: {', '.join(absent)} not in the grid."
                )
            else:
                best = table.loc[members].val_mean.idxmax()
                said.append(_sentence(dataset, table, counts, model, best, "its best member by validation"))
        for model in table[table.kind.isin(["joined", "pretrained"])].index:
            for control in table[table.kind == "baseline"].index:
                said.append(_sentence(dataset, table, counts, model, control, "the raw-band baseline"))
            for control in table[table.kind == "random"].index:
                if control.removesuffix("_random") == model:
                    said.append(_sentence(dataset, table, counts, model, control, "the same network untrained"))
    return said


def _sentence(dataset, table, counts, ours: str, theirs: str, what: str) -> str:
    row = table.loc[ours]
    gap = difference(row.task, counts[dataset, ours], counts[dataset, theirs], row.classes)
    spread = max(table.loc[[ours, theirs], "std"])
    words = {
        "better": "better",
        "worse": "worse",
        "cannot be told": "cannot be told apart by this test set",
    }[gap.verdict]
    return (
        f"{dataset}: {ours} against {theirs}, {what}: {gap.mean:+.3f} {row.metric} "
        f"(95 % interval {gap.low:+.3f} to {gap.high:+.3f} over {row.runs} seeds and {row.n_test} test samples; "
        f"{f'seeds alone spread {spread:.3f}' if row.runs > 1 else 'one seed, so no spread is known'}): {words}."
    )


def boxplots(runs: pd.DataFrame, summary: pd.DataFrame, path: Path) -> None:
    """Box plots over seeds, a panel a dataset, like the paper's Figure 2; a line is the interval of the mean."""
    datasets = list(summary.dataset.unique())
    columns = min(2, len(datasets))
    rows = -(-len(datasets) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.5 * columns, 3.9 * rows), squeeze=False)
    for panel in axes.flat[len(datasets) :]:
        panel.axis("off")
    for panel, dataset in zip(axes.flat, datasets, strict=False):
        table = summary[summary.dataset == dataset]
        scores = [runs[(runs.dataset == dataset) & (runs.model == model)].score for model in table.model]
        boxes = panel.boxplot(scores, patch_artist=True, widths=0.6, medianprops={"color": "black"})
        for box, what in zip(boxes["boxes"], table.kind, strict=True):
            box.set_facecolor(COLOURS[what])
        places = np.arange(1, len(table) + 1) + 0.38
        panel.vlines(places, table.low, table.high, color="0.35", linewidth=1)
        panel.set_xticks(range(1, len(table) + 1), table.model, rotation=20, ha="right", fontsize=8)
        panel.set_title(f"{dataset} (n = {table.n_test.iloc[0]})", fontsize=10)
        panel.set_ylabel(f"test {table.metric.iloc[0]}")
        panel.grid(axis="y", alpha=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="lower center", ncols=len(COLOURS), frameon=False, fontsize=9)
    figure.suptitle(
        "Frozen backbones: boxes over seeds; lines: 95 % interval of the mean over seeds and test samples",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    # No creation date and version, so that the same scores give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def markdown(summary: pd.DataFrame) -> str:
    """The table of scores, as the README shows it."""
    lines = [
        "| dataset | model | kind | metric | test score, mean ± std over seeds | 95 % interval | test samples |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary.itertuples():
        spread = f"{row.std:.3f}" if row.runs > 1 else "–"
        lines.append(
            f"| {row.dataset} | {row.model} | {row.kind} | {row.metric} | {row.mean:.3f} ± {spread} | "
            f"{row.low:.3f}–{row.high:.3f} | {row.n_test} |"
        )
    return "\n".join(lines) + "\n"


def page(summary: pd.DataFrame, said: Sequence[str], left_out: Sequence[str], picture: Path) -> str:
    """One HTML page that needs no other file."""
    image = base64.b64encode(picture.read_bytes()).decode()
    shown = summary.drop(columns=["task", "classes"]).to_html(index=False, float_format=lambda value: f"{value:.4g}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>eo-compose report</title>
<style>body{{font:15px/1.5 sans-serif;max-width:1150px;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;font-size:13px}}td,th{{padding:3px 8px;border-bottom:1px solid #ddd;text-align:left}}
img{{max-width:100%}}</style></head><body>
<h1>Which backbones, joined how, read these data best?</h1>
<p>Protocol: <b>frozen</b> backbones, features cached once; learning rate and weight decay searched on the
validation split; every row below is the test split, touched once per seed. A fine-tuned model would be another
protocol and is never mixed in. Random networks and the raw-band baseline are controls, not models to use.</p>
<img alt="Box plots of test scores over seeds, one panel a dataset" src="data:image/png;base64,{image}">
<h2>What can be told</h2>{_list(said)}
<h2>Scores</h2>
<p>std is over seeds; low and high bound the 95 % bootstrap interval of the mean, over seeds and test samples.</p>
{shown}
<h2>Left out</h2>
<p>A model is left out of a dataset that lacks a band its backbones were trained on.</p>{_list(left_out)}
</body></html>
"""


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items or ["none"]) + "</ul>"
