"""The dipole operator in PyTorch, in ONNX, and as TensorRT's plugin knows it."""
