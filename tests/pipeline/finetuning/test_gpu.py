"""Fine-tuning on a GPU: it starts as the frozen model, and ends with finite weights and scores."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.finetuning import protocol, train
from pipeline.finetuning.model import FineTunedEnsemble
from pipeline.training.loop import HParams
from tests.pipeline.finetuning.conftest import FEW

TOLD = {"dataset": "d", "model": "m", "weights": "random, seed 0"}


@pytest.fixture
def tuned(gpu, frozen):
    def make(dataset: str, model: str, precision: str, **changes):
        one = frozen(dataset, model)
        described = dataclasses.replace(FEW, **changes)
        return one, lambda seed: FineTunedEnsemble(one.opened, one.members, one.head, described, seed, gpu, precision)

    return make


@pytest.mark.parametrize("model", ["lite0", "prithvi", "hiera"])
@pytest.mark.parametrize(("what", "checkpointing"), [("all", True), ("lora", False)])
def test_it_starts_as_the_frozen_model_and_ends_with_scores(tuned, job, tmp_path, model, what, checkpointing):
    changes = {"what": what, "checkpointing": checkpointing}
    one, make = tuned("sample-landuse", model, "bfloat16", **changes)
    asked = job(one, **changes)
    done = train.train(make(0), asked, HParams(1e-3, 1e-2, 0), tmp_path / "first.pt")
    exact = train.train(one.tuned(**changes), asked, HParams(1e-3, 1e-2, 0), tmp_path / "exact.pt")
    assert done.frozen_score == pytest.approx(exact.frozen_score, abs=0.1)
    tested = protocol.run_fine_tuning(make, asked, TOLD, tmp_path)
    assert np.isfinite(tested.runs.score).all()
    assert all(torch.isfinite(values).all() for values in tested.best.values())
