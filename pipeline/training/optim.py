"""AdamW for many heads at once, and the learning rate schedule."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim.adamw import adamw

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Share of the steps in which the learning rate rises to its full value; it then falls as a cosine.
WARM_UP = 0.1


class StackedAdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) for several heads, each with its own hyperparameters.

    `parameters` are each (head, …), and whether weight decay applies to it.
    """

    def __init__(
        self, parameters: Sequence[tuple[torch.Tensor, bool]],
        learning_rates: Sequence[float], weight_decays: Sequence[float],
    ):  # fmt: skip
        self._parameters = [parameter for parameter, _ in parameters]
        self._moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter, _ in parameters]
        self._rates, decays = (self._parameters[0].new_tensor(values) for values in (learning_rates, weight_decays))
        self._decays = [decays * has_decay for _, has_decay in parameters]
        # On the device: a CUDA graph repeats its increase.
        self._steps = self._rates.new_zeros((), dtype=torch.float64)

    @torch.no_grad()
    def step(self, lr_factor: float | torch.Tensor) -> None:
        """Update once, with the learning rates times `lr_factor`: a number, or a float32 scalar on the device."""
        self._steps += 1
        rates, (mean_beta, square_beta) = self._rates * lr_factor, BETAS
        scaled_rates = rates / (1 - mean_beta**self._steps)
        square_correction = 1 - square_beta**self._steps
        for parameter, decays, (mean, square) in zip(self._parameters, self._decays, self._moments, strict=True):
            shape = (-1, *[1] * (parameter.ndim - 1))
            mean.lerp_(parameter.grad, 1 - mean_beta)
            square.mul_(square_beta).addcmul_(parameter.grad, parameter.grad, value=1 - square_beta)
            update = mean / (square / square_correction).sqrt_().add_(EPSILON)
            parameter.mul_((1 - rates * decays).view(shape)).sub_(update.mul_(scaled_rates.view(shape)))


class NetworkAdamW:
    """AdamW for one network: weights decay, biases and normalization do not.

    It calls torch's function, because torch's class imports torch's compiler, which takes 1.5 s a process.
    """

    def __init__(self, network: torch.nn.Module, learning_rate: float, weight_decay: float):
        self._learning_rate, parameters = learning_rate, list(network.parameters())
        self._groups = [
            ([parameter for parameter in parameters if parameter.ndim > 1], weight_decay),
            ([parameter for parameter in parameters if parameter.ndim <= 1], 0.0),
        ]
        # Mean, mean square and number of steps of each parameter.
        self._states: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, lr_factor: float | torch.Tensor) -> None:
        """Update the parameters with a gradient once, with the learning rate times `lr_factor`."""
        for parameters, weight_decay in self._groups:
            trained = [parameter for parameter in parameters if parameter.grad is not None]
            for parameter in trained:
                if parameter not in self._states:
                    n_steps = parameter.new_zeros((), dtype=torch.float32)
                    self._states[parameter] = torch.zeros_like(parameter), torch.zeros_like(parameter), n_steps
            gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
            means, squares, steps = ([self._states[parameter][index] for parameter in trained] for index in range(3))
            adamw(
                trained, gradients, means, squares, [], steps,
                fused=True, amsgrad=False, maximize=False, beta1=BETAS[0], beta2=BETAS[1], eps=EPSILON,
                lr=self._learning_rate * lr_factor, weight_decay=weight_decay,
            )  # fmt: skip


def warm_cosine(steps: int) -> Callable[[int], float]:
    """Return the learning rate factor as a function of the step: linear warm-up, then cosine to 0."""
    warm_up_steps = max(1, round(WARM_UP * steps))

    def lr_factor(step: int) -> float:
        if step < warm_up_steps:
            return (step + 1) / warm_up_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up_steps) / max(1, steps - warm_up_steps)))

    return lr_factor
