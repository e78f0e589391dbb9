"""Frozen models with trained heads, from small extractions of real data, ready to be fine-tuned."""

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
from pipeline.training import task_data
from pipeline.training.loop import HParams
from pipeline.training.protocol import train_heads, trained_head

HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=60, batch=20),
    UPerNetHeadConfig(channels=4, steps=4, batch=4),
    FcnHeadConfig(steps=30, batch=8),
    segmentation="fcn",
)
EXTRACT = ExtractConfig("float32", "none", "float32", False, 16, 64, False, ("identity",))
CONFIG = FineTuneConfig(steps=4, batch=4, val_checks=2, seeds=1, learning_rates=(1e-3,))
BACKBONES = {
    "lite0": BackboneConfig("efficientnet", "lite0", "random", 32),
    "prithvi": BackboneConfig("prithvi", "prithvi_eo_v2_tiny_tl", "random", 32),
    "hiera": BackboneConfig("hiera", "sam2.1_hiera_t", "random", 64),
    "raw": BackboneConfig("band_statistics", "mean_std", "none", 32),
}
# Fields of an images store with one entry per sample.
SAMPLE_FIELDS = ("image", "label", "sample", "split", "lat", "lon", "time", "crs", "transform")


@dataclasses.dataclass
class FrozenModel:
    """Frozen backbones, their trained head, and a subset of the images that it was trained on.

    Attributes:
        images: the images store, opened; `images_path` is its folder.
        members: the backbones.
        head_path: file of the trained head; `head_group` are the heads in memory.
        data: features and labels of the splits.
        stores: feature stores, for `task_data.load`.
    """

    images: xr.Dataset
    images_path: Path
    members: list[EnsembleMember]
    head_path: Path
    head_group: torch.nn.Module
    data: task_data.TaskData
    stores: dict

    def trainable(self, seed: int = 0, precision: str = "float32", **changes) -> FineTunedEnsemble:
        """Make it trainable; `changes` are of `CONFIG`."""
        config = dataclasses.replace(CONFIG, **changes)
        return FineTunedEnsemble(self.images, self.members, self.head_path, config, seed, "cpu", precision)


@pytest.fixture
def make_job(tmp_path):
    """Function from a frozen model, and changes to `CONFIG`, to a fine-tuning job on its images."""

    def make(model: FrozenModel, **changes) -> FineTuneJob:
        images = AugmentedImages.copy_to_file(model.images, tmp_path / "images.npy")
        return FineTuneJob(images, model.data.task, dataclasses.replace(CONFIG, **changes))

    return make


@pytest.fixture(autouse=True)
def _single_thread():
    """One torch thread: the networks are small, and other tests run in parallel."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def small_images_path(image_dataset, tmp_path_factory):
    """Function from a dataset's name to an images store with the first samples of each split."""
    paths = {}

    def write(name: str, n_per_split: int) -> Path:
        if name not in paths:
            folder, dataset = tmp_path_factory.mktemp("small"), image_dataset(name)
            split = np.asarray(dataset.split)
            rows = np.concatenate([np.flatnonzero(split == part)[:n_per_split] for part in ("train", "val", "test")])
            subset = {
                field: np.asarray(getattr(dataset, field))[rows]
                for field in SAMPLE_FIELDS
                if getattr(dataset, field) is not None
            }
            subset |= {field: subset[field].tolist() for field in ("sample", "split", "crs") if field in subset}
            path = folder / f"{name}.zarr"
            image_writer.write(dataclasses.replace(dataset, **subset), folder / "scratch", path)
            paths[name] = path
        return paths[name]

    return write


@pytest.fixture(scope="session")
def frozen_model(small_images_path, tmp_path_factory):
    """Function from a dataset's and a model's name to a `FrozenModel`, made by the program's own code."""
    models = {}

    def make(dataset: str, model: str, n_per_split: int = 12) -> FrozenModel:
        if (dataset, model) in models:
            return models[dataset, model]
        folder, images_path = tmp_path_factory.mktemp("frozen"), small_images_path(dataset, n_per_split)
        images = image_store.open_images(images_path)
        members = [EnsembleMember(name, BACKBONES[name], folder) for name in model.split("+")]
        stores = {extract_features(images, member, folder): None for member in members}
        data = task_data.load(stores, images_path, HEADS, ("train", "val", "test"), "cpu")
        group = train_heads(data, [HParams(1e-2, 1e-2, 0)])
        checkpoint.save(folder / "head.pt", trained_head(data, model, group, 0))
        models[dataset, model] = FrozenModel(images, images_path, members, folder / "head.pt", group, data, stores)
        return models[dataset, model]

    return make


def extract_features(images: xr.Dataset, member: EnsembleMember, folder: Path) -> Path:
    """Write a member's feature store and return its path."""
    name, backbone, spec = member.name, member.backbone, get_spec(member.backbone)
    preprocessor = preprocessing.make_preprocessor(images, name, backbone, spec)
    network = create_backbone(backbone, spec, preprocessor.input_bands, folder)
    encoder = Encoder(preprocessor, network, "cpu", strides=spec.strides)
    pyramid = encoder(images.image[:2].values, preprocessor.metadata(images, slice(0, 2)))
    schema = engine.make_schema(images, spec, pyramid, backbone.input_size, EXTRACT)
    weights = {"weights": "random"}
    provenance = engine.provenance(images, name, backbone, spec, preprocessor, weights, EXTRACT, "cpu")
    writer = Writer(folder / f"scratch-{name}", schema, folder / f"{name}.zarr", provenance)
    engine.extract(images, encoder, writer, EXTRACT.batch)
    writer.finish()
    return FeatureStore(folder / f"{name}.zarr").location
