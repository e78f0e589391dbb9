"""The only training loop: K heads, each with its own learning rate, weight decay and seed, in one pass.

A head's own: its initialisation, its optimiser's state, the step at which it stops, and, where the features are in
memory, its order of samples. Shared: the features, read and moved once, and the number of steps. Features that are
streamed from the disk come in one order, the same for all heads and settings. Either way a head trained among K gives
the numbers that it gives alone, but for rounding.
"""

import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

from pipeline import metrics
from pipeline.training.feed import Stream
from pipeline.training.lane import Lane, Recipe, Setting
from pipeline.training.loss import Task, decided
from pipeline.training.recorded import Recorded

# Decides the order of samples that are streamed.
STREAMED_SEED = 0
# Samples in an evaluation's batch, where heads are one product.
_MANY = 4096
# Heads at once on a GPU, which the kernels of one do not fill.
_STREAMS = 4
# Values in pooled vectors above which a product over all of them is worth every core.
_LARGE = 1 << 23


@dataclass(frozen=True)
class Data:
    """Features and labels of the same samples.

    Attributes:
        inputs: (sample, channel), or a list of levels (sample, channel, y, x), standardised; or a stream of them.
        label: (sample,), (sample, class) or (sample, y, x), on the device that trains.
    """

    inputs: torch.Tensor | list[torch.Tensor] | Stream
    label: torch.Tensor


