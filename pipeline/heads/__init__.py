"""Heads: networks from cached features to logits, and the registry of dense heads.

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
from pkgutil import resolve_name

from pipeline.errors import UserError

# Classes, or "module:class", which is imported on first use (torch takes 3 s to import).
HEADS: dict[str, Callable | str] = {"upernet": "pipeline.heads.upernet:UPerNet", "fcn": "pipeline.heads.fcn:Fcn"}


def register_head(name: str, head: Callable | str) -> None:
    """Add a dense head, a class or "module:class"; its settings are `heads.custom.<name>` of params.yaml.

    A name that is taken raises ValueError.
    """
    if name in HEADS:
        raise ValueError(f"There is already a head called '{name}'.")
    HEADS[name] = head


def get_head(name: str) -> Callable:
    """Return the class of a dense head by its name, or raise UserError."""
    if name not in HEADS:
        key, names = "heads.segmentation", list(HEADS)
        raise UserError(f"{key} is '{name}'. Choose one of: {', '.join(names)}.", key=key, value=name, allowed=names)
    head = HEADS[name]
    return resolve_name(head) if isinstance(head, str) else head
