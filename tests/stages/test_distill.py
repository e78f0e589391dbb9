"""The stages distill and cost on the small grid: what is left, what is read, and mistakes in words."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.data import image_store
from pipeline.tasks import get_task
from pipeline.distillation.student import load_student
from tests.stages.conftest import Job

# What a backbone would have to come through.
FORBIDDEN = [
    "pipeline.backbones.encoder",
    "pipeline.extraction.engine",
    "pipeline.backbones.efficientnet",
    "segmentation_models_pytorch",
]


@pytest.fixture
def without_teachers(job, tmp_path) -> Job:
    """The job's folder as a student needs it: no weights of any backbone."""
    for name in ("params.yaml", "data/images", "data/features", "data/models", "results/tune", "results/runs"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        whole = job.folder / name
        shutil.copytree(whole, tmp_path / name) if whole.is_dir() else shutil.copy(whole, tmp_path / name)
    one = Job(tmp_path)
    one.environment["PYTHONPATH"] = str(job.folder)
    return one


def distill(job: Job, dataset="sample-trees", student="small", **given) -> str:
    return job.stage("distill", "--dataset", dataset, "--student", student, **given)


def test_no_teacher_is_loaded(without_teachers, job):
    """With no file of weights there, and none of the code that could run them; and it ends with the same student."""
    folder = without_teachers.folder
    code = (
        "import sys; from stages.distill import distill; distill('sample-landuse-seg', 'small'); "
        f"print('LOADED', [name for name in {FORBIDDEN} if name in sys.modules])"
    )
    assert "LOADED []" in without_teachers.run(sys.executable, "-c", code)
    assert not (folder / "data/weights").exists()
    for name in ("student.pt", "student.json"):
        path = f"results/distill/sample-landuse-seg/small/best/{name}"
        assert (folder / path).read_bytes() == (job.folder / path).read_bytes()


def test_the_student_that_is_left_has_the_scores_that_are_told(job):
    for dataset, task in (("sample-trees", "classification"), ("sample-landuse-seg", "segmentation")):
        folder = job.folder / "results/distill" / dataset / "small"
        told = json.loads((folder / "metadata.json").read_text())
        student, about = load_student(folder / "best")
        assert about["teacher"] == told["teacher"]
        assert told["teacher"] in ("lite0", "csmask_b4+lite0")
        store = image_store.open_images(job.folder / f"data/images/{dataset}.zarr")
        test = np.flatnonzero(store.split.values == "test")
        with torch.inference_mode():
            said = student(torch.from_numpy(store.image[test].values.astype(np.float32))).argmax(dim=1).numpy()
        counts = get_task(task)(len(about["classes"])).counts(said, store.label[test].values)
        runs = pd.read_csv(folder / "distilled/runs.csv").set_index("seed")
        seed = told["variants"]["distilled"]["seed"]
        assert get_task(task)(len(about["classes"])).score(counts.sum(axis=0)) == pytest.approx(
            runs.score[seed], abs=1e-6
        )
        assert seed == runs.val_score.idxmax()
        assert pd.read_csv(folder / "runs.csv").protocol.unique().tolist() == ["distilled", "supervised"]


def test_costs_are_of_every_model_that_can_be_used(job):
    costs = pd.read_csv(job.folder / "results/cost.csv").set_index(["dataset", "model"])
    rates = pd.read_csv(job.folder / "results/rates.csv").set_index(["dataset", "student", "file"]).images_per_second
    files = {"torch", "student.onnx", "student.pt2", "student-int8.onnx"}
    assert set(rates.index) == {
        (name, "small", file) for name in ("sample-trees", "sample-landuse-seg") for file in files
    }
    assert (rates > 0).all()
    seg = costs.loc["sample-landuse-seg"]
    assert set(seg.index) == {"small", "raw", "lite0", "csmask_b4+lite0"}
    assert set(costs.loc["sample-trees"].index) == {"small", "raw", "lite0"}
    assert (seg.chips_per_second > 0).all()
    assert seg.flops["small"] < seg.flops["lite0"] < seg.flops["csmask_b4+lite0"]
    assert 15e6 < seg.parameters["csmask_b4+lite0"] < 30e6
    page = (job.folder / "results/report/index.html").read_text()
    assert "student small, teacher csmask_b4+lite0:" in page or "student small, teacher lite0:" in page


def test_a_teacher_that_is_left_out_leaves_its_student_out(without_teachers):
    with without_teachers.changed({"distill": {"teacher": "csmask_b4+lite0"}}):
        said = distill(without_teachers)
    assert "left out: The teacher csmask_b4+lite0 is left out: csmask_b4 needs the bands nir" in said
    told = json.loads((without_teachers.folder / "results/distill/sample-trees/small/metadata.json").read_text())
    assert told["skipped"]
    assert not (without_teachers.folder / "results/distill/sample-trees/small/best").exists()


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (lambda one: shutil.rmtree(one / "data/features/sample-trees/lite0.zarr"), "There is no feature store at"),
        (lambda one: (one / "results/runs/sample-trees/lite0/head.pt").unlink(), "There is no trained head at"),
        (
            lambda one: shutil.copytree(
                one / "data/features/sample-landuse-seg/lite0.zarr", one / "data/features/sample-trees/lite0.zarr",
                dirs_exist_ok=True,
            ),
            "is not the store that was resolved",
        ),
        (
            lambda one: shutil.copy(
                one / "results/runs/sample-landuse-seg/lite0/head.pt", one / "results/runs/sample-trees/lite0/head.pt"
            ),
            "The trained head is of lite0 for the classes farm",
        ),
    ],
    ids=["no store", "no head", "another set's store", "another set's head"],
)  # fmt: skip
def test_what_is_missing_or_of_another_data_set_is_refused(without_teachers, breaks, says):
    breaks(without_teachers.folder)
    said = distill(without_teachers, fails=True)
    assert "error: " in said
    assert says in said
    assert "Traceback" not in said
    assert not (without_teachers.folder / "results/distill/sample-trees").exists(), "nothing half-written"


def test_students_that_are_not_described_or_do_not_fit_are_refused(without_teachers):
    assert "There is no student 'tiny'" in distill(without_teachers, student="tiny", fails=True)
    with without_teachers.changed({"students": {"small": {"network": "resnet18", "chip_size": 16}}}):
        said = distill(without_teachers, fails=True)
    assert (
        "error: timm's 'resnet18' cannot be a student of 16 px and 3 bands: its deepest level has stride 32" in said
    )
    with without_teachers.changed({"students": {"small": {"network": "resnet1"}}}):
        assert "timm has no network 'resnet1'" in distill(without_teachers, fails=True)
