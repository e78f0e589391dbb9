"""A data set whose features are known from its pixels, so that a row out of place cannot hide."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cache.reader import FeatureStore
from cache.schema import LevelSchema, StoreSchema
from cache.writer import Writer
from pipeline.bands import Band
from pipeline.config import (
    DistillConfig,
    HeadsConfig,
    LinearHeadConfig,
    LossWeights,
    SearchConfig,
    StepsConfig,
    UPerNetHeadConfig,
)
from pipeline.data import image_store
from pipeline.data.augmentation import VIEWS, AugmentedImages
from pipeline.distillation.teacher import CachedTeacher
from pipeline.distillation.train import DistillationSetup
from pipeline.heads import checkpoint
from pipeline.training import task_data
from pipeline.training.loop import HParams

COUNT, SIDE = 60, 32
HEADS = HeadsConfig(
    LinearHeadConfig("all", "mean", steps=200, batch=20), UPerNetHeadConfig(channels=8, steps=60, batch=4)
)
SEARCH = SearchConfig(trials=2, trials_per_round=2, seed=0, learning_rate=(5e-3, 1e-2), weight_decay=(1e-3, 1e-2))
DISTILL = DistillConfig(
    (), "best", LossWeights(1.0, 1.0, 1.0), 2.0, (), classification=StepsConfig(30, 16), segmentation=StepsConfig(20, 8), seeds=2, search=SEARCH
)  # fmt: skip


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Images of two bands in blocks, (sample, band, y, x), and a class of every block, (sample, y, x)."""
    generator = np.random.default_rng(0)
    mask = generator.integers(3, size=(COUNT, 4, 4)).repeat(8, axis=1).repeat(8, axis=2)
    own = np.linspace(100, 200, COUNT)[:, None, None]
    noise = generator.normal(size=(COUNT, 2, SIDE, SIDE)) * 5
    return (np.stack([100.0 * mask, own + 0 * mask], axis=1) + noise).astype(np.float32), mask


def features_of(image: np.ndarray) -> dict[str, np.ndarray]:
    """A 'backbone': means of blocks, then both bands and their sum; what it sees it sees in place."""
    blocks = image.reshape(len(image), 2, 4, 8, 4, 8).mean(axis=(3, 5))
    level = np.concatenate([blocks, blocks.sum(axis=1, keepdims=True)], axis=1).astype(np.float32)
    return {"level0/features": level, "pooled/mean_level0": level.mean(axis=(2, 3))}


class Made:
    """An images store and the feature store of one member, with its trained head."""

    def __init__(self, folder: Path, opened, task: str, split: list[str], views=(), name="member"):
        image, mask = pixels()
        common = np.array([np.bincount(one.ravel(), minlength=3).argmax() for one in mask])
        label = {
            "classification": common,
            "multilabel": np.stack([(mask == c).mean((1, 2)) > 0.3 for c in range(2)], axis=1).astype(np.int64),
            "segmentation": np.where(np.arange(SIDE) < 4, image_store.IGNORE, mask),
        }[task]
        classes = ["a", "b", "c"][: 2 if task == "multilabel" else 3]
        label[np.array(split) == image_store.UNLABELLED] = image_store.missing_label(task, len(classes), (SIDE, SIDE))
        self.image, self.mask, self.folder, self.task = image, mask, folder, task
        self.like = opened(
            image_store.ImageDataset(
                image=image, label=label, sample=[f"s{i:03d}" for i in range(COUNT)], split=split, classes=classes,
                bands=[Band("B1", "red", 0.665, 1.0), Band("B2", "nir", 0.8, 1.0)], task=task, units="dn",
                gsd=1.0, licence="none", source="made", display=(0.0, 0.3),
            )
        )  # fmt: skip
        self.pictures = Path(self.like.encoding["source"])
        self.store = folder / f"{name}.zarr"
        self._write(views)

    def _write(self, views) -> None:
        one = features_of(self.image)
        layout = StoreSchema(
            sample=tuple(self.like.sample.values.tolist()), split=tuple(self.like.split.values.tolist()),
            levels=(LevelSchema(3, 4, 4, 8, "x"),), pooled={"mean_level0": 3}, dtype="float32", shard_size=32,
            **({"views": tuple(views)} if views else {}),
        )  # fmt: skip
        if views:
            copies = [features_of(np.ascontiguousarray(VIEWS[view](self.image))) for view in views]
            one = {key: np.stack([copy[key] for copy in copies], axis=1) for key in one}
        made_from = {"images_sha256": self.like.attrs["content_sha256"]}
        writer = Writer(self.folder / "scratch-features", layout, self.store, made_from)
        for shard in writer.pending_shards():
            writer.write(shard, {key: value[layout.rows(shard)] for key, value in one.items()})
        writer.finish()
        FeatureStore(self.store)

    def head(self) -> Path:
        """Trained on the features, as the stage train does."""
        path = self.folder / "head.pt"
        if not path.exists():
            cell = task_data.load({self.store: None}, self.pictures, HEADS, ("train", "val"), "cpu")
            checkpoint.save(path, "member", cell, cell.train([HParams(0.02, 0.01, 0)]), 0)
        return path

    def lesson(self, described: DistillConfig = DISTILL) -> DistillationSetup:
        chips = AugmentedImages.load(self.pictures, max_gb=1.0)
        teacher = CachedTeacher({self.store: None}, self.pictures, checkpoint.load(self.head()), chips.rows("train", "unlabelled"))
        return DistillationSetup(chips, teacher, described, "cpu")


@pytest.fixture
def made(tmp_path, open_images):
    """From a task, views and the splits to a data set, its teacher's store and head."""

    def make(task: str, views=(), split=("train", "val", "train", "test", "train", "train")) -> Made:
        return Made(tmp_path, open_images, task, [*split] * (COUNT // len(split)), views)

    return make


@pytest.fixture(autouse=True)
def _one_core():
    """Students so small train fastest on one core, above all beside other tests."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(cores)
