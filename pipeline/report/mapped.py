"""The report's part on students outside of this program: their exported files, and maps made with them."""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import rasterio
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from pipeline.data.image_store import IGNORE
from pipeline.report import page

# A picture's longer side in pixels; larger maps are read coarser.
SIDE = 1024
Cell = tuple[str, str]


def exports_and_maps_section(exported: Mapping[Cell, Path], rates: pd.DataFrame, maps: Mapping[Cell, Path], folder: Path) -> str:
    """HTML; pictures are written to `folder` too.

    Args:
        exported, maps: the folders of the stages export and map, by dataset and student.
        rates: dataset, student, file, images_per_second.
    """
    fast = rates.set_index(["dataset", "student", "file"]).images_per_second
    rows = [row for cell, path in exported.items() for row in _files(cell, path, fast)]
    parts = []
    if rows:
        parts.append(
            "<h2>Exported students</h2><p>Each file was compared with torch on real chips. Scores are on the "
            "validation split, and rates are of this machine's processor. int8: weights stored as int8, activations "
            "quantised as they come.</p>" + page.html_table(pd.DataFrame(rows))
        )
    for (dataset, student), path in maps.items():
        told = json.loads((path / "map.json").read_text())
        if told["skipped"]:
            continue
        if not parts or "<h2>Maps" not in "".join(parts):
            parts.append(
                "<h2>Maps</h2><p>Whole scenes mapped by exported students: tiles that overlap, blended. The scenes "
                "hold the chips of all splits: a map also shows what a student has learned by heart.</p>"
            )
        name = folder / f"map-{dataset}-{student}.png"
        draw_map(path, told, f"{dataset}, student {student}", name)
        parts.append(page.embedded_image(name, f"Map of the scene of {dataset} by the student {student}"))
    return "".join(parts)


def draw_map(path: Path, told: Mapping, title: str, final: Path) -> None:
    """A map and its confidence side by side; of several labels the first.

    Args:
        path: the map's folder, `told` its map.json.
    """
    classes, sure = (_coarse(path / f"{name}.tif") for name in ("class", "confidence"))
    several = told["task"] == "multilabel"
    names = ["no " + told["classes"][0], told["classes"][0]] if several else told["classes"]
    colours = [plt.get_cmap("tab10" if len(names) <= 10 else "tab20")(number % 20) for number in range(len(names))]
    height, width = classes.shape
    size = (13, min(9, 0.8 + 6 * height / width))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    left.imshow(classes, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest")
    shown = right.imshow(sure, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(shown, ax=[left, right], shrink=0.8, label="probability of the class, percent")
    there = [number for number in range(len(names)) if (classes == number).any()]
    handles = [Patch(color=colours[number], label=names[number]) for number in there]
    left.legend(handles=handles, fontsize=7, loc="upper right")
    for panel in (left, right):
        panel.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.savefig(final, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _coarse(path: Path) -> np.ma.MaskedArray:
    with rasterio.open(path) as file:
        by = max(1, max(file.shape) / SIDE)
        shape = tuple(max(1, round(side / by)) for side in file.shape)
        return np.ma.masked_equal(file.read(1, out_shape=shape), IGNORE)


def _files(cell: Cell, path: Path, fast: pd.Series) -> list[dict[str, str]]:
    told = json.loads((path / "export.json").read_text())
    if told["skipped"]:
        return []
    return [
        {
            "dataset": cell[0],
            "student": cell[1],
            "file": name,
            "MB": f"{one['bytes'] / 1e6:.1f}",
            "images/s": f"{fast[(*cell, name)]:g}" if (*cell, name) in fast else "not timed",
            "score on validation": f"{told['metric']} {one['score']:.3f} (n = {told['chips']})",
            "largest difference from torch, of the logits' spread": f"{one['difference']:.1g}",
        }
        for name, one in told["files"].items()
    ]
