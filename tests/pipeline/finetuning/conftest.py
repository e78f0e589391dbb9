"""Frozen models with their heads, made of small extractions of real data, ready to be fine-tuned."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from cache.reader import FeatureStore
from cache.writer import Writer
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.config import (
    BackboneConfig,
    ExtractConfig,
    FcnHeadConfig,
    FineTuneConfig,
    HeadsConfig,
    LinearHeadConfig,
    UPerNetHeadConfig,
)
from pipeline.data import image_store, image_writer
from pipeline.data.augmentation import AugmentedImages
from pipeline.extraction import engine
from pipeline.finetuning.model import EnsembleMember, FineTunedEnsemble
from pipeline.finetuning.train import FineTuneJob
from pipeline.heads import checkpoint
from pipeline.training import loop, task_data

HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=60, batch=20),
    UPerNetHeadConfig(channels=4, steps=4, batch=4),
    FcnHeadConfig(steps=30, batch=8),
    segmentation="fcn",
)
KEEPS = ExtractConfig("float32", "none", "float32", False, 16, 64, False, ("identity",))
FEW = FineTuneConfig(steps=4, batch=4, val_checks=2, seeds=1, learning_rates=(1e-3,))
BACKBONES = {
    "lite0": BackboneConfig("efficientnet", "lite0", "random", 32),
    "prithvi": BackboneConfig("prithvi", "prithvi_eo_v2_tiny_tl", "random", 32),
    "hiera": BackboneConfig("hiera", "sam2.1_hiera_t", "random", 64),
    "raw": BackboneConfig("raw", "mean_std", "none", 32),
}


@dataclasses.dataclass
class Frozen:
    """A model with its head, and the images it was trained on, thinned out."""

    opened: xr.Dataset
    members: list[EnsembleMember]
    head: Path
    cell: task_data.TaskData
    group: torch.nn.Module
    stores: dict
    path: Path

    def tuned(self, seed: int = 0, device_precision: str = "float32", **changes) -> FineTunedEnsemble:
        described = dataclasses.replace(FEW, **changes)
        return FineTunedEnsemble(self.opened, self.members, self.head, described, seed, "cpu", device_precision)


@pytest.fixture
def job(tmp_path):
    """From a frozen model, and changes to `FEW`, to what is learnt from its images."""

    def make(one: Frozen, **changes) -> FineTuneJob:
        described = dataclasses.replace(FEW, **changes)
        return FineTuneJob(AugmentedImages.copy_to_file(one.opened, tmp_path / "images.npy"), one.cell.task, described)

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
def thinned(image_dataset, tmp_path_factory):
    """From a dataset's name to a store of some of its images, of all splits."""
    made = {}

    def write(name: str, keep: int):
        if name not in made:
            folder, one = tmp_path_factory.mktemp("thin"), image_dataset(name)
            splits = np.asarray(one.split)
            rows = np.concatenate([np.flatnonzero(splits == split)[:keep] for split in ("train", "val", "test")])
            each = ("image", "label", "sample", "split", "lat", "lon", "time", "crs", "transform")
            picked = {key: np.asarray(getattr(one, key))[rows] for key in each if getattr(one, key) is not None}
            picked |= {key: picked[key].tolist() for key in ("sample", "split", "crs") if key in picked}
            image_writer.write(dataclasses.replace(one, **picked), folder / "scratch", folder / f"{name}.zarr")
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
        opened, members, stores = image_store.open_images(path), [], {}
        for name in model.split("+"):
            backbone = BACKBONES[name]
            members.append(EnsembleMember(name, backbone, folder))
            declared = get_spec(backbone)
            given = preprocessing.make_preprocessor(opened, name, backbone, declared)
            encoder = Encoder(
                given, create_backbone(backbone, declared, given.input_bands, folder), "cpu", strides=declared.strides
            )
            pyramid = encoder(opened.image[:2].values, given.metadata(opened, slice(0, 2)))
            layout = engine.make_layout(opened, declared, pyramid, backbone.input_size, KEEPS)
            said = engine.provenance(opened, name, backbone, declared, given, {"weights": "random"}, KEEPS, "cpu")
            writer = Writer(folder / f"scratch-{name}", layout, folder / f"{name}.zarr", said)
            engine.extract(opened, encoder, writer, KEEPS.batch)
            writer.finish()
            stores[FeatureStore(folder / f"{name}.zarr").location] = None
        cell = task_data.load(stores, path, HEADS, ("train", "val", "test"), "cpu")
        group = cell.train([loop.HParams(1e-2, 1e-2, 0)])
        checkpoint.save(folder / "head.pt", model, cell, group, 0)
        made[dataset, model] = Frozen(opened, members, folder / "head.pt", cell, group, stores, path)
        return made[dataset, model]

    return make
