"""The paper's protocol (16 trials, 10 seeds), compared with one run of one head and with terratorch.

    python -m benchmarks.heads [linear] [upernet] [terratorch]     # by default all
    python -m benchmarks.heads --device cuda linear upernet        # heads on a GPU

Needs the stores of `make run`, and params.yaml. No time includes imports.

- `linear_vs_single`, `upernet_vs_single`: seconds of the search and the seeds divided by those of one head, both from
  the stores on disk to test scores, medians of rounds. `linear` covers all classification cells of the grid, and its
  single head is plain torch (nn.Linear, autograd, fused AdamW) on one core or all, whichever is faster; that of
  `upernet` is our code, on one core. `…_training_vs_single` is the same without reading the stores.
- `vs_terratorch`: seconds of 26 runs of terratorch divided by ours: one extraction, the search and the seeds, on
  `lite0` and `sample-trees`. terratorch has its usual configuration: frozen backbone in the training loop, its own
  data module (GeoTIFFs in folders of classes), task and trainer. Three of its runs are timed. Both train for 200
  steps, terratorch in whole epochs: fewer than in params.yaml, which favours terratorch, since our extraction takes
  as long for any number of steps.
"""

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import rasterio
import torch
import xarray as xr
from torch.nn import functional

from benchmarks.features import FOLDER
from benchmarks.timing import save_results, seconds
from pipeline import config, device
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.data.image_store import SPLITS, open_images
from pipeline.extraction import launch
from pipeline.tasks import TaskType
from pipeline.training import loop, task_data
from pipeline.training.loop import HParams
from pipeline.training.optim import warm_cosine
from pipeline.training.protocol import score_split, search, train_heads
from pipeline.training.task_data import TaskData

ROUNDS = 3
UPERNET_CELL = ("sample-landuse-seg", "lite0+lite2")
TERRATORCH_CELL = ("sample-trees", "lite0")
# terratorch is slow, so it has few runs, and both sides few steps.
N_TERRATORCH_RUNS, N_STEPS = 3, 200
SINGLE = HParams(1e-2, 1e-2, 0)


def store_paths(dataset: str, model: str) -> list[Path]:
    return [Path(f"data/features/{dataset}/{name}.zarr") for name in model.split("+")]


def load(params: config.Params, dataset: str, model: str) -> TaskData:
    """Load all splits of a dataset for a model."""
    stores, images_path = dict.fromkeys(store_paths(dataset, model)), Path(f"data/images/{dataset}.zarr")
    return task_data.load(stores, images_path, params.heads, SPLITS, params.compute.device)


def run_protocol(params: config.Params, data: TaskData) -> tuple[dict, np.ndarray]:
    """Return the best hyperparameters, and the test scores of the seeds."""
    best = search(lambda hparams: score_split(data, train_heads(data, hparams), "val"), params.search)["best"]
    hparams = [HParams(**best, seed=seed) for seed in range(params.train.seeds)]
    return best, score_split(data, train_heads(data, hparams), "test")


def plain_torch_seconds(data: TaskData, threads: int) -> float:
    """Return the seconds of one linear head in plain torch, from features in memory to its test score."""
    train, test, n_threads = data.splits["train"], data.splits["test"], torch.get_num_threads()
    torch.set_num_threads(threads)
    start = time.perf_counter()
    head = torch.nn.Linear(train.inputs.shape[1], data.task.n_classes).to(train.inputs.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(data.schedule.steps))
    for index in loop.batch_order(len(train.label), data.schedule, 0).to(train.inputs.device):
        optimizer.zero_grad()
        functional.cross_entropy(head(train.inputs[index]), train.label[index]).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        (head(test.inputs).argmax(1) == test.label).float().mean().item()
    elapsed = time.perf_counter() - start
    torch.set_num_threads(n_threads)
    return elapsed


def measure(params: config.Params, cells: list[tuple[str, str]], single: Callable[[TaskData], float]) -> dict:
    """Return the seconds of reading, protocol and single run of all cells together, medians of rounds."""
    rounds = []
    for _ in range(1 + ROUNDS):
        times = dict.fromkeys(("reading", "protocol", "single"), 0.0)
        for cell in cells:
            start = time.perf_counter()
            data = load(params, *cell)
            times["reading"] += time.perf_counter() - start
            times["single"] += single(data)
            times["protocol"] += seconds(partial(run_protocol, params, data))
        rounds.append(times)
    return {part: statistics.median(times[part] for times in rounds[1:]) for part in rounds[0]}


def ratios(name: str, times: dict[str, float]) -> dict:
    """Return the protocol's seconds relative to a single run's, with and without reading."""
    reading, protocol, single = times["reading"], times["protocol"], times["single"]
    return {
        f"{name}_vs_single": round((reading + protocol) / (reading + single), 2),
        f"{name}_training_vs_single": round(protocol / single, 2),
        f"{name}_seconds": {part: round(value, 2) for part, value in times.items()},
    }


def linear(params: config.Params) -> dict:
    """Measure the protocol of linear heads over the grid's classification cells that were not skipped."""
    datasets = [name for name in params.grid.datasets if params.dataset(name).task == TaskType.CLASSIFICATION]
    cells = [cell for cell in product(datasets, params.grid.models) if all(map(Path.exists, store_paths(*cell)))]
    threads = {1} if params.compute.device == "cuda" else {1, torch.get_num_threads()}
    times = measure(params, cells, lambda data: min(plain_torch_seconds(data, count) for count in threads))
    return ratios("linear", times) | {"linear_cells": len(cells)}


