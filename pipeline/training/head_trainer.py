"""One independent group of heads in training: its optimizer, its schedule, and its early stopping."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.heads.config import HeadGroup
from pipeline.tasks import Task
from pipeline.training.optim import FusedAdamW, StackedAdamW, warm_cosine


@dataclass(frozen=True)
class HParams:
    """Hyperparameters of one head."""

    learning_rate: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class TrainSchedule:
    """Length of the training and early stopping.

    Attributes:
        steps: number of updates.
        batch: samples per update.
        patience: validation checks without a better score after which a head stops; every head then ends with its
            best state. 0 trains all steps and keeps the last state.
        val_checks: number of validation checks.
    """

    steps: int
    batch: int
    patience: int = 0
    val_checks: int = 10


class HeadTrainer:
    """Train one independent group: heads that are stacked, or a single one.

    Args:
        group: of heads (pipeline/heads).
        hparams: of each head.
        task: defines the loss and the score.
        schedule: of the training.

    Attributes:
        lr_factor: from a step to the factor of the learning rate.
        steps: steps so far.
        best_scores: best validation score of each head.
        checks_since_best: validation checks of each head since then.
        best_state: state of each head at its best check; empty before the first.
    """

    def __init__(self, group: HeadGroup, hparams: Sequence[HParams], task: Task, schedule: TrainSchedule):
        self.group, self.task, self.schedule, self.hparams = group, task, schedule, list(hparams)
        learning_rates = [head.learning_rate for head in hparams]
        weight_decays = [head.weight_decay for head in hparams]
        self.optimizer = (
            StackedAdamW(group.parameter_heads(), learning_rates, weight_decays)
            if group.is_stacked
            else FusedAdamW(group, learning_rates[0], weight_decays[0])
        )
        self.lr_factor, self.steps = warm_cosine(schedule.steps), 0
        self.best_scores = np.full(len(hparams), -np.inf)
        self.checks_since_best = np.zeros(len(hparams), dtype=int)
        self.best_state: dict[str, torch.Tensor] = {}

    @property
    def is_done(self) -> bool:
        """Whether every head has stopped, or has taken all its steps."""
        patience = self.schedule.patience
        has_stopped = patience > 0 and bool((self.checks_since_best >= patience).all())
        return has_stopped or self.steps >= self.schedule.steps

    def step(self, inputs, index: torch.Tensor | None, label: torch.Tensor) -> None:
        """Take the next step of every head.

        Args:
            inputs, index: as for the group's `forward_heads`.
            label: of these rows, (head, batch, …).
        """
        self.update(inputs, index, label, self.lr_factor(self.steps))
        self.steps += 1

    def update(
        self, inputs, index: torch.Tensor | None, label: torch.Tensor, lr_factor: float | torch.Tensor
    ) -> None:
        """Update the parameters once, with the learning rates times `lr_factor`; does not count the step."""
        self.optimizer.zero_grad()
        if self.group.has_manual_backward:
            self.group.backward(inputs, index, lambda logits, heads: self.task.loss_grad(logits, label[heads]))
        else:
            for heads, logits in self.group.forward_heads(inputs, index):
                self.task.loss(logits, label[heads]).sum().backward()
        self.optimizer.step(lr_factor)

    def is_check_due(self) -> bool:
        """Whether the validation split is to be evaluated after this step."""
        interval = max(1, self.schedule.steps // self.schedule.val_checks)
        return self.steps % interval == 0 or self.steps == self.schedule.steps

    def record_validation(self, counts: np.ndarray) -> None:
        """Record validation counts (head, sample, cell), and the state of every head that is at its best.

        A head that has stopped is trained on as long as others of its group are, but no longer recorded.
        """
        scores = self.task.score(counts.sum(axis=1))
        is_active = self.checks_since_best < self.schedule.patience
        # Ties: the latest wins. On a small validation split many checks tie, and the first is the least trained.
        is_best, is_better = is_active & (scores >= self.best_scores), is_active & (scores > self.best_scores)
        checks = np.where(is_better, 0, self.checks_since_best + 1)
        self.checks_since_best = np.where(is_active, checks, self.checks_since_best)
        self.best_scores = np.where(is_best, scores, self.best_scores)
        self._copy_state(is_best)

    def _copy_state(self, is_best: np.ndarray) -> None:
        """Copy the state of some heads, bool (head,), to `best_state`."""
        for name, values in self.group.state_dict().items():
            if not self.group.is_stacked:
                if is_best[0]:
                    self.best_state[name] = values.clone()
            elif name not in self.best_state:
                self.best_state[name] = values.clone()
            else:
                heads = torch.from_numpy(np.flatnonzero(is_best)).to(values.device)
                self.best_state[name][heads] = values[heads]

    def restore_best(self) -> None:
        """Set every head to its state at its best check."""
        if self.best_state:
            self.group.load_state_dict(self.best_state)
