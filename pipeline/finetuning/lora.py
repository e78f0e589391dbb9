"""Low-rank adapters (Hu et al., LoRA, ICLR 2022), by peft.

In transformers on the linear layers of attention, as in the paper; in networks without attention on the ungrouped
1x1 convolutions, which hold most of their weights. Adapters begin as zero: the network is the frozen one.
"""

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.finetuning.layers import blocks

_ATTENTION = ("attn", "attention")


def add_lora(network: nn.Module, rank: int, seed: int, name: str) -> None:
    """Put adapters, which are trained, into a frozen network.

    Args:
        name: of the backbone, for the error.

    Raises:
        UserError: the network has no layer for them.
    """
    targets = lora_targets(network)
    if not targets:
        raise UserError(
            f"LoRA adapts the linear layers of attention, or 1x1 convolutions, inside a network's blocks, and {name} "
            "has none. Set finetune.method to all or last<n>."
        )
    # peft brings transformers, which takes seconds to import.
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)


def lora_targets(network: nn.Module) -> list[str]:
    """Names of the layers that are adapted."""
    inside = {id(module) for block in blocks(network) for module in block.modules()}
    layers = [(name, module) for name, module in network.named_modules() if id(module) in inside]
    linear = [
        name
        for name, module in layers
        if isinstance(module, nn.Linear) and any(part in _ATTENTION for part in name.split("."))
    ]
    return linear or [name for name, module in layers if _pointwise(module)]


def _pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
