"""What it costs to use a model: tensors, arithmetic, size on disk and time; of students and frozen ensembles alike.

Everything from a chip as it is stored to its logits is counted; reading it from the disk is not.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
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
from pipeline.heads.checkpoint import TrainedHead

# Chips of one timed batch, and timed batches of each model.
BATCH_CHIPS, ROUNDS = 16, 5


@dataclass(frozen=True)
class BenchmarkedModel:
    """A model: `answer` takes chips (batch, band, y, x) to logits; `modules` are all its networks."""

    modules: Sequence[torch.nn.Module]
    predict: Callable[[np.ndarray], torch.Tensor]


def student(one: Student, device: str) -> BenchmarkedModel:
    """A student on a device."""
    one = one.to(device, memory_format=torch.channels_last)
    return BenchmarkedModel([one], lambda chips: one(torch.from_numpy(chips.astype(np.float32)).to(device)))


def frozen_ensemble(
    head: TrainedHead, backbones: Mapping[str, BackboneConfig], weights: Path, store: xr.Dataset, device: str
) -> BenchmarkedModel:
    """A head with the backbones below it.

    Args:
        backbones: of its members, described.
        weights: the folder of every backbone's weights.
    """
    encoders = []
    for name in head.backbones:
        declared = get_spec(backbones[name])
        seen = make_preprocessor(store, name, backbones[name], declared)
        network = create_backbone(backbones[name], declared, seen.input_bands, weights / name)
        encoders.append(Encoder(seen, network, device, strides=declared.strides))

    def answer(chips: np.ndarray) -> torch.Tensor:
        return head.logits([encoder.network(encoder.prepare(chips)).arrays() for encoder in encoders])

    return BenchmarkedModel([*[encoder.network for encoder in encoders], head.network], answer)


def benchmark(models: Mapping[str, BenchmarkedModel], chips: np.ndarray, device: str) -> pd.DataFrame:
    """One row a model, timed in turns, so that what else the machine does hits all alike.

    Returns:
        model; parameters; bytes of its tensors as torch saves them; flops of one chip (two for a product and its
        sum); device; cores; chips_per_second, the median of the rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for one in models.values():
            one.predict(chips)
        for _ in range(ROUNDS):
            for name, one in models.items():
                taken[name].append(_seconds(lambda one=one: one.predict(chips), device))
    rows = [
        {"model": name, **_size(one.modules), "flops": flops(lambda one=one: one.predict(chips[:1])), "device": device,
         "cores": torch.get_num_threads(), "chips_per_second": len(chips) / statistics.median(taken[name])}
        for name, one in models.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


@torch.no_grad()
def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of products and convolutions, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def _size(modules: Sequence[torch.nn.Module]) -> dict:
    held = BytesIO()
    torch.save([module.state_dict() for module in modules], held)
    return {"parameters": sum(one.numel() for module in modules for one in module.parameters()), "bytes": held.tell()}


def _seconds(work: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun
