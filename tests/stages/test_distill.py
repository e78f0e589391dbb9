"""The stages distill and cost on the small grid: their results, inputs and errors."""

import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.data import image_store
from pipeline.distillation.student import load_student
from pipeline.tasks import get_task
from tests.stages.conftest import SMALL, Job

DATASETS = SMALL["grid"]["datasets"]
# Modules that run or build backbones.
BACKBONE_MODULES = [
    "pipeline.backbones.encoder", "pipeline.extraction.engine", "pipeline.backbones.efficientnet",
    "segmentation_models_pytorch",
]  # fmt: skip
ARGUMENTS = ["--dataset", "sample-trees", "--student", "small"]


@pytest.fixture
def job_without_backbones(job, tmp_path) -> Job:
    """A copy of the job's folder with the inputs of distill only: no weights of any backbone."""
    for name in ("data/images", "data/features", "results/distill"):
        shutil.copytree(job.folder / name, tmp_path / name, ignore=shutil.ignore_patterns("small"))
    shutil.copy(job.folder / "params.yaml", tmp_path)
    copy = Job(tmp_path)
    copy.environment["PYTHONPATH"] = str(job.folder)
    return copy


def test_distill_needs_no_backbone(job_without_backbones, job):
    """Without files of weights and without the modules that run them, the student is the same."""
    folder = job_without_backbones.folder
    code = (
        "import sys; from stages.distill import distill; distill('sample-landuse-seg', 'small'); "
        f"print('LOADED', [name for name in {BACKBONE_MODULES} if name in sys.modules])"
    )
    assert "LOADED []" in job_without_backbones.run(sys.executable, "-c", code)
    assert not (folder / "data/weights").exists()
    for name in ("student.pt", "student.json"):
        path = f"results/distill/sample-landuse-seg/small/best/{name}"
        assert (folder / path).read_bytes() == (job.folder / path).read_bytes()


def test_distill_saved_student_has_the_recorded_scores(job):
    for dataset, name in (("sample-trees", "classification"), ("sample-landuse-seg", "segmentation")):
        folder = job.folder / "results/distill" / dataset / "small"
        metadata = json.loads((folder / "metadata.json").read_text())
        student, student_metadata = load_student(folder / "best")
        assert student_metadata["teacher"] == metadata["teacher"]
        assert (student_metadata["variant"], student_metadata["weights"]) == ("distilled", metadata["weights"])
        assert metadata["teacher"] in ("lite0", "csmask_b4+lite0")
        images = image_store.open_images(job.folder / f"data/images/{dataset}.zarr")
        test = np.flatnonzero(images.split.values == "test")
        with torch.inference_mode():
            predicted = student(torch.from_numpy(images.image[test].values.astype(np.float32))).argmax(dim=1).numpy()
        task = get_task(name)(len(student_metadata["classes"]))
        assert student_metadata["ignore"] == task.ignore_value
        score = task.score(task.counts(predicted, images.label[test].values).sum(axis=0))
        runs = pd.read_csv(folder / "distilled/runs.csv").set_index("seed")
        seed = metadata["variants"]["distilled"]["seed"]
        assert score == pytest.approx(runs.score[seed], abs=1e-6)
        assert seed == runs.val_score.idxmax()
        assert pd.read_csv(folder / "runs.csv").protocol.unique().tolist() == ["distilled", "supervised"]


def test_cost_has_every_model_that_is_not_skipped(job):
    seg, trees = (pd.read_csv(job.folder / f"results/cost/{name}.csv").set_index("model") for name in DATASETS)
    assert set(seg.index) == {"small", "raw", "lite0", "csmask_b4+lite0"}
    assert set(trees.index) == {"small", "raw", "lite0"}
    assert (seg.chips_per_second > 0).all()
    assert seg.flops["small"] < seg.flops["lite0"] < seg.flops["csmask_b4+lite0"]
    assert 15e6 < seg.parameters["csmask_b4+lite0"] < 30e6
    page = (job.folder / "results/report/index.html").read_text()
    assert re.search(r"small[^<]*teacher[^<]*lite0", page)


def test_distill_skipped_teacher_skips_the_student(job_without_backbones):
    with job_without_backbones.changed({"distill": {"teacher": "csmask_b4+lite0"}}):
        teacher = {"teacher": None, "skipped": "csmask_b4+lite0 needs nir"}
        folder = job_without_backbones.folder / "results/distill/sample-trees/teacher"
        (folder / "teacher.json").write_text(json.dumps(teacher))
        job_without_backbones.stage("distill", *ARGUMENTS)
    student = folder.parent / "small"
    skipped = json.loads((student / "metadata.json").read_text())["skipped"]
    assert all(name in skipped for name in ("csmask_b4+lite0", "nir")), skipped
    assert not (student / "best").exists()
