"""Choices for speed on a CPU, each compared with its alternative in alternating rounds.

    python -m benchmarks.choices

A ratio is how many times faster the choice is, a median.

- `independent_heads`: UPerNets trained in parallel on a core each; sequentially on all cores.
- `upernet_channels_last`, `csmask_channels_last`: tensors in channels last, for a training step and a forward pass;
  contiguous tensors.
- `weights_first`, `fused_adamw`: ten linear heads' products, each on separate rows, with the weights as the first
  factor, and their optimizer's fused step; rows first, and the same arithmetic in separate passes. On one core.
- `dense_manual_gradients`: a UPerNet's training step on masks of 256 px with the gradients of the logits computed
  directly; autograd through torch's resize and cross-entropy. On one core.
- `classes_by_max`: the classes of these masks by `max`; `argmax`. On one core.
- `lite0_large_pages`: a forward pass with torch's memory in large pages; small pages.
- `lite0_small_batches`, `csmask_small_batches`: extraction in the batches that the engine finds; batches of 32 and
  16.
- `parallel_readers`: 2048 images of 13 bands read, 256 at a time, to the memory that a GPU copies from, by four
  threads, file by file; read, bands selected and copied by one thread. Needs `data/images`.
- `stats_by_image`: mean and standard deviation of their bands, one image at a time, by a thread per core; 256 images
  at a time by one thread. Needs `data/images`.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import xarray as xr
from torch.nn import functional

from benchmarks.extraction import CPU_CASES, ExtractionCase, repeat_images
from benchmarks.timing import ratio, seconds
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.preprocessing import Preprocessor
from pipeline.config import BackboneConfig
from pipeline.extraction import loader
from pipeline.heads.dense import HeadList
from pipeline.heads.upernet import UPerNet
from pipeline.tasks import Segmentation
from pipeline.training import loop
from pipeline.training.feature_loader import SplitData
from pipeline.training.loop import HParams, TrainSchedule

CHANNELS, SIDES = (56, 96, 272, 768), (32, 16, 8, 4)
ROUNDS = 5


def random_levels(memory_format: torch.memory_format) -> list[torch.Tensor]:
    """Return levels of 16 images."""
    shapes = zip(CHANNELS, SIDES, strict=True)
    return [
        torch.randn(16, channels, side, side).contiguous(memory_format=memory_format) for channels, side in shapes
    ]


def independent_heads() -> float:
    inputs, label = random_levels(torch.channels_last), torch.randint(7, (16, 128, 128))
    hparams = [HParams(1e-3, 1e-4, seed) for seed in range(4)]
    task = Segmentation(7)

    def make_group(seeds):
        return HeadList(lambda: UPerNet(CHANNELS, 7, 16), (128, 128), seeds)

    def train(groups):
        for group in groups:
            loop.fit(make_group, SplitData(inputs, label), task, group, TrainSchedule(steps=30, batch=4))

    return ratio(lambda: train([hparams]), lambda: train([[head] for head in hparams]), ROUNDS)


def upernet_channels_last() -> float:
    def make_step(memory_format):
        head, inputs = UPerNet(CHANNELS, 7, 16).to(memory_format=memory_format), random_levels(memory_format)
        label = torch.randint(7, (16, 32, 32))

        def step():
            for _ in range(5):
                functional.cross_entropy(head(inputs), label).backward()

        return step

    return ratio(make_step(torch.channels_last), make_step(torch.contiguous_format), ROUNDS)


def csmask_channels_last() -> float:
    def make_forward(memory_format):
        network = _random_network(BackboneConfig("efficientnet", "csmask_b4", "random", 128), memory_format)
        image = torch.randn(32, 6, 128, 128).contiguous(memory_format=memory_format)

        def forward():
            with torch.inference_mode():
                network(image)

        return forward

    return ratio(make_forward(torch.channels_last), make_forward(torch.contiguous_format), ROUNDS)


def weights_first() -> float:
    """A forward pass and the gradient of the weights, 32 rows per head."""
    rows, weights = torch.randn(10, 32, 1192), torch.randn(10, 7, 1192, requires_grad=True)

    def make_products(has_weights_first: bool):
        def compute():
            for _ in range(200):
                if has_weights_first:
                    logits = torch.bmm(weights, rows.transpose(1, 2))
                else:
                    logits = torch.bmm(rows, weights.transpose(1, 2))
                torch.autograd.grad(logits.sum(), weights)

        return compute

    return _ratio_on_one_core(make_products(True), make_products(False))


def fused_adamw() -> float:
    """For the weights of ten heads with the same hyperparameters."""
    values, gradient = torch.randn(10, 7, 1192), torch.randn(10, 7, 1192)

    def make_steps(is_fused: bool):
        weights = values.clone().requires_grad_()
        weights.grad = gradient
        optimizer = torch.optim.AdamW([weights], fused=is_fused, foreach=False)

        def step():
            for _ in range(200):
                optimizer.step()

        return step

    return _ratio_on_one_core(make_steps(True), make_steps(False))


def dense_manual_gradients() -> float:
    inputs, task = [level[:4] for level in random_levels(torch.channels_last)], Segmentation(2)
    label = torch.randint(2, (1, 4, 256, 256), dtype=torch.uint8)
    group = HeadList(lambda: UPerNet(CHANNELS, 2, 16), (256, 256), (0,))

    def direct():
        for _ in range(5):
            group.backward(inputs, None, lambda logits, heads: task.loss_grad(logits, label[heads]))

    def autograd():
        for _ in range(5):
            logits = functional.interpolate(group.heads[0](inputs), size=(256, 256), mode="bilinear")
            task.loss(logits[None], label).sum().backward()

    return _ratio_on_one_core(direct, autograd)


def classes_by_max() -> float:
    logits = torch.randn(1, 4, 2, 256, 256)
    return _ratio_on_one_core(lambda: logits.max(dim=2).indices, lambda: logits.argmax(dim=2))


def lite0_small_batches() -> float:
    return _small_batches("lite0", 32)


def csmask_small_batches() -> float:
    return _small_batches("csmask_b4", 16)


def _small_batches(backbone: str, large_batch: int) -> float:
    dataset, count, *_ = CPU_CASES[backbone]
    small, large = (ExtractionCase(backbone, dataset, count, batch, "cpu", "float32") for batch in (0, large_batch))
    return ratio(small.extract_levels, large.extract_levels, ROUNDS)


def parallel_readers() -> float:
    images, preprocessor = _thirteen_bands()
    encoder = SimpleNamespace(device="cpu", preprocessor=preprocessor)
    batches = [slice(start, start + 256) for start in range(0, len(images.sample), 256)]

    def read_with_one_thread():
        for batch in batches:
            selected = preprocessor.select_bands(images.image[batch].values)
            torch.from_numpy(selected).clone()

    with ThreadPoolExecutor(4) as readers:
        image_loader = loader.ImageLoader(images, encoder, (), readers)
        return ratio(lambda: [image_loader(batch) for batch in batches], read_with_one_thread, ROUNDS)


def stats_by_image() -> float:
    images, preprocessor = _thirteen_bands()
    rows = np.flatnonzero(images.split.values == "train")

    def compute_by_batch():
        total = squares = 0
        for start in range(0, len(rows), 256):
            selected = preprocessor.select_bands(images.image[rows[start : start + 256]].values)
            values = selected / np.float64(preprocessor.scale)
            total, squares = total + values.sum(axis=(0, 2, 3)), squares + np.square(values).sum(axis=(0, 2, 3))

    return ratio(lambda: preprocessing._training_stats(images, preprocessor), compute_by_batch, ROUNDS)


def _thirteen_bands() -> tuple[xr.Dataset, Preprocessor]:
    """2048 images, and their preprocessing for DOFA."""
    images = repeat_images("sample-landuse-seg", 2048)
    backbone = BackboneConfig("dofa", "dofa_large_patch16_224", "random", 224, normalisation="dataset")
    return images, preprocessing.make_preprocessor(images, "dofa", backbone, get_spec(backbone))


def lite0_large_pages() -> float:
    def forward_seconds(large_pages: str) -> float:
        command = [sys.executable, "-c", "from benchmarks.choices import print_lite0_seconds; print_lite0_seconds()"]
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": large_pages}
        return float(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    return statistics.median(forward_seconds("0") / forward_seconds("1") for _ in range(ROUNDS))


def print_lite0_seconds() -> None:
    """Print the seconds of a forward pass, in a separate process: torch reads the setting of pages once."""
    network = _random_network(BackboneConfig("efficientnet", "lite0", "random", 224), torch.channels_last)
    image = torch.randn(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        network(image)
        print(statistics.median(seconds(lambda: network(image)) for _ in range(7)))


def _random_network(backbone: BackboneConfig, memory_format: torch.memory_format) -> torch.nn.Module:
    return create_backbone(backbone, get_spec(backbone), None, Path()).to(memory_format=memory_format)


def _ratio_on_one_core(tested: Callable[[], object], reference: Callable[[], object]) -> float:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return ratio(tested, reference, ROUNDS)
    finally:
        torch.set_num_threads(n_threads)


if __name__ == "__main__":
    CHOICES = [
        independent_heads, upernet_channels_last, csmask_channels_last, weights_first, fused_adamw,
        dense_manual_gradients, classes_by_max, lite0_large_pages, lite0_small_batches, csmask_small_batches,
        parallel_readers, stats_by_image,
    ]  # fmt: skip
    results = {choice.__name__: round(choice(), 2) for choice in CHOICES}
    print(json.dumps(results | {"cores": torch.get_num_threads()}))
