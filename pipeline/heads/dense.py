"""Heads on pyramids, each its own network: K of them as lanes that share the features."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional


class DenseGroup(nn.Module):
    """K networks, each initialised from its own seed.

    Args:
        make: makes one, from a list of levels (batch, channel, y, x) to logits (batch, class, y, x).
        size: height and width to which logits are resized: the mask's.
        seeds: one per head.
        precision: of the networks, float32 or bfloat16; parameters and logits are float32 either way.

    Attributes:
        stacked: parameters do not hold several heads.
        direct: gradients are autograd's.
    """

    stacked = direct = False

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

    def lanes(self):
        """One per head, sharing its weights with this group."""
        alone = []
        for head in self.heads:
            lane = DenseGroup(nn.Identity, self.size, (), self.precision)
            lane.heads.append(head)
            alone.append(lane)
        return alone

    def pieces(self, inputs: Sequence[torch.Tensor], index: torch.Tensor | None):
        """Yield head by head, so that only one head's activations are held: (1, batch, class, y, x)."""
        for position, head in enumerate(self.heads):
            levels = inputs if index is None else [level[index[position]] for level in inputs]
            with torch.autocast(levels[0].device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                logits = head(levels)
            resized = functional.interpolate(logits.float(), size=self.size, mode="bilinear")
            yield slice(position, position + 1), resized[None]
