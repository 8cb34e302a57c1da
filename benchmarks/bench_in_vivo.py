"""Methods and networks on a real field of a patient with a haemorrhage, beside another network.

    python benchmarks/bench_in_vivo.py FOLDER MODEL.onnx ... -o benchmarks/results/in_vivo.json \
        --figure docs/methods.png

FOLDER holds tissue_phase_rad.nii.gz, mask.nii.gz, params.json and chi_msqsm_ppm.nii.gz, the map
of another published network, which serves to find the lesions and is no truth.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import parser, say, write
from numpy.typing import NDArray
from scipy.ndimage import label

from qsm_deploy.kernels.dipole import dipole_kernel
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.runtime.card.card import METADATA_KEY, parse_card
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.metrics.metrics import correlation, field_residual
from qsm_deploy.runtime.page.figure import png_of, rows_figure
from qsm_deploy.runtime.page.rows import Row
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, Maker, open_reconstructor
from qsm_deploy.runtime.scan.params import load_params
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles, load_scan
from qsm_deploy.runtime.sessions.open import open_session

WINDOW_PPM = (-0.15, 0.15)
ON_CONE, BESIDE = (0.0, 0.1), (0.15, 0.3)  # |D|
SHELLS = ((0.03, 0.08), (0.08, 0.16), (0.16, 0.3))  # 1 / mm


def power_on_cone(chi_ppm: Volume, mask: Mask, geometry: Geometry) -> list[float]:
    """Return the mean power on the magic cone over that beside it, in shells of frequency.

    Streaks lie on the cone. Lesions are clipped, so that they do not rule.
    """
    kept = np.clip(chi_ppm, *WINDOW_PPM) * mask
    d, power = np.abs(dipole_kernel(geometry)), np.abs(np.fft.fftn(kept)) ** 2
    axes = (np.fft.fftfreq(n, h) for n, h in zip(kept.shape, geometry.voxel_size_mm, strict=True))
    x, y, z = np.ix_(*axes)
    k = np.sqrt(x * x + y * y + z * z)

    def mean(shell: tuple[float, float], cone: tuple[float, float]) -> float:
        there = (k >= shell[0]) & (k < shell[1]) & (d >= cone[0]) & (d < cone[1])
        return float(power[there].mean())

    return [round(mean(shell, ON_CONE) / mean(shell, BESIDE), 3) for shell in SHELLS]


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
            "power_on_cone_over_beside": power_on_cone(chi, mask, scan.geometry),
            "haemorrhage_mean_ppm": round(float(chi[haemorrhage].mean()), 3),
            "diamagnetic_spots_mean_ppm": [round(float(chi[spot].mean()), 3) for spot in spots],
        }
        for name, chi in maps.items()
    }


def not_anchored(model: Path, folder: Path) -> Path:
    """Return a copy of a model whose map keeps nothing of a prior map."""
    graph = onnx.load(model)
    (card,) = [p.value for p in graph.metadata_props if p.key == METADATA_KEY]
    free = replace(parse_card(card), anchor=None)
    onnx.helper.set_model_props(graph, {METADATA_KEY: free.to_json()})
    path = folder / f"{model.stem}, not anchored.onnx"
    onnx.save(graph, path)
    return path


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
    anchored = [m for m in args.models if open_session(m, "openvino").card.anchor]
    folder = tempfile.TemporaryDirectory()
    free = [not_anchored(model, Path(folder.name)) for model in anchored]
    makers |= {model.stem: [model] for model in (*args.models, *free)}
    for name, maker in makers.items():
        reconstructor = open_reconstructor(maker, Host())
        planned = reconstructor.plan(scan, Wants(allow_geometry=not isinstance(maker, Method)))
        outside[name] = list(planned.prepared.departures)
        made = reconstructor.run(planned, Stages())
        maps[name] = made.map_ppm
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
