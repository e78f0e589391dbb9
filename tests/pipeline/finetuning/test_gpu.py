"""Fine-tuning on a GPU: it starts from the frozen model, and ends with finite weights and scores."""

from functools import partial

import numpy as np
import pytest
import torch

from pipeline.finetuning import train
from pipeline.training.loop import HParams
from tests.pipeline.finetuning.conftest import METADATA


@pytest.mark.parametrize("model", ["lite0", "prithvi", "hiera"])
@pytest.mark.parametrize(("method", "checkpointing"), [("all", True), ("lora", False)])
def test_fine_tuning_on_gpu_starts_as_the_frozen_model_and_scores(
    gpu, frozen_model, tmp_path, model, method, checkpointing
):
    frozen, changes = frozen_model("classification", model), {"method": method, "checkpointing": checkpointing}
    create_model = partial(frozen.trainable, precision="bfloat16", device=gpu, **changes)
    job, hparams = frozen.job(**changes), HParams(1e-3, 1e-2, 0)
    on_gpu = train.train(create_model(0), job, hparams, tmp_path / "gpu.pt")
    on_cpu = train.train(frozen.trainable(**changes), job, hparams, tmp_path / "cpu.pt")
    assert on_gpu.frozen_score == pytest.approx(on_cpu.frozen_score, abs=0.1)
    result = train.run_fine_tuning(create_model, job, METADATA, tmp_path)
    assert np.isfinite(result.runs.score).all()
    assert all(torch.isfinite(tensor).all() for tensor in result.best_tensors.values())
