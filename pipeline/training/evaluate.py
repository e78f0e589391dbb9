"""What trained heads say: counts, logits, and whether they are numbers at all."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline import metrics
from pipeline.training.feature_loader import Data, StreamedFeatures
from pipeline.training.losses import Task, predict_labels
from pipeline.training.parallel import parallel_map

# Samples in an evaluation's batch, where heads are one product.
_MANY = 4096


def evaluate(group: torch.nn.Module, data: Data, task: Task, batch: int) -> np.ndarray:
    """Per-sample counts of every head, int64 (head, sample, cells); see pipeline/metrics."""
    return np.concatenate(evaluate_groups(group.lanes(), data, task, batch))


def evaluate_groups(groups: Sequence[torch.nn.Module], data: Data, task: Task, batch: int) -> list[np.ndarray]:
    """Counts of each group; a stream is read once for all."""
    with parallel_map(data, groups[0]) as each:
        if not isinstance(data.inputs, StreamedFeatures):
            return list(each(lambda group: evaluate_in_memory(group, data, task, batch), groups))
        parts, rows = [], torch.arange(len(data.label)).split(batch)
        for index, inputs in zip(rows, data.inputs.batches(rows), strict=True):
            label = data.label[index.to(data.label.device)]
            parts.append(list(each(lambda group, x=inputs, y=label: _counts(group, x, y, task), groups)))
    return [np.concatenate(some, axis=1) for some in zip(*parts, strict=True)]


def evaluate_in_memory(group: torch.nn.Module, data: Data, task: Task, batch: int) -> np.ndarray:
    """A group's counts on features in memory."""
    size, inputs, parts = _MANY if group.stacked else batch, data.inputs, []
    for start in range(0, len(data.label), size):
        some = slice(start, start + size)
        parts.append(_counts(group, select_rows(inputs, some), data.label[some], task))
    return np.concatenate(parts, axis=1)


@torch.no_grad()
def diverged_heads(group: torch.nn.Module) -> np.ndarray:
    """Which heads have parameters, or running statistics, that are no numbers, bool (head,)."""
    found = []
    for lane in group.lanes():
        values = [one for one in lane.state_dict().values() if one.is_floating_point()]
        heads = len(lane) if group.stacked else 1
        found.append(~torch.stack([one.isfinite().reshape(heads, -1).all(dim=1) for one in values]).all(dim=0))
    return torch.cat(found).cpu().numpy()


@torch.no_grad()
def predict_logits(group: torch.nn.Module, inputs: torch.Tensor | StreamedFeatures) -> np.ndarray:
    """Logits of every trained head on pooled vectors (sample, channel), float32 (head, sample, class)."""
    rows = torch.arange(len(inputs)).split(_MANY)
    batches = inputs.batches(rows) if isinstance(inputs, StreamedFeatures) else inputs.split(_MANY)
    parts = [torch.cat([piece for _, piece in group.pieces(batch, None)]).float().cpu() for batch in batches]
    return torch.cat(parts, dim=1).numpy()


def select_rows(inputs: torch.Tensor | list[torch.Tensor], index: torch.Tensor | slice):
    return inputs[index] if isinstance(inputs, torch.Tensor) else [level[index] for level in inputs]


@torch.no_grad()
def _counts(group: torch.nn.Module, inputs, label: torch.Tensor, task: Task) -> np.ndarray:
    """Counts on one batch, (head, sample, cells); the group's mode is left as it was."""
    training = group.training
    group.eval()
    logits = torch.cat([piece for _, piece in group.pieces(inputs, None)])
    group.train(training)
    predicted = predict_labels(logits, label, task, dim=2).cpu().numpy()
    true = label.long().cpu().numpy()
    return np.stack([metrics.counts(task.type, one, true, task.n_classes, task.ignore_value) for one in predicted])
