"""Methods and networks on a real field of a patient with a haemorrhage, beside another network.

    python benchmarks/bench_in_vivo.py FOLDER MODEL.onnx ... -o benchmarks/results/in_vivo.json \
        --figure docs/methods.png

FOLDER holds tissue_phase_rad.nii.gz, mask.nii.gz, params.json and chi_msqsm_ppm.nii.gz, the map
of another published network, which serves to find the lesions and is no truth.
"""

from pathlib import Path
from typing import Any

import numpy as np
from common import parser, say, write
from numpy.typing import NDArray
from scipy.ndimage import label

from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.job.figure import Row, png_of, rows_figure
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.metrics.metrics import correlation, field_residual
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, Maker, open_reconstructor
from qsm_deploy.runtime.scan.params import load_params
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles, load_scan

WINDOW_PPM = (-0.15, 0.15)


def largest_regions(mask: NDArray[np.bool_], count: int) -> list[NDArray[np.bool_]]:
    """Return the largest connected regions of a mask."""
    regions, _ = label(mask)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return [regions == n for n in np.argsort(sizes)[::-1][:count]]


def load_patient(folder: Path) -> Scan:
    """Return the field; its "truth" is the other network's map."""
    names = ("tissue_phase_rad", "mask", "chi_msqsm_ppm")
    phase, mask, other = (folder / f"{name}.nii.gz" for name in names)
    reading = Reading(units="rad", from_file=load_params(folder / "params.json"))
    return load_scan(ScanFiles((phase,), mask, other), reading)


def scores(maps: dict[str, NDArray[np.float32]], scan: Scan) -> dict[str, dict[str, Any]]:
    """Return what each map makes of the field and the lesions, by its name."""
    other, mask = scan.truth_ppm, scan.mask
    assert other is not None
    (haemorrhage,) = largest_regions(other > 0.25, 1)
    spots = largest_regions(other < -0.15, 6)
    return {
        name: {
            "correlation_with_msqsm": round(correlation(chi, other, mask), 3),
            "field_residual": round(field_residual(chi, scan.measured[0], mask, scan.geometry), 3),
            "std_ppm": round(float(chi[mask].std()), 4),
            "haemorrhage_mean_ppm": round(float(chi[haemorrhage].mean()), 3),
            "diamagnetic_spots_mean_ppm": [round(float(chi[spot].mean()), 3) for spot in spots],
        }
        for name, chi in maps.items()
    }


def main() -> None:
    """Evaluate, print and write."""
    p = parser(__doc__)
    p.add_argument("folder", type=Path)
    p.add_argument("models", type=Path, nargs="+")
    p.add_argument("--figure", type=Path)
    args = p.parse_args()
    scan = load_patient(args.folder)
    assert scan.truth_ppm is not None
    maps = {"msQSM": scan.truth_ppm}
    outside: dict[str, list[str]] = {}
    makers: dict[str, Maker] = {
        "TKD 0.12": Method("tkd", threshold=0.12),
        "TKD 0.2": Method("tkd", threshold=0.2),
        "total variation": Method("tv"),
        "total variation, robust": Method("tv", robust=True),
        "iLSQR": Method("ilsqr"),
    }
    makers |= {model.stem: [model] for model in args.models}
    for name, maker in makers.items():
        reconstructor = open_reconstructor(maker, Host())
        planned = reconstructor.plan(scan, Wants(allow_geometry=not isinstance(maker, Method)))
        outside[name] = list(planned.prepared.departures)
        made = reconstructor.run(planned, Stages())
        maps[name] = made.chi_ppm
        print(name, made.findings.get("inversion", ""))
    rows = [
        say({"map": name, "outside_training": outside.get(name, []), **row})
        for name, row in scores(maps, scan).items()
    ]
    write(args.output, rows)
    if args.figure is not None:
        shown = ("TKD 0.12", "total variation", "tv-unet", "iLSQR")
        lines = [Row(name, maps[name], WINDOW_PPM) for name in shown]
        picture = rows_figure(lines, scan.mask, scan.geometry, None)  # its axes are not known
        args.figure.write_bytes(png_of(picture))


if __name__ == "__main__":
    main()
