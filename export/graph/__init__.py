"""ONNX graphs: traced, reduced in precision, run with true rounding, counted."""
