"""Fine-tuning: train the backbones too, starting from the frozen model and its best head."""
