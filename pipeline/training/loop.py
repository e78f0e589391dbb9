"""The training loop: K heads with their own hyperparameters, in one pass over the features.

Each head has its own initialisation, optimizer state and early stopping, and, where the features are in memory, its
own order of samples. Features streamed from the disk come in one order for all heads. A head trained among K has the
same result as one trained alone, up to floating-point rounding.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from pipeline.heads.config import HeadGroup
from pipeline.tasks import Task
from pipeline.training.feature_loader import SplitData, StreamedFeatures
from pipeline.training.optim import NetworkAdamW, StackedAdamW, warm_cosine
from pipeline.training.parallel import GraphedStep, cuda_streams, deterministic_cudnn, parallel_map
from pipeline.training.predictions import evaluate_groups, evaluate_in_memory, select_rows

# Seed of the order of streamed samples.
STREAMED_SEED = 0
Inputs = torch.Tensor | list[torch.Tensor]
# Arguments of `HeadTrainer.step`: inputs, rows (head, batch), and labels (head, batch, …).
Batch = tuple[Inputs, torch.Tensor | None, torch.Tensor]


@dataclass(frozen=True)
class HParams:
    """Hyperparameters of one head."""

    learning_rate: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class TrainSchedule:
    """Length of the training, and early stopping.

    With patience a head stops after so many validation checks without a better score and ends with its best state;
    0 trains all steps and keeps the last state.
    """

    steps: int
    batch: int
    patience: int = 0
    val_checks: int = 10


class HeadTrainer:
    """Train one independent group: heads that are stacked, or a single one."""

    def __init__(self, group: HeadGroup, hparams: Sequence[HParams], task: Task, schedule: TrainSchedule):
        self.group, self.task, self.schedule, self.hparams = group, task, schedule, list(hparams)
        rates, decays = [head.learning_rate for head in hparams], [head.weight_decay for head in hparams]
        self.optimizer = (
            StackedAdamW(group.parameter_heads(), rates, decays)
            if group.is_stacked
            else NetworkAdamW(group, rates[0], decays[0])
        )
        self.lr_factor, self.steps = warm_cosine(schedule.steps), 0
        self.best_scores = np.full(len(hparams), -np.inf)
        self.checks_since_best = np.zeros(len(hparams), dtype=int)
        self.best_state: dict[str, torch.Tensor] = {}

    @property
    def is_done(self) -> bool:
        patience = self.schedule.patience
        has_stopped = patience > 0 and bool((self.checks_since_best >= patience).all())
        return has_stopped or self.steps >= self.schedule.steps

    def step(self, inputs: Inputs, index: torch.Tensor | None, label: torch.Tensor) -> None:
        """Take the next step; `inputs` and `index` as for `forward_heads`, and their labels (head, batch, …)."""
        self.update(inputs, index, label, self.lr_factor(self.steps))
        self.steps += 1

    def update(self, inputs: Inputs, index: torch.Tensor | None, label: torch.Tensor, lr_factor) -> None:
        """Update the parameters once, with the learning rates times `lr_factor`; does not count the step."""
        self.group.zero_grad()
        for heads, logits in self.group.forward_heads(inputs, index):
            self.task.loss(logits, label[heads]).sum().backward()
        self.optimizer.step(lr_factor)

    def is_check_due(self) -> bool:
        interval = max(1, self.schedule.steps // self.schedule.val_checks)
        return self.steps % interval == 0 or self.steps == self.schedule.steps

    def validate_if_due(self, validation: SplitData | None) -> None:
        if validation and self.is_check_due():
            self.record_validation(evaluate_in_memory(self.group, validation, self.task, self.schedule.batch))

    def record_validation(self, counts: np.ndarray) -> None:
        """Record validation counts (head, sample, entry), and the state of every head that is at its best.

        A stopped head is still trained while others of its group are, but no longer recorded.
        """
        scores = self.task.score(counts.sum(axis=1))
        is_active = self.checks_since_best < self.schedule.patience
        # Ties: the latest wins. On a small validation split many checks tie, and the first is the least trained.
        is_best, is_better = is_active & (scores >= self.best_scores), is_active & (scores > self.best_scores)
        self.checks_since_best[is_active] += 1
        self.checks_since_best[is_better] = 0
        self.best_scores[is_best] = scores[is_best]
        for name, values in self.group.state_dict().items():
            if name not in self.best_state or is_best.all():
                self.best_state[name] = values.clone()
            elif self.group.is_stacked:
                heads = torch.from_numpy(np.flatnonzero(is_best)).to(values.device)
                self.best_state[name][heads] = values[heads]

    def restore_best(self) -> None:
        if self.best_state:
            self.group.load_state_dict(self.best_state)


def fit(
    make_group: Callable[[Sequence[int]], HeadGroup],
    data: SplitData,
    task: Task,
    hparams: Sequence[HParams],
    schedule: TrainSchedule,
    validation: SplitData | None = None,
) -> HeadGroup:
    """Train one head per hyperparameters with AdamW and a cosine schedule with warm-up; return the group.

    `make_group` creates heads from seeds; `validation` is needed if the schedule has patience.
    """
    group = make_group([head.seed for head in hparams]).to(data.label.device).train()
    trainers, start = [], 0
    for part in group.independent_heads():
        trainers.append(HeadTrainer(part, hparams[start : start + len(part)], task, schedule))
        start += len(part)
    validation = validation if schedule.patience else None
    if isinstance(data.inputs, StreamedFeatures):
        _train_streamed(trainers, data, validation)
    elif data.label.is_cuda:
        _train_on_gpu(trainers, data, validation)
    else:
        with parallel_map(data, group) as map_parallel:
            finished = map_parallel(lambda trainer: _train_in_memory(trainer, data, validation), trainers)
            list(tqdm(finished, total=len(trainers), unit="group", mininterval=2, file=sys.stderr))
    for trainer in trainers:
        trainer.restore_best()
    return group.eval()


def batch_order(n_samples: int, schedule: TrainSchedule, seed: int) -> torch.Tensor:
    """Return the rows of every batch, int64 (step, batch).

    Every epoch has a new order; samples that do not fill a batch start the next one, so all batches have one size.
    """
    generator, total = torch.Generator().manual_seed(seed), schedule.steps * schedule.batch
    epochs = [torch.randperm(n_samples, generator=generator) for _ in range(-(-total // n_samples))]
    return torch.cat(epochs)[:total].view(schedule.steps, schedule.batch)


def _train_in_memory(trainer: HeadTrainer, data: SplitData, validation: SplitData | None) -> None:
    """Train a group on the CPU, every head with its own order of samples."""
    for index in _orders(trainer, data):
        trainer.step(*_batch(trainer, data, index))
        trainer.validate_if_due(validation)
        if trainer.is_done:
            return


def _train_on_gpu(trainers: Sequence[HeadTrainer], data: SplitData, validation: SplitData | None) -> None:
    """Train all groups on a GPU: one step of each in alternation, on a few concurrent streams."""
    device = data.label.device
    streams = cuda_streams(device)
    pools = [torch.cuda.graph_pool_handle() for _ in streams]
    steps = [_graphed_step(trainer, data, pools[index % len(pools)]) for index, trainer in enumerate(trainers)]
    trainings = [_run_graphed(trainer, step, validation) for trainer, step in zip(trainers, steps, strict=True)]
    active = [(training, streams[index % len(streams)]) for index, training in enumerate(trainings)]
    torch.cuda.synchronize(device)  # the other streams read what this one has written
    bar = tqdm(total=sum(len(step.orders) for step in steps), unit="step", mininterval=2, file=sys.stderr)
    try:
        with deterministic_cudnn(), bar as progress:
            active = _step_each(active, progress)
            # Release the memory of the eager steps: graphs have their own and cannot use it.
            torch.cuda.empty_cache()
            while active:
                active = _step_each(active, progress)
    finally:
        torch.cuda.synchronize(device)
        del steps, trainings, active
        torch.cuda.empty_cache()  # release the memory of the graphs, which nothing else could use


def _step_each(active: Sequence[tuple[Iterator[int], torch.cuda.Stream]], progress: tqdm) -> list:
    """Take a step of each training; return the trainings that are not finished."""
    unfinished = []
    for training, stream in active:
        with torch.cuda.stream(stream):
            n_steps = next(training, None)
        if n_steps:
            progress.update(n_steps)
            unfinished.append((training, stream))
    return unfinished


def _graphed_step(trainer: HeadTrainer, data: SplitData, pool: tuple[int, int] | None) -> GraphedStep:
    def update(index: torch.Tensor, lr_factor: torch.Tensor) -> None:
        trainer.update(*_batch(trainer, data, index), lr_factor)

    lr_factors = [trainer.lr_factor(step) for step in range(trainer.schedule.steps)]
    return GraphedStep(update, _orders(trainer, data), lr_factors, pool)


def _run_graphed(trainer: HeadTrainer, step: GraphedStep, validation: SplitData | None) -> Iterator[int]:
    """Train as `_train_in_memory`, by a CUDA graph; yield 1 after each step, on the caller's stream."""
    while not trainer.is_done:
        step()
        trainer.steps += 1
        trainer.validate_if_due(validation)
        yield 1
    trainer.group.zero_grad()  # the gradients are in the graph's memory


