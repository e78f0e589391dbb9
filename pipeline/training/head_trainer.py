"""Heads that are trained as one: their optimiser, their schedule, and when each stops."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import metrics
from pipeline.training.losses import Task, loss, loss_grad
from pipeline.training.optim import StackedAdamW, TorchAdamW, warm_cosine


@dataclass(frozen=True)
class HParams:
    """What distinguishes one head of a group."""

    learning_rate: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class TrainSchedule:
    """How heads are trained.

    Attributes:
        steps, batch: updates, and samples in each.
        patience: validation checks without a better score after which a head stops, and then every head ends as it
            was at its best check; 0 to train all steps and keep the last.
        checks: validation checks in all steps.
    """

    steps: int
    batch: int
    patience: int = 0
    checks: int = 10


class HeadTrainer:
    """Part of a group, which trains by itself: heads that are one product, or a single one."""

    def __init__(self, group, settings: Sequence[HParams], task: Task, recipe: TrainSchedule):
        self.group, self.task, self.recipe, self.settings = group, task, recipe, list(settings)
        rates, decays = zip(*[(one.learning_rate, one.weight_decay) for one in settings], strict=True)
        self.optimiser = (
            StackedAdamW(group.parameter_heads(), rates, decays)
            if group.stacked
            else TorchAdamW(group, rates[0], decays[0])
        )
        self.factor, self.steps = warm_cosine(recipe.steps), 0
        self.best, self.since = np.full(len(settings), -np.inf), np.zeros(len(settings), dtype=int)
        self.state: dict[str, torch.Tensor] = {}

    @property
    def done(self) -> bool:
        """Every head has stopped, or has had all its steps."""
        stopped = self.recipe.patience > 0 and bool((self.since >= self.recipe.patience).all())
        return stopped or self.steps >= self.recipe.steps

    def step(self, inputs, index: torch.Tensor | None, label: torch.Tensor) -> None:
        """The next update of every head, from rows `index` (head, batch) of the inputs and their labels (head, …)."""
        self.update(inputs, index, label, self.factor(self.steps))
        self.steps += 1

    def update(self, inputs, index: torch.Tensor | None, label: torch.Tensor, factor: float | torch.Tensor) -> None:
        """One update, the learning rates times `factor`; the caller counts the steps."""
        self.optimiser.zero_grad()
        if self.group.direct:
            self.group.pull(inputs, index, lambda logits, heads: loss_grad(logits, label[heads], self.task))
        else:
            for heads, logits in self.group.pieces(inputs, index):
                loss(logits, label[heads], self.task).sum().backward()
        self.optimiser.step(factor)

    def check_is_due(self) -> bool:
        every = max(1, self.recipe.steps // self.recipe.checks)
        return self.steps % every == 0 or self.steps == self.recipe.steps

    def check(self, counts: np.ndarray) -> None:
        """Note which heads are at their best, from their counts on validation (head, sample, cells).

        One that has stopped may be trained on beside others: what it was at its best is kept, and no more noted.
        """
        scores = metrics.score(self.task.type, counts.sum(axis=1), self.task.n_classes)
        going = self.since < self.recipe.patience
        # Of equals the later: on a small validation split many are equal, and the first of them is the least trained.
        kept, better = going & (scores >= self.best), going & (scores > self.best)
        self.since = np.where(going, np.where(better, 0, self.since + 1), self.since)
        self.best = np.where(kept, scores, self.best)
        self._keep(kept)

    def _keep(self, kept: np.ndarray) -> None:
        for name, values in self.group.state_dict().items():
            if not self.group.stacked:
                if kept[0]:
                    self.state[name] = values.clone()
            elif name not in self.state:
                self.state[name] = values.clone()
            else:
                chosen = torch.from_numpy(np.flatnonzero(kept)).to(values.device)
                self.state[name][chosen] = values[chosen]

    def restore(self) -> None:
        """Every head as it was at its best check."""
        if self.state:
            self.group.load_state_dict(self.state)