def upernet(params: config.Params) -> dict:
    """Measure the protocol of UPerNet on one cell."""

    def single(data: TaskData) -> float:
        return seconds(lambda: score_split(data, train_heads(data, [SINGLE]), "test"))

    return ratios("upernet", measure(params, [UPERNET_CELL], single))


def terratorch(params: config.Params) -> dict:
    """Measure our protocol from images to test scores, and terratorch's runs."""
    dataset, name = TERRATORCH_CELL
    settings = replace(params.heads.linear, pooled="last", steps=N_STEPS)
    params = replace(params, heads=replace(params.heads, linear=settings))
    images_path, weights_dir = Path(f"data/images/{dataset}.zarr"), Path(f"data/weights/{name}")
    images, backbone = open_images(images_path), params.backbone(name)
    spec = get_spec(backbone)
    preprocessor = preprocessing.make_preprocessor(images, name, backbone, spec)
    network = create_backbone(backbone, spec, preprocessor.input_bands, weights_dir)

    scratch = FOLDER / "heads"
    job = launch.ExtractionJob(
        name, backbone, params.extract, "cpu", images_path, weights_dir, scratch / "scratch", scratch / "store.zarr"
    )
    start = time.perf_counter()
    launch.launch(job, params.compute)
    data = task_data.load({job.final: None}, images_path, params.heads, SPLITS, "cpu")
    best, scores = run_protocol(params, data)
    our_seconds = time.perf_counter() - start
    shutil.rmtree(scratch)

    epochs = -(-settings.steps * settings.batch // len(data.splits["train"].label))
    low, high = params.search.learning_rate
    rates = np.geomspace(low, high, N_TERRATORCH_RUNS).tolist()
    with tempfile.TemporaryDirectory() as folder:
        write_tiffs(images, Path(folder))
        decay = best["weight_decay"]
        runs = [terratorch_run(Path(folder), network, rate, decay, epochs, settings.batch) for rate in rates]
    n_runs = params.search.trials + params.train.seeds
    return {
        "vs_terratorch": round(n_runs * statistics.mean(run["seconds"] for run in runs) / our_seconds, 1),
        "our_seconds": round(our_seconds, 1),
        "our_accuracy": [round(float(value), 4) for value in (scores.mean(), scores.std(ddof=1))],
        "terratorch_runs": [{"learning_rate": rate, **run} for rate, run in zip(rates, runs, strict=True)],
        "runs": n_runs,
        "epochs": epochs,
    }


def write_tiffs(images: xr.Dataset, folder: Path) -> None:
    """Write the chips of an images store as GeoTIFFs in folders of splits and classes."""
    for index, (name, split) in enumerate(zip(images.sample.values, images.split.values, strict=True)):
        chip = images.image[index].values
        path = folder / str(split) / f"{int(images.label[index])}" / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        bands, height, width = chip.shape
        with rasterio.open(path, "w", "GTiff", width, height, bands, dtype=chip.dtype) as file:
            file.write(chip)


class FrozenBackbone(torch.nn.Module):
    """A backbone of terratorch, always in evaluation mode, else its BatchNorm would be updated."""

    out_channels: ClassVar = [24, 40, 112, 320]  # of lite0

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return list(self.network(image).levels)

    def train(self, mode: bool = True) -> "FrozenBackbone":
        return super().train(False)


def terratorch_run(
    folder: Path, network: torch.nn.Module, learning_rate: float, weight_decay: float, epochs: int, batch: int
) -> dict[str, float]:
    """Train a linear head on the frozen network with terratorch; return its seconds and accuracies."""
    # terratorch and its dependencies take 10 s to import, and only this benchmark needs them.
    import albumentations
    import lightning
    from albumentations.pytorch import ToTensorV2
    from terratorch.datamodules import GenericNonGeoClassificationDataModule
    from terratorch.tasks import ClassificationTask

    transform = [albumentations.Resize(128, 128), ToTensorV2()]
    # As our preprocessing: scaled to [0, 1], then the network's mean and standard deviation.
    data = GenericNonGeoClassificationDataModule(
        batch, 0, *[folder / split for split in SPLITS], means=[0.498 * 255] * 3, stds=[0.502 * 255] * 3,
        num_classes=2, train_transform=transform, val_transform=transform, test_transform=transform, drop_last=False,
    )  # fmt: skip
    lightning.seed_everything(0, verbose=False)
    task = ClassificationTask(
        {"backbone": FrozenBackbone(network), "decoder": "IdentityDecoder", "num_classes": 2},
        "EncoderDecoderFactory",
        lr=learning_rate, optimizer="AdamW", optimizer_hparams={"weight_decay": weight_decay},
        scheduler="CosineAnnealingLR", scheduler_hparams={"T_max": epochs}, freeze_backbone=True,
    )  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(task, datamodule=data)
    val = trainer.callback_metrics["val/Accuracy_Micro"].item()
    result = trainer.test(task, datamodule=data, verbose=False)[0]
    return {"seconds": time.perf_counter() - start, "val": val, "test": result["test/Accuracy_Micro"]}


PARTS = {part.__name__: part for part in (linear, upernet, terratorch)}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; by default all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of our heads and of plain torch")
    arguments, params = parser.parse_args(), config.load()
    params = replace(params, compute=replace(params.compute, device=device.resolve_device(arguments.device)))
    parts = arguments.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"There is no part {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    if arguments.device != "cpu" and "terratorch" in parts:
        parser.error("terratorch runs on the CPU only. Name the parts to run on a GPU: linear, upernet.")
    results = {"device": arguments.device}
    for name in parts:
        results |= PARTS[name](params)
    save_results("heads" if arguments.device == "cpu" else "heads_gpu", results)


if __name__ == "__main__":
    main()
