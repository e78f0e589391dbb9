"""What a grid will take before any of it is run: bytes, images and, from a quick measurement here, hours.

Networks are built with random weights and looked at on blank images: sizes are exact, times are of this machine.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.base import MissingBandsError, match_bands
from pipeline.bands import Band
from pipeline.config import BackboneConfig, Params
from pipeline.data.sources import DatasetSize

# Images of the measured forward, and head-steps measured, by device.
_BATCH = {"cpu": 2, "cuda": 64}
_WORD = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class OutputShape:
    """What a network gives of an image of these bands: levels (channel, y, x), vectors, and images a second here."""

    levels: tuple[tuple[int, int, int], ...]
    pooled_channels: int
    images_per_second: float


@dataclass(frozen=True)
class Estimate:
    """One line of a plan: what a stage does to a dataset; None where nothing is known."""

    stage: str
    item: str
    images: int
    gigabytes: float
    hours: float | None


def plan(params: Params, sets: Mapping[str, DatasetSize], device: str) -> list[Estimate]:
    """Lines for prepare, extract, the heads and the students of every dataset that is known."""
    lines, looked, stepped = [], {}, {}
    for name, wanted in sets.items():
        hours = wanted.samples / wanted.images_per_second / 3600 / len(os.sched_getaffinity(0)) if wanted.images_per_second else None
        lines.append(Estimate("prepare", name, wanted.samples, wanted.samples * wanted.bytes_per_image / 1e9, hours))
        dense = wanted.task == "segmentation"
        for backbone in params.grid.backbones:
            seen = _look(backbone, params.backbone(backbone), wanted.bands, device, looked)
            if seen is None:
                lines.append(Estimate("extract", f"{name} x {backbone}: left out", 0, 0.0, 0.0))
                continue
            count = seen.pooled_channels + (sum(c * y * x for c, y, x in seen.levels) if dense or params.extract.keep_levels else 0)
            copies = wanted.samples * len(params.extract.views)
            size = copies * count * _WORD[params.extract.dtype] / 1e9
            lines.append(Estimate("extract", f"{name} x {backbone}", copies, size, copies / seen.images_per_second / 3600))
        heads, teachers = params.search.trials + params.train.seeds, 0
        for model in params.grid.models:
            members = [
                _look(one, params.backbone(one), wanted.bands, device, looked) for one in params.members(model)
            ]
            if None in members:
                continue
            teachers += 1
            head = params.heads.upernet if dense else params.heads.linear
            seconds = _step(params, members, dense, wanted.classes, device, stepped)
            hours = heads * head.steps * seconds / 3600
            lines.append(Estimate("tune, train", f"{name} x {model}", heads * head.steps * head.batch, 0.0, hours))
        if teachers and params.distill.applies_to(name):
            lines += [_taught(params, name, wanted, student, device) for student in params.grid.students]
    return lines


def _look(
    name: str, backbone: BackboneConfig, bands: Sequence[Band], device: str, looked: dict
) -> OutputShape | None:
    """Build and time a network; None if it cannot see these bands."""
    import torch

    declared = get_spec(backbone)
    try:
        seen = match_bands(name, declared, bands, backbone.input_size, backbone.bands)
    except MissingBandsError:
        return None
    key = (name, seen.input_names)
    if key not in looked:
        weights = "none" if backbone.weights == "none" else "random"
        network = create_backbone(replace(backbone, weights=weights, hub=None), declared, seen, Path()).to(device)
        image = torch.zeros(_BATCH[device], len(seen.input_names), seen.input_size, seen.input_size, device=device)
        with torch.inference_mode():
            network(image)
            _wait(device)
            begun = time.perf_counter()
            pyramid = network(image)
            _wait(device)
        rate = len(image) / (time.perf_counter() - begun)
        pooled = sum(vector.shape[1] for vector in pyramid.pooled.values())
        looked[key] = OutputShape(tuple(tuple(level.shape[1:]) for level in pyramid.levels), pooled, rate)
    return looked[key]


def _step(
    params: Params, members: Sequence[OutputShape], dense: bool, classes: int, device: str, stepped: dict
) -> float:
    """Seconds of one step of one head on these members' features."""
    import torch

    from pipeline.heads.upernet import UPerNet

    head = params.heads.upernet if dense else params.heads.linear
    key = (tuple((one.levels, one.pooled_channels) for one in members), dense, classes)
    if key not in stepped:
        batch = head.batch if device == "cuda" else min(2, head.batch) if dense else head.batch
        if dense:
            grids = [max(one.levels[place][1:] for one in members) for place in range(len(members[0].levels))]
            widths = [sum(one.levels[place][0] for one in members) for place in range(len(grids))]
            network = UPerNet(widths, head.channels, classes).to(device)
            given = [torch.randn(batch, *shape, device=device)
                     for shape in ((width, *grid) for width, grid in zip(widths, grids, strict=True))]  # fmt: skip
        else:
            network = torch.nn.Linear(sum(one.pooled_channels for one in members), classes).to(device)
            given = torch.randn(batch, network.in_features, device=device)
        for attempt in range(2):
            _wait(device)
            begun = time.perf_counter()
            network(given).square().mean().backward()
            _wait(device)
            stepped[key] = (time.perf_counter() - begun) * head.batch / batch if attempt else 0.0
    return stepped[key]


def _taught(params: Params, name: str, wanted: DatasetSize, student: str, device: str) -> Estimate:
    """The line of a student: every variant, its search and its seeds; what its teacher says is not timed.

    Disk is for the best one's tensors and its two exports, which are as large.
    """
    import torch

    from pipeline.distillation.student import Student, StudentSpec

    dense, chosen, distill = wanted.task == "segmentation", params.student(student), params.distill
    side, recipe = (chosen.mask_size, distill.segmentation) if dense else (chosen.chip_size, distill.classification)
    bands = len(wanted.bands)
    network = Student(
        StudentSpec(chosen.network, bands, wanted.classes, wanted.task, side), [0.0] * bands, [1.0] * bands
    ).to(device)
    chips = torch.zeros(recipe.batch, bands, side, side, device=device)
    for _ in range(2):  # the first is slower
        _wait(device)
        begun = time.perf_counter()
        network(chips).square().mean().backward()
        _wait(device)
        seconds = time.perf_counter() - begun
    steps = len(distill.variants) * (distill.search.trials + distill.seeds) * recipe.steps
    size = 3 * 4 * sum(one.numel() for one in network.parameters()) / 1e9
    return Estimate("distill, export", f"{name} x {student}", steps * recipe.batch, size, steps * seconds / 3600)


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def format_table(lines: Sequence[Estimate]) -> str:
    """The lines, and their sums by stage, as text."""
    rows = [("stage", "what", "images", "GB", "hours")]
    rows += [_row(line.stage, line.item, line.images, line.gigabytes, line.hours) for line in lines]
    for stage in dict.fromkeys(line.stage for line in lines):
        own = [line for line in lines if line.stage == stage]
        known = [line.hours for line in own if line.hours is not None]
        hours = sum(known) if known else None
        rows.append(_row(stage, "in all", sum(x.images for x in own), sum(x.gigabytes for x in own), hours))
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(stage: str, what: str, images: int, gigabytes: float, hours: float | None) -> tuple[str, ...]:
    return stage, what, str(images), f"{gigabytes:.2f}", "–" if hours is None else f"{hours:.2f}"
