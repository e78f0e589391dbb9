"""AdamW for many heads at once, and the learning rate schedule."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Share of the steps in which the learning rate rises to its full value; it then falls as a cosine.
WARM_UP = 0.1


class StackedAdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) for parameters whose first dimension is the head.

    Every head has its own learning rate and weight decay. The kernel is torch's fused one, so each head's numbers are
    exactly those of `torch.optim.AdamW` with its learning rate (a test compares). Consecutive heads of one learning
    rate share a call.

    Args:
        parameters: each (head, …), and whether weight decay applies to it.
        learning_rates, weight_decays: one per head.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[torch.Tensor, bool]],
        learning_rates: Sequence[float],
        weight_decays: Sequence[float],
    ):
        self.parameters = list(parameters)
        self.hparams = list(zip(learning_rates, weight_decays, strict=True))
        self.moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter, _ in parameters]
        self.steps = torch.zeros((), device=self.parameters[0][0].device)
        self._prepare_calls()

    def zero_grad(self) -> None:
        """Remove all gradients."""
        for parameter, _ in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr_factor: float | torch.Tensor) -> None:
        """Update once, with the learning rates times `lr_factor`: a number, or a float32 scalar on the device."""
        self.steps += 1
        # All heads' weight decay at once, so that one call of the kernel serves weights and biases of a head.
        remaining = (1 - self._decay_rates * lr_factor).to(self.parameters[0][0].dtype)
        for parameter, has_decay in self.parameters:
            if has_decay:
                parameter.mul_(remaining.view(-1, *[1] * (parameter.ndim - 1)))
        grads_of_heads = [parameter.grad.unbind() for parameter, _ in self.parameters]
        for heads, learning_rate, values, means, squares in self._calls:
            grads = [grads[head] for head in heads for grads in grads_of_heads]
            torch._fused_adamw_(
                values, grads, means, squares, [], [self.steps] * len(values), lr=learning_rate * lr_factor,
                beta1=BETAS[0], beta2=BETAS[1], weight_decay=0.0, eps=EPSILON, amsgrad=False, maximize=False,
            )  # fmt: skip

    def _prepare_calls(self) -> None:
        """List what each call of the kernel updates: consecutive heads of the same learning rate.

        Every head has separate tensors, because the kernel rounds the last elements of a tensor differently.
        """
        learning_rates = [learning_rate for learning_rate, _ in self.hparams]
        decay_rates = [learning_rate * decay for learning_rate, decay in self.hparams]
        self._decay_rates = torch.tensor(decay_rates, dtype=torch.float64, device=self.steps.device)
        kinds = [[parameter.detach() for parameter, _ in self.parameters], *zip(*self.moments, strict=True)]
        self._calls = []
        for learning_rate, run in groupby(range(len(learning_rates)), key=lambda head: learning_rates[head]):
            heads = list(run)
            tensors = ([tensor[head] for head in heads for tensor in kind] for kind in kinds)
            self._calls.append((heads, learning_rate, *tensors))


def parameter_groups(head: torch.nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """Return torch's parameter groups of one head: weights decay, biases and normalization do not."""
    groups = []
    for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
        parameters = [parameter for parameter in head.parameters() if (parameter.ndim > 1) == is_matrix]
        groups.append({"params": parameters, "lr": learning_rate, "weight_decay": decay})
    return groups


class FusedAdamW:
    """AdamW for one head, by direct calls of torch's fused kernel; the interface of `StackedAdamW`.

    `torch.optim.AdamW` groups the parameters by device and dtype at every step, which takes longer here than the
    kernel. Parameters without a gradient at the first step never have one.
    """

    def __init__(self, head: torch.nn.Module, learning_rate: float, weight_decay: float):
        groups = parameter_groups(head, learning_rate, weight_decay)
        self._groups = [(group["params"], group["weight_decay"]) for group in groups]
        self._learning_rate = learning_rate
        # Values, their decay, and their two moments of each call; empty before the first step.
        self._calls: list[tuple] = []
        self._steps: torch.Tensor  # created at the first step, on the device of the parameters

    def zero_grad(self) -> None:
        """Remove all gradients."""
        for parameters, _ in self._groups:
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self, lr_factor: float | torch.Tensor) -> None:
        """Update once, with the learning rate times `lr_factor`."""
        if not self._calls:
            self._prepare_calls()
        self._steps += 1
        for values, decay, means, squares in self._calls:
            torch._fused_adamw_(
                values, [value.grad for value in values], means, squares, [], [self._steps] * len(values),
                lr=self._learning_rate * lr_factor, beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPSILON,
                amsgrad=False, maximize=False,
            )  # fmt: skip

    def _prepare_calls(self) -> None:
        """List what each call of the kernel updates: the parameters with a gradient."""
        for parameters, decay in self._groups:
            values = [parameter for parameter in parameters if parameter.grad is not None]
            means, squares = ([torch.zeros_like(value) for value in values] for _ in range(2))
            self._calls += [(values, decay, means, squares)] if values else []
        self._steps = torch.zeros((), device=self._calls[0][0][0].device)


def warm_cosine(steps: int) -> Callable[[int], float]:
    """Return the learning rate factor as a function of the step: linear warm-up, then cosine to 0."""
    warm_up_steps = max(1, round(WARM_UP * steps))

    def lr_factor(step: int) -> float:
        if step < warm_up_steps:
            return (step + 1) / warm_up_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up_steps) / max(1, steps - warm_up_steps)))

    return lr_factor
