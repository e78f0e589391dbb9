"""Students on a GPU score about as well as on a CPU."""

import dataclasses

import pytest
import torch

from pipeline.distillation import train
from tests.pipeline.distillation.test_train import create_student, train_student

METADATA = {"dataset": "d", "model": "small"}


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_train_on_gpu_scores_as_on_cpu(gpu, make_dataset, task):
    setup = make_dataset(task).setup()
    scores = []
    for device_setup in (setup, dataclasses.replace(setup, device=gpu)):
        student, _ = train_student(device_setup, "distilled")
        scores.append(train._scores([student], device_setup, "val")[0])
    assert scores[0] == pytest.approx(scores[1], abs=0.2)


def test_train_variant_on_gpu_returns_students_on_the_gpu(gpu, make_dataset, tmp_path):
    setup = dataclasses.replace(make_dataset("classification").setup(), device=gpu)
    _, result = train.train_variant(
        lambda seed: create_student(setup, seed), setup, "distilled", METADATA, tmp_path / "study", ""
    )
    assert len(result.runs) == 2
    assert result.runs.score.between(0, 1).all()
    devices = {parameter.device.type for parameter in result.group[result.best_index].parameters()}
    assert devices == {torch.device(gpu).type}
