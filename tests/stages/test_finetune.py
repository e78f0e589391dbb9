"""Fine-tuning as a user asks for it: an experiment whose scores stand beside the frozen ones, and what is refused."""

import json
import shutil

import pandas as pd
import pytest

from tests.stages.test_bad_input import stage
from tests.stages.test_job import planned

ASKED = {
    "grid": {"finetune": ["lite0"]},
    "finetune": {"what": "lora", "steps": 2, "batch": 4, "checks": 1, "seeds": 2, "learning_rates": [0.001]},
}


def test_none_by_default_and_only_what_is_new_when_asked(job):
    assert planned(job) == []
    with job.changed(ASKED):
        names = {name for name in planned(job) if not name.startswith("check")}
    assert names == {"finetune@sample-landuse-seg-lite0", "finetune@sample-trees-lite0", "report"}


@pytest.mark.slow
def test_scores_stand_beside_the_frozen_ones(job):
    frozen = json.loads((job.folder / "results/metrics.json").read_text())
    with job.changed(ASKED):
        job.run("dvc", "repro")
        runs = pd.read_csv(job.folder / "results/report/runs.csv")
        scores = json.loads((job.folder / "results/metrics.json").read_text())
        said = (job.folder / "results/report/findings.md").read_text()
        trained = sum(1 for _ in (job.folder / "results/finetune").rglob("tuned.pt"))
    for dataset in ("sample-landuse-seg", "sample-trees"):  # DVC leaves what no stage makes any more
        shutil.rmtree(job.folder / "results/finetune" / dataset)
    job.run("dvc", "repro")
    job.run("git", "checkout", "-q", "dvc.lock")  # which still lists what no stage makes any more
    tuned = runs[runs.protocol == "fine-tuned (lora)"]
    assert set(tuned.model) == {"lite0, fine-tuned"}
    assert tuned.groupby("dataset").size().to_dict() == {"sample-landuse-seg": 2, "sample-trees": 2}
    assert {
        name: {model: one for model, one in of.items() if "tuned" not in model} for name, of in scores.items()
    } == frozen
    assert scores["sample-trees"]["lite0, fine-tuned"]["mean"] > 0.5
    assert (
        "sample-trees: lite0, fine-tuned against lite0, itself frozen (fine-tuned (lora): another protocol)" in said
    )
    assert trained == 2
    assert not list((job.folder / "data/scratch/finetune").glob("*/*/*")), "checkpoints of finished runs"
    assert json.loads((job.folder / "results/metrics.json").read_text()) == frozen


def test_what_cannot_be_fine_tuned(job):
    cell = ["--dataset", "sample-trees", "--model"]
    assert "not in grid.models (raw, lite0, csmask_b4+lite0)" in stage(job, "finetune", *cell, "raw+lite0")
    assert "no backbone 'x'" in stage(job, "finetune", *cell, "x")
    assert "raw has no parameters to fine-tune" in stage(job, "finetune", *cell, "raw")
    with job.changed({"finetune": {"what": "last9"}}):
        assert "lite0 has 7 blocks. Choose last7 or fewer" in stage(job, "finetune", *cell, "lite0")
    head = job.folder / "results/runs/sample-trees/lite0/head.pt"
    kept = head.read_bytes()
    try:
        head.unlink()
        assert "There is no trained head at" in stage(job, "finetune", *cell, "lite0")
        head.write_bytes((job.folder / "results/runs/sample-landuse-seg/lite0/head.pt").read_bytes())
        assert "for the task segmentation, and classification is asked for" in stage(job, "finetune", *cell, "lite0")
        head.write_bytes(kept[:100])
        assert "is no head that train has kept" in stage(job, "finetune", *cell, "lite0")
    finally:
        head.unlink(missing_ok=True)
        head.write_bytes(kept)
    assert not (job.folder / "results/finetune/sample-trees").exists()


def test_a_model_that_was_left_out_is_left_out_again(job):
    with job.changed({"grid": {"finetune": ["csmask_b4+lite0"]}}):
        job.stage("finetune", "--dataset", "sample-trees", "--model", "csmask_b4+lite0")
        folder = job.folder / "results/finetune/sample-trees"
        assert pd.read_csv(folder / "csmask_b4+lite0/runs.csv").empty
        (folder / "csmask_b4+lite0/runs.csv").unlink()
        (folder / "csmask_b4+lite0").rmdir()
        folder.rmdir()
