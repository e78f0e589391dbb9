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

from pipeline.backbones import build, spec
from pipeline.encoding.encode import Encoder
from pipeline.encoding.inputs import describe
from pipeline.encoding.pyramid import Pyramid
from pipeline.params import Backbone
from pipeline.students import Student
from pipeline.training.kept import Kept

# Chips of one timed batch, and timed batches of each model.
BATCH, ROUNDS = 16, 5


@dataclass(frozen=True)
class Usable:
    """A model: `answer` takes chips (batch, band, y, x) to logits; `modules` are all its networks."""

    modules: Sequence[torch.nn.Module]
    answer: Callable[[np.ndarray], torch.Tensor]


def student(one: Student, device: str) -> Usable:
    """A student on a device."""
    one = one.to(device, memory_format=torch.channels_last)
    return Usable([one], lambda chips: one(torch.from_numpy(chips.astype(np.float32)).to(device)))


def frozen(head: Kept, backbones: Mapping[str, Backbone], weights: Path, store: xr.Dataset, device: str) -> Usable:
    """A head with the backbones below it.

    Args:
        backbones: of its members, described.
        weights: the folder of every backbone's weights.
    """
    encoders = []
    for name in head.backbones:
        declared = spec(backbones[name])
        seen = describe(store, name, backbones[name], declared)
        network = build(backbones[name], declared, seen.seen, weights / name)
        encoders.append(Encoder(seen, network, device, strides=declared.strides))

    def answer(chips: np.ndarray) -> torch.Tensor:
        return head.logits([_named(encoder.network(encoder.prepare(chips))) for encoder in encoders])

    return Usable([*[encoder.network for encoder in encoders], head.network], answer)


def measure(models: Mapping[str, Usable], chips: np.ndarray, device: str) -> pd.DataFrame:
    """One row a model, timed in turns, so that what else the machine does hits all alike.

    Returns:
        model; parameters; bytes of its tensors as torch saves them; flops of one chip (two for a product and its
        sum); device; cores; chips_per_second, the median of the rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for one in models.values():
            one.answer(chips)
        for _ in range(ROUNDS):
            for name, one in models.items():
                taken[name].append(_seconds(lambda one=one: one.answer(chips), device))
    rows = [
        {"model": name, **_size(one.modules), "flops": flops(lambda one=one: one.answer(chips[:1])), "device": device,
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


def _named(pyramid: Pyramid) -> dict[str, torch.Tensor]:
    """By the names of the store's arrays."""
    levels = {f"level{place}/features": level for place, level in enumerate(pyramid.levels)}
    return levels | {f"pooled/{name}": vector for name, vector in pyramid.pooled.items()}
