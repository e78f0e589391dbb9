"""K linear heads on pooled features, computed as one batched product."""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class StackedLinear(nn.Module):
    """A group of K linear classifiers, each initialised from its own seed.

    Args:
        widths: channels of each backbone's pooled features; the inputs are these, concatenated.
        n_classes: number of classes.
        seeds: one per head.
        fuse: from the first backbone's features and the list of the others' projected features, each (head, batch,
            channel), to fused features; None classifies the concatenated inputs.
        projections: channels in and out of the projections of all backbones but the first.
        fused_width: channels of the fused features; None without `fuse`.

    Attributes:
        is_stacked: the first dimension of all parameters is the head.
        has_manual_backward: whether `backward` computes the gradients without autograd; not with `fuse`.
    """

    is_stacked = True

    def __init__(
        self,
        widths: Sequence[int],
        n_classes: int,
        seeds: Sequence[int],
        fuse: Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor] | None = None,
        projections: Sequence[tuple[int, int]] = (),
        fused_width: int | None = None,
    ):
        super().__init__()
        self.widths, self.fuse, self.has_manual_backward = list(widths), fuse, fuse is None
        self.n_projections = len(projections)
        shapes = [*projections, (sum(widths) if fused_width is None else fused_width, n_classes)]
        layers_of_heads = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                layers_of_heads.append([nn.Linear(*shape) for shape in shapes])
        stacks = list(zip(*layers_of_heads, strict=True))
        self.weights = nn.ParameterList(torch.stack([layer.weight.detach() for layer in stack]) for stack in stacks)
        self.biases = nn.ParameterList(torch.stack([layer.bias.detach() for layer in stack]) for stack in stacks)

    def __len__(self) -> int:
        return len(self.biases[-1])

    def independent_heads(self) -> list["StackedLinear"]:
        """Return this group: all heads are computed as one product."""
        return [self]

    def parameter_heads(self) -> list[tuple[nn.Parameter, bool]]:
        """Return all parameters and whether weight decay applies.

        It applies to weights (head, out, in), not to biases (head, out).
        """
        return [(weight, True) for weight in self.weights] + [(bias, False) for bias in self.biases]

    def forward_heads(self, inputs: torch.Tensor, index: torch.Tensor | None):
        """Yield once: (all heads, logits (head, batch, class)).

        Args:
            inputs: (sample, channel).
            index: rows of each head, (head, batch); None for all rows.
        """
        rows = inputs if index is None else self._select(inputs, index)
        yield slice(None), self._logits(rows) if self.fuse is None else self._fused_logits(rows, self.fuse)

    @torch.no_grad()
    def backward(
        self,
        inputs: torch.Tensor,
        index: torch.Tensor | None,
        loss_grad: Callable[[torch.Tensor, slice], torch.Tensor],
    ) -> None:
        """Set the gradients of all heads' losses, each one matrix product; autograd takes longer.

        Args:
            inputs, index: as for `forward_heads`.
            loss_grad: from logits (head, batch, class) and the slice of heads to the gradient with respect to the
                logits.
        """
        rows = inputs if index is None else self._select(inputs, index)
        grad_logits = loss_grad(self._logits(rows), slice(None))
        self.biases[0].grad = grad_logits.sum(dim=1)
        if rows.ndim == 3:
            self.weights[0].grad = torch.bmm(grad_logits.transpose(1, 2), rows)
        else:
            flat = grad_logits.transpose(0, 1).flatten(1)
            self.weights[0].grad = torch.mm(flat.t(), rows).view_as(self.weights[0])

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (head, batch, class) of each head's own rows (head, batch, channel) or of shared ones."""
        if rows.ndim == 3:
            return self._linear(0, rows)
        logits = torch.addmm(self.biases[0].flatten(), rows, self.weights[0].flatten(0, 1).t())
        return logits.view(len(rows), len(self), -1).transpose(0, 1)

    def _fused_logits(
        self, rows: torch.Tensor, fuse: Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        first, *features = rows.expand(len(self), -1, -1).split(self.widths, dim=2)
        if self.n_projections:
            features = [self._linear(layer, values) for layer, values in enumerate(features)]
        return self._linear(-1, fuse(first, features))

    def _linear(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Apply a layer of each head to its own rows (head, batch, channel).

        The weights are the first factor: with few classes that is faster on a CPU (benchmarks/choices.py).
        """
        bias = self.biases[layer][:, :, None]
        return torch.baddbmm(bias, self.weights[layer], rows.transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def _select(inputs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows (head, batch, channel) of inputs (sample, channel)."""
        return inputs.index_select(0, index.flatten()).view(*index.shape, -1)
