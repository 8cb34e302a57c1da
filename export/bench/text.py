"""What ``qsm-bench`` found, as a table for people."""

from typing import Any

from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.runtime.console.peak_memory import memory_text

GIGA = 1e9
HEADS = ("", "library", "precision", "median", "from - to", "speed", "memory", "Mvoxel/s")
MORE = ("GFLOP/s", "of product", "of copy", "p99.9", "max")


def bench_text(result: dict[str, Any]) -> str:
    """Return a line on what ran where, the rows, and the stages of each."""
    plan, machine = result["plan"], result["machine"]
    run = "whole" if plan["whole_volume"] else f"{plan['patches']} patches"
    busy = machine["others_busy_cores"]
    lines = [
        f"{shape_text(result['shape'])}, {run}, {result['repeats']} reconstructions each, in turns",
        f"{machine['processor']}, {machine['cores']} cores"
        + ("" if busy is None else f", {busy:g} of them busy with other work"),
        *(_peak_line(device, peak) for device, peak in result["peaks"].items()),
        *_reference_lines(result["rows"]),
        "",
        *_table([(*HEADS, *MORE), *(_cells(row) for row in result["rows"])]),
        "",
    ]
    stages = [name for row in result["rows"] for name in row["seconds"] if name != "total"]
    names = ["load", *dict.fromkeys(stages)]
    rows = [("median seconds", *names)]
    for row in result["rows"]:
        medians = {"load": row["load_seconds"]}
        medians |= {name: times["median"] for name, times in row["seconds"].items()}
        rows.append((_name(row), *(f"{medians[n]:.3f}" if n in medians else "-" for n in names)))
    return "\n".join([*lines, *_table(rows)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    total, accuracy = row["seconds"]["total"], row["accuracy"]
    return (
        row["name"],
        row["library"],
        row["precision"],
        f"{total['median']:.3f} s",
        f"{total['min']:.3f} - {total['max']:.3f}",
        f"{row['speed']:.2f}x",
        memory_text(row.get("gpu_bytes", row["peak_bytes"])),
        f"{row['voxels_per_second'] / 1e6:.2f}",
        f"{row['gflop_per_second']:.0f}" if "gflop_per_second" in row else "-",
        _percent(row.get("share_of_peak_product")),
        _percent(row.get("share_of_peak_copy")),
        *(("-", "-") if accuracy is None else map("{:.2g}".format, _errors(accuracy))),
    )


def _errors(accuracy: dict[str, Any]) -> tuple[float, float]:
    return accuracy["p999_ppb"], accuracy["max_ppb"]


def _reference_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the errors are relative to, for each network."""
    found = {(row["network"], row["accuracy"]["reference"]) for row in rows if row["accuracy"]}
    lines = [f"errors of {network} in ppb against {name}" for network, name in sorted(found)]
    return lines or ["no errors: the weights for PyTorch are not at hand (--weights)"]


def _name(row: dict[str, Any]) -> str:
    return f"{row['name']}, {row['library']} {row['precision']}"


def _peak_line(device: str, peak: dict[str, Any] | None) -> str:
    if peak is None:
        return f"{device}: its peak was not measured, PyTorch cannot use it"
    products = ", ".join(
        f"{rate / GIGA:.0f} GFLOP/s in {name}" for name, rate in peak["flop_per_second"].items()
    )
    return (
        f"{device}: a product at {products}; a copy at {peak['bytes_per_second'] / GIGA:.1f} GB/s"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
