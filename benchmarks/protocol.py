"""The paper's protocol (16 trials, 10 seeds), compared with one run of one head and with terratorch.

    python -m benchmarks.protocol [linear] [upernet] [terratorch]     # by default all
    python -m benchmarks.protocol --device cuda linear upernet        # heads on a GPU
    python -m benchmarks.protocol --split-seed 1 terratorch           # blocks assigned to the splits by another seed

Needs the stores of `make run`, and params.yaml. No time includes imports.

- `linear_vs_single`, `upernet_vs_single`: wall time of the search and the seeds divided by that of one head's run,
  both from the stores on disk to test scores, medians of alternating rounds (on a GPU one round of linear heads).
  `linear` covers all cells of the classification datasets together. `…_training_vs_single` is the same without
  reading the stores, which both do once. The single run uses one core or all cores, whichever is faster. The linear
  one is plain torch: the same steps and batches from features in memory, nn.Linear, cross_entropy, autograd and fused
  AdamW. `linear_vs_own_single` compares with one head of our code, which needs no autograd and is faster than plain
  torch.
- `vs_terratorch`: wall time of 26 runs of terratorch divided by ours: one extraction, the search and the seeds.
  terratorch runs in its usual configuration: the frozen backbone in the training loop, its own data module (GeoTIFFs
  in folders of classes), task and trainer. Eight of its runs are timed: six trials, with learning rates spread over
  our search range and our best weight decay, and two more seeds of the trial that is best on validation. The time of
  all 26 is 26 times their mean, since every trial and seed has as many epochs, ours rounded up. Both train for 200
  steps instead of the number in params.yaml, which favours terratorch: our extraction takes as long for any number of
  steps. Both classify the mean of the deepest level of `lite0` on `sample-trees`. Its BatchNorm stays in evaluation
  mode, so that both use the same features. Accuracies are means over seeds, with their standard deviation.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks import resplit
from benchmarks.features import FOLDER
from benchmarks.terratorch_runs import TerratorchRun, terratorch_run, write_tiffs
from benchmarks.timing import seconds
from cache.errors import StoreError
from cache.reader import FeatureStore
from cache.writer import Writer
from pipeline import config, device
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.data.image_store import SPLITS, open_images
from pipeline.extraction import engine, estimate
from pipeline.tasks import TaskType
from pipeline.training import loop, task_data
from pipeline.training.loop import HeadTrainer, HParams, TrainSchedule
from pipeline.training.optim import warm_cosine
from pipeline.training.protocol import score_split, search, train_heads
from pipeline.training.task_data import TaskData

ROUNDS = 3
UPERNET_CELL = ("sample-landuse-seg", "csmask_b4+lite0")
TERRATORCH_CELL = ("sample-trees", "lite0")
# terratorch is slow, so it has few runs, and both sides few steps.
N_RATES, N_SEEDS, N_STEPS = 6, 3, 200
SINGLE = HParams(1e-2, 1e-2, 0)


def feature_paths(dataset: str, model: str) -> dict[Path, None]:
    """Return the paths of the stores of a model's backbones."""
    return {Path(f"data/features/{dataset}/{name}.zarr"): None for name in model.split("+")}


def load(params: config.Params, dataset: str, model: str) -> TaskData:
    """Load all splits of a dataset for a model."""
    images_path = Path(f"data/images/{dataset}.zarr")
    return task_data.load(feature_paths(dataset, model), images_path, params.heads, SPLITS, params.compute.device)


def run_protocol(params: config.Params, data: TaskData) -> tuple[dict, np.ndarray]:
    """Return the result of the search, and the test scores of the seeds."""
    result = search(lambda hparams: score_split(data, train_heads(data, hparams), "val"), params.search)
    hparams = [HParams(**result["best"], seed=seed) for seed in range(params.train.seeds)]
    return result, score_split(data, train_heads(data, hparams), "test")


def run_single(data: TaskData) -> np.ndarray:
    """Return the test score of one head of our code."""
    return score_split(data, train_heads(data, [SINGLE]), "test")


def classification_cells(params: config.Params) -> list[tuple[str, str]]:
    """Return dataset and model of the grid's classification cells that were not skipped."""
    cells = []
    for dataset in params.grid.datasets:
        is_classification = params.dataset(dataset).task == TaskType.CLASSIFICATION
        for model in params.grid.models if is_classification else ():
            try:
                [FeatureStore(path) for path in feature_paths(dataset, model)]
            except StoreError:  # skipped
                continue
            cells.append((dataset, model))
    return cells


