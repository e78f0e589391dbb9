"""What a plan says beforehand is what is written afterwards."""

import dataclasses

import pytest

from pipeline import config, plan
from pipeline.bands import Band
from pipeline.data.sources import DatasetSize
from pipeline.distillation.student import Student, StudentSpec

RGB = tuple(
    Band(name[0].upper(), name, place, 10) for name, place in (("red", 0.66), ("green", 0.56), ("blue", 0.49))
)


@pytest.fixture
def params():
    """params.yaml with the cheapest of models and one student."""
    loaded = config.load()
    grid = dataclasses.replace(loaded.grid, backbones=("raw",), models=("raw",), students=("small",))
    return dataclasses.replace(loaded, grid=grid)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_students_are_counted(params, task):
    distill = dataclasses.replace(params.distill, extra_variants=("logits",), datasets=("here",))
    wanted = DatasetSize(100, RGB, task, 4, 3 * 128 * 128)
    lines = plan.plan(dataclasses.replace(params, distill=distill), {"here": wanted}, "cpu")
    (line,) = [one for one in lines if one.stage == "distill, export"]
    recipe = distill.masks if task == "segmentation" else distill.chips
    # Three variants: everything, logits, labels alone.
    heads = 3 * (distill.search.trials + distill.seeds)
    assert (line.item, line.images) == ("here x small", heads * recipe.steps * recipe.batch)
    student = Student(StudentSpec("mobilenetv3_small_100", 3, 4, task, 64), [0.0] * 3, [1.0] * 3)
    # The saved tensors and two graphs; buffers are the rest.
    assert line.gigabytes == pytest.approx(3 * 4 * sum(one.numel() for one in student.parameters()) / 1e9)
    assert line.hours > 0
    assert "distill, export" in plan.format_table(lines)


def test_no_students_no_teachers_no_lines(params):
    grid = dataclasses.replace(params.grid, students=())
    wanted = DatasetSize(100, RGB, "classification", 4, 0)
    lines = plan.plan(dataclasses.replace(params, grid=grid), {"here": wanted}, "cpu")
    assert [line.stage for line in lines] == ["prepare", "extract", "tune, train"]
    elsewhere = dataclasses.replace(params.distill, datasets=("sample-trees",))
    lines = plan.plan(dataclasses.replace(params, distill=elsewhere), {"here": wanted}, "cpu")
    assert [line.stage for line in lines] == ["prepare", "extract", "tune, train"]
    # A teacher that cannot see the bands teaches nobody.
    unseen = dataclasses.replace(params.grid, backbones=("lite0",), models=("lite0",), students=("small",))
    radar = DatasetSize(100, (Band("VV", "sar_vv"),), "classification", 4, 0)
    lines = plan.plan(dataclasses.replace(params, grid=unseen), {"here": radar}, "cpu")
    assert [line.item for line in lines] == ["here", "here x lite0: left out"]
