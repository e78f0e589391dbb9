"""A fine-tuning in a process of its own, to be killed: python killed.py IMAGES HEAD FOLDER; writes FOLDER/done."""

import dataclasses
import sys
from pathlib import Path

import pandas as pd
import torch

from pipeline.data import image_store
from pipeline.data.augmentation import AugmentedImages
from pipeline.finetuning import protocol
from pipeline.finetuning.model import EnsembleMember, FineTunedEnsemble
from pipeline.finetuning.train import FineTuneJob
from pipeline.training import task_data
from tests.pipeline.finetuning.conftest import BACKBONES, FEW

# Checkpoints after every step, so that a kill falls between two.
MANY = dataclasses.replace(FEW, method="lora", steps=6, val_checks=6, seeds=2, learning_rates=(1e-3, 1e-2))
TOLD = {"dataset": "d", "model": "lite0", "weights": "random, seed 0"}


def fine_tune(pictures: Path, head: Path, folder: Path) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    """The whole protocol on lite0; what `protocol.run` says of its runs, and the best of them."""
    folder.mkdir(exist_ok=True)
    opened = image_store.open_images(pictures)
    members = [EnsembleMember("lite0", BACKBONES["lite0"], folder)]
    job = FineTuneJob(AugmentedImages.copy_to_file(opened, folder / "images.npy"), task_data.task_from_store(opened), MANY)
    tested = protocol.run_fine_tuning(
        lambda seed: FineTunedEnsemble(opened, members, head, MANY, seed, "cpu", "float32"), job, TOLD, folder
    )
    return tested.runs, tested.best


if __name__ == "__main__":
    fine_tune(*map(Path, sys.argv[1:4]))
    Path(sys.argv[3], "done").touch()
