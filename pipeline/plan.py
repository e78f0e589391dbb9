"""Estimate the disk space and time of a grid before it runs; networks are timed on this machine."""

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.base import MissingBandsError, match_bands
from pipeline.config import Params
from pipeline.data.sources import DatasetSize
from pipeline.distillation.student import Student, StudentSpec
from pipeline.tasks import get_task
from pipeline.training.loop import HeadTrainer, HParams, TrainSchedule
from pipeline.training.task_data import head_config

# Images of a measured forward pass, by device.
BATCH_IMAGES = {"cpu": 2, "cuda": 64}
# A dense head is timed on at most this many samples on a CPU.
CPU_DENSE_BATCH = 2
# Seconds above which a call is not repeated; the first call of a small network is mostly set-up.
LONG_CALL = 1.0
METHOD = f"""How the hours are estimated:
- Networks with random weights run on blank images on this machine, one at a time, once per shape of their input.
- extract: seconds per image of a forward pass on {BATCH_IMAGES["cpu"]} images ({BATCH_IMAGES["cuda"]} on a GPU),
  times the images of the dataset. Reading and writing are not included.
- tune, train: seconds of one training step of one head, times the steps, times the trials and seeds. On a CPU a
  segmentation head is timed on {CPU_DENSE_BATCH} samples, and the seconds are scaled to its batch.
- distill: seconds of one training step of a student, times steps, variants, trials and seeds.
- Composition, maps, costs, fine-tuning and the report are not estimated."""
Shapes = tuple[tuple[int, ...], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """Shapes of a backbone's levels and pooled vectors for one image, and the measured seconds."""

    levels: Shapes
    pooled: Shapes
    seconds_per_image: float


@dataclass(frozen=True)
class Estimate:
    """Disk space and time of one item of a stage, such as `dataset x model`.

    Attributes:
        images: number of images that are read, encoded or trained on.
        hours: None if unknown.
    """

    stage: str
    item: str
    images: int
    gigabytes: float
    hours: float | None


def plan(params: Params, sizes: Mapping[str, DatasetSize], device: str) -> list[Estimate]:
    """Estimate prepare, extract, the heads and the students of datasets; print each timed network."""
    timer, estimates = _Timer(params, device), []
    for name, size in sizes.items():
        rate = size.images_per_second and size.images_per_second * len(os.sched_getaffinity(0))
        hours, gigabytes = size.n_samples / rate / 3600 if rate else None, size.n_samples * size.bytes_per_image / 1e9
        estimates.append(Estimate("prepare", name, size.n_samples, gigabytes, hours))
        outputs = {backbone: timer.backbone(backbone, size) for backbone in params.grid.backbones}
        estimates += [_estimate_extract(params, name, size, *item) for item in outputs.items()]
        heads = []
        for model in params.grid.models:
            members = [output for member in params.members(model) if (output := outputs[member])]
            if len(members) == len(params.members(model)):
                heads.append(_estimate_heads(params, timer, f"{name} x {model}", size, members))
        estimates += heads
        if heads and params.distill.applies_to(name):  # without a trained model there is no teacher
            estimates += [_estimate_student(params, timer, name, size, student) for student in params.grid.students]
    return estimates


def format_table(estimates: Sequence[Estimate]) -> str:
    """Format the estimates and their totals per stage as a text table."""
    rows = [("stage", "item", "images", "GB", "hours"), *map(_format_row, estimates)]
    for stage in dict.fromkeys(estimate.stage for estimate in estimates):
        of_stage = [estimate for estimate in estimates if estimate.stage == stage]
        hours = [estimate.hours for estimate in of_stage if estimate.hours is not None]
        images, gigabytes = (sum(getattr(item, name) for item in of_stage) for name in ("images", "gigabytes"))
        rows.append(_format_row(Estimate(stage, "total", images, gigabytes, sum(hours) if hours else None)))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines)


def _format_row(estimate: Estimate) -> tuple[str, ...]:
    hours = "–" if estimate.hours is None else f"{estimate.hours:.2f}"
    return estimate.stage, estimate.item, str(estimate.images), f"{estimate.gigabytes:.2f}", hours


def _estimate_extract(params: Params, name: str, size: DatasetSize, backbone: str, output: Output | None) -> Estimate:
    if output is None:
        return Estimate("extract", f"{name} x {backbone}: skipped", 0, 0.0, 0.0)
    has_levels = get_task(size.task).is_dense or params.extract.keep_levels
    n_values = sum(map(prod, output.pooled + output.levels if has_levels else output.pooled))
    images = size.n_samples * len(params.extract.views)
    gigabytes = images * n_values * np.dtype(params.extract.dtype).itemsize / 1e9
    return Estimate("extract", f"{name} x {backbone}", images, gigabytes, images * output.seconds_per_image / 3600)


def _estimate_heads(
    params: Params, timer: "_Timer", item: str, size: DatasetSize, outputs: Sequence[Output]
) -> Estimate:
    """Estimate the search and the final training of a model's heads."""
    head, shapes = "linear", tuple(output.pooled for output in outputs)
    if get_task(size.task).is_dense:
        head, shapes = params.heads.segmentation, tuple(_used_levels(params, output.levels) for output in outputs)
    settings = params.heads.settings(head)
    n_steps = (params.search.trials + params.train.seeds) * settings.steps
    hours = n_steps * timer.head_step(head, item, size, shapes) / 3600
    return Estimate("tune, train", item, n_steps * settings.batch, 0.0, hours)


