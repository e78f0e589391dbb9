import json

import pytest
import torch

from pipeline.backbones import create_backbone, get_spec
from pipeline.backbones.base import InputBands
from pipeline.config import BackboneConfig
from pipeline.distillation.student import (
    Student,
    StudentSpec,
    load_student,
    make_student,
    pretrained_state,
    save_student,
)
from pipeline.errors import UserError
from tests.errors import raises

SPEC = StudentSpec("test_resnet", 5, 3, "classification", 64)
METADATA = {
    "dataset": "d", "task": "classification", "classes": ["a", "b", "c"], "ignore": None, "units": "dn", "gsd": 10.0,
    "bands": [{"name": f"B{i}", "common_name": f"c{i}", "wavelength": None} for i in range(5)], "size": [16, 16],
    "variant": "supervised", "weights": "random", "teacher": None,
}  # fmt: skip
LITE0 = BackboneConfig("efficientnet", "lite0", "pretrained", 64)
LITE0_STUDENT = StudentSpec("tf_efficientnet_lite0", 3, 4, "classification", 64)
RGB = ("red", "green", "blue")


def create(**changes) -> Student:
    torch.manual_seed(0)
    spec = StudentSpec(**{**vars(SPEC), **changes})
    return Student(spec, [100.0] * spec.n_bands, [10.0] * spec.n_bands).eval()


def test_student_normalises_its_input():
    student, chips = create(), torch.rand(2, 5, 64, 64) * 50 + 80
    unnormalised = Student(SPEC, [0.0] * 5, [1.0] * 5).eval()
    tensors = {name: tensor for name, tensor in student.state_dict().items() if name not in ("mean", "std")}
    unnormalised.load_state_dict(tensors, strict=False)
    with torch.inference_mode():
        torch.testing.assert_close(student(chips), unnormalised((chips - 100) / 10))
        assert (student(chips) - unnormalised(chips)).abs().max() > 1e-3


def test_student_antialiases_when_it_shrinks_chips():
    """Bilinear sampling without antialiasing would read one column in four of a finely striped chip."""
    student, chips = create(input_size=32), torch.full((1, 5, 128, 128), 110.0)
    striped = chips.clone()
    striped[..., 0::2] += 40
    striped[..., 1::2] -= 40
    with torch.inference_mode():
        for flat, fine in zip(student.levels(chips), student.levels(striped), strict=True):
            assert (flat - fine).abs().mean() < 0.1 * flat.abs().mean()


@pytest.mark.parametrize(
    ("changes", "mentions", "fields"),
    [
        ({"architecture": "mobilnet"}, [], {"key": "students.network", "value": "mobilnet"}),
        ({"input_size": 16}, [32], {"key": "students.input_size", "value": 16}),
        ({"task": "regression"}, [], {"key": "task", "value": "regression"}),
        (
            {"architecture": "swin_tiny_patch4_window7_224"}, ["64 px", "5 bands"],
            {"key": "students.network", "value": "swin_tiny_patch4_window7_224"},
        ),
    ],
)  # fmt: skip
def test_student_unusable_network_is_refused(changes, mentions, fields):
    with raises(UserError, *mentions, **fields):
        create(**changes)


def lite0_state(weights_dir, spec=LITE0_STUDENT, bands=RGB):
    return pretrained_state("lite0", LITE0, weights_dir, spec, bands)


def test_pretrained_state_known_bands_in_any_order_reproduce_the_backbone(weights_folder):
    image, folder, order = torch.randn(1, 3, 64, 64), weights_folder("lite0"), (2, 0, 1)
    network = create_backbone(LITE0, get_spec(LITE0), InputBands(RGB, (0, 1, 2), (None,) * 3, 64), folder)
    state = lite0_state(folder, bands=[RGB[index] for index in order])
    student = make_student(LITE0_STUDENT, [0.0] * 3, [1.0] * 3, state, 0).eval()
    with torch.inference_mode():
        for actual, expected in zip(student.levels(image[:, order]), network(image).levels, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_pretrained_state_more_bands_keep_the_magnitude_of_the_input_layer(weights_folder):
    six_bands = StudentSpec("tf_efficientnet_lite0", 6, 4, "classification", 64)
    wide = lite0_state(weights_folder("lite0"), six_bands, [*RGB, "nir", "swir16", "swir22"])["conv_stem.weight"]
    narrow = lite0_state(weights_folder("lite0"))["conv_stem.weight"]
    torch.testing.assert_close(wide.sum(dim=1), narrow.sum(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide[:, 0], narrow[:, 0] / 2)


def test_make_student_random_weights_follow_the_seed():
    seeds = (0, 0, 1)
    first, repeated, different = (make_student(SPEC, [0.0] * 5, [1.0] * 5, None, seed).head.weight for seed in seeds)
    assert torch.equal(first, repeated)
    assert not torch.equal(first, different)


def test_pretrained_state_of_another_network_is_refused(weights_folder, tmp_path):
    other_network = StudentSpec("test_resnet", 3, 4, "classification", 64)
    with raises(UserError, "test_resnet", key="students.weights", value="lite0"):
        lite0_state(weights_folder("lite0"), other_network)
    with raises(UserError, key="students.weights", value="lite0", path=tmp_path / get_spec(LITE0).weights_file):
        lite0_state(tmp_path)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_save_student_loaded_student_predicts_the_same(tmp_path, task):
    student, chips = create(task=task), torch.rand(2, 5, 48, 40) * 200
    save_student(tmp_path / "best", student, {**METADATA, "task": task})
    loaded, metadata = load_student(tmp_path / "best")
    with torch.inference_mode():
        logits = student(chips)
        torch.testing.assert_close(loaded(chips), logits, rtol=0, atol=0)
    assert logits.shape == ((2, 3, 48, 40) if task == "segmentation" else (2, 3))
    assert logits.dtype == torch.float32
    assert not loaded.training
    assert metadata["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert metadata["mean"] == [100.0] * 5
    assert metadata["architecture"] == SPEC.architecture


@pytest.mark.parametrize(
    ("file", "content", "mentions"),
    [
        ("student.json", None, []),
        ("student.json", {"architecture": "x"}, ["bands"]),
        ("student.json", {**METADATA, "classes": ["a", "b"], "architecture": SPEC.architecture, "input_size": 64,
                          "mean": [1.0] * 5, "std": [1.0] * 5}, ["head"]),
        ("student.pt", None, []),
        ("student.pt", "not tensors", []),
    ],
    ids=["no metadata", "incomplete metadata", "other classes", "no tensors", "damaged tensors"],
)  # fmt: skip
def test_load_student_absent_or_damaged_files_are_refused(tmp_path, file, content, mentions):
    save_student(tmp_path, create(), METADATA)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    named_file = "student.pt" if mentions == ["head"] else file  # the tensors do not fit these classes
    with raises(UserError, *mentions, path=tmp_path / named_file):
        load_student(tmp_path)