def _train_streamed(trainers: Sequence[HeadTrainer], data: SplitData, validation: SplitData | None) -> None:
    """Train all groups batch by batch; each batch is read and moved once."""
    task, schedule, device = trainers[0].task, trainers[0].schedule, data.label.device
    rows = batch_order(len(data.label), schedule, STREAMED_SEED)
    with parallel_map(data, trainers[0].group) as map_parallel:
        for index, inputs in zip(rows, data.inputs.batches(rows), strict=True):
            label, active = data.label[index.to(device)], [trainer for trainer in trainers if not trainer.is_done]

            def step(trainer: HeadTrainer, inputs=inputs, label=label) -> None:
                trainer.step(inputs, None, label.expand(len(trainer.group), *label.shape))

            list(map_parallel(step, active))
            if validation and active[0].is_check_due():
                groups = [trainer.group for trainer in active]
                counts_of_group = evaluate_groups(groups, validation, task, schedule.batch)
                for trainer, counts in zip(active, counts_of_group, strict=True):
                    trainer.record_validation(counts)
            if all(trainer.is_done for trainer in trainers):
                return


def _orders(trainer: HeadTrainer, data: SplitData) -> torch.Tensor:
    """Rows of every step, (step, head, batch), on the device; (step, 1, batch) if all heads have one seed."""
    seeds = [head.seed for head in trainer.hparams]
    seeds = seeds[:1] if len(set(seeds)) == 1 else seeds
    orders = [batch_order(len(data.label), trainer.schedule, seed) for seed in seeds]
    return torch.stack(orders, dim=1).to(data.label.device)


def _batch(trainer: HeadTrainer, data: SplitData, index: torch.Tensor) -> Batch:
    """Select rows (head, batch), or (1, batch), which all heads share."""
    assert not isinstance(data.inputs, StreamedFeatures)
    n_heads = len(trainer.hparams)
    if len(index) == n_heads > 1:
        return data.inputs, index, data.label[index]
    label = data.label[index].expand(n_heads, *index.shape[1:], *data.label.shape[1:])
    return select_rows(data.inputs, index[0]), None, label
