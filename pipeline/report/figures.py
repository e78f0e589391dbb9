"""Figures of the report. Files have no date and no version, so the same numbers yield the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import rasterio
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from pipeline.report.significance import ModelKind
from pipeline.tasks import IGNORE, get_task

KIND_COLOURS = {
    ModelKind.ENSEMBLE: "#d95f02", ModelKind.PRETRAINED: "#1b9e77", ModelKind.RANDOM: "#aaaaaa",
    ModelKind.BAND_STATISTICS: "#7570b3", ModelKind.FINE_TUNED: "#e7298a", ModelKind.AVERAGE: "#e6ab02",
}  # fmt: skip
ROLE_COLOURS = {"student": "#d95f02", "teacher": "#1b9e77", "member": "#7570b3"}
MARKERS = "osD^vP*X"
# Longer side of a map in the figure, in pixels; larger maps are read at a lower resolution.
MAX_MAP_PIXELS = 1024


def draw_boxplots(runs: pd.DataFrame, summary: pd.DataFrame, path: Path) -> None:
    """Draw box plots of the scores over seeds, one panel per dataset, as in Figure 2 of the paper.

    A line next to a box is the 95 % interval of the mean over test samples. Drawn are the models of the summary.
    """
    datasets = list(summary.dataset.unique())
    figure, panels = _panel_grid(len(datasets), panel_size=(6.5, 3.9))
    for panel, dataset in zip(panels, datasets, strict=True):
        table = summary[summary.dataset == dataset]
        scores = [runs[(runs.dataset == dataset) & (runs.model == model)].score for model in table.model]
        boxes = panel.boxplot(scores, patch_artist=True, widths=0.6, medianprops={"color": "black"})
        for box, kind in zip(boxes["boxes"], table.kind, strict=True):
            box.set_facecolor(KIND_COLOURS[ModelKind(kind)])
        line_positions = np.arange(1, len(table) + 1) + 0.38
        panel.vlines(line_positions, table.low, table.high, color="0.35", linewidth=1)
        panel.set_xticks(range(1, len(table) + 1), table.model, rotation=20, ha="right", fontsize=8)
        panel.set_title(f"{dataset} (n = {table.n_test.iloc[0]})", fontsize=10)
        panel.set_ylabel(f"test {table.metric.iloc[0]}")
        panel.grid(axis="y", alpha=0.3)
    handles = [Patch(facecolor=KIND_COLOURS[kind], label=kind) for kind in KIND_COLOURS if kind in set(summary.kind)]
    title = f"Protocols: {', '.join(summary.protocol.unique())}. Boxes: over seeds. Lines: 95 % interval of the mean "
    _save_with_legend(figure, handles, title + "over test samples", path)


def draw_cka_matrices(cka: pd.DataFrame, path: Path) -> None:
    """Draw the linear CKA of every two backbones, one row of panels per dataset and one panel per level."""
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
            panel.set_title("all features of the head" if level == "all" else level, fontsize=8)
        row[0].set_ylabel(dataset, fontsize=9)
    figure.suptitle("Linear CKA between frozen backbones (debiased, training split)", fontsize=11)
    figure.tight_layout()
    _save(figure, path)


def draw_gain_against_cka(pairs: pd.DataFrame, path: Path) -> None:
    """Draw the gain of every ensemble of two backbones against the similarity of the two."""
    figure, panel = plt.subplots(figsize=(7.5, 4.4))
    panel.axhline(0, color="0.6", linewidth=1)
    for number, (dataset, table) in enumerate(pairs.groupby("dataset", sort=False)):
        marker = MARKERS[number % len(MARKERS)]
        panel.scatter(table.cka, table.gain, label=dataset, color=f"C{number}", marker=marker, s=45)
    for row in pairs.itertuples():
        panel.annotate(row.model, (row.cka, row.gain), xytext=(5, 4), textcoords="offset points", fontsize=7)
    panel.set_xlabel("linear CKA of the two backbones (training split)")
    panel.set_ylabel("gain over the better backbone\n(probe, validation split)")
    panel.margins(x=0.15, y=0.12)
    panel.set_title(f"Do ensembles of dissimilar backbones gain more? n = {len(pairs)}", fontsize=10)
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def draw_score_against_cost(rows: pd.DataFrame, path: Path) -> None:
    """Draw test scores against operations per chip, one panel per dataset.

    A line is the 95 % interval of the mean over test samples. The rows are those of `sections.students`.
    """
    rows = rows.drop_duplicates(["dataset", "display_name"])
    datasets = list(rows.dataset.unique())
    figure, panels = _panel_grid(len(datasets), panel_size=(6.5, 3.6))
    for panel, dataset in zip(panels, datasets, strict=True):
        table = rows[(rows.dataset == dataset) & rows.flops.notna()]
        for row, n_equal in zip(table.itertuples(), table.groupby("flops").cumcount(), strict=True):
            # The variants of a student cost the same; shift them, or their intervals would overlap.
            x = row.flops / 1e9 * 1.07**n_equal
            panel.vlines(x, row.low, row.high, color="0.7", linewidth=1)
            panel.scatter(x, row.mean, color=ROLE_COLOURS[row.role], s=40, zorder=3)
            panel.annotate(row.display_name, (x, row.mean), xytext=(6, 3), textcoords="offset points", fontsize=7)
        panel.set_xscale("log")
        panel.set_title(dataset, fontsize=10)
        panel.set_xlabel("GFLOPs per chip (log scale)")
        panel.set_ylabel(f"test {table.metric.iloc[0]}" if len(table) else "")
        panel.margins(x=0.25, y=0.12)
        panel.grid(alpha=0.3)
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=colour, label=role) for role, colour in ROLE_COLOURS.items()
    ]
    title = "Students and frozen models: score and cost. Lines: 95 % interval over test samples"
    _save_with_legend(figure, handles, title, path)


def draw_map(folder: Path, metadata: Mapping, title: str, path: Path) -> None:
    """Draw the map of a folder and its confidence; for multi-label tasks, the first class.

    Args:
        metadata: content of the folder's map.json.
    """
    classes, confidence = (_read_downsampled(folder / f"{name}.tif") for name in ("class", "confidence"))
    names = metadata["classes"]
    if get_task(metadata["task"]).is_multilabel:
        names = ["no " + names[0], names[0]]
    colormap = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    colours = [colormap(number % 20) for number in range(len(names))]
    height, width = classes.shape
    size = (13, min(9, 0.8 + 6 * height / width))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    left.imshow(classes, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest")
    confidence_image = right.imshow(confidence, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(confidence_image, ax=[left, right], shrink=0.8, label="probability of the class (%)")
    present = [number for number in range(len(names)) if (classes == number).any()]
    handles = [Patch(color=colours[number], label=names[number]) for number in present]
    left.legend(handles=handles, fontsize=7, loc="upper right")
    for panel in (left, right):
        panel.set_axis_off()
    figure.suptitle(title, fontsize=11)
    _save(figure, path, dpi=100)


def _read_downsampled(path: Path) -> np.ma.MaskedArray:
    """Read a map at `MAX_MAP_PIXELS` or fewer pixels a side, (y, x); pixels without a class are masked."""
    with rasterio.open(path) as file:
        factor = max(1, max(file.shape) / MAX_MAP_PIXELS)
        shape = tuple(max(1, round(side / factor)) for side in file.shape)
        return np.ma.masked_equal(file.read(1, out_shape=shape), IGNORE)


def _panel_grid(n_panels: int, panel_size: tuple[float, float]) -> tuple[plt.Figure, list[plt.Axes]]:
    """Create a figure with panels in at most two columns; sizes in inches."""
    n_columns = min(2, n_panels)
    n_rows = -(-n_panels // n_columns)
    size = (panel_size[0] * n_columns, panel_size[1] * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False)
    for unused in axes.flat[n_panels:]:
        unused.axis("off")
    return figure, list(axes.flat[:n_panels])


def _save_with_legend(figure: plt.Figure, handles: Sequence, title: str, path: Path) -> None:
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    _save(figure, path)


def _save(figure: plt.Figure, path: Path, dpi: int = 110) -> None:
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)
