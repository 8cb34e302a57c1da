"""Whether a file in INT8 is computed in INT8 on this CPU, or what it says in FP32."""

from pathlib import Path

from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.sessions.session import Backend, Precision

INT8_IN = "int8_in"  # of a card's options: the backends whose INT8 kept to the budget at export
CPUINFO = Path("/proc/cpuinfo")
SUMMING_IN_INT32 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def why_not_int8(card: ModelCard, backend: Backend) -> str | None:
    """Return why a backend computes a file in FP32 that is in INT8; ``None`` if it need not."""
    if backend not in card.options.get(INT8_IN, "").split():
        return f"INT8 in {backend} was not found accurate at export"
    return None if sums_in_int32() else "this CPU has neither VNNI nor AMX for INT8"


def sums_in_int32() -> bool:
    """Tell whether products of INT8 are summed in INT32; elsewhere sums of two saturate at INT16.

    OpenVINO says that any x86 CPU is able of INT8.
    """
    return CPUINFO.is_file() and not SUMMING_IN_INT32.isdisjoint(CPUINFO.read_text().split())


def computed_precision(card: ModelCard, backend: Backend, asked: Precision) -> Precision:
    """Return what a backend computes a file in."""
    if asked != "auto":
        return asked
    return "int8" if card.precision == "int8" and not why_not_int8(card, backend) else "fp32"
