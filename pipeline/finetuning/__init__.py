"""Fine-tuning: the backbones themselves are trained on, from the frozen model and its best head."""
