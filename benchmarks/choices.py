"""Choices that the code makes for speed on a CPU, each against its alternative, by turns, as medians.

    python -m benchmarks.choices

`lanes`: UPerNets trained a core a head, against each in turn on all cores.
`upernet_channels_last`, `csmask_channels_last`: against contiguous tensors, for a training step and a forward.
`weights_first`, `fused_adamw`: ten linear heads' products on rows of their own, and their optimiser's step, against
rows first and against the same arithmetic in separate passes; on one core.
`dense_pull`: a UPerNet's training step on masks of 256 px, gradients by its logits told directly, against autograd
through torch's resize and cross-entropy; `classes_by_max`: their classes, by `max` against `argmax`; on one core.
`lite0_large_pages`: a forward with torch's memory in large pages, against small ones.
`lite0_small_batches`, `csmask_small_batches`: extraction in the batches that the engine finds, against 32 and 16.
`many_readers`: 2048 images of 13 bands brought, 256 at a time, into the memory that a GPU copies from: four threads,
file by file, against reading, picking bands and copying by one; `moments_by_image`: their bands' mean and deviation,
one image at a time by a thread a core, against 256 at a time by one. Both need `data/images`.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional

from benchmarks.extraction import CPU, Case, repeated
from benchmarks.timing import ratio, seconds
from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones import preprocessing as inputs
from pipeline.config import BackboneConfig
from pipeline.extraction import loader
from pipeline.heads.dense import HeadList
from pipeline.heads.upernet import UPerNet
from pipeline.training import loop
from pipeline.training.losses import loss, loss_grad

WIDTHS, SIDES = (56, 96, 272, 768), (32, 16, 8, 4)
ROUNDS = 5


def levels(layout) -> list[torch.Tensor]:
    shapes = zip(WIDTHS, SIDES, strict=True)
    return [torch.randn(16, width, side, side).contiguous(memory_format=layout) for width, side in shapes]


def lanes() -> float:
    inputs, label = levels(torch.channels_last), torch.randint(7, (16, 128, 128))
    settings = [loop.HParams(1e-3, 1e-4, seed) for seed in range(4)]
    task = loop.Task("segmentation", 7)

    def train(group):
        def make(seeds):
            return HeadList(lambda: UPerNet(WIDTHS, 16, 7), (128, 128), seeds)

        for part in group:
            loop.fit(make, loop.Data(inputs, label), task, part, loop.TrainSchedule(steps=30, batch=4))

    return ratio(lambda: train([settings]), lambda: train([[one] for one in settings]), ROUNDS)


def upernet_channels_last() -> float:
    def step(layout):
        head, inputs = UPerNet(WIDTHS, 16, 7).to(memory_format=layout), levels(layout)
        label = torch.randint(7, (16, 32, 32))

        def work():
            for _ in range(5):
                functional.cross_entropy(head(inputs), label).backward()

        return work

    return ratio(step(torch.channels_last), step(torch.contiguous_format), ROUNDS)


def csmask_channels_last() -> float:
    def forward(layout):
        described = BackboneConfig("efficientnet", "csmask_b4", "random", 128)
        network = create_backbone(described, get_spec(described), None, Path()).to(memory_format=layout)
        image = torch.randn(32, 6, 128, 128).contiguous(memory_format=layout)

        def work():
            with torch.inference_mode():
                network(image)

        return work

    return ratio(forward(torch.channels_last), forward(torch.contiguous_format), ROUNDS)


def weights_first() -> float:
    """A forward and the weights' gradient, 32 rows a head."""
    rows, weights = torch.randn(10, 32, 1192), torch.randn(10, 7, 1192, requires_grad=True)

    def product(first: bool):
        def work():
            for _ in range(200):
                other = rows.transpose(1, 2)
                out = torch.bmm(weights, other) if first else torch.bmm(rows, weights.transpose(1, 2))
                torch.autograd.grad(out.sum(), weights)

        return work

    return _on_one_core(product(True), product(False))


def fused_adamw() -> float:
    """On weights of ten heads of one setting."""
    values, gradient = torch.randn(10, 7, 1192), torch.randn(10, 7, 1192)

    def steps(fused: bool):
        value = values.clone().requires_grad_()
        value.grad = gradient
        optimiser = torch.optim.AdamW([value], fused=fused, foreach=False)

        def work():
            for _ in range(200):
                optimiser.step()

        return work

    return _on_one_core(steps(True), steps(False))


