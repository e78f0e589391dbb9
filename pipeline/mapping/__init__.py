"""A scene of any size becomes a map: overlapping tiles, blended, in memory that does not grow with the scene.

Nothing here imports torch but the predictors that need it: an exported student maps with onnxruntime alone.
"""
