"""The networks that come along."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parents[1] / "models" / "tv-unet.onnx"
BUNDLED = {"tv-unet": BUNDLED_MODEL}  # by name
