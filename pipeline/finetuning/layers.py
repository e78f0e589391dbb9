"""The blocks of any network: what is trained of it, at which rate, and what is computed twice to save memory.

Blocks are the members of the network's outermost lists of modules (`blocks` of a vision transformer, `layer1` to
`layer4` of a ResNet, `stages` of a ConvNeXt), in order. Parameters that are registered before them are the stem;
those after them, such as a last normalisation, go with the last block.
"""

from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import UserError

_LISTS = (nn.ModuleList, nn.Sequential)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network, those next to the input first; none if it has no lists of modules."""
    module = network
    while not isinstance(module, _LISTS) and len(inside := _trainable(module)) == 1:
        module = inside[0]
    outermost = [module] if isinstance(module, _LISTS) else _trainable(module)
    return [block for one in outermost if isinstance(one, _LISTS) and len(one) > 1 for block in _trainable(one)]


def layer_index(network: nn.Module) -> dict[str, int]:
    """Of every parameter, by name: 0 for the stem, and the number of the block, from 1."""
    number, deepest, found = {}, 0, {}
    for place, block in enumerate(blocks(network), start=1):
        number |= {id(parameter): place for parameter in block.parameters()}
    for name, parameter in network.named_parameters():
        found[name] = number.get(id(parameter), deepest)
        deepest = max(deepest, found[name])
    return found


def layer_lr_scale(network: nn.Module, decay: float) -> dict[str, float]:
    """Of every parameter, by name, its share of the head's learning rate.

    `decay` for the last block, and times `decay` for each one before it; the stem's comes last (layer-wise decay:
    Clark et al., ELECTRA, ICLR 2020, as used by Bao et al., BEiT, ICLR 2022).
    """
    last = len(blocks(network))
    return {name: decay ** (last + 1 - depth) for name, depth in layer_index(network).items()}


def unfreeze(network: nn.Module, last: int, name: str) -> None:
    """Have a frozen network's parameters trained: those of the last blocks, or with 0 all.

    Raises:
        UserError: it has fewer blocks.
    """
    count = len(blocks(network))
    if last > count:
        has = f"{count} blocks" if count else "no list of blocks"
        fewer = f"last{count} or fewer, " if count else ""
        raise UserError(f"finetune.method is 'last{last}', and {name} has {has}. Choose {fewer}all or lora.")
    depth = layer_index(network)
    for parameter, values in network.named_parameters():
        values.requires_grad_(values.is_floating_point() and (not last or depth[parameter] > count - last))


def enable_checkpointing(network: nn.Module) -> None:
    """Keep only the blocks' inputs for the gradients, and compute what is inside them again (gradient checkpointing:
    Chen et al., arXiv 1604.06174)."""
    for block in blocks(network):
        block.forward = _again(block.forward)


def _again(forward):
    def computed(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return computed


def _trainable(module: nn.Module) -> list[nn.Module]:
    """Its parts that hold parameters."""
    return [child for child in module.children() if next(child.parameters(), None) is not None]
