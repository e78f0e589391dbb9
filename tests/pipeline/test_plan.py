"""Estimates of a plan equal what is written later."""

import dataclasses

import pytest

from pipeline import config, plan
from pipeline.bands import Band
from pipeline.data.sources import DatasetSize
from pipeline.distillation.student import Student, StudentSpec

RGB = (Band("R", "red", 0.66, 10), Band("G", "green", 0.56, 10), Band("B", "blue", 0.49, 10))


@pytest.fixture
def params():
    """params.yaml with one cheap model and one student."""
    committed = config.load()
    grid = dataclasses.replace(committed.grid, backbones=("raw",), models=("raw",), students=("small",))
    return dataclasses.replace(committed, grid=grid)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_plan_counts_every_variant_and_seed_of_a_student(params, task):
    distill = dataclasses.replace(params.distill, extra_variants=("logits",), datasets=("d",))
    size = DatasetSize(100, RGB, task, 4, 3 * 128 * 128)
    estimates = plan.plan(dataclasses.replace(params, distill=distill), {"d": size}, "cpu")
    (estimate,) = [estimate for estimate in estimates if estimate.stage == "distill, export"]
    schedule = distill.segmentation if task == "segmentation" else distill.classification
    # Three variants: distilled, logits, supervised.
    n_students = 3 * (distill.search.trials + distill.seeds)
    assert (estimate.item, estimate.images) == ("d x small", n_students * schedule.steps * schedule.batch)
    student = Student(StudentSpec("mobilenetv3_small_100", 3, 4, task, 64), [0.0] * 3, [1.0] * 3)
    # The saved tensors and two exported graphs, as large as the parameters.
    n_bytes = 3 * 4 * sum(parameter.numel() for parameter in student.parameters())
    assert estimate.gigabytes == pytest.approx(n_bytes / 1e9)
    assert estimate.hours > 0
    assert "distill, export" in plan.format_table(estimates)


@pytest.mark.parametrize(("head", "steps", "batch"), [("upernet", 120, 4), ("fcn", 7, 3)], ids=["upernet", "fcn"])
def test_plan_times_the_segmentation_head_of_the_params(params, head, steps, batch):
    upernet = dataclasses.replace(params.heads.upernet, steps=120, batch=4)
    fcn = config.FcnHeadConfig(steps=7, batch=3)
    heads = dataclasses.replace(params.heads, segmentation=head, upernet=upernet, fcn=fcn)
    sizes = {"d": DatasetSize(100, RGB, "segmentation", 4, 0)}
    backbones = {**params.backbones, "lite0_random": config.BackboneConfig("efficientnet", "lite0", "random", 64)}
    grid = dataclasses.replace(params.grid, backbones=("lite0_random",), models=("lite0_random",), students=())
    params = dataclasses.replace(params, heads=heads, grid=grid, backbones=backbones)
    (estimate,) = [estimate for estimate in plan.plan(params, sizes, "cpu") if estimate.stage == "tune, train"]
    assert estimate.images == (params.search.trials + params.train.seeds) * steps * batch
    assert estimate.hours > 0


def test_plan_without_students_or_teachers_has_no_estimate_of_students(params):
    size = DatasetSize(100, RGB, "classification", 4, 0)
    no_students = dataclasses.replace(params.grid, students=())
    estimates = plan.plan(dataclasses.replace(params, grid=no_students), {"d": size}, "cpu")
    assert [estimate.stage for estimate in estimates] == ["prepare", "extract", "tune, train"]
    other_datasets = dataclasses.replace(params.distill, datasets=("sample-trees",))
    estimates = plan.plan(dataclasses.replace(params, distill=other_datasets), {"d": size}, "cpu")
    assert [estimate.stage for estimate in estimates] == ["prepare", "extract", "tune, train"]
    # A model without the bands that it needs cannot be a teacher.
    grid = dataclasses.replace(params.grid, backbones=("lite0",), models=("lite0",), students=("small",))
    radar = DatasetSize(100, (Band("VV", "sar_vv"),), "classification", 4, 0)
    estimates = plan.plan(dataclasses.replace(params, grid=grid), {"d": radar}, "cpu")
    assert [(estimate.stage, estimate.images) for estimate in estimates] == [("prepare", 100), ("extract", 0)]
