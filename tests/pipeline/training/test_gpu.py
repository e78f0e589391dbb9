"""Heads on a GPU: the CPU's numbers, and a head among others has its own numbers."""

from functools import partial

import numpy as np
import pytest
import torch

from pipeline.heads.linear import StackedLinear
from pipeline.tasks import Classification, Segmentation
from pipeline.training import loop
from pipeline.training.feature_loader import SplitData
from pipeline.training.loop import TrainSchedule
from tests.pipeline.training.test_loop import HPARAMS, fit_linear, fit_upernet, head_weights, mean_iou


@pytest.fixture
def fit_heads(gpu, points, maps):
    """Function from the name of a head, hyperparameters and a device to trained heads."""

    def fit(head: str, hparams, device: str = gpu, **options):
        if head == "linear":
            return fit_linear(*(values.to(device) for values in points), hparams, **options)
        levels, label = maps
        return fit_upernet([level.to(device) for level in levels], label.to(device), hparams, **options)

    return fit


def assert_equal_heads(actual, expected):
    """Compare the parameters of every head, relative to their norm."""
    for head in range(len(HPARAMS)):
        weights, expected_weights = head_weights(actual, head).cpu(), head_weights(expected, head).cpu()
        assert (weights - expected_weights).norm() / expected_weights.norm() < 0.03


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_fit_on_a_gpu_has_the_cpus_numbers(fit_heads, head):
    cpu, cuda = (fit_heads(head, HPARAMS, device, steps=10) for device in ("cpu", "cuda"))
    assert_equal_heads(cuda, cpu)


@pytest.mark.parametrize(("head", "tolerance"), [("linear", 1e-4), ("upernet", 1e-7)])
def test_fit_on_a_gpu_of_a_head_among_others_equals_the_head_alone(fit_heads, head, tolerance):
    together = fit_heads(head, HPARAMS, steps=10)
    for index, hparams in enumerate(HPARAMS):
        alone = head_weights(fit_heads(head, [hparams], steps=10), 0)
        assert (alone - head_weights(together, index)).norm() / alone.norm() < tolerance


def test_fit_on_a_gpu_with_patience_learns(fit_heads, maps):
    levels, label = maps
    validation = SplitData([level.cuda() for level in levels], label.cuda())
    group = fit_heads("upernet", HPARAMS, steps=60, patience=2, validation=validation)
    assert mean_iou(group, validation).max() > 0.7


def test_fit_on_a_gpu_in_bfloat16_is_near_float32(fit_heads):
    lower = head_weights(fit_heads("upernet", HPARAMS, steps=10, precision="bfloat16"), 0)
    full = head_weights(fit_heads("upernet", HPARAMS, steps=10), 0)
    assert np.isfinite(lower.cpu()).all()
    assert 0 < torch.linalg.norm(lower - full) / torch.linalg.norm(full) < 0.2


def test_fit_on_a_gpu_of_linear_heads_that_stop_has_the_cpus_numbers(fit_heads, points):
    """Validation labels are random."""
    inputs, label = points
    noise = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(1))]
    schedule, groups = TrainSchedule(200, batch=32, patience=1, val_checks=20), {}
    for device in ("cpu", "cuda"):
        data, validation = (SplitData(inputs.to(device), values.to(device)) for values in (label, noise))
        make_group = partial(StackedLinear, [12], 3)
        groups[device] = loop.fit(make_group, data, Classification(3), HPARAMS, schedule, validation)
    assert_equal_heads(groups["cuda"], groups["cpu"])
    assert all(parameter.grad is None for parameter in groups["cuda"].parameters())


def test_fit_on_a_gpu_with_class_weights_has_the_cpus_numbers(fit_heads):
    task = Segmentation(2, (1.0, 20.0))
    cuda, cpu = (fit_heads("upernet", HPARAMS, device, steps=10, task=task) for device in ("cuda", "cpu"))
    assert_equal_heads(cuda, cpu)


def test_fit_on_a_gpu_releases_the_memory_of_its_graphs(fit_heads):
    fit_heads("upernet", HPARAMS, steps=10)
    reserved = torch.cuda.memory_reserved()
    for _ in range(3):
        fit_heads("upernet", HPARAMS, steps=10)
    assert torch.cuda.memory_reserved() <= reserved
