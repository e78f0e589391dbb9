"""Distillation: a compact student learns from what the cache holds of the teachers; no teacher is run again."""
