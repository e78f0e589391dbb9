"""The only training loop: K heads, each with its own learning rate, weight decay and seed, in one pass.

A head's own: its initialisation, its optimiser's state, the step at which it stops, and, where the features are in
memory, its order of samples. Shared: the features, read and moved once, and the number of steps. Features that are
streamed from the disk come in one order, the same for all heads and settings. Either way a head trained among K gives
the numbers that it gives alone, but for rounding.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm

from pipeline.training.cuda_graphs import GraphedStep
from pipeline.training.evaluate import diverged_heads, evaluate, evaluate_groups, evaluate_in_memory, predict_logits, select_rows
from pipeline.training.feature_loader import Data, StreamedFeatures
from pipeline.training.head_trainer import HeadTrainer, HParams, TrainSchedule
from pipeline.training.losses import Task
from pipeline.training.parallel import deterministic_cudnn, parallel_map, streams

# Decides the order of samples that are streamed.
STREAMED_SEED = 0


def fit(
    make_group: Callable[[Sequence[int]], torch.nn.Module],
    data: Data,
    task: Task,
    settings: Sequence[HParams],
    recipe: TrainSchedule,
    validation: Data | None = None,
) -> torch.nn.Module:
    """Train one head per setting with AdamW and a warmed-up cosine schedule, and return the group.

    Args:
        make_group: from seeds to a group of heads (see pipeline/heads).
        validation: what `recipe.patience` is judged on.
    """
    group = make_group([setting.seed for setting in settings]).to(data.label.device).train()
    lanes, rest = [], list(settings)
    for part in group.lanes():
        mine, rest = rest[: len(part)], rest[len(part) :]
        lanes.append(HeadTrainer(part, mine, task, recipe))
    checked = validation if recipe.patience else None
    if isinstance(data.inputs, StreamedFeatures):
        _streamed(lanes, data, recipe, checked)
    elif data.label.is_cuda:
        _by_turns(lanes, data, recipe, checked)
    else:
        with parallel_map(data, group) as each:
            trained = each(lambda lane: _in_memory(lane, data, recipe, checked), lanes)
            for _ in tqdm(trained, total=len(lanes), unit="lane", mininterval=2, file=sys.stderr):
                pass
    for lane in lanes:
        lane.restore()
    return group.eval()


def order(count: int, recipe: TrainSchedule, seed: int) -> torch.Tensor:
    """Rows of every batch, (step, batch): each epoch in a new order; what does not fill a batch waits its turn.

    All batches have one size, so that K heads' batches stack and BatchNorm never meets a single sample.
    """
    generator, wanted = torch.Generator().manual_seed(seed), recipe.steps * recipe.batch
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(epochs)[:wanted].view(recipe.steps, recipe.batch)


def _in_memory(lane: HeadTrainer, data: Data, recipe: TrainSchedule, validation: Data | None) -> None:
    """Train a lane, every head with its own order of samples."""
    for index in _orders(lane, data, recipe):
        lane.step(*_batch(lane, data, index))
        if validation and lane.check_is_due():
            lane.check(evaluate_in_memory(lane.group, validation, lane.task, recipe.batch))
        if lane.done:
            return


def _by_turns(lanes: Sequence[HeadTrainer], data: Data, recipe: TrainSchedule, validation: Data | None) -> None:
    """Train all lanes on a GPU, a step of each in turn, on a few streams side by side."""
    device = data.label.device
    lines = streams(device)
    pools = [torch.cuda.graph_pool_handle() for _ in lines]
    recorded = [_steps(lane, data, recipe, pools[place % len(pools)]) for place, lane in enumerate(lanes)]
    going = [
        (_repeated(lane, steps, validation), lines[place % len(lines)])
        for place, (lane, steps) in enumerate(zip(lanes, recorded, strict=True))
    ]
    torch.cuda.synchronize(device)  # what these streams are about to read is there
    bar = tqdm(total=recipe.steps * len(lanes), unit="step", mininterval=2, file=sys.stderr)
    try:
        with deterministic_cudnn(), bar as progress:
            going = _turn(going, progress)
            # Memory of the steps that are not recorded: a recording has its own, and cannot take this.
            torch.cuda.empty_cache()
            while going:
                going = _turn(going, progress)
    finally:
        torch.cuda.synchronize(device)
        del recorded, going
        torch.cuda.empty_cache()  # the recordings' memory, which nothing else would use


def _turn(going: Sequence[tuple[Iterator[int], torch.cuda.Stream]], progress: tqdm) -> list:
    """Those that took a step and may take another."""
    left = []
    for lane, stream in going:
        with torch.cuda.stream(stream):
            taken = next(lane, None)
        if taken:
            progress.update(taken)
            left.append((lane, stream))
    return left


def _steps(lane: HeadTrainer, data: Data, recipe: TrainSchedule, pool: tuple[int, int] | None) -> GraphedStep:
    """A lane's steps, to be recorded."""

    def update(index: torch.Tensor, factor: torch.Tensor) -> None:
        lane.update(*_batch(lane, data, index), factor)

    return GraphedStep(update, _orders(lane, data, recipe), [lane.factor(step) for step in range(recipe.steps)], pool)


def _repeated(lane: HeadTrainer, step: GraphedStep, validation: Data | None) -> Iterator[int]:
    """A lane's training as `_in_memory`'s, by its recorded steps; yields after each, on its caller's stream."""
    while not lane.done:
        step()
        lane.steps += 1
        if validation and lane.check_is_due():
            lane.check(evaluate_in_memory(lane.group, validation, lane.task, lane.recipe.batch))
        yield 1
    lane.optimiser.zero_grad()  # gradients are the recording's memory


def _orders(lane: HeadTrainer, data: Data, recipe: TrainSchedule) -> torch.Tensor:
    """Rows of every step, (step, head, batch), on the device; heads of one seed have one order: (step, 1, batch)."""
    seeds = [setting.seed for setting in lane.settings]
    seeds = seeds[:1] if len(set(seeds)) == 1 else seeds
    return torch.stack([order(len(data.label), recipe, seed) for seed in seeds], dim=1).to(data.label.device)


def _batch(lane: HeadTrainer, data: Data, index: torch.Tensor) -> tuple:
    """What `Lane.step` takes, of the rows (head, batch) or (1, batch), which heads then share."""
    heads = len(lane.settings)
    if len(index) == heads > 1:
        return data.inputs, index, data.label[index]
    label = data.label[index].expand(heads, *index.shape[1:], *data.label.shape[1:])
    return select_rows(data.inputs, index[0]), None, label


def _streamed(lanes: Sequence[HeadTrainer], data: Data, recipe: TrainSchedule, validation: Data | None) -> None:
    """Train all lanes batch by batch, each batch read and moved once."""
    rows, device = order(len(data.label), recipe, STREAMED_SEED), data.label.device
    with parallel_map(data, lanes[0].group) as each:
        for index, batch in zip(rows, data.inputs.batches(rows), strict=True):
            label, going = data.label[index.to(device)], [lane for lane in lanes if not lane.done]
            list(each(lambda lane, x=batch, y=label: lane.step(x, None, y.expand(len(lane.group), *y.shape)), going))
            if validation and going[0].check_is_due():
                counts = evaluate_groups([lane.group for lane in going], validation, going[0].task, recipe.batch)
                for lane, one in zip(going, counts, strict=True):
                    lane.check(one)
            if all(lane.done for lane in lanes):
                return


__all__ = ["Data", "HParams", "Task", "TrainSchedule", "diverged_heads", "evaluate", "fit", "predict_logits", "order"]
