"""Heads on a GPU: the CPU's numbers, and a head among others has its own numbers."""

import pytest
import torch

from pipeline.tasks import Segmentation
from pipeline.training.feature_loader import SplitData
from tests.pipeline.training import test_loop
from tests.pipeline.training.test_loop import HPARAMS, head_weights


@pytest.fixture
def fit_heads(gpu, points, maps):
    """Function from the name of a head, hyperparameters and a device to trained heads."""

    def fit(head: str, hparams=HPARAMS, device: str = gpu, **options):
        if head == "linear":
            return test_loop.fit_linear(points[0].to(device), points[1].to(device), hparams, **options)
        levels, label = maps
        return test_loop.fit_upernet([level.to(device) for level in levels], label.to(device), hparams, **options)

    return fit


def assert_equal_heads(actual, expected):
    """Compare the parameters of every head, relative to their norm."""
    for head in range(len(HPARAMS)):
        weights, expected_weights = head_weights(actual, head).cpu(), head_weights(expected, head).cpu()
        assert (weights - expected_weights).norm() / expected_weights.norm() < 0.03


@pytest.mark.parametrize(
    ("head", "options"), [("linear", {}), ("upernet", {}), ("upernet", {"task": Segmentation(2, (1.0, 20.0))})]
)
def test_fit_on_a_gpu_has_the_cpus_numbers(fit_heads, head, options):
    cpu, cuda = (fit_heads(head, device=device, steps=10, **options) for device in ("cpu", "cuda"))
    assert_equal_heads(cuda, cpu)


@pytest.mark.parametrize(("head", "tolerance"), [("linear", 1e-4), ("upernet", 1e-7)])
def test_fit_on_a_gpu_of_a_head_among_others_equals_the_head_alone(fit_heads, head, tolerance):
    together = fit_heads(head, steps=10)
    for index, hparams in enumerate(HPARAMS):
        alone = head_weights(fit_heads(head, [hparams], steps=10), 0)
        assert (alone - head_weights(together, index)).norm() / alone.norm() < tolerance


def test_fit_on_a_gpu_with_patience_learns(fit_heads, maps):
    levels, label = maps
    validation = SplitData([level.cuda() for level in levels], label.cuda())
    group = fit_heads("upernet", steps=60, patience=2, validation=validation)
    assert test_loop.mean_iou(group, validation).max() > 0.7


def test_fit_on_a_gpu_in_bfloat16_is_near_float32(fit_heads):
    lower = head_weights(fit_heads("upernet", steps=10, precision="bfloat16"), 0)
    full = head_weights(fit_heads("upernet", steps=10), 0)
    assert 0 < torch.linalg.norm(lower - full) / torch.linalg.norm(full) < 0.2


def test_fit_on_a_gpu_of_linear_heads_that_stop_has_the_cpus_numbers(fit_heads, points):
    groups, noise = {}, test_loop.random_labels(points)
    for device in ("cpu", "cuda"):
        validation = SplitData(noise.inputs.to(device), noise.label.to(device))
        groups[device] = fit_heads("linear", device=device, steps=200, patience=1, validation=validation)
    assert_equal_heads(groups["cuda"], groups["cpu"])
    assert all(parameter.grad is None for parameter in groups["cuda"].parameters())


def test_fit_on_a_gpu_releases_the_memory_of_its_graphs(fit_heads):
    fit_heads("upernet", steps=10)
    reserved = torch.cuda.memory_reserved()
    for _ in range(3):
        fit_heads("upernet", steps=10)
    assert torch.cuda.memory_reserved() <= reserved
