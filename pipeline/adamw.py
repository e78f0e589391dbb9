"""AdamW for many heads at once, and the schedule of all heads."""

import math
from collections.abc import Callable, Sequence

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Share of the steps over which the learning rate rises to its full value, before it falls as a cosine.
WARM_UP = 0.1


class HeadwiseAdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) for parameters whose first dimension is the head.

    Every head has its own learning rate and weight decay. The operations are those of `torch.optim.AdamW`, in their
    order, so that each head's numbers are exactly torch's (a test compares), at the cost of one head.

    Args:
        parameters: each (head, …), and whether it decays.
        learning_rates, weight_decays: one per head.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[torch.Tensor, bool]],
        learning_rates: Sequence[float],
        weight_decays: Sequence[float],
    ):
        self.parameters = list(parameters)
        self.rates = torch.tensor(learning_rates, dtype=torch.float64)
        self.decays = torch.tensor(weight_decays, dtype=torch.float64)
        self.means = [torch.zeros_like(one) for one, _ in parameters]
        self.squares = [torch.zeros_like(one) for one, _ in parameters]
        self.steps = 0

    def freeze(self, head: int) -> None:
        """A head that changes no more."""
        self.rates[head] = 0

    def zero_grad(self) -> None:
        for parameter, _ in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update, the learning rates times `factor`."""
        self.steps += 1
        rates = self.rates * factor
        first, second = (1 - beta**self.steps for beta in BETAS)
        for (parameter, decays), mean, square in zip(self.parameters, self.means, self.squares, strict=True):
            shape, gradient = (-1, *[1] * (parameter.ndim - 1)), parameter.grad
            if decays:
                parameter.mul_((1 - rates * self.decays).to(parameter).view(shape))
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = square.sqrt().div_(second**0.5).add_(EPSILON)
            parameter.add_((mean * (-rates / first).to(parameter).view(shape)).div_(scale))


def parameter_groups(head: torch.nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """torch's groups for one head: weights decay; biases and normalisation, which are vectors, do not."""
    groups = []
    for decays, decay in ((True, weight_decay), (False, 0.0)):
        chosen = [parameter for parameter in head.parameters() if (parameter.ndim > 1) == decays]
        groups.append({"params": chosen, "lr": learning_rate, "weight_decay": decay})
    return groups


class TorchAdamW:
    """torch's own, for one head, with the same interface."""

    def __init__(self, head: torch.nn.Module, learning_rate: float, weight_decay: float):
        self._optimiser = torch.optim.AdamW(parameter_groups(head, learning_rate, weight_decay), fused=True)
        self._rate = learning_rate

    def zero_grad(self) -> None:
        self._optimiser.zero_grad(set_to_none=True)

    def step(self, factor: float) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate * factor
        self._optimiser.step()


def warm_cosine(steps: int) -> Callable[[int], float]:
    """From a step to the share of the learning rate: a linear rise, then a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor
