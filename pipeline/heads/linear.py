"""Linear heads on pooled vectors, K as one batched product."""

from collections.abc import Sequence

import torch
from torch import nn


class LinearGroup(nn.Module):
    """K linear classifiers, each initialised from its own seed.

    Args:
        channels: of the fused pooled vector.
        classes: outputs.
        seeds: one per head.
    """

    def __init__(self, channels: int, classes: int, seeds: Sequence[int]):
        super().__init__()
        self.heads = nn.ModuleList()
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.heads.append(nn.Linear(channels, classes))

    def lanes(self):
        """One: the heads are trained as one product."""
        return [self]

    def pieces(self, inputs: torch.Tensor, index: torch.Tensor):
        """Yield once: all heads and their logits (head, batch, class), from inputs (sample, channel)."""
        weight = torch.stack([head.weight for head in self.heads])
        bias = torch.stack([head.bias for head in self.heads])
        yield slice(None), torch.baddbmm(bias[:, None], inputs[index], weight.transpose(1, 2))
