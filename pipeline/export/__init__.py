"""A student as files that run elsewhere: ONNX, torch.export, and ONNX with int8 weights.

Chips go in as the images store has them: normalisation and resize are in the graph, and bands, units, classes and
size are in the file's metadata.
"""
