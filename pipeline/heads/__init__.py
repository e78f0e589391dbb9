"""Heads in groups: K of them, each with its own seed, trained side by side on the same features.

A group is a `torch.nn.Module` with `heads` (a list of modules whose parameters belong to one head each) and
`pieces(inputs, index)`, which yields (positions of heads, logits (head, batch, class, …)) for the rows that
`index` (head, batch) picks from `inputs`.
"""
