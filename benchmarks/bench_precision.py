r"""What FP16, BF16 and INT8 cost a map: ppb in the mask, XSIM, size on disk, share in INT8.

    python benchmarks/bench_precision.py DATA -o benchmarks/results/precision.json

DATA holds ``cosmos2016/`` and ``checkpoints/``. Networks: the bundled ones, and SpiNet-QSM and the
split MoDL-QSM with their authors' weights, whose prior runs in its loop. Two volumes each: the box
of 64 voxels around a phantom's calcification, which is as hard as a head gets, and the middle of a
real COSMOS map with its simulated field, which nothing was calibrated on. Ranges come from the
three phantoms of ``--calibration phantoms``. Errors are those of true rounding, against PyTorch in
FP32.

The loops are slow: their boxes have 48 voxels, their calibration data is the middle 96 voxels of
the phantoms, and of INT8 per collector the part in FP16 is not rounded (``rounded``: false). Rows
are written network by network; one that is in the file is left out.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import onnx
from bench_accuracy import cases
from common import Row, parser, say, write

from qsm_deploy.calibration.int8.calibration import Calibrated, Int8Choices, calibrate
from qsm_deploy.calibration.int8.choice import decide
from qsm_deploy.calibration.int8.collectors import Collector
from qsm_deploy.calibration.int8.evaluation import Int8Evaluation, middle_of
from qsm_deploy.calibration.int8.map_error import MapError
from qsm_deploy.calibration.int8.qdq import fused_layers
from qsm_deploy.calibration.int8.table import row_dicts
from qsm_deploy.calibration.int8.volumes import CalibrationData, load_calibration
from qsm_deploy.export.checkpoints.normalisation import load_normalisation
from qsm_deploy.export.checkpoints.state import load_state, state_sha256
from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.int8.verification import (
    evaluation_of,
    evaluation_scans,
    exact_session,
    float_graphs,
)
from qsm_deploy.export.measure.rounding import calcified_scan, measure_rounding
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.terminal import bar_on_terminal
from qsm_deploy.runtime.scan.scan import Scan

BOX, LOOP_BOX, LOOP_DATA = 64, 48, 96
NETWORKS: dict[str, tuple[tuple[str, ...], dict[str, str], tuple[str, ...]]] = {
    "tv-unet": ((), {}, ()),
    "ir2qsm": ((), {}, ()),
    "spinet-qsm": (("spinet_qsm.pth",), {}, ()),
    "modl-qsm": (("modl_qsm.h5",), {"form": "split"}, ("modl_qsm_norm.mat",)),
}


@dataclass(frozen=True)
class Loaded:
    """A network with its graph in FP32."""

    module: Network
    card: ModelCard
    model: onnx.ModelProto


def load(name: str, folder: Path) -> Loaded:
    """Return a network with real weights."""
    weights, options, normalisation = NETWORKS[name]
    spec = REGISTRY[name]
    state = load_state(*([folder / file for file in weights] or [spec.bundled_file()]))
    norm = load_normalisation(tuple(folder / file for file in normalisation))
    choices = Choices(spec.chosen_options(options), norm)
    module = build_network(spec, state, choices)
    card = provisional_card(spec, module, choices, "", state_sha256(state))
    return Loaded(module, card, onnx_from_module(module))


def volumes(network: Loaded, cosmos: Path) -> Iterator[tuple[str, Scan]]:
    """Yield the boxes that errors are measured on."""
    calcified, divisor = calcified_scan(network.card), network.card.divisor
    size = box_size(network.card)
    yield "phantom", middle_of(calcified, size, divisor) if size < BOX else calcified
    (case,) = cases([], cosmos)
    scan = Scan(
        case.field_ppm[None],
        case.mask,
        case.geometry,
        nib.Nifti1Header(),
        np.eye(4),
        truth_ppm=case.chi_ppm,
    )
    yield "cosmos2016", middle_of(scan, size, divisor)


def box_size(card: ModelCard) -> int:
    """Return the size of the boxes that errors are measured on."""
    return LOOP_BOX if card.patchable == "split" else BOX


def calibration_data(card: ModelCard) -> CalibrationData:
    """Return the phantoms, or their middle for a network in a loop."""
    data = load_calibration("phantoms", card, progress=bar_on_terminal)
    if card.patchable != "split":
        return data
    return replace(data, scans=tuple(middle_of(s, LOOP_DATA, card.divisor) for s in data.scans))


def size_bytes(network: Loaded, model: onnx.ModelProto) -> int:
    """Return the size of a model on disk."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return len(with_card(copy, network.card))


def plain_rows(network: Loaded, judges: dict[str, Int8Evaluation]) -> Iterator[Row]:
    """Yield FP32, FP16 and BF16."""
    for precision in ("fp32", "fp16", "bf16"):
        model = network.model if precision == "fp32" else with_precision(network.model, precision)
        for volume, judge in judges.items():
            error = judge.quick_error(model) if precision == "fp32" else judge.rounded_error(model)
            yield row(network, precision, volume, error, model, 0.0)


