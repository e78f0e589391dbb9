"""The only training loop: K heads, each with its own learning rate, weight decay and seed, in one pass.

What is a head's own: its initialisation, its order of samples, its optimiser state. What is shared: the
features, read and moved once, and the number of steps. A head trained among K gives the numbers it gives
alone.
"""

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from pipeline import metrics

# Share of the steps over which the learning rate rises to its full value, before it falls as a cosine.
WARM_UP = 0.1


@dataclass(frozen=True)
class Setting:
    """What distinguishes one head of a group."""

    learning_rate: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Task:
    """What is asked: the kind of task, how many classes, and the label value that does not count."""

    kind: str
    classes: int
    ignore: int | None = None


def fit(
    make_group: Callable[[Sequence[int]], torch.nn.Module],
    inputs,
    label: torch.Tensor,
    task: Task,
    settings: Sequence[Setting],
    steps: int,
    batch: int,
) -> torch.nn.Module:
    """Train one head per setting with AdamW and a cosine schedule, and return the group.

    Args:
        make_group: from seeds to a group of heads (see pipeline/heads).
        inputs: features in memory: (sample, channel), or a list of levels (sample, channel, y, x).
        label: (sample,), (sample, class) or (sample, y, x), on the same device.
    """
    group = make_group([setting.seed for setting in settings]).to(label.device).train()
    lanes, position = [], 0
    for lane in group.lanes():
        lanes.append((lane, settings[position : position + len(lane.heads)]))
        position += len(lane.heads)
    if label.device.type == "cpu" and lanes[0][0] is not group:
        # Small convolutions keep one core busy and not two: a core a lane is faster than every core on each
        # lane in turn, and a head's numbers depend neither on the others nor on how many cores there are.
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            trained = pool.map(lambda lane: _train(*lane, inputs, label, task, steps, batch), lanes)
            for _ in tqdm(trained, total=len(lanes), unit="head", mininterval=2, file=sys.stderr):
                pass
    else:
        for lane in lanes:
            _train(*lane, inputs, label, task, steps, batch)
    return group.eval()


def _train(group, settings: Sequence[Setting], inputs, label, task: Task, steps: int, batch: int) -> None:
    optimiser = torch.optim.AdamW(
        [one for head, own in zip(group.heads, settings, strict=True) for one in parameter_groups(head, own)],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_cosine(steps))
    batches = [_batches(len(label), batch, setting.seed) for setting in settings]
    for _ in range(steps):
        index = torch.stack([next(order) for order in batches]).to(label.device)
        optimiser.zero_grad(set_to_none=True)
        for heads, logits in group.pieces(inputs, index):
            loss(logits, label[index[heads]], task).sum().backward()
        optimiser.step()
        schedule.step()


def parameter_groups(head: torch.nn.Module, setting: Setting) -> list[dict]:
    """AdamW's groups for one head: weights decay; biases and normalisation, which are vectors, do not."""
    groups = []
    for decays, decay in ((True, setting.weight_decay), (False, 0.0)):
        chosen = [parameter for parameter in head.parameters() if (parameter.ndim > 1) == decays]
        groups.append({"params": chosen, "lr": setting.learning_rate, "weight_decay": decay})
    return groups


def _batches(count: int, batch: int, seed: int):
    """Rows of one batch after another, every epoch in a new order; what does not fill a batch waits its turn.

    All batches have one size, so that K heads' batches stack and BatchNorm never meets a single sample.
    """
    generator, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:batch]
        waiting = waiting[batch:]


def loss(logits: torch.Tensor, label: torch.Tensor, task: Task) -> torch.Tensor:
    """Mean loss of each head, (head,), from logits (head, batch, class, …) and labels (head, batch, …).

    Cross-entropy over the pixels or samples that count; binary cross-entropy for multi-label.
    """
    if task.kind == "multilabel":
        each = functional.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
        return each.flatten(1).mean(dim=1)
    ignore = task.ignore if task.ignore is not None else -100
    each = functional.cross_entropy(
        logits.flatten(0, 1), label.flatten(0, 1), ignore_index=ignore, reduction="none"
    ).view(label.shape)
    valid = (label != ignore).flatten(1).sum(dim=1).clamp_min(1)
    return each.flatten(1).sum(dim=1) / valid


@torch.inference_mode()
def evaluate(group: torch.nn.Module, inputs, label: torch.Tensor, task: Task, batch: int) -> np.ndarray:
    """Per-sample counts of every head, int64 (head, sample, cells); see pipeline/metrics."""
    heads, parts = len(group.heads), []
    for start in range(0, len(label), batch):
        rows = torch.arange(start, min(start + batch, len(label)), device=label.device)
        logits = torch.cat([piece for _, piece in group.pieces(inputs, rows.expand(heads, -1))])
        predicted = (logits > 0).long() if task.kind == "multilabel" else logits.argmax(dim=2)
        true = label[rows].cpu().numpy()
        parts.append(
            np.stack(
                [metrics.counts(task.kind, one.cpu().numpy(), true, task.classes, task.ignore) for one in predicted]
            )
        )
    return np.concatenate(parts, axis=1)


@torch.inference_mode()
def logits(group: torch.nn.Module, inputs: torch.Tensor, batch: int) -> np.ndarray:
    """Logits of every head on pooled vectors (sample, channel), float32 (head, sample, class)."""
    heads, parts = len(group.heads), []
    for start in range(0, len(inputs), batch):
        rows = torch.arange(start, min(start + batch, len(inputs)), device=inputs.device)
        parts.append(torch.cat([piece for _, piece in group.pieces(inputs, rows.expand(heads, -1))]).float().cpu())
    return torch.cat(parts, dim=1).numpy()


def _warm_cosine(steps: int) -> Callable[[int], float]:
    warm = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor
