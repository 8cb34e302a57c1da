"""TensorRT engines, built from a graph: by an export, and again where a plan does not fit."""
