"""K heads' AdamW against torch's own, on the same gradients."""

import copy

import pytest
import torch

from pipeline.training.optim import FusedAdamW, StackedAdamW, parameter_groups, warm_cosine

RATES, DECAYS = [1e-2, 3e-1, 1e-4], [1e-2, 0.0, 30.0]


def test_each_heads_numbers_are_exactly_torchs():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 5, 7, generator=generator), torch.randn(3, 5, generator=generator)
    theirs = [[one[head].clone().requires_grad_() for one in (weight, bias)] for head in range(3)]
    ours = StackedAdamW([(weight, True), (bias, False)], RATES, DECAYS)
    factor = warm_cosine(50)
    optimisers = [
        torch.optim.AdamW(
            [{"params": [w], "weight_decay": decay}, {"params": [b], "weight_decay": 0}], lr=rate, fused=True
        )
        for (w, b), rate, decay in zip(theirs, RATES, DECAYS, strict=True)
    ]
    for step in range(50):
        weight.grad, bias.grad = torch.randn(weight.shape, generator=generator), torch.randn(bias.shape)
        for optimiser, rate, (w, b), head in zip(optimisers, RATES, theirs, range(3), strict=True):
            w.grad, b.grad = weight.grad[head].clone(), bias.grad[head].clone()
            for group in optimiser.param_groups:
                group["lr"] = rate * factor(step)
            optimiser.step()
        ours.step(factor(step))
        for head, (w, b) in enumerate(theirs):
            assert torch.equal(weight[head], w)
            assert torch.equal(bias[head], b)


def test_one_networks_numbers_are_exactly_torchs():
    ours = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1)
    )
    ours = ours.to(memory_format=torch.channels_last)
    ours.unused = torch.nn.Linear(2, 2)
    theirs = copy.deepcopy(ours)
    mine = FusedAdamW(ours, 1e-2, 0.3)
    optimiser = torch.optim.AdamW(parameter_groups(theirs, 1e-2, 0.3), fused=True)
    factor = warm_cosine(30)
    for step in range(30):
        image = torch.randn(4, 3, 9, 9)
        for network, one in ((ours, mine), (theirs, optimiser)):
            one.zero_grad()
            network[:4](image).square().mean().backward()
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * factor(step)
        optimiser.step()
        mine.step(factor(step))
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_rate_rises_then_falls_as_a_cosine():
    factors = [warm_cosine(100)(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] < 0.001
