"""The verbs: one screen each, one per DVC stage, run as `python -m stages.<stage>`."""
