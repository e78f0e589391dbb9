"""Heads in groups: K of them, each with its own seed, trained side by side on the same features.

A group is a `torch.nn.Module` with
- `heads`: a list of modules, whose parameters belong to one head each;
- `lanes()`: the parts that share no work and may be trained side by side, groups themselves;
- `pieces(inputs, index)`: yields (positions of heads, logits (head, batch, class, …)) for the rows of
  `inputs` that `index` (head, batch) picks.
"""
