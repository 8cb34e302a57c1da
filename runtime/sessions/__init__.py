"""Inference libraries of the CPU behind one small protocol, a file each."""
