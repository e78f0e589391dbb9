"""AdamW of several heads against torch's own, on the same gradients."""

import pytest
import torch

from pipeline.training.optim import StackedAdamW, warm_cosine

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
        stacked.step()
    for head, (w, b) in enumerate(references):
        torch.testing.assert_close(weight[head], w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias[head], b, rtol=1e-5, atol=1e-6)


def test_warm_cosine_rises_then_falls_as_a_cosine():
    factors = [warm_cosine(100)(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] < 0.001
