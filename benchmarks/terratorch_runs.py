"""terratorch's side of benchmarks/protocol.py: a run of a frozen backbone as its users do it."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.data.image_store import SPLITS


def write_tiffs(images, folder: Path) -> None:
    """The same chips as GeoTIFFs in folders of splits and classes."""
    import rasterio

    for place, (name, split) in enumerate(zip(images.sample.values, images.split.values, strict=True)):
        chip = images.image[place].values
        path = folder / str(split) / f"{int(images.label[place])}" / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        bands, height, width = chip.shape
        with rasterio.open(path, "w", "GTiff", width, height, bands, dtype=chip.dtype) as file:
            file.write(chip)


@dataclass(frozen=True)
class Run:
    """One run of terratorch: its wall time with the test, and the accuracy after its last epoch, as fractions."""

    seconds: float
    val: float
    test: float


def terratorch_run(folder: Path, network, rate: float, decay: float, seed: int, epochs: int, batch: int) -> Run:
    """Train a linear head on the frozen network by terratorch's datamodule, task and trainer."""
    import albumentations
    import lightning
    from albumentations.pytorch import ToTensorV2
    from terratorch.datamodules import GenericNonGeoClassificationDataModule
    from terratorch.tasks import ClassificationTask

    class Frozen(torch.nn.Module):
        """Our network as terratorch takes one: a list of maps, and their channels."""

        def __init__(self):
            super().__init__()
            self.network, self.out_channels = network, [24, 40, 112, 320]

        def forward(self, image):
            return list(self.network(image).levels)

        def train(self, mode: bool = True):
            return super().train(False)

    transform = [albumentations.Resize(128, 128), ToTensorV2()]
    # As our own inputs are made: unit scale, then the network's mean and deviation.
    data = GenericNonGeoClassificationDataModule(
        batch, 0, *[folder / split for split in SPLITS], means=[0.498 * 255] * 3, stds=[0.502 * 255] * 3,
        num_classes=2, train_transform=transform, val_transform=transform, test_transform=transform, drop_last=False,
    )  # fmt: skip
    lightning.seed_everything(seed, verbose=False)
    task = ClassificationTask(
        {"backbone": Frozen(), "decoder": "IdentityDecoder", "num_classes": 2}, "EncoderDecoderFactory",
        lr=rate, optimizer="AdamW", optimizer_hparams={"weight_decay": decay},
        scheduler="CosineAnnealingLR", scheduler_hparams={"T_max": epochs}, freeze_backbone=True,
    )  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    begun = time.perf_counter()
    trainer.fit(task, datamodule=data)
    val = trainer.callback_metrics["val/Accuracy_Micro"].item()
    found = trainer.test(task, datamodule=data, verbose=False)[0]
    return Run(time.perf_counter() - begun, val, found["test/Accuracy_Micro"])
