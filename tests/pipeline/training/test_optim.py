"""AdamW of several heads against torch's own, on the same gradients."""

import copy

import pytest
import torch

from pipeline.training.optim import NetworkAdamW, StackedAdamW, warm_cosine

LEARNING_RATES, DECAYS = [1e-2, 3e-1, 1e-4], [1e-2, 0.0, 30.0]


def test_stacked_adamw_of_each_head_equals_torchs():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 5, 7, generator=generator), torch.randn(3, 5, generator=generator)
    references = [[values[head].clone() for values in (weight, bias)] for head in range(3)]
    stacked = StackedAdamW([(weight, True), (bias, False)], LEARNING_RATES, DECAYS)
    optimizers = [
        torch.optim.AdamW([{"params": [w], "weight_decay": decay}, {"params": [b], "weight_decay": 0}], lr=rate)
        for (w, b), rate, decay in zip(references, LEARNING_RATES, DECAYS, strict=True)
    ]
    for _ in range(50):
        weight.grad = torch.randn(weight.shape, generator=generator)
        bias.grad = torch.randn(bias.shape, generator=generator)
        for head, (w, b) in enumerate(references):
            w.grad, b.grad = weight.grad[head].clone(), bias.grad[head].clone()
            optimizers[head].step()
        stacked.step(1.0)
    for head, (w, b) in enumerate(references):
        torch.testing.assert_close(weight[head], w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias[head], b, rtol=1e-5, atol=1e-6)


def test_network_adamw_is_exactly_torchs():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 5, 1))
    network.unused = torch.nn.Linear(2, 2)
    reference = copy.deepcopy(network)
    parameters = list(reference.parameters())
    groups = [{"params": [parameter], "weight_decay": 0.3 * (parameter.ndim > 1)} for parameter in parameters]
    optimizers = NetworkAdamW(network, 1e-2, 0.3), torch.optim.AdamW(groups, lr=0.5e-2, fused=True)
    for _ in range(20):
        image = torch.randn(4, 3, 9, 9)
        for trained, optimizer in zip((network, reference), optimizers, strict=True):
            optimizer.zero_grad()
            trained[:3](image).square().mean().backward()
        optimizers[0].step(0.5)
        optimizers[1].step()
    assert all(map(torch.equal, network.parameters(), parameters))


def test_warm_cosine_rises_then_falls_as_a_cosine():
    factors = [warm_cosine(100)(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] < 0.001
