"""Map a scene of any size: predict overlapping tiles, blend them, and write Cloud Optimized GeoTIFFs.

Memory does not grow with the scene. Only `torch_predictors` imports torch: exported students need onnxruntime alone.
"""
