"""Methods and networks on a real field of a patient with a haemorrhage, beside another network.

    python benchmarks/bench_in_vivo.py FOLDER MODEL.onnx ... -o benchmarks/results/in_vivo.json \
        --figure docs/methods.png

FOLDER holds tissue_phase_rad.nii.gz, mask.nii.gz, params.json and chi_msqsm_ppm.nii.gz, the map
of another published network, which serves to find the lesions and is no truth.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from common import parser, say, write
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import label

from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.metrics.metrics import correlation, field_residual
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, Maker, open_reconstructor
from qsm_deploy.runtime.scan.params import load_params
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles, load_scan


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


def picture(maps: dict[str, NDArray[np.float32]], scan: Scan) -> Figure:
    """Return an axial and a sagittal plane of each map, as its voxels are stored."""
    figure, axes = plt.subplots(2, len(maps), figsize=(3.2 * len(maps), 6.2), facecolor="black")
    x, _, z = np.argwhere(scan.mask).mean(axis=0).astype(int)
    sizes = scan.geometry.voxel_size_mm
    box = np.argwhere(scan.mask).min(axis=0), np.argwhere(scan.mask).max(axis=0) + 1
    cut = tuple(slice(low, high) for low, high in zip(*box, strict=True))
    for (name, chi), (above, below) in zip(maps.items(), axes.T, strict=True):
        planes = {above: (chi[cut[0], cut[1], z], sizes[1] / sizes[0])}
        planes[below] = (chi[x, cut[1], cut[2]], sizes[2] / sizes[1])
        for axis, (plane, aspect) in planes.items():
            axis.imshow(plane.T, cmap="gray", vmin=-0.15, vmax=0.15, origin="lower", aspect=aspect)
            axis.axis("off")
        above.set_title(name, color="white")
    figure.tight_layout()
    return figure


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
        shown = ("TKD 0.12", "total variation", "tkd-unet", "iLSQR")
        picture({name: maps[name] for name in shown}, scan).savefig(args.figure, dpi=90)


if __name__ == "__main__":
    main()
