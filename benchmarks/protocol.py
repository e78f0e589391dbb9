"""The paper's protocol, 16 trials and 10 seeds, against one run of one head, and against terratorch.

    python -m benchmarks.protocol [linear] [upernet] [terratorch]     # all, or some of them
    python -m benchmarks.protocol --device cuda linear upernet        # heads on a GPU
    python -m benchmarks.protocol --deal 1 terratorch                 # blocks dealt to the splits by another seed

From `make run`'s stores and params.yaml. Imports are left out of every time.

- `linear_vs_single`, `upernet_vs_single`: wall time of the search and the seeds over that of one head's run, both
  from the stores on disk to test scores, medians of alternating rounds (one of the linear ones on a GPU); linear over
  all cells of the classification sets together. `…_training_vs_single` leaves out what both have once, reading the
  stores. The single runs are on one core or all cores, whichever is faster. The linear one is written as anybody
  would in plain torch: the same steps and batches from features in memory, nn.Linear, cross_entropy, autograd and the
  fused AdamW.
  `linear_vs_own_single` is against our own code with one head, which has no autograd and is faster than plain torch.
- `vs_terratorch`: wall time of terratorch's 26 runs over ours: one extraction, the search and the seeds.
  terratorch does a run as its users do: the frozen backbone in the loop, its own datamodule (GeoTIFFs, folders
  of classes), task and trainer. Eight of its runs are timed in full: six trials, their learning rates spread over the
  range that ours are drawn from, with our best weight decay, and two further seeds of the one that is best on
  validation. The 26 are 26 times their mean, since every trial and seed has as many epochs, ours rounded up. Both
  train for 200 steps instead of params.yaml's 1200, which favours terratorch: our extraction does not shrink with
  them. Both classify the deepest level's mean; the backbone is `lite0`, the set `sample-trees`. Its BatchNorm is
  kept in evaluation mode, as a frozen backbone's should be (terratorch only stops the gradients), so that both see
  the same features. Accuracies are means over seeds, with their standard deviation.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks import deals
from benchmarks.features import FOLDER
from benchmarks.terratorch_runs import Run, terratorch_run, write_tiffs
from benchmarks.timing import seconds
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.writer import Writer
from pipeline import config, device
from pipeline.data.image_store import SPLITS, open_images
from pipeline.training import loop, task_data
from pipeline.training.head_trainer import HeadTrainer, HParams, TrainSchedule
from pipeline.training.optim import warm_cosine
from pipeline.training.protocol import count_split, train_heads
from pipeline.training.search import search

ROUNDS = 3
UPERNET = ("sample-landuse-seg", "csmask_b4+lite0")
THEIRS = ("sample-trees", "lite0")
# Few runs of terratorch's, and of few steps on both sides: it takes long for each.
RATES, SEEDS, STEPS = 6, 3, 200


def stores(dataset: str, model: str) -> dict:
    return {Path(f"data/features/{dataset}/{name}.zarr"): None for name in model.split("+")}


def load(described: config.Params, dataset: str, model: str) -> task_data.TaskData:
    pictures, where = Path(f"data/images/{dataset}.zarr"), described.compute.device
    return task_data.load(stores(dataset, model), pictures, described.heads, SPLITS, where)


def scores(cell: task_data.TaskData, group, split: str) -> np.ndarray:
    return cell.task.score(count_split(cell, group, split).sum(axis=1))


def protocol(described: config.Params, cell: task_data.TaskData) -> tuple[dict, np.ndarray]:
    """The search's result, and the seeds' test scores."""
    found = search(lambda settings: scores(cell, train_heads(cell, settings), "val"), described.search)
    settings = [HParams(**found["best"], seed=seed) for seed in range(described.train.seeds)]
    return found, scores(cell, train_heads(cell, settings), "test")


def single(cell: task_data.TaskData) -> np.ndarray:
    return scores(cell, train_heads(cell, [HParams(1e-2, 1e-2, 0)]), "test")


def classification(described: config.Params) -> list[tuple[str, str]]:
    """The grid's cells of classification sets whose backbones see the images."""
    found = []
    for dataset in described.grid.datasets:
        for model in described.grid.models if described.dataset(dataset).task == "classification" else ():
            try:
                [FeatureStore(path) for path in stores(dataset, model)]
            except StoreError:  # left out
                continue
            found.append((dataset, model))
    return found