def plain_torch_seconds(data: TaskData, schedule: TrainSchedule, threads: int) -> float:
    """Return the seconds of one linear head in plain torch, from features in memory to its test score."""
    train, test = data.splits["train"], data.splits["test"]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    start = time.perf_counter()
    head = torch.nn.Linear(train.inputs.shape[1], data.task.n_classes).to(train.inputs.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(schedule.steps))
    for index in loop.batch_order(len(train.label), schedule, 0).to(train.inputs.device):
        optimizer.zero_grad()
        functional.cross_entropy(head(train.inputs[index]), train.label[index]).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        (head(test.inputs).argmax(1) == test.label).float().mean().item()
    elapsed = time.perf_counter() - start
    torch.set_num_threads(n_threads)
    return elapsed


def linear(params: config.Params) -> dict:
    """Measure the protocol of linear heads over all cells."""
    rounds, cells = [], classification_cells(params)
    schedule = TrainSchedule(params.heads.linear.steps, params.heads.linear.batch)
    for _ in range(
        1 + (ROUNDS if params.compute.device == "cpu" else 1)
    ):  # one round on a GPU, whose time is limited
        times = np.zeros(4)
        for dataset, model in cells:
            start = time.perf_counter()
            data = load(params, dataset, model)
            reading = time.perf_counter() - start
            plain = min(plain_torch_seconds(data, schedule, threads) for threads in _thread_counts(params))
            own = seconds(lambda data=data: run_single(data))
            protocol = seconds(lambda data=data: run_protocol(params, data))
            times += (reading, protocol, plain, own)
        rounds.append(times)
    reading, protocol, plain, own = np.array(rounds[1:]).T
    ratios = {
        "linear_vs_single": (reading + protocol) / (reading + plain),
        "linear_training_vs_single": protocol / plain,
        "linear_vs_own_single": (reading + protocol) / (reading + own),
        "linear_training_vs_own_single": protocol / own,
    }
    times = {"reading": reading, "protocol": protocol, "plain_single": plain, "own_single": own}
    return {
        **{name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "linear_seconds": {name: round(statistics.median(values), 2) for name, values in times.items()},
        "linear_cells": len(cells),
    }


def _thread_counts(params: config.Params) -> set[int]:
    """Numbers of threads to try for a single run; on a GPU, one thread waits for it in any case."""
    return {1} if params.compute.device == "cuda" else {1, torch.get_num_threads()}


def all_cores_seconds(params: config.Params, data: TaskData) -> float:
    """Return the seconds of one UPerNet on all cores; `fit` would use one core for one head."""
    schedule = TrainSchedule(params.heads.upernet.steps, params.heads.upernet.batch)
    group = train_heads(data, [SINGLE])  # not timed; it is trained once more below
    trainer = HeadTrainer(group.independent_heads()[0].train(), [SINGLE], data.task, schedule)
    train = data.splits["train"]
    start = time.perf_counter()
    for index in loop.batch_order(len(train.label), schedule, 0):
        trainer.step([level[index] for level in train.inputs], None, train.label[index][None])
    score_split(data, group.eval(), "test")
    return time.perf_counter() - start


def upernet(params: config.Params) -> dict:
    """Measure the protocol of UPerNet on one cell."""
    rounds = []
    for _ in range(2):
        start = time.perf_counter()
        data = load(params, *UPERNET_CELL)
        reading = time.perf_counter() - start
        run_single(data)  # warms up
        single = statistics.median(seconds(lambda data=data: run_single(data)) for _ in range(ROUNDS))
        if params.compute.device == "cpu":
            single = min(single, all_cores_seconds(params, data))
        protocol = seconds(lambda data=data: run_protocol(params, data))
        rounds.append({"reading": reading, "protocol": protocol, "single": single})
    with_reading = [(times["protocol"] + times["reading"]) / (times["single"] + times["reading"]) for times in rounds]
    training = [times["protocol"] / times["single"] for times in rounds]
    return {
        "upernet_vs_single": round(statistics.mean(with_reading), 2),
        "upernet_training_vs_single": round(statistics.mean(training), 2),
        "upernet_seconds": {
            "protocol": round(rounds[-1]["protocol"], 1), "single": round(rounds[-1]["single"], 2)
        },
    }  # fmt: skip


def terratorch(params: config.Params, split_seed: int | None = None) -> dict:
    """Measure our protocol from images to test scores, and terratorch's runs.

    Args:
        split_seed: assigns the blocks to the splits; None for the splits of params.yaml.
    """
    dataset, name = TERRATORCH_CELL
    settings = replace(params.heads.linear, pooled="last", steps=N_STEPS)
    params = replace(params, heads=replace(params.heads, linear=settings))
    images_path = Path(f"data/images/{dataset}.zarr")
    if split_seed is not None:
        images_path = resplit.write_resplit_images(dataset, params.dataset(dataset), split_seed)
    images, backbone = open_images(images_path), params.backbone(name)
    spec = get_spec(backbone)
    preprocessor = preprocessing.make_preprocessor(images, name, backbone, spec)
    network = create_backbone(backbone, spec, preprocessor.input_bands, Path(f"data/weights/{name}"))

    shutil.rmtree(scratch := FOLDER / "protocol", ignore_errors=True)
    start = time.perf_counter()
    encoder = Encoder(preprocessor, network, "cpu", strides=spec.strides)
    pyramid = estimate.dry_run(images, encoder, 4).pyramid
    schema = engine.make_schema(images, spec, pyramid, backbone.input_size, params.extract)
    provenance = {"images_sha256": images.attrs["content_sha256"]}
    writer = Writer(scratch / "scratch", schema, scratch / "store.zarr", provenance)
    batch = params.extract.batch or estimate.find_batch_size(images, encoder, params.extract.shard)
    engine.extract(images, encoder, writer, batch)
    writer.finish()
    data = task_data.load({scratch / "store.zarr": None}, images_path, params.heads, SPLITS, "cpu")
    result, our_scores = run_protocol(params, data)
    our_seconds = time.perf_counter() - start
    shutil.rmtree(scratch)

    epochs = -(-settings.steps * settings.batch // len(data.splits["train"].label))
    with tempfile.TemporaryDirectory() as folder:
        write_tiffs(images, Path(folder))

        def run(learning_rate: float, seed: int) -> TerratorchRun:
            weight_decay = result["best"]["weight_decay"]
            return terratorch_run(Path(folder), network, learning_rate, weight_decay, seed, epochs, settings.batch)

        trials = {float(rate): run(rate, 0) for rate in np.geomspace(*params.search.learning_rate, N_RATES)}
        best_rate = max(trials, key=lambda rate: trials[rate].val)
        seed_runs = [trials[best_rate], *(run(best_rate, seed) for seed in range(1, N_SEEDS))]
    timed_runs, n_runs = [*trials.values(), *seed_runs[1:]], params.search.trials + params.train.seeds
    return {
        "vs_terratorch": round(n_runs * statistics.mean(run.seconds for run in timed_runs) / our_seconds, 1),
        "our_seconds": round(our_seconds, 1),
        "terratorch_seconds_per_run": [round(run.seconds, 1) for run in timed_runs],
        "runs": n_runs, "epochs": epochs,
        "our_accuracy": _mean_std(our_scores),
        "terratorch_accuracy": _mean_std(np.array([run.test for run in seed_runs])),
        "terratorch_val_by_rate": {f"{rate:.2g}": round(trial.val, 4) for rate, trial in trials.items()},
    }  # fmt: skip


def _mean_std(accuracy: np.ndarray) -> list[float]:
    return [round(float(accuracy.mean()), 4), round(float(accuracy.std(ddof=1)), 4)]


PARTS = {part.__name__: part for part in (linear, upernet, terratorch)}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; by default all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of our heads and of plain torch")
    parser.add_argument("--split-seed", type=int, help="assigns the blocks of terratorch's dataset to the splits")
    arguments, params = parser.parse_args(), config.load()
    params = replace(params, compute=replace(params.compute, device=device.resolve_device(arguments.device)))
    results = {"cores": os.cpu_count(), "device": arguments.device}
    if arguments.split_seed is not None:
        results["split_seed"] = arguments.split_seed
    parts = arguments.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"There is no part {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    if arguments.device != "cpu" and "terratorch" in parts:
        parser.error("terratorch runs on the CPU only. Name the parts to run on a GPU: linear, upernet.")
    if arguments.split_seed is not None and parts != ["terratorch"]:
        parser.error("--split-seed is for terratorch: python -m benchmarks.protocol --split-seed 1 terratorch")
    for name in parts:
        results |= terratorch(params, arguments.split_seed) if name == "terratorch" else PARTS[name](params)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
