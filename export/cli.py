"""``qsm-export``: a network's weights in, a verified ONNX file out."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qsm_deploy.kernels.errors import MissingDependencyError, UsageError
from qsm_deploy.runtime.command import run_command

NAME = "qsm-export"
GATE_PPB = 0.01
EPILOG = """\
examples:
  qsm-export --list
  qsm-export --model ir2qsm --weights model_IR2Unet.pth -o ir2qsm.onnx
  qsm-export --model tkd-unet

exit codes: 0 done, 2 usage, 3 files, 4 a network that cannot become ONNX or a missing library,
5 differs from PyTorch, 7 weights, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parser().parse_args(argv)
    return run_command(NAME, lambda: _list(arguments) if arguments.list else _export(arguments))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        prog=NAME,
        description="Write a QSM network as one ONNX file, checked against PyTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", metavar="NAME", help="the network; --list names them")
    p.add_argument("--weights", type=Path, help="its state dict; else the bundled one")
    p.add_argument("-o", "--output", type=Path, help="ONNX file; default NAME-fp32.onnx")
    p.add_argument(
        "--residual",
        choices=("input", "iteration"),
        help="what ir2qsm adds to each iteration: the field (default, as published) or that "
        "iteration's own input",
    )
    p.add_argument(
        "--gate-ppb",
        type=_positive,
        default=GATE_PPB,
        metavar="PPB",
        help="largest difference from PyTorch that passes (default %(default)s)",
    )
    p.add_argument("--force", action="store_true", help="overwrite existing outputs")
    p.add_argument("--json", action="store_true", help="the result as one JSON object")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    p.add_argument("--list", action="store_true", help="show the known networks and leave")
    return p


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of ppb")
    return value


def _list(arguments: argparse.Namespace) -> str:
    from qsm_deploy.export.registry import REGISTRY

    rows = [
        {
            "network": spec.name,
            "bundled_weights": spec.bundled[1].source if spec.bundled else None,
            "published_weights": spec.published.source,
            "licence": spec.published.licence,
            "doi": spec.doi,
        }
        for spec in REGISTRY.values()
    ]
    if arguments.json:
        return json.dumps(rows)
    lines = []
    for row in rows:
        lines.append(str(row.pop("network")))
        lines += [f"  {k.replace('_', ' '):18}{value or 'none'}" for k, value in row.items()]
    return "\n".join(lines)


def _export(arguments: argparse.Namespace) -> str:
    from qsm_deploy.export.registry import network_spec

    def say(line: str) -> None:
        if not arguments.quiet:
            print(f"{NAME}: {line}", file=sys.stderr, flush=True)

    if arguments.model is None:
        raise UsageError("name a network with --model; --list shows those known")
    spec = network_spec(arguments.model)
    options = spec.chosen_options({"residual": arguments.residual})
    output = arguments.output or Path(f"{spec.name}-fp32.onnx")
    if output.suffix != ".onnx":
        raise UsageError(f"-o {output}: the output is an ONNX file; give it the suffix .onnx")
    weights, licence = arguments.weights, spec.published.licence
    if weights is None:
        weights = spec.bundled_file()
        if spec.bundled:
            licence = spec.bundled[1].licence
            say(f"no --weights: taking the bundled ones, {spec.bundled[1].source}")
    try:
        from qsm_deploy.export.checkpoints import load_state
        from qsm_deploy.export.export_network import export_network
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("qsm_deploy"):
            raise
        raise MissingDependencyError(error.name or "torch", "export", NAME) from error
    exported = export_network(
        spec,
        load_state(weights),
        output,
        licence=licence,
        options=options,
        gate_ppb=arguments.gate_ppb,
        force=arguments.force,
        say=say,
    )
    card = exported.card
    if arguments.json:
        result = {
            "file": str(exported.path),
            "card_file": str(exported.card_path),
            "size_bytes": exported.size_bytes,
            "differences": [dataclasses.asdict(d) for d in exported.differences],
            "card": json.loads(card.to_json()),
        }
        return json.dumps(result)
    for d in exported.differences:
        say(f"{d.backend} {_size(d.shape)}: within {d.max_ppb:.2g} ppb of PyTorch")
    shapes = ", ".join(map(_size, card.verified.shapes))
    return (
        f"{exported.path}: {exported.size_bytes / 1e6:.1f} MB, within "
        f"{card.verified.max_ppb:.2g} ppb of PyTorch at {shapes}"
    )


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


if __name__ == "__main__":
    sys.exit(main())