def plain(cell: task_data.TaskData, recipe: loop.TrainSchedule, threads: int) -> float:
    """Seconds of one linear head in plain torch, to its test score."""
    part, test = cell.splits["train"], cell.splits["test"]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    head = torch.nn.Linear(part.inputs.shape[1], cell.task.n_classes).to(part.inputs.device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warm_cosine(recipe.steps))
    for index in loop.batch_order(len(part.label), recipe, 0).to(part.inputs.device):
        optimiser.zero_grad()
        functional.cross_entropy(head(part.inputs[index]), part.label[index]).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        (head(test.inputs).argmax(1) == test.label).float().mean().item()
    spent = time.perf_counter() - begun
    torch.set_num_threads(before)
    return spent


def linear(described: config.Params) -> dict:
    """Ratios of the linear protocol over all cells."""
    rounds, chosen = [], classification(described)
    recipe = TrainSchedule(described.heads.linear.steps, described.heads.linear.batch)
    for _ in range(1 + (ROUNDS if described.compute.device == "cpu" else 1)):  # a GPU's time is dear
        times = np.zeros(4)
        for dataset, model in chosen:
            begun = time.perf_counter()
            cell = load(described, dataset, model)
            read = time.perf_counter() - begun
            torchs = min(plain(cell, recipe, threads) for threads in _threads(described))
            own, many = seconds(lambda c=cell: single(c)), seconds(lambda c=cell: protocol(described, c))
            times += (read, many, torchs, own)
        rounds.append(times)
    read, many, torchs, own = np.array(rounds[1:]).T
    ratios = {
        "linear_vs_single": (read + many) / (read + torchs),
        "linear_training_vs_single": many / torchs,
        "linear_vs_own_single": (read + many) / (read + own),
        "linear_training_vs_own_single": many / own,
    }
    spent = {"reading": read, "all": many, "plain_one": torchs, "own_one": own}
    return {
        **{name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "linear_seconds": {name: round(statistics.median(values), 2) for name, values in spent.items()},
        "linear_cells": len(chosen),
    }


def _threads(described: config.Params) -> set[int]:
    """How many threads to try a single run with; a GPU's waits for one, whatever there are."""
    return {1} if described.compute.device == "cuda" else {1, torch.get_num_threads()}


def all_cores(described: config.Params, cell: task_data.TaskData) -> float:
    """Seconds of one UPerNet on every core, which `fit` would give one."""
    chosen, setting = described.heads.upernet, HParams(1e-2, 1e-2, 0)
    recipe = TrainSchedule(chosen.steps, chosen.batch)
    group = train_heads(cell, [setting])  # made, and trained outside of the clock
    lane = HeadTrainer(group.independent_heads()[0].train(), [setting], cell.task, recipe)
    begun = time.perf_counter()
    for index in loop.batch_order(len(cell.splits["train"].label), recipe, 0):
        lane.step(
            [level[index] for level in cell.splits["train"].inputs], None, cell.splits["train"].label[index][None]
        )
    scores(cell, group.eval(), "test")
    return time.perf_counter() - begun


def upernet(described: config.Params) -> dict:
    """Ratios of UPerNet's protocol on one cell."""
    rounds = []
    for _ in range(2):
        begun = time.perf_counter()
        cell = load(described, *UPERNET)
        read = time.perf_counter() - begun
        single(cell)  # warms up
        one = statistics.median(seconds(lambda c=cell: single(c)) for _ in range(ROUNDS))
        if described.compute.device == "cpu":
            one = min(one, all_cores(described, cell))
        many = seconds(lambda c=cell: protocol(described, c))
        rounds.append((many + read, one + read, many, one))
    whole, training = (statistics.mean(r[i] / r[i + 1] for r in rounds) for i in (0, 2))
    return {
        "upernet_vs_single": round(whole, 2),
        "upernet_training_vs_single": round(training, 2),
        "upernet_seconds": {"all": round(rounds[-1][2], 1), "one": round(rounds[-1][3], 2)},
    }


def terratorch(described: config.Params, dealt: int | None = None) -> dict:
    """Ours, from images to test scores, against terratorch's.

    Args:
        dealt: a seed to deal the blocks to the splits by, in place of params.yaml's.
    """
    from pipeline.backbones import create_backbone, get_spec, preprocessing
    from pipeline.backbones.encoder import Encoder
    from pipeline.extraction import engine, estimate

    dataset, backbone = THEIRS
    recipe = dataclasses.replace(described.heads.linear, pooled="last", steps=STEPS)
    described = dataclasses.replace(described, heads=dataclasses.replace(described.heads, linear=recipe))
    pictures = Path(f"data/images/{dataset}.zarr")
    if dealt is not None:
        pictures = deals.store(dataset, described.dataset(dataset), dealt)
    images, chosen = open_images(pictures), described.backbone(backbone)
    declared = get_spec(chosen)
    given = preprocessing.make_preprocessor(images, backbone, chosen, declared)
    network = create_backbone(chosen, declared, given.input_bands, Path(f"data/weights/{backbone}"))

    shutil.rmtree(scratch := FOLDER / "protocol", ignore_errors=True)
    begun = time.perf_counter()
    encoder = Encoder(given, network, "cpu", strides=declared.strides)
    look = estimate.dry_run(images, encoder, 4)
    layout = engine.make_schema(images, declared, look.pyramid, chosen.input_size, described.extract)
    provenance = {"images_sha256": images.attrs["content_sha256"]}
    writer = Writer(scratch / "scratch", layout, scratch / "store.zarr", provenance)
    batch = described.extract.batch or estimate.find_batch_size(images, encoder, described.extract.shard)
    engine.extract(images, encoder, writer, batch)
    writer.finish()
    cell = task_data.load({scratch / "store.zarr": None}, pictures, described.heads, SPLITS, "cpu")
    found, ours = protocol(described, cell)
    spent = time.perf_counter() - begun
    shutil.rmtree(scratch)

    epochs = -(-recipe.steps * recipe.batch // len(cell.splits["train"].label))
    with tempfile.TemporaryDirectory() as folder:
        write_tiffs(images, Path(folder))

        def run(rate: float, seed: int) -> Run:
            decay = found["best"]["weight_decay"]
            return terratorch_run(Path(folder), network, rate, decay, seed, epochs, recipe.batch)

        trials = {float(rate): run(rate, 0) for rate in np.geomspace(*described.search.learning_rate, RATES)}
        best = max(trials, key=lambda rate: trials[rate].val)
        seeds = [trials[best], *(run(best, seed) for seed in range(1, SEEDS))]
    runs, count = [*trials.values(), *seeds[1:]], described.search.trials + described.train.seeds
    return {
        "vs_terratorch": round(count * statistics.mean(one.seconds for one in runs) / spent, 1),
        "ours_seconds": round(spent, 1), "terratorch_seconds_a_run": [round(one.seconds, 1) for one in runs],
        "runs": count, "epochs": epochs,
        "ours_accuracy": _spread(ours), "terratorch_accuracy": _spread(np.array([one.test for one in seeds])),
        "terratorch_val_by_rate": {f"{rate:.2g}": round(one.val, 4) for rate, one in trials.items()},
    }  # fmt: skip


def _spread(accuracy: np.ndarray) -> list[float]:
    return [round(float(accuracy.mean()), 4), round(float(accuracy.std(ddof=1)), 4)]


PARTS = {work.__name__: work for work in (linear, upernet, terratorch)}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; none for all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of our heads and of plain torch's")
    parser.add_argument("--deal", type=int, help="terratorch's set with its blocks dealt by this seed")
    arguments, described = parser.parse_args(), config.load()
    described = dataclasses.replace(
        described, compute=dataclasses.replace(described.compute, device=device.resolve_device(arguments.device))
    )
    found = {"cores": os.cpu_count(), "device": arguments.device}
    if arguments.deal is not None:
        found["deal"] = arguments.deal
    chosen = arguments.parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if arguments.device != "cpu" and "terratorch" in chosen:
        parser.error("terratorch's runs are on the CPU; name the parts that a GPU is to run: linear, upernet")
    if arguments.deal is not None and chosen != ["terratorch"]:
        parser.error("--deal is for terratorch alone: python -m benchmarks.protocol --deal 1 terratorch")
    for name in chosen:
        found |= terratorch(described, arguments.deal) if name == "terratorch" else PARTS[name](described)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
