"""Frozen models with trained heads, from small extractions of synthetic chips, ready to be fine-tuned."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from cache.writer import Writer
from pipeline import config
from pipeline.backbones import create_backbone, get_spec, preprocessing
from pipeline.backbones.encoder import Encoder
from pipeline.bands import SENTINEL2
from pipeline.data import image_store, image_writer
from pipeline.data.augmentation import AugmentedImages
from pipeline.extraction import engine
from pipeline.finetuning.model import EnsembleMember, FineTunedEnsemble
from pipeline.finetuning.train import FineTuneJob
from pipeline.heads import checkpoint
from pipeline.training import task_data
from pipeline.training.loop import HParams
from pipeline.training.protocol import train_heads, trained_head

LINEAR = config.LinearHeadConfig("all", "mean", steps=60, batch=20)
UPERNET, FCN = config.UPerNetHeadConfig(channels=4, steps=4, batch=4), config.FcnHeadConfig(steps=10, batch=8)
HEADS = config.HeadsConfig(LINEAR, UPERNET, FCN, segmentation="fcn")
EXTRACT = config.ExtractConfig("float32", "none", "float32", False, 16, 64, False, ("identity",))
CONFIG = config.FineTuneConfig(steps=4, batch=4, val_checks=2, seeds=1, learning_rates=(1e-3,))
BACKBONES = {
    "lite0": config.BackboneConfig("efficientnet", "lite0", "random", 32),
    "prithvi": config.BackboneConfig("prithvi", "prithvi_eo_v2_tiny_tl", "random", 32),
    "hiera": config.BackboneConfig("hiera", "sam2.1_hiera_t", "random", 64),
    "raw": config.BackboneConfig("band_statistics", "mean_std", "none", 32),
}
METADATA = {"dataset": "d", "model": "m", "weights": "random, seed 0"}
N_PER_SPLIT, SIDE, N_CLASSES = 8, 16, 3


def make_images(task: str, side: int = SIDE) -> image_store.ImageDataset:
    """Chips of Sentinel-2 bands whose halves have the brightness of a class."""
    generator = np.random.default_rng(0)
    count = 3 * N_PER_SPLIT
    left, right = np.arange(count) % N_CLASSES, np.arange(count) // 2 % N_CLASSES
    mask = np.where(np.arange(side) < side // 2, left[:, None, None], right[:, None, None])
    mask = np.broadcast_to(mask, (count, side, side))
    noise = generator.normal(0, 100, (count, len(SENTINEL2), side, side))
    return image_store.ImageDataset(
        image=(500 + 1000 * mask[:, None] + noise).clip(1).astype(np.uint16),
        label=mask.astype(np.uint8) if task == "segmentation" else left,
        sample=[f"s{i:02}" for i in range(count)], split=np.repeat(["train", "val", "test"], N_PER_SPLIT).tolist(),
        classes=["a", "b", "c"], bands=list(SENTINEL2), task=task, units="dn", gsd=10.0, licence="none",
        source="a random generator", display=(0.0, 0.3), lat=np.full(count, 53.0), lon=np.full(count, 13.0),
        time=np.full(count, "2017-02-16T10:21:01", "datetime64[s]"),
    )  # fmt: skip


@dataclasses.dataclass
class FrozenModel:
    """Frozen backbones, their trained head (a file, and in memory), images, features and stores."""

    images: xr.Dataset
    images_path: Path
    members: list[EnsembleMember]
    head_path: Path
    head_group: torch.nn.Module
    data: task_data.TaskData
    stores: dict

    def trainable(self, seed=0, precision="float32", device="cpu", **changes) -> FineTunedEnsemble:
        """Make it trainable; `changes` are of `CONFIG`."""
        settings = dataclasses.replace(CONFIG, **changes)
        return FineTunedEnsemble(self.images, self.members, self.head_path, settings, seed, device, precision)

    def job(self, **changes) -> FineTuneJob:
        """Return a fine-tuning job on its images."""
        images = AugmentedImages.copy_to_file(self.images, self.head_path.with_name("images.npy"))
        return FineTuneJob(images, self.data.task, dataclasses.replace(CONFIG, **changes))


@pytest.fixture(autouse=True)
def _single_thread():
    """One torch thread: the networks are small, and other tests run in parallel."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def frozen_model(tmp_path_factory):
    """Function from a task and a model's name to a `FrozenModel`, made by the program's own code."""
    models, images_paths = {}, {}

    def make(task: str, model: str) -> FrozenModel:
        if task not in images_paths:
            images_paths[task] = tmp_path_factory.mktemp("images") / f"{task}.zarr"
            image_writer.write(make_images(task), images_paths[task].with_name("scratch"), images_paths[task])
        if (task, model) not in models:
            folder, images_path = tmp_path_factory.mktemp("frozen"), images_paths[task]
            images = image_store.open_images(images_path)
            members = [EnsembleMember(name, BACKBONES[name], folder) for name in model.split("+")]
            stores = {extract_features(images, member, folder): None for member in members}
            data = task_data.load(stores, images_path, HEADS, ("train", "val", "test"), "cpu")
            group, head_path = train_heads(data, [HParams(1e-2, 1e-2, 0)]), folder / "head.pt"
            checkpoint.save(head_path, trained_head(data, model, group, 0))
            models[task, model] = FrozenModel(images, images_path, members, head_path, group, data, stores)
        return models[task, model]

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
    return folder / f"{name}.zarr"
