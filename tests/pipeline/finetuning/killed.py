"""A fine-tuning in its own process, to be killed: python -m … IMAGES HEAD FOLDER."""

import dataclasses
import sys
from pathlib import Path

from pipeline.data import image_store
from pipeline.data.augmentation import AugmentedImages
from pipeline.finetuning import train
from pipeline.finetuning.model import EnsembleMember, FineTunedEnsemble
from pipeline.finetuning.train import FineTuneJob
from pipeline.training import task_data
from tests.pipeline.finetuning.conftest import BACKBONES, CONFIG

# A checkpoint after every step, so that a kill falls between two checkpoints.
KILLED_CONFIG = dataclasses.replace(
    CONFIG, method="last1", steps=4, val_checks=4, seeds=2, learning_rates=(1e-3, 1e-2)
)
METADATA = {"dataset": "d", "model": "lite0", "weights": "random, seed 0"}


def fine_tune(images_path: Path, head_path: Path, folder: Path) -> train.FineTuneResult:
    """Run the whole protocol on lite0."""
    folder.mkdir(exist_ok=True)
    images = image_store.open_images(images_path)
    members = [EnsembleMember("lite0", BACKBONES["lite0"], folder)]
    augmented_images = AugmentedImages.copy_to_file(images, folder / "images.npy")
    job = FineTuneJob(augmented_images, task_data.task_from_store(images), KILLED_CONFIG)

    def create_model(seed: int) -> FineTunedEnsemble:
        return FineTunedEnsemble(images, members, head_path, KILLED_CONFIG, seed, "cpu", "float32")

    return train.run_fine_tuning(create_model, job, METADATA, folder)


if __name__ == "__main__":
    fine_tune(*map(Path, sys.argv[1:4]))
