"""Heads: networks from cached features to logits, and the registry of their names.

A new dense head is one file and one line in `HEADS`, or, from outside the package, one call of `register_head`. Its
class takes `(channels_in, n_classes, **options)`: channels of the levels, finest first, number of classes, and the
options of params.yaml (`heads.custom.<name>.options`). Its `forward` takes the levels (batch, channel, y, x),
finest first, and returns logits (batch, class, y, x) of any size.

Heads are trained in groups: K heads, each with its own seed and hyperparameters, on the same features. A group is a
`torch.nn.Module` with
- `__len__`: the number of heads;
- `independent_heads()`: the groups that share no computation and can be trained in parallel;
- `is_stacked`: whether the first dimension of all parameters is the head. `parameter_heads()` then lists the
  parameters and whether weight decay applies to each. Else each independent group has one head;
- `forward_heads(inputs, index)`: yields (slice of heads, logits (head, batch, class, …)). Head k gets the rows
  `index[k]` of `inputs`; without `index` all heads get all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from pipeline.errors import UserError


@dataclass(frozen=True)
class HeadType:
    """An entry of the registry.

    Attributes:
        factory: the head's class, or "module:class", which is imported on first use (torch takes 3 s to import).
        is_dense: whether the head predicts pixels from levels; else it predicts chips from pooled features.
    """

    factory: Callable | str
    is_dense: bool = True

    def load(self) -> Callable:
        """Import the factory."""
        if not isinstance(self.factory, str):
            return self.factory
        module, name = self.factory.split(":")
        return getattr(import_module(module), name)


HEADS = {
    "linear": HeadType("pipeline.heads.linear:StackedLinear", is_dense=False),
    "upernet": HeadType("pipeline.heads.upernet:UPerNet"),
    "fcn": HeadType("pipeline.heads.fcn:Fcn"),
}


def register_head(name: str, factory: Callable | str) -> None:
    """Add a dense head, a class or "module:class"; its settings are `heads.custom.<name>` of params.yaml.

    A name that is taken raises ValueError.
    """
    if name in HEADS:
        raise ValueError(f"There is already a head called '{name}'.")
    HEADS[name] = HeadType(factory)


def get_head(name: str, is_dense: bool | None = None, key: str = "heads.segmentation") -> HeadType:
    """Return a head of the registry, or raise UserError.

    Args:
        is_dense: only among the dense heads (True) or the pooled ones (False).
        key: origin of the name, for the message.
    """
    names = [other for other, head in HEADS.items() if is_dense is None or head.is_dense == is_dense]
    if name not in names:
        raise UserError(f"{key} is '{name}'. Choose one of: {', '.join(names)}.", key=key, value=name, allowed=names)
    return HEADS[name]
