"""Students on a GPU score about as well as on a CPU."""

import dataclasses

import pytest
import torch

from pipeline.distillation import train
from tests.pipeline.distillation.test_train import METADATA, create_student, train_student


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_train_variant_on_gpu_scores_as_on_cpu(gpu, make_dataset, tmp_path, task):
    setup = make_dataset(task).setup()
    on_gpu = dataclasses.replace(setup, device=gpu)
    student, _ = train_student(setup, "distilled")
    _, result = train.train_variant(
        lambda seed: create_student(setup, seed), on_gpu, "distilled", METADATA, tmp_path / "study", ""
    )
    assert result.runs.val_score[0] == pytest.approx(train._scores([student], setup, "val")[0], abs=0.2)
    devices = {parameter.device.type for parameter in result.group[result.best_index].parameters()}
    assert devices == {torch.device(gpu).type}
