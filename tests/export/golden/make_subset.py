"""Thin out the golden vectors: the whole input, every 33rd voxel of each output.

python tests/export/golden/make_subset.py FOLDER_WITH_GOLDEN_VECTORS
"""

import sys
from pathlib import Path

import numpy as np

STRIDE = 33  # coprime to 32, so that every row and plane is met
CASES = {"published": "input", "legacy": "iteration"}


def main(folder: Path) -> None:
    """Write ``ir2qsm.npz`` beside this script."""
    arrays = {"input": np.load(folder / "input.npz")["input"]}
    for case, residual in CASES.items():
        golden = np.load(folder / f"ir2qsm_noisefree_{case}_residual.npz")
        arrays[f"output_{residual}"] = golden["output"].reshape(-1)[::STRIDE]
        arrays[f"all_{residual}"] = golden["all_output"].reshape(4, -1)[:, ::STRIDE]
    np.savez_compressed(Path(__file__).with_name("ir2qsm.npz"), stride=STRIDE, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
