"""Linear heads on pooled vectors, K as one batched product."""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class StackedLinear(nn.Module):
    """K linear classifiers, each initialised from its own seed.

    Args:
        widths: channels of each member's pooled vectors, or of all together.
        classes: outputs.
        seeds: one per head.
        projected: channels in and out of the projections of all members but the first; none for concatenation.
        mix: from the first member's vectors and the others' projected ones to (head, batch, channel).

    Attributes:
        stacked: parameters hold all heads, along their first dimension.
        direct: one layer a head, whose gradients `pull` gives without autograd.
    """

    is_stacked = True

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        seeds: Sequence[int],
        projected: Sequence[tuple[int, int]] = (),
        mix: Callable | None = None,
    ):
        super().__init__()
        self.widths, self.mix, self.has_manual_backward = list(widths), mix, not projected
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

    def independent_heads(self):
        """One: the heads are trained as one product."""
        return [self]

    def parameter_heads(self) -> list[tuple[nn.Parameter, bool]]:
        """Weights (head, out, in) decay, biases (head, out) do not."""
        return [(one, True) for one in self.weights] + [(one, False) for one in self.biases]

    def forward_heads(self, inputs: torch.Tensor, index: torch.Tensor | None):
        """Yield once: all heads and their logits (head, batch, class), from inputs (sample, channel)."""
        rows = inputs if index is None else self._picked(inputs, index)
        yield slice(None), self._logits(rows) if self.has_manual_backward else self._mixed(rows)

    @torch.no_grad()
    def backward(
        self, inputs: torch.Tensor, index: torch.Tensor | None, slope: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> None:
        """Set the gradients of all heads' losses, by the product that they are; autograd takes longer to get there.

        Args:
            inputs, index: as for `pieces`.
            slope: from logits (head, batch, class), and whose they are, to the losses' gradients by them.
        """
        rows = inputs if index is None else self._picked(inputs, index)
        steep = slope(self._logits(rows), slice(None))
        self.biases[0].grad = steep.sum(dim=1)
        if rows.ndim == 3:
            self.weights[0].grad = torch.bmm(steep.transpose(1, 2), rows)
        else:
            flat = steep.transpose(0, 1).flatten(1)
            self.weights[0].grad = torch.mm(flat.t(), rows).view_as(self.weights[0])

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Each head on its own rows (head, batch, channel), or all on the same (batch, channel), as one product."""
        if rows.ndim == 3:
            return self._product(0, rows)
        logits = torch.addmm(self.biases[0].flatten(), rows, self.weights[0].flatten(0, 1).t())
        return logits.view(len(rows), len(self), -1).transpose(0, 1)

    def _mixed(self, rows: torch.Tensor) -> torch.Tensor:
        first, *others = rows.expand(len(self), -1, -1).split(self.widths, dim=2)
        others = [self._product(layer, other) for layer, other in enumerate(others)]
        return self._product(-1, self.mix(first, others))

    def _product(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Each head on its own rows (head, batch, channel).

        Weights come first: with few classes that is faster on a CPU than rows first
        (benchmarks/choices.py).
        """
        bias = self.biases[layer][:, :, None]
        return torch.baddbmm(bias, self.weights[layer], rows.transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def _picked(inputs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return inputs.index_select(0, index.flatten()).view(*index.shape, -1)
