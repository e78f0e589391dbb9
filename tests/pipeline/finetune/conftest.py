"""Frozen models with their heads, made of small extractions of real data, ready to be fine-tuned."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from cache.read import Features
from cache.write import Writer
from pipeline.backbones import build, spec
from pipeline.encoding import inputs
from pipeline.encoding.encode import Encoder
from pipeline.extraction import extract
from pipeline.finetune.described import FineTune
from pipeline.finetune.pictures import Pictures
from pipeline.finetune.train import Job
from pipeline.finetune.tuned import Member, Tuned
from pipeline.imagery import images, imagestore
from pipeline.params import Backbone, Extract, FcnHead, Heads, LinearHead, UperNetHead
from pipeline.training import cells, fit, kept

HEADS = Heads(
    LinearHead("all", "mean", steps=60, batch=20),
    UperNetHead(channels=4, steps=4, batch=4),
    FcnHead(steps=30, batch=8),
    segmentation="fcn",
)
KEEPS = Extract("float32", "none", "float32", False, 16, 64, False, ("identity",))
FEW = FineTune(steps=4, batch=4, checks=2, seeds=1, learning_rates=(1e-3,))
BACKBONES = {
    "lite0": Backbone("efficientnet", "lite0", "random", 32),
    "prithvi": Backbone("prithvi", "prithvi_eo_v2_tiny_tl", "random", 32),
    "hiera": Backbone("hiera", "sam2.1_hiera_t", "random", 64),
    "raw": Backbone("raw", "mean_std", "none", 32),
}


@dataclasses.dataclass
class Frozen:
    """A model with its head, and the images it was trained on, thinned out."""

    opened: xr.Dataset
    members: list[Member]
    head: Path
    cell: cells.Cell
    group: torch.nn.Module
    stores: dict
    path: Path

    def tuned(self, seed: int = 0, device_precision: str = "float32", **changes) -> Tuned:
        described = dataclasses.replace(FEW, **changes)
        return Tuned(self.opened, self.members, self.head, described, seed, "cpu", device_precision)


@pytest.fixture
def job(tmp_path):
    """From a frozen model, and changes to `FEW`, to what is learnt from its images."""

    def make(one: Frozen, **changes) -> Job:
        described = dataclasses.replace(FEW, **changes)
        return Job(Pictures(one.opened, tmp_path / "images.npy"), one.cell.task, described)

    return make


@pytest.fixture(autouse=True)
def plain_torch():
    """Float32 in full, which importing terratorch changes for the whole process, and one thread: networks are small,
    and the tests beside these use the other core."""
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def thinned(prepared, tmp_path_factory):
    """From a dataset's name to a store of some of its images, of all splits."""
    made = {}

    def write(name: str, keep: int):
        if name not in made:
            folder, one = tmp_path_factory.mktemp("thin"), prepared(name)
            splits = np.asarray(one.split)
            rows = np.concatenate([np.flatnonzero(splits == split)[:keep] for split in ("train", "val", "test")])
            each = ("image", "label", "sample", "split", "lat", "lon", "time", "crs", "transform")
            picked = {key: np.asarray(getattr(one, key))[rows] for key in each if getattr(one, key) is not None}
            picked |= {key: picked[key].tolist() for key in ("sample", "split", "crs") if key in picked}
            imagestore.write(dataclasses.replace(one, **picked), folder / "scratch", folder / f"{name}.zarr")
            made[name] = folder / f"{name}.zarr"
        return made[name]

    return write


@pytest.fixture(scope="session")
def frozen(thinned, tmp_path_factory):
    """From a dataset's and a model's name to the model, extracted and its head trained by the program's own code."""
    made = {}

    def make(dataset: str, model: str, keep: int = 12) -> Frozen:
        if (dataset, model) in made:
            return made[dataset, model]
        folder = tmp_path_factory.mktemp("frozen")
        path = thinned(dataset, keep)
        opened, members, stores = images.open_images(path), [], {}
        for name in model.split("+"):
            backbone = BACKBONES[name]
            members.append(Member(name, backbone, folder))
            declared = spec(backbone)
            given = inputs.describe(opened, name, backbone, declared)
            encoder = Encoder(given, build(backbone, declared, given.seen, folder), "cpu", strides=declared.strides)
            pyramid = encoder(opened.image[:2].values, given.where_and_when(opened, slice(0, 2)))
            layout = extract.make_layout(opened, declared, pyramid, backbone.input_size, KEEPS)
            said = extract.provenance(opened, name, backbone, declared, given, {"weights": "random"}, KEEPS, "cpu")
            writer = Writer(folder / f"scratch-{name}", layout, folder / f"{name}.zarr", said)
            extract.extract(opened, encoder, writer, KEEPS.batch)
            writer.finish()
            stores[Features(folder / f"{name}.zarr").location] = None
        cell = cells.load(stores, path, HEADS, ("train", "val", "test"), "cpu")
        group = cell.train([fit.Setting(1e-2, 1e-2, 0)])
        kept.save(folder / "head.pt", model, cell, group, 0)
        made[dataset, model] = Frozen(opened, members, folder / "head.pt", cell, group, stores, path)
        return made[dataset, model]

    return make
