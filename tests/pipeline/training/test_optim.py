"""AdamW of several heads against torch's own, on the same gradients."""

import copy

import pytest
import torch

from pipeline.training.optim import FusedAdamW, StackedAdamW, parameter_groups, warm_cosine

LEARNING_RATES, DECAYS = [1e-2, 3e-1, 1e-4], [1e-2, 0.0, 30.0]


def test_stacked_adamw_of_each_head_is_exactly_torchs():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 5, 7, generator=generator), torch.randn(3, 5, generator=generator)
    references = [[values[head].clone().requires_grad_() for values in (weight, bias)] for head in range(3)]
    stacked = StackedAdamW([(weight, True), (bias, False)], LEARNING_RATES, DECAYS)
    lr_factor = warm_cosine(50)
    optimizers = [
        torch.optim.AdamW(
            [{"params": [w], "weight_decay": decay}, {"params": [b], "weight_decay": 0}], lr=learning_rate, fused=True
        )
        for (w, b), learning_rate, decay in zip(references, LEARNING_RATES, DECAYS, strict=True)
    ]
    for step in range(50):
        weight.grad, bias.grad = torch.randn(weight.shape, generator=generator), torch.randn(bias.shape)
        for head, (w, b) in enumerate(references):
            w.grad, b.grad = weight.grad[head].clone(), bias.grad[head].clone()
            for group in optimizers[head].param_groups:
                group["lr"] = LEARNING_RATES[head] * lr_factor(step)
            optimizers[head].step()
        stacked.step(lr_factor(step))
        for head, (w, b) in enumerate(references):
            assert torch.equal(weight[head], w)
            assert torch.equal(bias[head], b)


def test_fused_adamw_of_one_network_is_exactly_torchs():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1)
    )
    network = network.to(memory_format=torch.channels_last)
    network.unused = torch.nn.Linear(2, 2)
    reference = copy.deepcopy(network)
    fused = FusedAdamW(network, 1e-2, 0.3)
    optimizer = torch.optim.AdamW(parameter_groups(reference, 1e-2, 0.3), fused=True)
    lr_factor = warm_cosine(30)
    for step in range(30):
        image = torch.randn(4, 3, 9, 9)
        for trained, its_optimizer in ((network, fused), (reference, optimizer)):
            its_optimizer.zero_grad()
            trained[:4](image).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * lr_factor(step)
        optimizer.step()
        fused.step(lr_factor(step))
        for actual, expected in zip(network.parameters(), reference.parameters(), strict=True):
            assert torch.equal(actual, expected)


def test_warm_cosine_rises_then_falls_as_a_cosine():
    factors = [warm_cosine(100)(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] < 0.001
