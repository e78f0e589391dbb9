"""Train a linear head on a frozen backbone with terratorch, for benchmarks/protocol.py."""

import time
from dataclasses import dataclass
from pathlib import Path

import rasterio
import torch
import xarray as xr

from pipeline.data.image_store import SPLITS


def write_tiffs(images: xr.Dataset, folder: Path) -> None:
    """Write the chips of an images store as GeoTIFFs in folders of splits and classes."""
    for index, (name, split) in enumerate(zip(images.sample.values, images.split.values, strict=True)):
        chip = images.image[index].values
        path = folder / str(split) / f"{int(images.label[index])}" / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        bands, height, width = chip.shape
        with rasterio.open(path, "w", "GTiff", width, height, bands, dtype=chip.dtype) as file:
            file.write(chip)


@dataclass(frozen=True)
class TerratorchRun:
    """One run of terratorch.

    Attributes:
        seconds: wall time of training and test.
        val, test: accuracy after the last epoch, from 0 to 1.
    """

    seconds: float
    val: float
    test: float


class FrozenBackbone(torch.nn.Module):
    """Wrap a network as a backbone of terratorch: a list of maps, and their channels.

    It stays in evaluation mode: terratorch stops the gradients of a frozen backbone, but not the updates of its
    BatchNorm.
    """

    def __init__(self, network: torch.nn.Module, out_channels: list[int]):
        super().__init__()
        self.network, self.out_channels = network, out_channels

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return list(self.network(image).levels)

    def train(self, mode: bool = True) -> "FrozenBackbone":
        return super().train(False)


def terratorch_run(
    folder: Path,
    network: torch.nn.Module,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    epochs: int,
    batch: int,
) -> TerratorchRun:
    """Train a linear head on the frozen network with terratorch's data module, task and trainer.

    Args:
        folder: what `write_tiffs` wrote.
        network: `lite0`, which has levels of 24, 40, 112 and 320 channels.
    """
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
    lightning.seed_everything(seed, verbose=False)
    backbone = FrozenBackbone(network, [24, 40, 112, 320])
    task = ClassificationTask(
        {"backbone": backbone, "decoder": "IdentityDecoder", "num_classes": 2}, "EncoderDecoderFactory",
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
    return TerratorchRun(time.perf_counter() - start, val, result["test/Accuracy_Micro"])
