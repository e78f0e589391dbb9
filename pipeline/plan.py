"""Estimate the disk space and time of a grid before it runs.

Networks with random weights encode blank images: sizes are exact, times are measured on this machine.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.base import MissingBandsError, match_bands
from pipeline.config import Params
from pipeline.data.sources import DatasetSize
from pipeline.distillation.student import Student, StudentSpec
from pipeline.heads import get_head
from pipeline.heads.config import head_options
from pipeline.tasks import get_task

# Images of the measured forward pass, by device.
BATCH_IMAGES = {"cpu": 2, "cuda": 64}
# A dense head is timed on at most this many samples on a CPU.
CPU_DENSE_BATCH = 2
T = TypeVar("T")


@dataclass(frozen=True)
class OutputShape:
    """Outputs of a backbone for one image.

    Attributes:
        levels: shapes of the levels, (channel, y, x).
        pooled_channels: channels of all pooled vectors.
        images_per_second: measured on this machine.
    """

    levels: tuple[tuple[int, int, int], ...]
    pooled_channels: int
    images_per_second: float


@dataclass(frozen=True)
class Estimate:
    """Size and time of one item of a stage.

    Attributes:
        stage: names of the stages.
        item: such as `dataset x model`.
        images: number of images that are read, encoded or trained on.
        gigabytes: disk space.
        hours: None if unknown.
    """

    stage: str
    item: str
    images: int
    gigabytes: float
    hours: float | None


def plan(params: Params, sizes: Mapping[str, DatasetSize], device: str) -> list[Estimate]:
    """Estimate prepare, extract, the heads and the students of every dataset whose size is known."""
    estimator = _Estimator(params, device)
    estimates = []
    for name, size in sizes.items():
        estimates.append(_estimate_prepare(name, size))
        estimates += [estimator.extract(name, size, backbone) for backbone in params.grid.backbones]
        heads = [estimator.heads(name, size, model) for model in params.grid.models]
        heads = [estimate for estimate in heads if estimate]
        estimates += heads
        if heads and params.distill.applies_to(name):  # without a trained model there is no teacher
            estimates += [estimator.student(name, size, student) for student in params.grid.students]
    return estimates


def format_table(estimates: Sequence[Estimate]) -> str:
    """Format the estimates and their totals per stage as a text table."""
    rows = [("stage", "item", "images", "GB", "hours"), *map(_format_row, estimates)]
    for stage in dict.fromkeys(estimate.stage for estimate in estimates):
        of_stage = [estimate for estimate in estimates if estimate.stage == stage]
        hours = [estimate.hours for estimate in of_stage if estimate.hours is not None]
        total = Estimate(
            stage=stage,
            item="total",
            images=sum(estimate.images for estimate in of_stage),
            gigabytes=sum(estimate.gigabytes for estimate in of_stage),
            hours=sum(hours) if hours else None,
        )
        rows.append(_format_row(total))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _format_row(estimate: Estimate) -> tuple[str, ...]:
    hours = "–" if estimate.hours is None else f"{estimate.hours:.2f}"
    return estimate.stage, estimate.item, str(estimate.images), f"{estimate.gigabytes:.2f}", hours


def _estimate_prepare(name: str, size: DatasetSize) -> Estimate:
    hours = None
    if size.images_per_second:
        hours = size.n_samples / size.images_per_second / 3600 / len(os.sched_getaffinity(0))
    return Estimate("prepare", name, size.n_samples, size.n_samples * size.bytes_per_image / 1e9, hours)


class _Estimator:
    """Estimate stages; each network is timed once."""

    def __init__(self, params: Params, device: str):
        self.params, self.device = params, device
        self._output_shapes: dict[tuple, OutputShape] = {}
        self._step_seconds: dict[tuple, float] = {}

    def extract(self, name: str, size: DatasetSize, backbone: str) -> Estimate:
        """Estimate the features of a dataset by a backbone."""
        output, extract = self._output_shape(backbone, size), self.params.extract
        if output is None:
            return Estimate("extract", f"{name} x {backbone}: skipped", 0, 0.0, 0.0)
        n_values = output.pooled_channels
        if get_task(size.task).is_dense or extract.keep_levels:
            n_values += sum(channels * y * x for channels, y, x in output.levels)
        images = size.n_samples * len(extract.views)
        gigabytes = images * n_values * np.dtype(extract.dtype).itemsize / 1e9
        return Estimate(
            "extract", f"{name} x {backbone}", images, gigabytes, images / output.images_per_second / 3600
        )

    def heads(self, name: str, size: DatasetSize, model: str) -> Estimate | None:
        """Estimate the search and the final training of a model's heads; None if a backbone lacks bands."""
        outputs = [self._output_shape(backbone, size) for backbone in self.params.members(model)]
        if None in outputs:
            return None
        head = "linear"
        if get_task(size.task).is_dense:
            head = self.params.heads.segmentation
        settings = self.params.heads.settings(head)
        n_heads = self.params.search.trials + self.params.train.seeds
        hours = n_heads * settings.steps * self._head_step_seconds(head, outputs, size) / 3600
        return Estimate("tune, train", f"{name} x {model}", n_heads * settings.steps * settings.batch, 0.0, hours)

    def student(self, name: str, size: DatasetSize, student: str) -> Estimate:
        """Estimate a student: the search and the seeds of every variant, without its teacher's predictions.

        The disk space is that of the best student's tensors and its two exports of the same size.
        """
        config, distill, n_bands = self.params.student(student), self.params.distill, len(size.bands)
        if get_task(size.task).is_dense:
            side, schedule = config.mask_size, distill.segmentation
        else:
            side, schedule = config.chip_size, distill.classification
        spec = StudentSpec(config.network, n_bands, size.n_classes, size.task, side)
        network = Student(spec, [0.0] * n_bands, [1.0] * n_bands).to(self.device)
        chips = torch.zeros(schedule.batch, n_bands, side, side, device=self.device)
        _, seconds = _time_second_call(lambda: network(chips).square().mean().backward(), self.device)
        steps = len(distill.variants) * (distill.search.trials + distill.seeds) * schedule.steps
        gigabytes = 3 * 4 * sum(parameter.numel() for parameter in network.parameters()) / 1e9
        hours = steps * seconds / 3600
        return Estimate("distill, export", f"{name} x {student}", steps * schedule.batch, gigabytes, hours)

    def _output_shape(self, name: str, size: DatasetSize) -> OutputShape | None:
        """Create and time a backbone; None if the dataset lacks bands that it needs."""
        backbone = self.params.backbone(name)
        spec = get_spec(backbone)
        try:
            input_bands = match_bands(name, spec, size.bands, backbone.input_size, backbone.bands)
        except MissingBandsError:
            return None
        key = (name, input_bands.input_names)
        if key not in self._output_shapes:
            weights = "none" if backbone.weights == "none" else "random"
            untrained = replace(backbone, weights=weights, hub=None)
            network = create_backbone(untrained, spec, input_bands, Path()).to(self.device)
            n_bands, side = len(input_bands.input_names), input_bands.input_size
            images = torch.zeros(BATCH_IMAGES[self.device], n_bands, side, side, device=self.device)
            with torch.inference_mode():
                pyramid, seconds = _time_second_call(lambda: network(images), self.device)
            self._output_shapes[key] = OutputShape(
                levels=tuple(tuple(level.shape[1:]) for level in pyramid.levels),
                pooled_channels=sum(vector.shape[1] for vector in pyramid.pooled.values()),
                images_per_second=len(images) / seconds,
            )
        return self._output_shapes[key]

    def _head_step_seconds(self, head: str, outputs: Sequence[OutputShape], size: DatasetSize) -> float:
        """Time one training step of one head on the features of a model's backbones."""
        key = (head, tuple((output.levels, output.pooled_channels) for output in outputs), size.n_classes)
        if key not in self._step_seconds:
            settings = self.params.heads.settings(head)
            batch = settings.batch
            features: torch.Tensor | list[torch.Tensor]
            if get_head(head).is_dense:
                batch = batch if self.device == "cuda" else min(CPU_DENSE_BATCH, batch)
                shapes = _fused_shapes(outputs)
                widths = [channels for channels, _, _ in shapes]
                network = (
                    get_head(head).load()(widths, n_classes=size.n_classes, **head_options(settings)).to(self.device)
                )
                features = [torch.randn(batch, *shape, device=self.device) for shape in shapes]
            else:
                width = sum(output.pooled_channels for output in outputs)
                network = torch.nn.Linear(width, size.n_classes).to(self.device)
                features = torch.randn(batch, width, device=self.device)
            _, seconds = _time_second_call(lambda: network(features).square().mean().backward(), self.device)
            self._step_seconds[key] = seconds * settings.batch / batch
        return self._step_seconds[key]


def _fused_shapes(outputs: Sequence[OutputShape]) -> list[tuple[int, int, int]]:
    """Shapes of the levels after concatenation: the channels of all backbones, on the finest grid."""
    return [
        (
            sum(output.levels[index][0] for output in outputs),
            *max(output.levels[index][1:] for output in outputs),
        )
        for index in range(len(outputs[0].levels))
    ]


def _time_second_call(function: Callable[[], T], device: str) -> tuple[T, float]:
    """Call a function twice; return its result and the seconds of the second, faster call."""
    for _ in range(2):
        _synchronize(device)
        start = time.perf_counter()
        result = function()
        _synchronize(device)
        seconds = time.perf_counter() - start
    return result, seconds


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
