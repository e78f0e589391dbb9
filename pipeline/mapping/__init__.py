"""Map a scene of any size; memory does not grow with it. Only `torch_predictors` imports torch."""