def fit(
    make_group: Callable[[Sequence[int]], torch.nn.Module],
    data: Data,
    task: Task,
    settings: Sequence[Setting],
    recipe: Recipe,
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
        lanes.append(Lane(part, mine, task, recipe))
    checked = validation if recipe.patience else None
    if isinstance(data.inputs, Stream):
        _streamed(lanes, data, recipe, checked)
    elif data.label.is_cuda:
        _by_turns(lanes, data, recipe, checked)
    else:
        with _side_by_side(data, group) as each:
            trained = each(lambda lane: _in_memory(lane, data, recipe, checked), lanes)
            for _ in tqdm(trained, total=len(lanes), unit="lane", mininterval=2, file=sys.stderr):
                pass
    for lane in lanes:
        lane.restore()
    return group.eval()


def evaluate(group: torch.nn.Module, data: Data, task: Task, batch: int) -> np.ndarray:
    """Per-sample counts of every head, int64 (head, sample, cells); see pipeline/metrics."""
    return np.concatenate(_evaluate(group.lanes(), data, task, batch))


def order(count: int, recipe: Recipe, seed: int) -> torch.Tensor:
    """Rows of every batch, (step, batch): each epoch in a new order; what does not fill a batch waits its turn.

    All batches have one size, so that K heads' batches stack and BatchNorm never meets a single sample.
    """
    generator, wanted = torch.Generator().manual_seed(seed), recipe.steps * recipe.batch
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(epochs)[:wanted].view(recipe.steps, recipe.batch)


def _in_memory(lane: Lane, data: Data, recipe: Recipe, validation: Data | None) -> None:
    """Train a lane, every head with its own order of samples."""
    for index in _orders(lane, data, recipe):
        lane.step(*_batch(lane, data, index))
        if validation and lane.check_is_due():
            lane.check(_in_batches(lane.group, validation, lane.task, recipe.batch))
        if lane.done:
            return


def _by_turns(lanes: Sequence[Lane], data: Data, recipe: Recipe, validation: Data | None) -> None:
    """Train all lanes on a GPU, a step of each in turn, on a few streams side by side."""
    device = data.label.device
    streams = _streams(device)
    pools = [torch.cuda.graph_pool_handle() for _ in streams]
    recorded = [_steps(lane, data, recipe, pools[place % len(pools)]) for place, lane in enumerate(lanes)]
    going = [
        (_repeated(lane, steps, validation), streams[place % len(streams)])
        for place, (lane, steps) in enumerate(zip(lanes, recorded, strict=True))
    ]
    torch.cuda.synchronize(device)  # what these streams are about to read is there
    bar = tqdm(total=recipe.steps * len(lanes), unit="step", mininterval=2, file=sys.stderr)
    try:
        with _exact(), bar as progress:
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


def _steps(lane: Lane, data: Data, recipe: Recipe, pool: tuple[int, int] | None) -> Recorded:
    """A lane's steps, to be recorded."""

    def update(index: torch.Tensor, factor: torch.Tensor) -> None:
        lane.update(*_batch(lane, data, index), factor)

    return Recorded(update, _orders(lane, data, recipe), [lane.factor(step) for step in range(recipe.steps)], pool)


def _repeated(lane: Lane, step: Recorded, validation: Data | None) -> Iterator[int]:
    """A lane's training as `_in_memory`'s, by its recorded steps; yields after each, on its caller's stream."""
    while not lane.done:
        step()
        lane.steps += 1
        if validation and lane.check_is_due():
            lane.check(_in_batches(lane.group, validation, lane.task, lane.recipe.batch))
        yield 1
    lane.optimiser.zero_grad()  # gradients are the recording's memory


def _orders(lane: Lane, data: Data, recipe: Recipe) -> torch.Tensor:
    """Rows of every step, (step, head, batch), on the device; heads of one seed have one order: (step, 1, batch)."""
    seeds = [setting.seed for setting in lane.settings]
    seeds = seeds[:1] if len(set(seeds)) == 1 else seeds
    return torch.stack([order(len(data.label), recipe, seed) for seed in seeds], dim=1).to(data.label.device)


def _batch(lane: Lane, data: Data, index: torch.Tensor) -> tuple:
    """What `Lane.step` takes, of the rows (head, batch) or (1, batch), which heads then share."""
    heads = len(lane.settings)
    if len(index) == heads > 1:
        return data.inputs, index, data.label[index]
    label = data.label[index].expand(heads, *index.shape[1:], *data.label.shape[1:])
    return _rows(data.inputs, index[0]), None, label


def _streamed(lanes: Sequence[Lane], data: Data, recipe: Recipe, validation: Data | None) -> None:
    """Train all lanes batch by batch, each batch read and moved once."""
    rows, device = order(len(data.label), recipe, STREAMED_SEED), data.label.device
    with _side_by_side(data, lanes[0].group) as each:
        for index, batch in zip(rows, data.inputs.batches(rows), strict=True):
            label, going = data.label[index.to(device)], [lane for lane in lanes if not lane.done]
            list(each(lambda lane, x=batch, y=label: lane.step(x, None, y.expand(len(lane.group), *y.shape)), going))
            if validation and going[0].check_is_due():
                counts = _evaluate([lane.group for lane in going], validation, going[0].task, recipe.batch)
                for lane, one in zip(going, counts, strict=True):
                    lane.check(one)
            if all(lane.done for lane in lanes):
                return


@contextmanager
def _side_by_side(data: Data, group: torch.nn.Module):
    """A `map` over lanes: a core a lane, or one lane after the other where one lane keeps the device busy.

    On a GPU a few dense heads are evaluated at once, each on a stream of its own, if features are kept there.

    Small convolutions and small products keep one core busy and not two: a core a lane is faster than every core on
    each lane in turn, much faster where others use the machine too, since torch's threads wait for one another by
    spinning; and a head's numbers depend neither on the others nor on how many cores there are.
    """
    large = isinstance(data.inputs, torch.Tensor) and data.inputs.numel() > _LARGE
    on_gpu = data.label.device.type != "cpu"
    if group.stacked and (on_gpu or large):
        yield map
        return
    if on_gpu and isinstance(data.inputs, Stream):  # batches come through one stream, which all lanes share
        with _exact():
            yield map
        return
    if on_gpu:
        torch.cuda.synchronize(data.label.device)  # what streams of other threads are about to read is there
        free = queue.SimpleQueue()
        for stream in _streams(data.label.device):
            free.put(stream)
        own = {"initializer": lambda: torch.cuda.set_stream(free.get())}
        with _exact(), ThreadPoolExecutor(_STREAMS, **own) as pool:
            yield pool.map
        torch.cuda.synchronize(data.label.device)
        return
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool.map


def _exact():
    """cuDNN's convolutions such that a head's numbers are the same each time.

    (cuDNN 9 has no such way for convolutions of a channel each, which students and backbones have, and fails.)
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


@lru_cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """A GPU's streams for heads, always the same: memory that one has freed is its own."""
    return [torch.cuda.Stream(device) for _ in range(_STREAMS)]


def _evaluate(groups: Sequence[torch.nn.Module], data: Data, task: Task, batch: int) -> list[np.ndarray]:
    """Counts of each group; a stream is read once for all."""
    with _side_by_side(data, groups[0]) as each:
        if not isinstance(data.inputs, Stream):
            return list(each(lambda group: _in_batches(group, data, task, batch), groups))
        parts, rows = [], torch.arange(len(data.label)).split(batch)
        for index, inputs in zip(rows, data.inputs.batches(rows), strict=True):
            label = data.label[index.to(data.label.device)]
            parts.append(list(each(lambda group, x=inputs, y=label: _counts(group, x, y, task), groups)))
    return [np.concatenate(some, axis=1) for some in zip(*parts, strict=True)]


def _in_batches(group: torch.nn.Module, data: Data, task: Task, batch: int) -> np.ndarray:
    """A group's counts on features in memory."""
    size, inputs, parts = _MANY if group.stacked else batch, data.inputs, []
    for start in range(0, len(data.label), size):
        some = slice(start, start + size)
        parts.append(_counts(group, _rows(inputs, some), data.label[some], task))
    return np.concatenate(parts, axis=1)


@torch.no_grad()
def diverged(group: torch.nn.Module) -> np.ndarray:
    """Which heads have parameters, or running statistics, that are no numbers, bool (head,)."""
    found = []
    for lane in group.lanes():
        values = [one for one in lane.state_dict().values() if one.is_floating_point()]
        heads = len(lane) if group.stacked else 1
        found.append(~torch.stack([one.isfinite().reshape(heads, -1).all(dim=1) for one in values]).all(dim=0))
    return torch.cat(found).cpu().numpy()


@torch.no_grad()
def logits(group: torch.nn.Module, inputs: torch.Tensor | Stream) -> np.ndarray:
    """Logits of every trained head on pooled vectors (sample, channel), float32 (head, sample, class)."""
    rows = torch.arange(len(inputs)).split(_MANY)
    batches = inputs.batches(rows) if isinstance(inputs, Stream) else inputs.split(_MANY)
    parts = [torch.cat([piece for _, piece in group.pieces(batch, None)]).float().cpu() for batch in batches]
    return torch.cat(parts, dim=1).numpy()


def _rows(inputs: torch.Tensor | list[torch.Tensor], index: torch.Tensor | slice):
    return inputs[index] if isinstance(inputs, torch.Tensor) else [level[index] for level in inputs]


@torch.no_grad()
def _counts(group: torch.nn.Module, inputs, label: torch.Tensor, task: Task) -> np.ndarray:
    """Counts on one batch, (head, sample, cells); the group's mode is left as it was."""
    training = group.training
    group.eval()
    logits = torch.cat([piece for _, piece in group.pieces(inputs, None)])
    group.train(training)
    predicted = decided(logits, label, task, dim=2).cpu().numpy()
    true = label.long().cpu().numpy()
    return np.stack([metrics.counts(task.kind, one, true, task.classes, task.ignore) for one in predicted])


__all__ = ["Data", "Recipe", "Setting", "Task", "diverged", "evaluate", "fit", "logits", "order"]
