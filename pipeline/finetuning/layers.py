"""Blocks of a network: trainable parameters, learning rates, LoRA adapters, activation checkpoints.

Blocks are the members of the network's outermost module lists (`blocks` of a vision transformer, `layer1` to `layer4`
of a ResNet, `stages` of a ConvNeXt), in order. Parameters registered before them are the stem; parameters after them,
such as a last normalisation, belong to the last block.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import FineTuneConfig
from pipeline.errors import UserError

_MODULE_LISTS = (nn.ModuleList, nn.Sequential)
# Names of attention modules in timm, terratorch and SAM 2.
_ATTENTION_NAMES = ("attn", "attention")


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network, first those next to the input; none if it has no module lists."""
    module = network
    while not isinstance(module, _MODULE_LISTS) and len(children := _children_with_parameters(module)) == 1:
        module = children[0]
    outermost = [module] if isinstance(module, _MODULE_LISTS) else _children_with_parameters(module)
    lists = [child for child in outermost if isinstance(child, _MODULE_LISTS) and len(child) > 1]
    return [block for module_list in lists for block in _children_with_parameters(module_list)]


def layer_index(network: nn.Module) -> dict[str, int]:
    """Return the number of each parameter's block by the parameter's name: 0 for the stem, blocks from 1."""
    block_of = {
        id(parameter): index for index, block in enumerate(blocks(network), 1) for parameter in block.parameters()
    }
    deepest, indices = 0, {}
    for name, parameter in network.named_parameters():
        indices[name] = block_of.get(id(parameter), deepest)
        deepest = max(deepest, indices[name])
    return indices


def layer_lr_scale(network: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factor on the head's learning rate for each parameter, by name.

    It is `layer_decay` for the last block, its square for the block before, and so on to the stem (Clark et al.,
    ELECTRA, ICLR 2020; as in Bao et al., BEiT, ICLR 2022).
    """
    n_blocks = len(blocks(network))
    return {name: layer_decay ** (n_blocks + 1 - index) for name, index in layer_index(network).items()}


def make_trainable(network: nn.Module, name: str, config: FineTuneConfig, seed: int) -> None:
    """Make the parameters that `config` selects trainable; refuse a backbone `name` without such layers."""
    if next(network.parameters(), None) is None:
        return
    if config.checkpointing:  # Chen et al., arXiv 1604.06174
        for block in blocks(network):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if config.method == "lora":
        _add_lora(network, config.rank, seed, name)
        return
    n_blocks, n_last_blocks, indices = len(blocks(network)), config.n_last_blocks, layer_index(network)
    if n_last_blocks > n_blocks:
        allowed = [f"last{n_blocks}"] * bool(n_blocks) + ["all", "lora"]
        raise UserError(
            f"finetune.method is '{config.method}', and {name} has {n_blocks} blocks. Choose one of: "
            f"{', '.join(allowed)}, or fewer blocks.",
            key="finetune.method", value=config.method, allowed=allowed,
        )  # fmt: skip
    for parameter_name, parameter in network.named_parameters():
        is_chosen = not n_last_blocks or indices[parameter_name] > n_blocks - n_last_blocks
        parameter.requires_grad_(parameter.is_floating_point() and is_chosen)


def _add_lora(network: nn.Module, rank: int, seed: int, name: str) -> None:
    """Insert low-rank adapters (Hu et al., LoRA, ICLR 2022), which start at zero and change no output.

    In transformers they adapt the linear layers of attention, as in the paper. In networks without attention they
    adapt the ungrouped 1x1 convolutions, which have most of the weights.
    """
    in_blocks = {id(module) for block in blocks(network) for module in block.modules()}
    attention, pointwise = [], []
    for module_name, module in network.named_modules():
        if id(module) not in in_blocks:
            continue
        if isinstance(module, nn.Linear) and set(_ATTENTION_NAMES) & set(module_name.split(".")):
            attention.append(module_name)
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            pointwise.append(module_name)
    if not (targets := attention or pointwise):
        raise UserError(
            f"{name} has no layers for LoRA: its blocks have no linear layers of attention and no 1x1 convolutions. "
            "Set finetune.method to all or last<n>.",
            key="finetune.method", value="lora", allowed=("all", "last<n>"),
        )  # fmt: skip
    from peft import LoraConfig, inject_adapter_in_model  # takes 3.4 s to import; other methods need none

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)


def _children_with_parameters(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if next(child.parameters(), None) is not None]
