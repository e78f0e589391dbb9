"""Measure parameters, size, floating-point operations and speed of students and frozen ensembles.

The cost covers everything from a stored chip to its logits, except reading the chip from the disk.
"""

import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch.utils.flop_counter import FlopCounterMode

from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.encoder import Encoder
from pipeline.backbones.preprocessing import make_preprocessor
from pipeline.config import BackboneConfig
from pipeline.distillation.student import Student
from pipeline.export import n_bytes
from pipeline.heads.checkpoint import TrainedHead

# Chips per timed batch.
BATCH_CHIPS = 16
# Timed batches of each model.
ROUNDS = 5


@dataclass(frozen=True)
class BenchmarkedModel:
    """A model: all its networks, and a function from chips (batch, band, y, x) to logits."""

    modules: Sequence[torch.nn.Module]
    predict: Callable[[np.ndarray], torch.Tensor]


def student_model(student: Student, device: str) -> BenchmarkedModel:
    """Prepare a student for `benchmark`."""
    student = student.to(device).to(memory_format=torch.channels_last)
    return BenchmarkedModel([student], lambda chips: student(torch.from_numpy(chips.astype(np.float32)).to(device)))


def frozen_ensemble(
    head: TrainedHead, backbones: Mapping[str, BackboneConfig], weights: Path, images: xr.Dataset, device: str
) -> BenchmarkedModel:
    """Prepare a trained head and its backbones (configurations by name) for `benchmark`."""
    encoders = []
    for name in head.backbones:
        spec = get_spec(backbones[name])
        preprocessor = make_preprocessor(images, name, backbones[name], spec)
        network = create_backbone(backbones[name], spec, preprocessor.input_bands, weights / name)
        encoders.append(Encoder(preprocessor, network, device, strides=spec.strides))

    def predict(chips: np.ndarray) -> torch.Tensor:
        return head.logits([encoder.network(encoder.prepare(chips)).arrays() for encoder in encoders])

    return BenchmarkedModel([*[encoder.network for encoder in encoders], head.network], predict)


def benchmark(models: Mapping[str, BenchmarkedModel], chips: np.ndarray, device: str) -> pd.DataFrame:
    """Measure models in alternation, so that other load on the machine affects all of them.

    Returns:
        One row per model. Columns: model; parameters; bytes, of its tensors; flops of one chip, where a
        multiplication and an addition count as two; device; cores; chips_per_second, the median over the rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for name, model in models.items():
                seconds[name].append(timeit.timeit(partial(_predict, model, chips, device), number=1))
    rows = [
        {
            "model": name,
            "parameters": sum(tensor.numel() for module in model.modules for tensor in module.parameters()),
            "bytes": sum(map(n_bytes, model.modules)),
            "flops": flops(partial(model.predict, chips[:1])),
            "device": device,
            "cores": torch.get_num_threads(),
            "chips_per_second": len(chips) / statistics.median(seconds[name][1:]),  # the first call is slower
        }
        for name, model in models.items()
    ]
    return pd.DataFrame(rows)


@torch.no_grad()
def flops(function: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products and convolutions, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _predict(model: BenchmarkedModel, chips: np.ndarray, device: str) -> None:
    model.predict(chips)
    if device != "cpu":
        torch.cuda.synchronize()
