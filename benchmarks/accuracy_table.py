"""The table of docs/accuracy.md, from the results of bench_accuracy.py.

python benchmarks/accuracy_table.py benchmarks/results/accuracy.json
"""

import json
import sys
from pathlib import Path

from common import Row

SHOWN = {
    "best tkd": "best TKD",
    "best tikhonov": "best Tikhonov",
    "tv": "`tv`, the default",
    "medi": "`medi`, with a magnitude",
    "tv-unet": "`tv-unet`",
    "ir2qsm": "`ir2qsm` demo",
    "ir2qsm, data consistency": "the same, `--data-consistency`",
}
CONDITIONS = {
    (0.0, 0.0): "no noise",
    (0.0025, 0.0): "0.0025 ppm",
    (0.005, 0.0): "0.005 ppm",
    (0.0025, 0.002): "0.0025, left-over 0.002",
    (0.0025, 0.005): "0.0025, left-over 0.005",
}


def table(summary: list[Row]) -> str:
    """Return it in Markdown: NRMSE / XSIM / HFEN, the least NRMSE of a column in bold."""
    lines = ["| volume | | " + " | ".join(CONDITIONS.values()) + " |", "|---" * 7 + "|"]
    for group in dict.fromkeys(row["group"] for row in summary):
        rows = {
            (row["method"], (row["noise_ppm"], row["left_over"])): row
            for row in summary
            if row["group"] == group
        }
        least = {
            c: min(rows[m, c]["nrmse_percent"] for m in SHOWN if (m, c) in rows) for c in CONDITIONS
        }
        title = group
        for method, name in SHOWN.items():
            cells = [_cell(rows.get((method, c)), least[c]) for c in CONDITIONS]
            if any(cell != "-" for cell in cells):
                lines.append(f"| {title} | {name} | " + " | ".join(cells) + " |")
                title = ""
    return "\n".join(lines)


def _cell(row: Row | None, least: float) -> str:
    if row is None:
        return "-"
    nrmse = f"{row['nrmse_percent']:.1f}"
    nrmse = f"**{nrmse}**" if row["nrmse_percent"] == least else nrmse
    return f"{nrmse} / {row['xsim_uniform5']:.2f} / {row['hfen_percent']:.0f}"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())["summary"]))
