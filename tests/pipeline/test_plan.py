"""Estimates of a plan equal what is written later, and time what runs later."""

import dataclasses

import pytest

from pipeline import config, plan
from pipeline.bands import Band
from pipeline.data.sources import DatasetSize
from pipeline.distillation.student import Student, StudentSpec
from pipeline.heads.fcn import Fcn
from pipeline.heads.upernet import UPerNet

RGB = (Band("R", "red", 0.66, 10), Band("G", "green", 0.56, 10), Band("B", "blue", 0.49, 10))
BACKBONE = config.BackboneConfig("efficientnet", "lite0", "random", 64)


def dataset(task: str, n_samples: int = 100, bands=RGB) -> DatasetSize:
    return DatasetSize(n_samples, bands, task, 4, (64, 64), bytes_per_image=0)


@pytest.fixture
def params():
    """params.yaml with cheap backbones, heads and a cheap student."""
    committed = config.load()
    backbones = {**committed.backbones, "lite0_random": BACKBONE}
    upernet = config.UPerNetHeadConfig(channels=8, steps=120, batch=4)
    heads = dataclasses.replace(committed.heads, upernet=upernet, fcn=config.FcnHeadConfig(steps=7, batch=3))
    students = {"small": config.StudentConfig("test_resnet", "random", 32, 48)}
    grid = dataclasses.replace(committed.grid, backbones=("raw",), models=("raw",), students=("small",))
    return dataclasses.replace(committed, backbones=backbones, heads=heads, students=students, grid=grid)


def with_grid(params, model, students=()):
    grid = dataclasses.replace(params.grid, backbones=(model,), models=(model,), students=students)
    return dataclasses.replace(params, grid=grid)


def test_plan_counts_every_variant_and_seed_of_a_student(params):
    distill = dataclasses.replace(params.distill, extra_variants=("logits",), datasets=("d",))
    params = dataclasses.replace(params, distill=distill)
    for task, schedule in (("classification", distill.classification), ("segmentation", distill.segmentation)):
        estimates = plan.plan(params, {"d": dataset(task)}, "cpu")
        (estimate,) = [estimate for estimate in estimates if estimate.stage == "distill, export"]
        # Three variants: distilled, logits, supervised.
        n_students = 3 * (distill.search.trials + distill.seeds)
        assert (estimate.item, estimate.images) == ("d x small", n_students * schedule.steps * schedule.batch)
        student = Student(StudentSpec("test_resnet", 3, 4, task, 64), [0.0] * 3, [1.0] * 3)
        # The saved tensors and two exported graphs, as large as the parameters.
        n_bytes = 3 * 4 * sum(parameter.numel() for parameter in student.parameters())
        assert estimate.gigabytes == pytest.approx(n_bytes / 1e9)
        assert estimate.hours > 0
    assert "distill, export" in plan.format_table(estimates)


@pytest.mark.parametrize("network", [UPerNet, Fcn])
def test_plan_times_only_the_segmentation_head_of_the_params(params, monkeypatch, network):
    head = network.__name__.lower()
    heads = dataclasses.replace(params.heads, segmentation=head)
    params = with_grid(dataclasses.replace(params, heads=heads), "lite0_random")
    created = []
    for head_class in (UPerNet, Fcn):
        original = head_class.__init__

        def record(self, *args, original=original, **kwargs):
            created.append(type(self))
            original(self, *args, **kwargs)

        monkeypatch.setattr(head_class, "__init__", record)
    estimates = plan.plan(params, {"d": dataset("segmentation")}, "cpu")
    (estimate,) = [estimate for estimate in estimates if estimate.stage == "tune, train"]
    settings = params.heads.settings(head)
    assert estimate.images == (params.search.trials + params.train.seeds) * settings.steps * settings.batch
    assert estimate.hours > 0
    assert created == [network]


def test_plan_datasets_of_one_shape_share_a_timed_network(params, capsys):
    sizes = {"small": dataset("classification"), "large": dataset("classification", 300)}
    estimates = plan.plan(with_grid(params, "lite0_random"), sizes, "cpu")
    timed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert timed == ["timing lite0_random", "timing linear"]
    small, large = [estimate for estimate in estimates if estimate.stage == "extract"]
    assert (large.hours, large.gigabytes) == pytest.approx((3 * small.hours, 3 * small.gigabytes))


def test_plan_without_students_or_teachers_has_no_estimate_of_students(params):
    def stages(changed, size):
        return [(estimate.stage, estimate.images) for estimate in plan.plan(changed, {"d": size}, "cpu")]

    chips = dataset("classification")
    assert "distill, export" not in dict(stages(with_grid(params, "raw"), chips))
    other_datasets = dataclasses.replace(params.distill, datasets=("sample-trees",))
    assert "distill, export" not in dict(stages(dataclasses.replace(params, distill=other_datasets), chips))
    # A model without the bands that it needs cannot be a teacher.
    radar = dataset("classification", bands=(Band("VV", "sar_vv"),))
    assert stages(with_grid(params, "lite0", students=("small",)), radar) == [("prepare", 100), ("extract", 0)]
