"""Heads in groups: K of them, each with its own seed, trained side by side on the same features.

A group is a `torch.nn.Module` with
- `__len__`: how many heads;
- `lanes()`: the parts that share no work and may be trained side by side, groups themselves;
- `stacked`: whether all heads are in the same parameters, along their first dimension, which
  `parameter_heads()` then lists with whether each decays; else a lane is one head;
- `pieces(inputs, index)`: yields (positions of heads, logits (head, batch, class, …)) for the rows of
  `inputs` that `index` (head, batch) picks, or, where `index` is None, for all rows of `inputs`, the same for all.
"""