def int8_rows(
    network: Loaded, calibrated: Calibrated, judges: dict[str, Int8Evaluation]
) -> Iterator[Row]:
    """Yield INT8 wherever it may be, for each collector."""
    layers = fused_layers(calibrated.candidates)
    for collector in get_args(Collector):
        quantiser, share = calibrated.quantiser(collector), calibrated.share(layers)
        model = quantiser.quantised(calibrated.graphs.half, layers)
        is_rounded = network.card.patchable != "split"
        for volume, judge in judges.items():
            if is_rounded:
                error = judge.rounded_error(model)
            else:
                error = judge.quick_error(quantiser.quantised(network.model, layers))
            found = row(network, f"int8, {collector}", volume, error, model, share)
            yield found | {"rounded": is_rounded}


def demoted_rows(
    network: Loaded,
    calibrated: Calibrated,
    judges: dict[str, Int8Evaluation],
    choosing: Int8Evaluation,
    collector: Collector,
) -> Iterator[Row]:
    """Yield INT8 within the budget, the table of its layers with the first row."""
    choices = Int8Choices("phantoms", collector=collector, progress=bar_on_terminal)
    found = decide(calibrated, choosing, choices)
    model = found.quantised(calibrated.graphs.half)
    extra: Row = {
        "budget": str(choices.budget),
        "error_on_the_volumes_it_was_chosen_by": rounded(found.error),
        "kept_fp16": found.why_not,
        "layers": [
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in r.items()}
            for r in row_dicts(found.rows)
        ],
    }
    for volume, judge in judges.items():
        error = judge.rounded_error(model)
        name = f"int8, {collector}, demoted"
        yield row(network, name, volume, error, model, found.share) | extra
        extra = {}


def row(
    network: Loaded,
    variant: str,
    volume: str,
    error: MapError,
    model: onnx.ModelProto,
    share: float,
) -> Row:
    """Return a row of the table."""
    return {
        "network": network.card.network,
        "variant": variant,
        "volume": volume,
        **rounded(error),
        "size_bytes": size_bytes(network, model),
        "share_of_macs_in_int8": round(share, 4),
    }


def rounded(error: MapError) -> Row:
    """Return an error with four digits."""
    return {name: float(f"{value:.4g}") for name, value in asdict(error).items()}


def rounding_rows(network: Loaded) -> Iterator[Row]:
    """Yield what the export itself measures of FP16 and BF16, with the fullest activation."""
    for precision in ("fp16", "bf16"):
        card = replace(network.card, precision=precision)
        found = measure_rounding(with_precision(network.model, precision), network.module, card)
        yield {
            "network": network.card.network,
            "variant": f"{precision}, as the export measures it",
            "p999_ppb": float(f"{found.p999_ppb:.4g}"),
            "max_ppb": float(f"{found.max_ppb:.4g}"),
            "largest_activation_share": float(f"{found.fullest[1]:.4g}"),
            "operator": found.fullest[0],
        }


def rows_of(name: str, data: Path, collectors: list[Collector], patches: int) -> Iterator[Row]:
    """Yield all rows of a network."""
    network = load(name, data / "checkpoints")
    scans = dict(volumes(network, data / "cosmos2016"))
    judges = {v: evaluation_of(network.module, network.card, [s]) for v, s in scans.items()}
    yield from plain_rows(network, judges)
    if network.card.patchable != "split":
        yield from rounding_rows(network)
    choices = Int8Choices("phantoms", patches=patches, progress=bar_on_terminal)
    card = network.card
    with tempfile.TemporaryDirectory() as folder:
        open_exact = partial(exact_session, network.model, card, Path(folder) / "fp32.onnx")
        graphs = float_graphs(network.model)
        calibrated = calibrate(graphs, card, calibration_data(card), choices, open_exact)
    yield from int8_rows(network, calibrated, judges)
    by = evaluation_scans(card, calibrated.data)
    if card.patchable == "split":
        by = [middle_of(scan, LOOP_BOX, card.divisor) for scan in by]
    choosing = evaluation_of(network.module, card, by)
    for collector in collectors:
        yield from demoted_rows(network, calibrated, judges, choosing, collector)


def main() -> None:
    """Measure, print and write."""
    p = parser(__doc__)
    p.add_argument("data", type=Path)
    p.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    p.add_argument("--demote", nargs="+", choices=get_args(Collector), default=["percentile-99.99"])
    p.add_argument("--patches", type=int, default=16)
    args = p.parse_args()
    rows: list[Row] = []
    if args.output and args.output.is_file():
        rows = json.loads(args.output.read_text())["rows"]
    for name in args.networks:
        if any(r["network"] == name for r in rows):
            continue
        began = time.perf_counter()
        for found in rows_of(name, args.data, args.demote, args.patches):
            rows.append(found)
            say({k: v for k, v in found.items() if k != "layers"})
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        write(args.output, rows)


if __name__ == "__main__":
    main()
