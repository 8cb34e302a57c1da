"""What a large cohort takes, a section for each question, each with a key in one file.

python benchmarks/bench_scale.py storage -o benchmarks/results/scale.json
"""

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from common import Row, parser, say

from qsm_deploy.export.bench.machine import machine

SHAPE = (160, 192, 160)


def storage(folder: Path) -> list[Row]:
    """Return the bytes of a map of a head in each type, and the error of whole ppb."""
    head = folder / "head"
    words = ["qsm-phantom", head, "--shape", *SHAPE, "--seed", "1", "-q"]
    subprocess.run([str(word) for word in words], check=True)
    exact = folder / "float32.nii.gz"
    rows = []
    for method in ("tv", "tv-unet", "tkd"):
        sizes = {}
        for dtype in ("float32", "int16"):
            chi = folder / f"{dtype}.nii.gz"
            words = ["qsm-run", head / "field.nii.gz", "-m", head / "mask.nii.gz", "-o", chi]
            words += ["--method", method, "--out-dtype", dtype, "--force", "-q"]
            subprocess.run([str(word) for word in words], check=True, capture_output=True)
            sizes[f"{dtype}_bytes"] = chi.stat().st_size
        read, kept = (nib.load(path).get_fdata() for path in (chi, exact))
        row = {"map": method, "shape": SHAPE, **sizes}
        row["ratio"] = round(sizes["float32_bytes"] / sizes["int16_bytes"], 2)
        row["largest_error_ppb"] = round(1000 * float(np.abs(read - kept).max()), 4)
        rows.append(say(row))
    return rows


SECTIONS: dict[str, Callable[[Path], list[Row]]] = {"storage": storage}


def main() -> None:
    """Measure the sections that are named, print them and put them in the file."""
    p = parser(__doc__)
    p.add_argument("sections", nargs="+", choices=SECTIONS)
    args = p.parse_args()
    for name in args.sections:
        with tempfile.TemporaryDirectory() as folder:
            result = {"machine": machine(), "rows": SECTIONS[name](Path(folder))}
        if args.output is not None:
            there = json.loads(args.output.read_text()) if args.output.exists() else {}
            args.output.write_text(json.dumps({**there, name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
