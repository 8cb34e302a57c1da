"""What a measurement ran on and with, for the head of every result, and who else was busy."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

from qsm_deploy.runtime.sessions.session import BACKENDS

LIBRARIES = ("numpy", "scipy", "torch", "onnx", *BACKENDS)
CPUINFO, STAT = Path("/proc/cpuinfo"), Path("/proc/stat")


def machine() -> dict[str, Any]:
    """Return processor, cores, system, and library versions."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "processor": cpu[0] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
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


class Others:
    """How many cores other processes keep busy while something is timed.

    Above a tenth or so, times are worth little.
    """

    def __init__(self) -> None:
        self._began, self._all, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def busy_cores(self) -> float | None:
        """Return their mean number since the creation of this object, if the system tells."""
        now = _busy_seconds()
        if now is None or self._all is None:
            return None
        passed = time.perf_counter() - self._began
        others = now - self._all - (_own_seconds() - self._own)
        return round(max(0.0, others / passed), 2)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _busy_seconds() -> float | None:
    """Return the time that all cores together have worked since the machine started."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, *_ = (
        int(ticks) for ticks in STAT.read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
