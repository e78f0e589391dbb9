"""Students on a GPU: taught by cached features, they come out about as good as on a processor."""

import dataclasses

import pytest
import torch

from pipeline.distillation import protocol
from tests.pipeline.distillation.test_train import fresh, trained

TOLD = {"dataset": "d", "model": "small"}


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_gpu_teaches_the_processors_student(gpu, made, task):
    lesson = made(task).lesson()
    on_gpu = dataclasses.replace(lesson, device=gpu)
    (ours, _), (theirs, _) = trained(lesson, "distilled"), trained(on_gpu, "distilled")
    scores = [protocol._scores([one], each, "val")[0] for one, each in ((ours, lesson), (theirs, on_gpu))]
    assert scores[0] == pytest.approx(scores[1], abs=0.2)


def test_the_whole_protocol(gpu, made, tmp_path):
    lesson = dataclasses.replace(made("classification").lesson(), device=gpu)
    taught = protocol.train_variant(lambda seed: fresh(lesson, seed), lesson, "distilled", TOLD, tmp_path / "study", "")
    assert len(taught.runs) == 2
    assert taught.runs.score.between(0, 1).all()
    assert {one.device.type for one in taught.best.parameters()} == {torch.device(gpu).type}
