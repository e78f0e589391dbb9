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
    """params.yaml with one cheap model and one student."""
    committed = config.load()
    grid = dataclasses.replace(committed.grid, backbones=("raw",), models=("raw",), students=("small",))
    return dataclasses.replace(committed, grid=grid)


def with_grid(params, **changes):
    return dataclasses.replace(params, grid=dataclasses.replace(params.grid, **changes))


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_plan_counts_every_variant_and_seed_of_a_student(params, task):
    distill = dataclasses.replace(params.distill, extra_variants=("logits",), datasets=("d",))
    estimates = plan.plan(dataclasses.replace(params, distill=distill), {"d": dataset(task)}, "cpu")
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


@pytest.mark.parametrize(
    ("head", "network", "other"), [("upernet", UPerNet, Fcn), ("fcn", Fcn, UPerNet)], ids=["upernet", "fcn"]
)
def test_plan_times_only_the_segmentation_head_of_the_params(params, monkeypatch, head, network, other):
    settings = {"upernet": dataclasses.replace(params.heads.upernet, steps=120, batch=4),
                "fcn": config.FcnHeadConfig(steps=7, batch=3)}  # fmt: skip
    heads = dataclasses.replace(params.heads, segmentation=head, **settings)
    params = dataclasses.replace(params, heads=heads, backbones={**params.backbones, "lite0_random": BACKBONE})
    params = with_grid(params, backbones=("lite0_random",), models=("lite0_random",), students=())
    created = []
    for head_class in (network, other):
        original = head_class.__init__

        def record(self, *args, original=original, **kwargs):
            created.append(type(self))
            original(self, *args, **kwargs)

        monkeypatch.setattr(head_class, "__init__", record)
    (estimate,) = [
        estimate
        for estimate in plan.plan(params, {"d": dataset("segmentation")}, "cpu")
        if estimate.stage == "tune, train"
    ]
    n_heads = params.search.trials + params.train.seeds
    assert estimate.images == n_heads * settings[head].steps * settings[head].batch
    assert estimate.hours > 0
    assert created == [network]


def test_plan_datasets_of_one_shape_share_a_timed_network(params, capsys):
    params = dataclasses.replace(params, backbones={**params.backbones, "lite0_random": BACKBONE})
    params = with_grid(params, backbones=("lite0_random",), models=("lite0_random",), students=())
    sizes = {"small": dataset("classification"), "large": dataset("classification", 300)}
    extracted = [estimate for estimate in plan.plan(params, sizes, "cpu") if estimate.stage == "extract"]
    timed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert timed == ["timing lite0_random", "timing linear"]
    small, large = extracted
    assert (large.hours, large.gigabytes) == pytest.approx((3 * small.hours, 3 * small.gigabytes))


def test_plan_without_students_or_teachers_has_no_estimate_of_students(params):
    def stages(changed, size):
        return [(estimate.stage, estimate.images) for estimate in plan.plan(changed, {"d": size}, "cpu")]

    chips = dataset("classification")
    assert "distill, export" not in dict(stages(with_grid(params, students=()), chips))
    other_datasets = dataclasses.replace(params.distill, datasets=("sample-trees",))
    assert "distill, export" not in dict(stages(dataclasses.replace(params, distill=other_datasets), chips))
    # A model without the bands that it needs cannot be a teacher.
    radar = dataset("classification", bands=(Band("VV", "sar_vv"),))
    no_bands = with_grid(params, backbones=("lite0",), models=("lite0",))
    assert stages(no_bands, radar) == [("prepare", 100), ("extract", 0)]
