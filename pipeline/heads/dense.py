"""K dense heads on feature pyramids, each its own network."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipeline.feature_ops import bilinear_weights


class HeadList(nn.Module):
    """A group of K networks, each initialised from its own seed.

    Args:
        make_head: makes a network from levels (batch, channel, y, x), finest first, to logits (batch, class, y, x).
        output_size: height and width to which logits are resized: those of the masks.
        seeds: one per head.
        precision: of the networks' computation, float32 or bfloat16; parameters and logits are float32 either way.

    Attributes:
        is_stacked: False; each parameter belongs to one head.
        has_manual_backward: `backward` computes the gradient of the loss and the resizing without autograd.
    """

    is_stacked, has_manual_backward = False, True

    def __init__(
        self,
        make_head: Callable[[], nn.Module],
        output_size: tuple[int, int],
        seeds: Sequence[int],
        precision: str = "float32",
    ):
        super().__init__()
        self.output_size, self.precision = output_size, precision
        self.heads = nn.ModuleList()
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                head = make_head()
            # Channels last is faster on a CPU at these sizes (benchmarks/choices.py).
            self.heads.append(head.to(memory_format=torch.channels_last))

    def __len__(self) -> int:
        return len(self.heads)

    def independent_heads(self) -> list["HeadList"]:
        """Return one group per head, which shares its parameters with this group."""
        groups = []
        for head in self.heads:
            group = HeadList(nn.Identity, self.output_size, (), self.precision)
            group.heads.append(head)
            groups.append(group)
        return groups

    def forward_heads(self, inputs: Sequence[torch.Tensor], index: torch.Tensor | None):
        """Yield (slice of one head, logits (1, batch, class, y, x)) for each head.

        Only the activations of one head are in memory.

        Args:
            inputs: levels (sample, channel, y, x), finest first.
            index: rows of each head, (head, batch); None for all rows.
        """
        for position in range(len(self)):
            yield slice(position, position + 1), self._resize(self._low_res_logits(position, inputs, index))[None]

    def backward(
        self,
        inputs: Sequence[torch.Tensor],
        index: torch.Tensor | None,
        loss_grad: Callable[[torch.Tensor, slice], torch.Tensor],
    ) -> None:
        """Add the gradients of all heads' losses to those of the parameters.

        At the size of the masks, where logits are largest, the gradient is computed directly, because autograd needs
        several more passes. From the logits on the head's grid on, autograd computes it.

        Args:
            inputs, index: as for `forward_heads`.
            loss_grad: from logits (1, batch, class, y, x) of a head and its slice to the gradient with respect to the
                logits.
        """
        for position in range(len(self)):
            low_res_logits = self._low_res_logits(position, inputs, index)
            with torch.no_grad():
                grad_logits = loss_grad(self._resize(low_res_logits)[None], slice(position, position + 1))[0]
                rows, columns = self._resize_weights(low_res_logits)
                grad_logits = (rows.t() @ grad_logits) @ columns
            low_res_logits.backward(grad_logits)

    def _low_res_logits(
        self, position: int, inputs: Sequence[torch.Tensor], index: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits of a head on its output grid, float32 (batch, class, y, x)."""
        levels = inputs if index is None else [level[index[position]] for level in inputs]
        with torch.autocast(levels[0].device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits = self.heads[position](levels)
        return logits.float().contiguous()

    def _resize(self, low_res_logits: torch.Tensor) -> torch.Tensor:
        """Logits of the masks' size, bilinear, as two matrix products: faster than torch's `interpolate`."""
        rows, columns = self._resize_weights(low_res_logits)
        return rows @ (low_res_logits @ columns.t())

    def _resize_weights(self, low_res_logits: torch.Tensor) -> list[torch.Tensor]:
        sides = zip(low_res_logits.shape[-2:], self.output_size, strict=True)
        return [bilinear_weights(old, new, low_res_logits.device) for old, new in sides]
