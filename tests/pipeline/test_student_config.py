"""Mistakes in the sections on students are refused, each with its key."""

import dataclasses

import pytest
import yaml

from pipeline import config
from pipeline.errors import UserError
from tests.conftest import ROOT
from tests.stages.conftest import merge


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": {"students": ["tiny"]}}, "no student 'tiny'"),
        ({"distill": {"datasets": ["sample-tree"]}}, "no dataset 'sample-tree'"),
        ({"grid": {"students": ["small", "small"]}}, "name each once"),
        (
            {"students": {"small": {"weights": "imagenet"}}},
            "students.small.weights is 'imagenet'.*or a backbone",
        ),
        ({"students": {"small": {"weights": "lite0_random"}}}, "no trained weights"),
        ({"students": {"small": {"chip_size": 0}}}, "students.small.chip_size is 0"),
        ({"students": {"small": {"width": 2}}}, "unknown key"),
        ({"distill": {"teacher": "hiera_200m"}}, "distill.teacher is 'hiera_200m', which is not in grid.models"),
        ({"distill": {"ablation": ["both"]}}, "distill.ablation names 'both'"),
        ({"distill": {"labels": 0.0}}, "control"),
        ({"distill": {"logits": -1.0}}, "distill.logits"),
        ({"distill": {"temperature": 0.0}}, "distill.temperature"),
        ({"distill": {"masks": {"batch": 1}}}, "BatchNorm"),
        ({"distill": {"search": {"trials": 0}}}, "distill.search.trials"),
        ({"distill": {"search": {"learning_rate": [1.0, 0.1]}}}, "distill.search.learning_rate"),
    ],
)
def test_refused(tmp_path, change, says):
    described = merge(yaml.safe_load((ROOT / "params.yaml").read_text()), change)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(described))
    with pytest.raises(UserError, match=says):
        config.load(tmp_path / "params.yaml")


def test_the_control_is_always_trained(params):
    assert params.distill.variants == ["distilled", "labels"]
    more = dataclasses.replace(params.distill, extra_variants=("logits", "features"))
    assert more.variants == ["distilled", "features", "logits", "labels"]


def test_another_student_is_one_line(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    line = "students:\n  mine: {network: resnet18, weights: random, chip_size: 64, mask_size: 64}\n  small:"
    (tmp_path / "params.yaml").write_text(
        text.replace("students:\n  small:", line).replace("    - small\n", "    - mine\n")
    )
    assert config.load(tmp_path / "params.yaml").student("mine").network == "resnet18"
