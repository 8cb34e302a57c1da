"""What patches cost: the patched map against the whole-volume one, IR2QSM and tv-unet.

Seconds are those of the network; prior maps are made of the whole volume, once.

python benchmarks/bench_patches.py MODEL.onnx ... -o benchmarks/results/patches.json
"""

import time
from pathlib import Path

import nibabel as nib
import numpy as np
from common import parser, say, write

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.metrics.metrics import nrmse
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import network_output
from qsm_deploy.runtime.reconstruction.prior_maps import prior_maps
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.open import open_session

PATCHES, OVERLAPS, BLENDS = (64, 96), (8, 16, 24, 32), ("hann", "crop")


def main() -> None:
    """Measure, print and write."""
    p = parser(__doc__)
    p.add_argument("models", type=Path, nargs="+")
    args = p.parse_args()
    head = head_phantom(Geometry((160, 192, 160)), seed=601)
    scan = Scan(head.local_field_ppm[None], head.mask, head.geometry, nib.Nifti1Header(), np.eye(4))
    rows = []
    for path in args.models:
        session = open_session(path, "openvino")
        card = session.card
        made = prior_maps(card.priors, scan)
        whole = network_output(session, scan, plan_whole(head.mask.shape, card.divisor), made=made)
        truth_error = nrmse(whole, head.chi_ppm, head.mask)
        for patch in PATCHES:
            for overlap in OVERLAPS:
                for blend in BLENDS:
                    plan = plan_patches(head.mask, card.divisor, patch, overlap, blend)
                    began = time.perf_counter()
                    chi = network_output(session, scan, plan, made=made)
                    rows.append(
                        {
                            "network": card.network,
                            "weights_sha256": card.weights_sha256[:8],
                            "halo": card.receptive_field.halo,
                            "patch": patch,
                            "overlap": overlap,
                            "blend": blend,
                            "patches": plan.count,
                            "seconds": round(time.perf_counter() - began, 2),
                            "nrmse_to_whole_percent": round(nrmse(chi, whole, head.mask), 4),
                            "nrmse_to_truth_percent": round(nrmse(chi, head.chi_ppm, head.mask), 2),
                            "whole_nrmse_to_truth_percent": round(truth_error, 2),
                        }
                    )
                    say(rows[-1])
    write(args.output, rows, shape=head.mask.shape)


if __name__ == "__main__":
    main()
