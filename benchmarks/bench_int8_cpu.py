"""INT8 on a CPU: time and error of FP32, BF16 and INT8 in OpenVINO, taking turns on the same cores.

    qsm-export --model tv-unet -o tv.onnx
    qsm-export --model tv-unet --int8 --calibration phantoms -o tv8.onnx
    python benchmarks/bench_int8_cpu.py tv.onnx tv8.onnx -o benchmarks/results/int8_cpu.json

and so for any network whose bundled weights the files have, two files each. The error is that of
the map of a drawn head against PyTorch in FP32. A run is the second of two in a session, of which
one is open at a time; where the first takes more than a minute it stands alone, with compiling.
"""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openvino
from common import parser, say, write

from qsm_deploy.calibration.int8.map_error import map_error
from qsm_deploy.calibration.phantom.measured_head import scan_from_phantom
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.measure.verification import ModuleSession
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.patches import plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import network_outputs
from qsm_deploy.runtime.reconstruction.prior_maps import prior_maps
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Precision, Session

SHAPES = ((96, 96, 96), (160, 192, 160))
LONG_S = 60.0
Priors = dict[str, Volume]


def reconstructed(session: Session, scan: Scan, made: Priors) -> tuple[Volume, float]:
    """Return a map, and the seconds of inference."""
    card = session.card
    plan = plan_whole(scan.mask.shape, card.divisor, card.pad_front)
    stages = Stages()
    chi = network_outputs(session, scan, plan, stages, made=made)
    return chi, stages.seconds["inference"]


def timed(path: Path, precision: Precision, scan: Scan, made: Priors) -> tuple[Volume, float]:
    """Return the map of a file, and the seconds of a run."""
    session = open_session(path, "openvino", precision=precision)
    chi, seconds = reconstructed(session, scan, made)
    return (chi, seconds) if seconds > LONG_S else reconstructed(session, scan, made)


def measure(plain: Path, quantised: Path, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each size and precision."""
    card = load_card(plain)
    spec = REGISTRY[card.network]
    options = {name: card.options[name] for name in spec.chosen_options({}) if name in card.options}
    module = build_network(spec, load_state(spec.bundled_file()), Choices(options))
    turns: dict[Precision, Path] = {"fp32": plain, "bf16": plain, "int8": quantised}
    rows = []
    for shape in SHAPES:
        scan = scan_from_phantom(card, head_phantom(Geometry(shape), seed=77))
        made = prior_maps(card.priors, scan)
        exact, _ = reconstructed(ModuleSession(module, card), scan, made)
        seconds: dict[Precision, list[float]] = {precision: [] for precision in turns}
        errors = {}
        while len(seconds["fp32"]) < (1 if seconds["fp32"][:1] > [LONG_S] else repeats):
            for precision, path in turns.items():
                chi, took = timed(path, precision, scan, made)
                seconds[precision].append(took)
                errors[precision] = asdict(map_error(chi, exact, scan))
        for precision, times in seconds.items():
            ratios = [a / b for a, b in zip(seconds["fp32"], times, strict=True)]
            row: dict[str, Any] = {"network": card.network, "shape": shape, "precision": precision}
            row |= {"seconds": [round(t, 3) for t in times]}
            row |= {"times_faster": round(statistics.median(ratios), 2)} | errors[precision]
            rows.append(say(row))
    return rows


def main() -> None:
    """Measure, print and write."""
    p = parser(__doc__, repeats=5)
    p.add_argument("files", nargs="+", type=Path, help="in FP32 and in INT8, for each network")
    args = p.parse_args()
    rows: list[dict[str, Any]] = []
    for plain, quantised in zip(args.files[::2], args.files[1::2], strict=True):
        rows += measure(plain, quantised, args.repeats)
        write(args.output, rows, openvino=openvino.__version__)


if __name__ == "__main__":
    main()
