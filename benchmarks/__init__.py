"""Measurements, each a command: run from the root of the checkout."""
