"""Distillation of cached teachers into compact students; no backbone is run."""
