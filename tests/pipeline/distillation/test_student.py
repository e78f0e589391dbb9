"""Students by themselves: what goes in, what comes out, and what a folder of one holds."""

import json

import pytest
import torch

from pipeline.distillation import student_files
from pipeline.errors import UserError

SHAPE = student_files.StudentSpec("mobilenetv3_small_050", 5, 3, "classification", 64)
TOLD = {
    "dataset": "d", "task": "classification", "classes": ["a", "b", "c"], "ignore": None, "units": "dn", "gsd": 10.0,
    "bands": [{"name": f"B{i}", "common_name": f"c{i}", "wavelength": None} for i in range(5)], "size": [16, 16],
    "variant": "supervised", "weights": "random", "teacher": None,
}  # fmt: skip


def made(**changes) -> student_files.Student:
    torch.manual_seed(0)
    shape = student_files.StudentSpec(**{**vars(SHAPE), **changes})
    return student_files.Student(shape, [100.0] * shape.n_bands, [10.0] * shape.n_bands).eval()


@pytest.mark.parametrize(("task", "gives"), [("classification", (2, 3)), ("segmentation", (2, 3, 48, 40))])
def test_logits_have_the_chips_own_size(task, gives):
    with torch.inference_mode():
        logits = made(task=task)(torch.rand(2, 5, 48, 40) * 200)
    assert logits.shape == gives
    assert logits.dtype == torch.float32


def test_normalisation_is_inside():
    student, chips = made(), torch.rand(2, 5, 64, 64) * 50 + 80
    other = student_files.Student(SHAPE, [0.0] * 5, [1.0] * 5).eval()
    tensors = {name: tensor for name, tensor in student.state_dict().items() if name not in ("mean", "std")}
    other.load_state_dict(tensors, strict=False)
    with torch.inference_mode():
        torch.testing.assert_close(student(chips), other((chips - 100) / 10))
        assert (student(chips) - other(chips)).abs().max() > 1e-3


def test_a_shrunk_chip_is_not_aliased():
    """Bilinear sampling alone would see one column in four of a finely striped chip."""
    student, chips = made(input_size=32), torch.full((1, 5, 128, 128), 110.0)
    striped = chips.clone()
    striped[..., 0::2] += 40
    striped[..., 1::2] -= 40
    with torch.inference_mode():
        for flat, fine in zip(student.levels(chips), student.levels(striped), strict=True):
            assert (flat - fine).abs().mean() < 0.1 * flat.abs().mean()


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_saved_and_loaded_it_says_the_same(tmp_path, task):
    student, chips = made(task=task), torch.rand(2, 5, 16, 16) * 200
    student_files.save_student(tmp_path / "best", student, {**TOLD, "task": task})
    loaded, told = student_files.load_student(tmp_path / "best")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(chips), student(chips), rtol=0, atol=0)
    assert not loaded.training
    assert told["parameters"] == sum(one.numel() for one in student.parameters())
    assert told["mean"] == [100.0] * 5
    assert told["architecture"] == "mobilenetv3_small_050"


def test_an_exported_graph_takes_any_number_of_raw_chips():
    for task in ("classification", "segmentation"):
        student, batch = made(task=task), torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(student, (torch.rand(2, 5, 16, 16),), dynamic_shapes=({0: batch},)).module()
        chips = torch.rand(7, 5, 16, 16) * 200
        with torch.inference_mode():
            torch.testing.assert_close(program(chips), student(chips))


def test_networks_that_cannot_be_students_are_refused():
    with pytest.raises(UserError, match="no network 'mobilnet'"):
        made(architecture="mobilnet")
    with pytest.raises(UserError, match="stride 32"):
        made(input_size=16)
    with pytest.raises(UserError, match="swin_tiny.* cannot be a student of 64 px and 5 bands"):
        made(architecture="swin_tiny_patch4_window7_224")


def test_a_folder_that_is_no_student_is_refused(tmp_path):
    with pytest.raises(UserError, match="no student in"):
        student_files.load_student(tmp_path)
    student_files.save_student(tmp_path, made(), TOLD)
    with pytest.raises(ValueError, match="units"):
        student_files.save_student(tmp_path, made(), {key: value for key, value in TOLD.items() if key != "units"})
    told = json.loads((tmp_path / "student.json").read_text())
    (tmp_path / "student.json").write_text(json.dumps({**told, "classes": ["a", "b"]}))
    with pytest.raises(UserError, match="does not fit the network"):
        student_files.load_student(tmp_path)
    (tmp_path / "student.json").write_text(json.dumps({"architecture": "x"}))
    with pytest.raises(UserError, match="does not describe a student"):
        student_files.load_student(tmp_path)
    (tmp_path / "student.json").write_text(json.dumps(told))
    (tmp_path / "student.pt").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="not a checkpoint"):
        student_files.load_student(tmp_path)
