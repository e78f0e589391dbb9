"""Training of heads on cached features: inputs, loop, hyperparameter search, frozen protocol."""
