"""Resident memory of this process: now, and at its peak since the last reset."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc_pid_clear_refs(5)


def rss_bytes() -> int:
    """Return the resident memory now [bytes]; its peak where the system does not tell."""
    return _from_status("VmRSS") or peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Return the peak resident memory since :func:`reset_peak`, else since the start [bytes]."""
    in_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    since_start = in_kib if sys.platform == "darwin" else in_kib * 1024
    return _from_status("VmHWM") or since_start


def address_space_bytes() -> int:
    """Return the address space in use now [bytes], 0 where the system does not tell."""
    return _from_status("VmSize") or 0


def reset_peak() -> None:
    """Let the peak start again from the memory in use now, where the system can do that."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK)


def return_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library keeps it (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _from_status(field: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    kib = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kib[0]) * 1024 if kib else None


def memory_text(size: float) -> str:
    """Return a number of bytes as people read it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
