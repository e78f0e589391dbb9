"""AdamW for many heads at once, and the schedule of all heads."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Share of the steps over which the learning rate rises to its full value, before it falls as a cosine.
WARM_UP = 0.1


class HeadwiseAdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) for parameters whose first dimension is the head.

    Every head has its own learning rate and weight decay. The kernel is torch's fused one, so that each head's
    numbers are exactly those of `torch.optim.AdamW` (a test compares); heads of the same setting are one call of it.

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
        self._views = self._cut()

    def freeze(self, head: int) -> None:
        """A head that changes no more."""
        self.settings[head] = (0.0, 0.0)
        self._views = self._cut()

    def zero_grad(self) -> None:
        for parameter, _ in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update, the learning rates times `factor`."""
        self.steps += 1
        for (parameter, _), views in zip(self.parameters, self._views, strict=True):
            for heads, rate, decay, values, mean, square in views:
                torch._fused_adamw_(
                    [values], [parameter.grad[heads]], [mean], [square], [], [self.steps],
                    lr=rate * factor, beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPSILON,
                    amsgrad=False, maximize=False,
                )  # fmt: skip

    def _cut(self) -> list[list[tuple]]:
        """Of each parameter, the views that one call updates: heads side by side that have the same setting."""
        starts = [place for place, one in enumerate(self.settings) if place == 0 or one != self.settings[place - 1]]
        runs = [slice(*ends) for ends in pairwise([*starts, len(self.settings)])]
        cut = []
        for (parameter, decays), (mean, square) in zip(self.parameters, self.moments, strict=True):
            values = parameter.detach()
            cut.append(
                [
                    (heads, rate, decay if decays else 0.0, values[heads], mean[heads], square[heads])
                    for heads, (rate, decay) in ((heads, self.settings[heads.start]) for heads in runs)
                ]
            )
        return cut


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
