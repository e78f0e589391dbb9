"""Training of heads on cached features: inputs, training loop, hyperparameter search and the frozen protocol."""
