"""A fine-tuning in a process of its own, to be killed: python killed.py IMAGES HEAD FOLDER; writes FOLDER/done."""

import dataclasses
import sys
from pathlib import Path

import pandas as pd
import torch

from pipeline.finetune import protocol
from pipeline.finetune.pictures import Pictures
from pipeline.finetune.train import Job
from pipeline.finetune.tuned import Member, Tuned
from pipeline.imagery import images
from pipeline.training import cells
from tests.pipeline.finetune.conftest import BACKBONES, FEW

# Checkpoints after every step, so that a kill falls between two.
MANY = dataclasses.replace(FEW, what="lora", steps=6, checks=6, seeds=2, learning_rates=(1e-3, 1e-2))
TOLD = {"dataset": "d", "model": "lite0", "weights": "random, seed 0"}


def fine_tune(pictures: Path, head: Path, folder: Path) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    """The whole protocol on lite0; what `protocol.run` says of its runs, and the best of them."""
    folder.mkdir(exist_ok=True)
    opened = images.open_images(pictures)
    members = [Member("lite0", BACKBONES["lite0"], folder)]
    job = Job(Pictures(opened, folder / "images.npy"), cells.task_of(opened), MANY)
    tested = protocol.run(lambda seed: Tuned(opened, members, head, MANY, seed, "cpu", "float32"), job, TOLD, folder)
    return tested.runs, tested.best


if __name__ == "__main__":
    fine_tune(*map(Path, sys.argv[1:4]))
    Path(sys.argv[3], "done").touch()
