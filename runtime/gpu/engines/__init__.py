"""Inference libraries of the GPU behind one small protocol, and what plans are for."""
