"""A synthetic dataset whose features are a function of its pixels, so that misplaced rows show."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import config
from pipeline.bands import Band
from pipeline.data import image_store, image_writer
from pipeline.data.augmentation import VIEWS, AugmentedImages
from pipeline.distillation.teacher import CachedTeacher
from pipeline.distillation.train import DistillationSetup
from pipeline.heads import checkpoint
from pipeline.tasks import IGNORE, get_task
from pipeline.training import task_data
from pipeline.training.loop import HParams
from pipeline.training.protocol import train_heads, trained_head
from tests.pipeline.conftest import write_store

N_SAMPLES, SIDE = 60, 32
LINEAR = config.LinearHeadConfig("all", "mean", steps=200, batch=20)
HEADS = config.HeadsConfig(LINEAR, config.UPerNetHeadConfig(channels=8, steps=60, batch=4))
SEARCH = config.SearchConfig(2, 2, seed=0, learning_rate=(5e-3, 1e-2), weight_decay=(1e-3, 1e-2))
DISTILL = config.DistillConfig(
    datasets=(), teacher="best", loss_weights=config.LossWeights(1.0, 1.0, 1.0), temperature=2.0, seeds=2,
    classification=config.StepsConfig(30, 16), segmentation=config.StepsConfig(20, 8), search=SEARCH,
    extra_variants=(),
)  # fmt: skip


def make_pixels() -> tuple[np.ndarray, np.ndarray]:
    """Images of two bands in blocks, (sample, band, y, x), and the class of every pixel, (sample, y, x)."""
    generator = np.random.default_rng(0)
    mask = generator.integers(3, size=(N_SAMPLES, 4, 4)).repeat(8, axis=1).repeat(8, axis=2)
    brightness = np.linspace(100, 200, N_SAMPLES)[:, None, None]
    noise = generator.normal(size=(N_SAMPLES, 2, SIDE, SIDE)) * 5
    return (np.stack([100.0 * mask, brightness + 0 * mask], axis=1) + noise).astype(np.float32), mask


def extract_features(image: np.ndarray) -> dict[str, np.ndarray]:
    """Act as a backbone: the block means of both bands and of their sum, which move with the pixels."""
    blocks = image.reshape(len(image), 2, 4, 8, 4, 8).mean(axis=(3, 5))
    level = np.concatenate([blocks, blocks.sum(axis=1, keepdims=True)], axis=1).astype(np.float32)
    return {"level0/features": level, "pooled/mean_level0": level.mean(axis=(2, 3))}


class SyntheticDataset:
    """An images store, the feature store of its only member, and a trained head."""

    def __init__(self, folder: Path, task: str, views: tuple[str, ...], split: list[str]):
        pixels, mask = (values[: len(split)] for values in make_pixels())
        largest_class = np.array([np.bincount(sample_mask.ravel(), minlength=3).argmax() for sample_mask in mask])
        label = {
            "classification": largest_class,
            "multilabel": np.stack([(mask == c).mean((1, 2)) > 0.3 for c in range(2)], axis=1).astype(np.int64),
            "segmentation": np.where(np.arange(SIDE) < 4, IGNORE, mask),
        }[task]
        classes = ["a", "b", "c"][: 2 if task == "multilabel" else 3]
        label[np.array(split) == image_store.UNLABELLED] = get_task(task).missing_label(len(classes), (SIDE, SIDE))
        dataset = image_store.ImageDataset(
            image=pixels, label=label, sample=[f"s{i:03d}" for i in range(len(split))], split=split,
            classes=classes, bands=[Band("B1", "red", 0.665, 1.0), Band("B2", "nir", 0.8, 1.0)], task=task,
            units="dn", gsd=1.0, licence="none", source="made", display=(0.0, 0.3),
        )  # fmt: skip
        self.pixels, self.images_path = pixels, folder / "images.zarr"
        image_writer.write(dataset, folder / "scratch", self.images_path)
        self.images = image_store.open_images(self.images_path)
        self.store, self.head_path = folder / "member.zarr", folder / "head.pt"
        arrays = extract_features(pixels)
        if views:
            copies = [extract_features(np.ascontiguousarray(VIEWS[view](pixels))) for view in views]
            arrays = {name: np.stack([copy[name] for copy in copies], axis=1) for name in arrays}
        write_store(self.store, arrays, self.images, views, shard_size=32)
        data = task_data.load({self.store: None}, self.images_path, HEADS, ("train", "val"), "cpu")
        checkpoint.save(self.head_path, trained_head(data, "member", train_heads(data, [HParams(0.02, 0.01, 0)]), 0))

    def setup(self, settings: config.DistillConfig = DISTILL) -> DistillationSetup:
        images = AugmentedImages.load(self.images_path, max_gb=1.0)
        rows = images.rows("train", image_store.UNLABELLED)
        teacher = CachedTeacher({self.store: None}, self.images_path, checkpoint.load(self.head_path), rows)
        return DistillationSetup(images, teacher, settings, "cpu")


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory):
    """Function from a task, views and splits to a `SyntheticDataset`, which tests share."""
    datasets = {}

    def make(task, views=(), split=("train", "val", "train", "test", "train", "train")) -> SyntheticDataset:
        if (task, views, split) not in datasets:
            full_split = [split[i % len(split)] for i in range(N_SAMPLES)] if len(split) < 10 else list(split)
            datasets[task, views, split] = SyntheticDataset(tmp_path_factory.mktemp(task), task, views, full_split)
        return datasets[task, views, split]

    return make


@pytest.fixture(autouse=True)
def _single_thread():
    """One torch thread: it is the fastest for such small students, above all with other tests in parallel."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
