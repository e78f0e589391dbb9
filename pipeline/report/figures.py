"""The report's pictures. The same figures give the same bytes: no creation date, no version."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

COLOURS = {"joined": "#d95f02", "pretrained": "#1b9e77", "random": "#aaaaaa", "baseline": "#7570b3",
           "fine-tuned": "#e7298a"}  # fmt: skip


def draw_boxplots(runs: pd.DataFrame, summary: pd.DataFrame, path: Path) -> None:
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
    kinds = [what for what in COLOURS if what in set(summary.kind)]
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=COLOURS[what]) for what in kinds]
    figure.legend(handles, kinds, loc="lower center", ncols=len(kinds), frameon=False, fontsize=9)
    protocols = " and ".join(summary.protocol.unique())
    figure.suptitle(
        f"Protocol: {protocols}. Boxes: over seeds; lines: 95 % interval of the mean over test samples", fontsize=11
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    _save(figure, path)


def draw_cka_matrices(cka: pd.DataFrame, path: Path) -> None:
    """Linear CKA of every two backbones: a row a data set, a panel a level.

    Args:
        cka: columns dataset, level, backbone_a, backbone_b, cka.
    """
    datasets = list(cka.dataset.unique())
    levels = ["all", *[level for level in cka.level.unique() if level != "all"]]
    side = 0.55 * cka.backbone_a.nunique() + 0.9
    size = (side * len(levels) + 1.2, (side + 0.35) * len(datasets))
    figure, axes = plt.subplots(len(datasets), len(levels), figsize=size, squeeze=False)
    for row, dataset in zip(axes, datasets, strict=True):
        for panel, level in zip(row, levels, strict=True):
            table = cka[(cka.dataset == dataset) & (cka.level == level)]
            if table.empty:
                panel.axis("off")
                continue
            matrix = table.pivot_table(index="backbone_a", columns="backbone_b", values="cka", sort=False)
            panel.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
            for (y, x), value in np.ndenumerate(matrix.to_numpy()):
                colour = "white" if value < 0.6 else "black"
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
            panel.set_xticks(range(len(matrix)), matrix.columns, rotation=30, ha="right", fontsize=7)
            panel.set_yticks(range(len(matrix)), matrix.index, fontsize=7)
            panel.set_title("all that a head reads" if level == "all" else level, fontsize=8)
        row[0].set_ylabel(dataset, fontsize=9)
    figure.suptitle("Linear CKA between frozen backbones (debiased, training split)", fontsize=11)
    figure.tight_layout()
    _save(figure, path)


def draw_gain_against_cka(pairs: pd.DataFrame, title: str, path: Path) -> None:
    """Gain of every two backbones over the better of them, against how alike they are.

    Args:
        pairs: dataset, model, cka, gain.
    """
    figure, panel = plt.subplots(figsize=(7.5, 4.4))
    panel.axhline(0, color="0.6", linewidth=1)
    for number, (dataset, table) in enumerate(pairs.groupby("dataset", sort=False)):
        panel.scatter(table.cka, table.gain, label=dataset, color=f"C{number}", marker="osD^vP*X"[number % 8], s=45)
    for row in pairs.itertuples():
        panel.annotate(row.model, (row.cka, row.gain), xytext=(5, 4), textcoords="offset points", fontsize=7)
    panel.set_xlabel("linear CKA of the two backbones (training split)")
    panel.set_ylabel("probe's gain over the better one\n(validation split)")
    panel.margins(x=0.15, y=0.12)
    panel.set_title(title, fontsize=10)
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def draw_score_against_cost(rows: pd.DataFrame, path: Path) -> None:
    """Test score against operations a chip, a panel a data set; a line is the 95 % interval of the mean.

    Args:
        rows: dataset, shown (the model's name), role (student, teacher or member), mean, low, high, flops, metric.
    """
    rows = rows.drop_duplicates(["dataset", "shown"])
    datasets = list(rows.dataset.unique())
    columns = min(2, len(datasets))
    size = (6.5 * columns, 3.6 * -(-len(datasets) // columns))
    figure, axes = plt.subplots(-(-len(datasets) // columns), columns, figsize=size, squeeze=False)
    colours = {"student": "#d95f02", "teacher": "#1b9e77", "member": "#7570b3"}
    for panel in axes.flat[len(datasets) :]:
        panel.axis("off")
    for panel, dataset in zip(axes.flat, datasets, strict=False):
        table = rows[(rows.dataset == dataset) & rows.flops.notna()]
        for row, before in zip(table.itertuples(), table.groupby("flops").cumcount(), strict=True):
            # A student's variants cost the same: a little apart, or their intervals would hide one another.
            across = row.flops / 1e9 * 1.07**before
            panel.vlines(across, row.low, row.high, color="0.7", linewidth=1)
            panel.scatter(across, row.mean, color=colours[row.role], s=40, zorder=3)
            panel.annotate(row.shown, (across, row.mean), xytext=(6, 3), textcoords="offset points", fontsize=7)
        panel.set_xscale("log")
        panel.set_title(dataset, fontsize=10)
        panel.set_xlabel("GFLOP a chip (log scale)")
        panel.set_ylabel(f"test {table.metric.iloc[0]}" if len(table) else "")
        panel.margins(x=0.25, y=0.12)
        panel.grid(alpha=0.3)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colour) for colour in colours.values()]
    figure.legend(handles, colours, loc="lower center", ncols=len(colours), frameon=False, fontsize=9)
    figure.suptitle(
        "Students against frozen models: score and cost. Lines: 95 % interval over test samples", fontsize=11
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
