import numpy as np
import pytest
import torch

from pipeline import cost
from pipeline.distillation.student import Student, StudentSpec


def test_operations_and_parameters_are_counted():
    one = torch.nn.Conv2d(3, 8, 3, padding=1, groups=1)
    assert cost.flops(lambda: one(torch.zeros(1, 3, 16, 16))) == 2 * 16 * 16 * 8 * 3 * 9
    usable = cost.BenchmarkedModel([one], lambda chips: one(torch.from_numpy(chips)))
    (row,) = cost.benchmark({"one": usable}, np.zeros((2, 3, 16, 16), np.float32), "cpu").to_dict("records")
    assert row["parameters"] == 8 * 27 + 8
    assert row["flops"] == 2 * 16 * 16 * 8 * 27
    assert row["bytes"] > 4 * row["parameters"]
    assert row["chips_per_second"] > 0


def test_a_student_costs_what_its_input_size_takes_not_its_chips():
    rows = {}
    for side in (32, 64):
        one = Student(
            StudentSpec("mobilenetv3_small_050", 2, 3, "classification", side), [0.0] * 2, [1.0] * 2
        )
        rows[side] = cost.flops(
            lambda one=one: cost.student(one.eval(), "cpu").predict(np.zeros((1, 2, 16, 16), np.uint16))
        )
    assert rows[64] == pytest.approx(4 * rows[32], rel=0.25)
