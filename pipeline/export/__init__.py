"""Export of students to ONNX (float32 or int8 weights) and torch.export.

The input is chips as the images store has them: normalisation and resize are in the graph, and bands, units, classes
and size are in the file's metadata.
"""
