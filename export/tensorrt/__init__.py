"""TensorRT plans, built."""
