"""Thin out the golden vectors: every 33rd voxel of each output, and one whole input for all.

python tests/export/golden/make_subset.py FOLDER_WITH_GOLDEN_VECTORS [NAME...]
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STRIDE = 33  # coprime to 32, so that every row and plane is met
# file: {array in it: (golden vector, array there)}; the input stands in ir2qsm.npz
SUBSETS = {
    "ir2qsm": {
        "output_input": ("ir2qsm_noisefree_published_residual", "output"),
        "all_input": ("ir2qsm_noisefree_published_residual", "all_output"),
        "output_iteration": ("ir2qsm_noisefree_legacy_residual", "output"),
        "all_iteration": ("ir2qsm_noisefree_legacy_residual", "all_output"),
    },
    "iqsm": {
        "output_v1": ("iqsm_v1_fixedLoT", "output"),
        "output_v2": ("iqsm_v2_learnableLoT", "output"),
    },
    "iqsm_plus": {"output": ("iqsm_plus_v1", "output")},
    "lpcnn": {"output_1": ("lpcnn_1ori", "output"), "output_2": ("lpcnn_2ori", "output")},
    "wide_resnet": {"output": ("spinet_dw", "output")},
    "xqsm": {"output": ("xqsm", "output")},
    "xqsm_unet": {"output": ("xqsm_unet", "output")},
    "qsmnet_torch": {
        "output_k3": ("qsmnet_torch_k3", "output"),
        "output_k5": ("qsmnet_torch_k5", "output"),
    },
    "ghpa": {"output": ("ege_ghpa2d_32_48", "output")},
    "after_qsm": {
        "output_recon": ("after_recon_unet", "output"),
        "output_refine": ("after_refine", "output"),
    },
}


def main(folder: Path, names: list[str]) -> None:
    """Write one file for each network, or for those named, beside this script."""
    for name in names or SUBSETS:
        arrays = {
            array: thinned(np.load(folder / f"{vector}.npz")[there])
            for array, (vector, there) in SUBSETS[name].items()
        }
        if name == "ir2qsm":
            arrays["input"] = np.load(folder / "input.npz")["input"]
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), stride=STRIDE, **arrays)


def thinned(volumes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return every 33rd voxel of each channel, (channels, voxels), or (voxels,) of a single one."""
    return volumes.reshape(volumes.shape[-4], -1)[:, ::STRIDE].squeeze()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