def dense_pull() -> float:
    inputs, task = [level[:4] for level in levels(torch.channels_last)], loop.Task("segmentation", 2, ignore_value=255)
    label = torch.randint(2, (1, 4, 256, 256), dtype=torch.uint8)
    group = HeadList(lambda: UPerNet(WIDTHS, 16, 2), (256, 256), (0,))

    def pulled():
        for _ in range(5):
            group.backward(inputs, None, lambda logits, heads: loss_grad(logits, label[heads], task))

    def pushed():
        for _ in range(5):
            logits = functional.interpolate(group.heads[0](inputs), size=(256, 256), mode="bilinear")
            loss(logits[None], label, task).sum().backward()

    return _on_one_core(pulled, pushed)


def classes_by_max() -> float:
    logits = torch.randn(1, 4, 2, 256, 256)
    return _on_one_core(lambda: logits.max(dim=2).indices, lambda: logits.argmax(dim=2))


def lite0_small_batches() -> float:
    return _small_batches("lite0", 32)


def csmask_small_batches() -> float:
    return _small_batches("csmask_b4", 16)


def _small_batches(backbone: str, large: int) -> float:
    dataset, count, *_ = CPU[backbone]
    ours, theirs = (Case(backbone, dataset, count, batch, "cpu", "float32") for batch in (0, large))
    return ratio(ours.engine, theirs.engine, ROUNDS)


def many_readers() -> float:
    opened, given = thirteen_bands()
    encoder, batches = SimpleNamespace(device="cpu", inputs=given), range(0, len(opened.sample), 256)

    def by_one():
        for start in batches:
            selected = given.select_bands(opened.image[start : start + 256].values)
            torch.from_numpy(selected).clone()

    with ThreadPoolExecutor(4) as readers:
        made = loader.ImageLoader(opened, encoder, (), readers)
        return ratio(lambda: [made._by_many(slice(start, start + 256)) for start in batches], by_one, ROUNDS)


def moments_by_image() -> float:
    opened, given = thirteen_bands()
    rows = np.flatnonzero(opened.split.values == "train")

    def all_at_once():
        total = squares = 0
        for start in range(0, len(rows), 256):
            values = given.select_bands(opened.image[rows[start : start + 256]].values) / np.float64(given.scale)
            total, squares = total + values.sum(axis=(0, 2, 3)), squares + np.square(values).sum(axis=(0, 2, 3))

    return ratio(lambda: inputs._moments(opened, given), all_at_once, ROUNDS)


def thirteen_bands():
    """2048 images and what DOFA is given of them."""
    opened = repeated("sample-landuse-seg", 2048)
    described = BackboneConfig("dofa", "dofa_large_patch16_224", "random", 224, normalisation="dataset")
    return opened, inputs.make_preprocessor(opened, "dofa", described, get_spec(described))


def _on_one_core(ours, theirs) -> float:
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return ratio(ours, theirs, ROUNDS)
    finally:
        torch.set_num_threads(cores)


def lite0_large_pages() -> float:
    def forward(large: str) -> float:
        command = [sys.executable, "-c", "from benchmarks.choices import lite0; lite0()"]
        extra = {"THP_MEM_ALLOC_ENABLE": large}
        return float(subprocess.run(command, env=os.environ | extra, check=True, capture_output=True).stdout)

    return statistics.median(forward("0") / forward("1") for _ in range(ROUNDS))


def lite0() -> None:
    """Print the seconds of a forward: torch decides once a process where its memory comes from."""
    described = BackboneConfig("efficientnet", "lite0", "random", 224)
    network = create_backbone(described, get_spec(described), None, Path()).to(memory_format=torch.channels_last)
    image = torch.randn(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        network(image)
        print(statistics.median(seconds(lambda: network(image)) for _ in range(7)))


if __name__ == "__main__":
    measured = [
        lanes, upernet_channels_last, csmask_channels_last, weights_first, fused_adamw, dense_pull, classes_by_max,
        lite0_large_pages, lite0_small_batches, csmask_small_batches, many_readers, moments_by_image,
    ]  # fmt: skip
    print(json.dumps({work.__name__: round(work(), 2) for work in measured} | {"cores": torch.get_num_threads()}))
