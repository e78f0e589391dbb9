"""The science: data, backbones, heads, training, search, distillation, maps. No DVC, no fixed paths."""
