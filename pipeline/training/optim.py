"""AdamW for many heads at once, and the learning rate schedule."""

import math
from collections.abc import Callable, Sequence

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Share of the steps in which the learning rate rises to its full value; it then falls as a cosine.
WARM_UP = 0.1


class StackedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, ICLR 2019) for parameters (head, …), with hyperparameters per head.

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
        rates, decays = (parameters[0][0].new_tensor(values) for values in (learning_rates, weight_decays))
        groups = [{"params": [value], "weight_decay": decays * has_decay} for value, has_decay in parameters]
        super().__init__(groups, {"lr": rates})
        self._steps = rates.new_zeros((), dtype=torch.float64)  # on the device: a CUDA graph repeats its increase

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters once."""
        self._steps += 1
        mean_correction, square_correction = (1 - beta**self._steps for beta in BETAS)
        for group in self.param_groups:
            (parameter,) = group["params"]
            state, shape = self.state[parameter], (-1, *[1] * (parameter.ndim - 1))
            if not state:
                state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            parameter.mul_((1 - group["lr"] * group["weight_decay"]).view(shape))
            state["mean"].lerp_(parameter.grad, 1 - BETAS[0])
            state["square"].mul_(BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - BETAS[1])
            scale = (state["square"] / square_correction).sqrt_().add_(EPSILON)
            parameter.sub_((group["lr"] / mean_correction).view(shape) * state["mean"] / scale)


def parameter_groups(head: torch.nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """Return torch's parameter groups of one head: weights decay, biases and normalization do not."""
    groups = []
    for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
        parameters = [parameter for parameter in head.parameters() if (parameter.ndim > 1) == is_matrix]
        groups.append({"params": parameters, "lr": learning_rate, "weight_decay": decay})
    return groups


def warm_cosine(steps: int) -> Callable[[int], float]:
    """Return the learning rate factor as a function of the step: linear warm-up, then cosine to 0."""
    warm_up_steps = max(1, round(WARM_UP * steps))

    def lr_factor(step: int) -> float:
        if step < warm_up_steps:
            return (step + 1) / warm_up_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up_steps) / max(1, steps - warm_up_steps)))

    return lr_factor
