import numpy as np
import pytest
import torch

from pipeline import cost
from pipeline.distillation.student import Student, StudentSpec


def test_benchmark_counts_operations_and_parameters():
    network = torch.nn.Conv2d(3, 8, 3, padding=1)
    flops = 2 * 16 * 16 * 8 * 3 * 9
    assert cost.flops(lambda: network(torch.zeros(1, 3, 16, 16))) == flops
    model = cost.BenchmarkedModel([network], lambda chips: network(torch.from_numpy(chips)))
    (row,) = cost.benchmark({"conv": model}, np.zeros((2, 3, 16, 16), np.float32), "cpu").to_dict("records")
    assert row["model"] == "conv"
    assert row["parameters"] == 8 * 27 + 8
    assert row["flops"] == flops
    assert row["bytes"] == 4 * row["parameters"]
    assert row["chips_per_second"] > 0


def test_student_model_cost_depends_on_its_input_size_not_on_the_chips():
    flops = {}
    for input_size in (32, 64):
        spec = StudentSpec("test_resnet", 2, 3, "classification", input_size)
        model = cost.student_model(Student(spec, [0.0] * 2, [1.0] * 2).eval(), "cpu")
        flops[input_size] = cost.flops(lambda model=model: model.predict(np.zeros((1, 2, 16, 16), np.uint16)))
    assert flops[64] == pytest.approx(4 * flops[32], rel=0.25)
