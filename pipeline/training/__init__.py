"""Heads on cached features: what is joined, the only training loop, the search, and the paper's protocol."""
