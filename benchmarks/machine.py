"""What a measurement ran on and with, for the head of every result."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

LIBRARIES = ("numpy", "scipy", "torch", "onnx", "onnxruntime", "openvino")


def machine() -> dict[str, Any]:
    """Return processor, cores, system, and library versions."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "processor": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "qsm_deploy": version("qsm-deploy"),
        **{name: version(name) for name in LIBRARIES},
    }


def version(name: str) -> str | None:
    """Return a library's version; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
