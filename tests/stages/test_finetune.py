"""Fine-tuning as an experiment on the small grid: its results next to the frozen ones, and errors."""

import json
import shutil

import pandas as pd
import pytest

FINETUNE_LITE0 = {
    "grid": {"finetune": ["lite0"]},
    "finetune": {"method": "lora", "steps": 2, "batch": 4, "val_checks": 1, "seeds": 2, "learning_rates": [0.001]},
}


def test_finetune_is_empty_by_default_and_runs_alone_if_named(job):
    assert job.planned() == []
    with job.changed(FINETUNE_LITE0):
        names = {*job.planned()} - {"validate"}
    assert names == {"finetune@sample-landuse-seg-lite0", "finetune@sample-trees-lite0", "report"}


@pytest.mark.slow
def test_finetune_scores_are_added_to_the_frozen_ones(job):
    frozen_scores = json.loads((job.folder / "results/metrics.json").read_text())
    with job.changed(FINETUNE_LITE0):
        job.run("dvc", "repro")
        runs = pd.read_csv(job.folder / "results/report/runs.csv")
        scores = json.loads((job.folder / "results/metrics.json").read_text())
        findings = (job.folder / "results/report/findings.md").read_text()
        n_trained = sum(1 for _ in (job.folder / "results/finetune").rglob("tuned.pt"))
    for dataset in ("sample-landuse-seg", "sample-trees"):  # DVC keeps the outputs of removed stages
        shutil.rmtree(job.folder / "results/finetune" / dataset)
    job.run("dvc", "repro")
    job.run("git", "checkout", "-q", "dvc.lock")  # it still lists the removed stages
    tuned = runs[runs.protocol == "fine-tuned (lora)"]
    assert set(tuned.model) == {"lite0, fine-tuned"}
    assert tuned.groupby("dataset").size().to_dict() == {"sample-landuse-seg": 2, "sample-trees": 2}
    assert scores["sample-trees"]["lite0, fine-tuned"]["mean"] > 0.5
    for dataset_scores in scores.values():
        del dataset_scores["lite0, fine-tuned"]
    assert scores == frozen_scores
    sentence = next(line for line in findings.splitlines() if "sample-trees" in line and "fine-tuned" in line)
    assert all(name in sentence for name in ("lite0", "lora")), sentence
    assert n_trained == 2
    assert not list((job.folder / "data/scratch/finetune").glob("*/*/*")), "checkpoints of finished runs"
    assert json.loads((job.folder / "results/metrics.json").read_text()) == frozen_scores


def test_finetune_backbone_that_cannot_be_trained_is_refused(job):
    error = job.stage_error("finetune", "--dataset", "sample-trees", "--model", "raw")
    assert (error.key, error.value) == ("grid.finetune", "raw")
    assert not (job.folder / "results/finetune/sample-trees").exists()


def test_finetune_skipped_model_is_skipped_again(job):
    with job.changed({"grid": {"finetune": ["csmask_b4+lite0"]}}):
        job.stage("finetune", "--dataset", "sample-trees", "--model", "csmask_b4+lite0")
        folder = job.folder / "results/finetune/sample-trees"
        assert pd.read_csv(folder / "csmask_b4+lite0/runs.csv").empty
        shutil.rmtree(folder)