def _used_levels(params: Params, levels: Shapes) -> Shapes:
    indices = {level % len(levels) for level in params.heads.levels}
    return tuple(levels[index] for index in sorted(indices)) or levels


def _estimate_student(params: Params, timer: "_Timer", name: str, size: DatasetSize, student: str) -> Estimate:
    """Estimate the search and the seeds of every variant, without the predictions of the teacher.

    The disk space is that of the best student's tensors and its two exports of the same size.
    """
    config, distill, side = params.student(student), params.distill, params.student(student).chip_size
    schedule = distill.classification
    if get_task(size.task).is_dense:
        schedule, side = distill.segmentation, config.mask_size
    spec = StudentSpec(config.network, len(size.bands), size.n_classes, size.task, side)
    n_bytes, seconds = timer.student_step(spec, schedule.batch)
    n_steps = len(distill.variants) * (distill.search.trials + distill.seeds) * schedule.steps
    hours = n_steps * seconds / 3600
    return Estimate("distill, export", f"{name} x {student}", n_steps * schedule.batch, 3 * n_bytes / 1e9, hours)


class _Timer:
    """Time every network once per shape of its input; each is freed before the next is made."""

    def __init__(self, params: Params, device: str):
        self.params, self.device = params, device
        self._outputs: dict[tuple, Output] = {}
        self._step_seconds: dict[tuple, float] = {}

    def backbone(self, name: str, size: DatasetSize) -> Output | None:
        """Time a forward pass; None if the dataset lacks bands that the backbone needs."""
        backbone = self.params.backbone(name)
        spec = get_spec(backbone)
        try:
            input_bands = match_bands(name, spec, size.bands, backbone.input_size, backbone.bands)
        except MissingBandsError:
            return None
        n_bands, side = len(input_bands.input_names), input_bands.input_size
        if (name, n_bands) not in self._outputs:
            print(f"timing {name}: {n_bands} bands, {side} x {side} px", flush=True)
            untrained = replace(backbone, weights="none" if backbone.weights == "none" else "random", hub=None)
            gc.collect()  # Prithvi's last network refers to itself, and would stay in memory beside the next
            network = create_backbone(untrained, spec, input_bands, Path()).to(self.device)
            images = torch.zeros(BATCH_IMAGES[self.device], n_bands, side, side, device=self.device)
            with torch.inference_mode():
                pyramid, seconds = self._time(lambda: network(images))
            levels = tuple(tuple(level.shape[1:]) for level in pyramid.levels)
            pooled = tuple(tuple(vector.shape[1:]) for vector in pyramid.pooled.values())
            self._outputs[name, n_bands] = Output(levels, pooled, seconds / len(images))
        return self._outputs[name, n_bands]

    def head_step(self, head: str, item: str, size: DatasetSize, shapes: tuple[Shapes, ...]) -> float:
        """Return the seconds of a training step of one head on the arrays of a model's backbones."""
        key = (head, size.task, size.n_classes, size.image_size, shapes)
        if key not in self._step_seconds:
            task, heads = get_task(size.task)(size.n_classes), self.params.heads
            settings = heads.settings(head)
            batch = min(CPU_DENSE_BATCH, settings.batch) if task.is_dense and self.device == "cpu" else settings.batch
            print(f"timing {head}: {item}", flush=True)
            config = head_config(heads, head, shapes, task, size.image_size, self.device)
            group = config.create_group([0]).to(self.device).train()
            trainer = HeadTrainer(group, [HParams(1e-3, 1e-2, 0)], task, TrainSchedule(settings.steps, batch))
            arrays = [torch.randn(batch, *shape, device=self.device) for member in shapes for shape in member]
            inputs = arrays if task.is_dense else torch.cat(arrays, dim=1)
            label_shape = task.label_shape(size.n_classes, size.image_size)
            label = torch.zeros(1, batch, *label_shape, dtype=torch.int64, device=self.device)
            _, seconds = self._time(lambda: trainer.step(inputs, None, label))
            self._step_seconds[key] = seconds * settings.batch / batch
        return self._step_seconds[key]

    def student_step(self, spec: StudentSpec, batch: int) -> tuple[int, float]:
        """Return the bytes of a student's tensors and the seconds of a forward and backward pass."""
        print(f"timing student {spec.architecture}: {spec.n_bands} bands, batch {batch}", flush=True)
        network = Student(spec, [0.0] * spec.n_bands, [1.0] * spec.n_bands).to(self.device)
        chips = torch.zeros(batch, spec.n_bands, spec.input_size, spec.input_size, device=self.device)
        _, seconds = self._time(lambda: network(chips).square().mean().backward())
        return 4 * sum(parameter.numel() for parameter in network.parameters()), seconds

    def _time(self, function: Callable[[], T]) -> tuple[T, float]:
        """Call a function, and again if the call was short; return its last result and seconds."""
        for _ in range(2):
            start = time.perf_counter()
            result = function()
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if seconds > LONG_CALL and self.device == "cpu":
                break
        return result, seconds
