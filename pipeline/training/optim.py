"""AdamW for many heads at once, and the schedule of all heads."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Share of the steps over which the learning rate rises to its full value, before it falls as a cosine.
WARM_UP = 0.1


class StackedAdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) for parameters whose first dimension is the head.

    Every head has its own learning rate and weight decay. The kernel is torch's fused one, so that each head's
    numbers are exactly those of `torch.optim.AdamW` of that rate (a test compares); heads of one rate are one call.

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
        self.settings = list(zip(learning_rates, weight_decays, strict=True))
        self.moments = [(torch.zeros_like(one), torch.zeros_like(one)) for one, _ in parameters]
        self.steps = torch.zeros((), device=self.parameters[0][0].device)
        self._arrange()

    def zero_grad(self) -> None:
        for parameter, _ in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, factor: float | torch.Tensor) -> None:
        """One update, the learning rates times `factor`: a number, or a float32 scalar on the device."""
        self.steps += 1
        # All heads' decay at once, so that one call of the kernel serves weights and biases of a head.
        left = (1 - self._shrinks * factor).to(self.parameters[0][0].dtype)
        for parameter, decays in self.parameters:
            if decays:
                parameter.mul_(left.view(-1, *[1] * (parameter.ndim - 1)))
        gradients = [parameter.grad.unbind() for parameter, _ in self.parameters]
        for heads, rate, values, means, squares in self._calls:
            torch._fused_adamw_(
                values, [one[head] for head in heads for one in gradients], means, squares, [],
                [self.steps] * len(values), lr=rate * factor, beta1=BETAS[0], beta2=BETAS[1], weight_decay=0.0,
                eps=EPSILON, amsgrad=False, maximize=False,
            )  # fmt: skip

    def _arrange(self) -> None:
        """What each call of the kernel updates: heads side by side that have the same rate.

        Every head's tensors by themselves, since the kernel rounds what is left over at a tensor's end otherwise.
        """
        rates = [rate for rate, _ in self.settings]
        shrinks = [rate * decay for rate, decay in self.settings]
        self._shrinks = torch.tensor(shrinks, dtype=torch.float64, device=self.steps.device)
        kinds = [[parameter.detach() for parameter, _ in self.parameters], *zip(*self.moments, strict=True)]
        self._calls = []
        for rate, run in groupby(range(len(rates)), key=lambda head: rates[head]):
            heads = list(run)
            self._calls.append((heads, rate, *([one[head] for head in heads for one in kind] for kind in kinds)))


def parameter_groups(head: torch.nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """torch's groups for one head: weights decay; biases and normalisation, which are vectors, do not."""
    groups = []
    for decays, decay in ((True, weight_decay), (False, 0.0)):
        chosen = [parameter for parameter in head.parameters() if (parameter.ndim > 1) == decays]
        groups.append({"params": chosen, "lr": learning_rate, "weight_decay": decay})
    return groups


class TorchAdamW:
    """`torch.optim.AdamW` for one head, with the same interface: its fused kernel called directly.

    torch's own class sorts parameters by device and dtype at every step, which takes longer than the kernel here.
    Parameters without a gradient at the first step never have one.
    """

    def __init__(self, head: torch.nn.Module, learning_rate: float, weight_decay: float):
        groups = parameter_groups(head, learning_rate, weight_decay)
        self._groups = [(group["params"], group["weight_decay"]) for group in groups]
        self._rate, self._calls, self._steps = learning_rate, None, None

    def zero_grad(self) -> None:
        for parameters, _ in self._groups:
            for one in parameters:
                one.grad = None

    @torch.no_grad()
    def step(self, factor: float | torch.Tensor) -> None:
        if self._calls is None:
            self._begin()
        self._steps += 1
        for values, decay, means, squares in self._calls:
            torch._fused_adamw_(
                values, [one.grad for one in values], means, squares, [], [self._steps] * len(values),
                lr=self._rate * factor, beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPSILON,
                amsgrad=False, maximize=False,
            )  # fmt: skip

    def _begin(self) -> None:
        self._calls = []
        for parameters, decay in self._groups:
            values = [one for one in parameters if one.grad is not None]
            moments = [[torch.zeros_like(one) for one in values] for _ in range(2)]
            self._calls += [(values, decay, *moments)] if values else []
        self._steps = torch.zeros((), device=self._calls[0][0][0].device)


def warm_cosine(steps: int) -> Callable[[int], float]:
    """From a step to the share of the learning rate: a linear rise, then a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor
