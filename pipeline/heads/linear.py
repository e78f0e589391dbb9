"""Linear heads on pooled vectors, K as one batched product."""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class _Picked(torch.autograd.Function):
    """The product of each head's own rows with its weights, (head, batch, class).

    Rows are gathered and multiplied head by head, while they are in the core's cache: several times faster on a CPU
    than torch's batched product, which is slow for few classes (LAB.md).
    """

    @staticmethod
    def forward(context, inputs: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        picked = [inputs[rows] for rows in index]
        context.save_for_backward(*picked)
        return torch.stack([rows @ weight.t() for rows, weight in zip(picked, weights, strict=True)])

    @staticmethod
    def backward(context, gradient: torch.Tensor):
        pulled = [one.t() @ rows for rows, one in zip(context.saved_tensors, gradient, strict=True)]
        return None, None, torch.stack(pulled)


class LinearGroup(nn.Module):
    """K linear classifiers, each initialised from its own seed.

    Args:
        widths: channels of each member's pooled vectors, or of all together.
        classes: outputs.
        seeds: one per head.
        projected: channels in and out of the projections of all members but the first; none for concatenation.
        mix: from the first member's vectors and the others' projected ones to (head, batch, channel).

    Attributes:
        stacked: parameters hold all heads, along their first dimension.
    """

    stacked = True

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        seeds: Sequence[int],
        projected: Sequence[tuple[int, int]] = (),
        mix: Callable | None = None,
    ):
        super().__init__()
        self.widths, self.mix = list(widths), mix
        shapes = [*projected, (widths[0] if projected else sum(widths), classes)]
        made = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made.append([nn.Linear(*shape) for shape in shapes])
        layers = list(zip(*made, strict=True))
        self.weights = nn.ParameterList(torch.stack([one.weight.detach() for one in layer]) for layer in layers)
        self.biases = nn.ParameterList(torch.stack([one.bias.detach() for one in layer]) for layer in layers)

    def __len__(self) -> int:
        return len(self.biases[-1])

    def lanes(self):
        """One: the heads are trained as one product."""
        return [self]

    def parameter_heads(self) -> list[tuple[nn.Parameter, bool]]:
        """Weights (head, out, in) decay, biases (head, out) do not."""
        return [(one, True) for one in self.weights] + [(one, False) for one in self.biases]

    def pieces(self, inputs: torch.Tensor, index: torch.Tensor | None):
        """Yield once: all heads and their logits (head, batch, class), from inputs (sample, channel)."""
        if len(self.weights) > 1:
            logits = self._mixed(inputs[None] if index is None else inputs[index])
        elif index is None:
            logits = self._every(inputs).transpose(0, 1)
        elif len(inputs) <= index.numel():
            # One product over all rows, which stay where they are, is less work than gathering each head's.
            logits = self._every(inputs)[index, torch.arange(len(self), device=index.device)[:, None]]
        else:
            logits = _Picked.apply(inputs, index, self.weights[0]) + self.biases[0][:, None]
        yield slice(None), logits

    def _every(self, inputs: torch.Tensor) -> torch.Tensor:
        """(sample, head, class): every head on every row."""
        logits = torch.addmm(self.biases[0].flatten(), inputs, self.weights[0].flatten(0, 1).t())
        return logits.view(len(inputs), len(self), -1)

    def _mixed(self, rows: torch.Tensor) -> torch.Tensor:
        first, *others = rows.expand(len(self), -1, -1).split(self.widths, dim=2)
        others = [self._product(layer, other) for layer, other in enumerate(others)]
        return self._product(-1, self.mix(first, others))

    def _product(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.biases[layer][:, None], rows, self.weights[layer].transpose(1, 2))
