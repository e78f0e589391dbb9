"""Heads on pyramids, each its own network: K of them as lanes that share the features."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipeline.grids import bilinear_weights


class HeadList(nn.Module):
    """K networks, each initialised from its own seed.

    Args:
        make: makes one, from a list of levels (batch, channel, y, x) to logits (batch, class, y, x).
        size: height and width to which logits are resized: the mask's.
        seeds: one per head.
        precision: of the networks, float32 or bfloat16; parameters and logits are float32 either way.

    Attributes:
        stacked: parameters do not hold several heads.
        direct: `pull` gives the gradients; from the logits' own grid on they are autograd's.
    """

    is_stacked, has_manual_backward = False, True

    def __init__(
        self, make: Callable[[], nn.Module], size: tuple[int, int], seeds: Sequence[int], precision: str = "float32"
    ):
        super().__init__()
        self.size, self.precision = size, precision
        self.heads = nn.ModuleList()
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                head = make()
            # Channels last is faster on a CPU at these sizes (benchmarks/choices.py).
            self.heads.append(head.to(memory_format=torch.channels_last))

    def __len__(self) -> int:
        return len(self.heads)

    def independent_heads(self):
        """One per head, sharing its weights with this group."""
        alone = []
        for head in self.heads:
            lane = HeadList(nn.Identity, self.size, (), self.precision)
            lane.heads.append(head)
            alone.append(lane)
        return alone

    def forward_heads(self, inputs: Sequence[torch.Tensor], index: torch.Tensor | None):
        """Yield head by head, so that only one head's activations are held: (1, batch, class, y, x)."""
        for position in range(len(self)):
            yield slice(position, position + 1), self._resized(self._coarse(position, inputs, index))[None]

    def backward(
        self,
        inputs: Sequence[torch.Tensor],
        index: torch.Tensor | None,
        slope: Callable[[torch.Tensor, slice], torch.Tensor],
    ) -> None:
        """Add the gradients of all heads' losses to those of the parameters.

        Where the masks are, and logits largest, they are told directly: autograd takes several passes more.

        Args:
            inputs, index: as for `pieces`.
            slope: from logits (1, batch, class, y, x) of a head, and its place, to the loss's gradient by them.
        """
        for position in range(len(self)):
            coarse = self._coarse(position, inputs, index)
            with torch.no_grad():
                steep = slope(self._resized(coarse)[None], slice(position, position + 1))[0]
                rows, columns = self._weights(coarse)
                steep = (rows.t() @ steep) @ columns
            coarse.backward(steep)

    def _coarse(self, position: int, inputs: Sequence[torch.Tensor], index: torch.Tensor | None) -> torch.Tensor:
        """A head's logits on its own grid, float32 (batch, class, y, x)."""
        levels = inputs if index is None else [level[index[position]] for level in inputs]
        with torch.autocast(levels[0].device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits = self.heads[position](levels)
        return logits.float().contiguous()

    def _resized(self, coarse: torch.Tensor) -> torch.Tensor:
        """Logits at the masks' size by bilinear interpolation, as two matrix products: faster than torch's."""
        rows, columns = self._weights(coarse)
        return rows @ (coarse @ columns.t())

    def _weights(self, coarse: torch.Tensor) -> list[torch.Tensor]:
        grid = zip(coarse.shape[-2:], self.size, strict=True)
        return [bilinear_weights(old, new, coarse.device) for old, new in grid]
