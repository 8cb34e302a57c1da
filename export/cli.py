"""``qsm-export``: a network's weights in, a verified ONNX file or TensorRT plan out."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsm_deploy.calibration.budgets import DEFAULTS
from qsm_deploy.export.int8.arguments import add_int8, int8_result, int8_text, positive
from qsm_deploy.export.networks.network_spec import flag
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.command import add_version, needs_extra, run_command

if TYPE_CHECKING:
    from qsm_deploy.export.write_network import Exported

NAME = "qsm-export"
OUTPUT_HELP = (
    "what to write: .onnx, or .plan, an engine for TensorRT with the graph beside it; default "
    "NAME-PRECISION.onnx, for a reduced precision NAME-PRECISION.plan where a flavour of TensorRT "
    "is installed"
)
EPILOG = """\
examples:
  qsm-export --list
  qsm-export --describe model_IR2Unet.pth
  qsm-export --describe tv-unet.plan --extract tv-unet.onnx
  qsm-export --model ir2qsm --weights model_IR2Unet.pth -o ir2qsm.onnx
  qsm-export --model tv-unet
  qsm-export --model tv-unet --fp16 -o tv-unet.plan --shapes 64,160x192x160,256
  qsm-export --model tv-unet --int8 --calibration maps/ -o tv-unet.onnx --layers layers.json
  qsm-export --model lpcnn --weights Bmodel.pkl --orientations 2
  qsm-export --model modl-qsm --weights last.h5 --dipole-op plugin
  qsm-export --module net.py:build --weights w.pth --card card.toml -o mine.onnx
  qsm-export --onnx theirs.onnx --card card.toml --fp16 -o mine.plan
  qsm-export --model iqsm-plus --weights iQSM_plus.pth LoT.pth --b0-direction 0 0.2 0.98
  qsm-export --model tv-unet --triton serve/
  qsm-export ir2qsm.plan --triton serve/
  qsm-export --method tv --triton serve/

exit codes: 0 done, 2 usage, 3 files, 4 a network that cannot be exported or a missing library,
5 differs from PyTorch, 7 weights, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parser().parse_intermixed_args(argv)
    if arguments.list:
        return run_command(NAME, lambda: _list(arguments))
    if arguments.describe or arguments.extract:
        return run_command(NAME, lambda: _describe(arguments))
    return run_command(NAME, lambda: _export(arguments))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        prog=NAME,
        description="Write a QSM network as ONNX or as a TensorRT plan, checked against PyTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="for --triton: finished .onnx or .plan files, as qsm-run takes them",
    )
    which = p.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="NAME", help="the network; --list names them")
    which.add_argument(
        "--module",
        metavar="FILE.py:FUNCTION",
        help="a network of your own: what the function returns, a torch.nn.Module; or "
        "package.module:function (docs/own-network.md)",
    )
    which.add_argument(
        "--onnx", type=Path, metavar="FILE", help="an ONNX file that something else made"
    )
    p.add_argument(
        "--card",
        type=Path,
        metavar="FILE.toml",
        help="for --module and --onnx: what neither says of itself; what is missing is named",
    )
    p.add_argument(
        "--weights",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="the authors' file, or files where there are several; else the bundled one",
    )
    p.add_argument("-o", "--output", type=Path, help=OUTPUT_HELP)
    p.add_argument(
        "--triton",
        type=Path,
        metavar="DIR",
        help="write a model repository for NVIDIA Triton instead, which reconstructs as qsm-run "
        "does, with the network, FILE or --method",
    )
    p.add_argument(
        "--method",
        metavar="NAME",
        help="for --triton: a method of qsm-run, as tv, in place of FILE or after it",
    )
    _add_precision(p.add_mutually_exclusive_group())
    add_int8(p.add_argument_group("INT8"))
    _add_engine(p.add_argument_group("TensorRT plans"))
    _add_choices(p.add_argument_group("what the weights do not say"))
    p.add_argument(
        "--gate-ppb",
        type=positive,
        metavar="PPB",
        help="largest difference from PyTorch that passes (default {fp32:g}; {split:g} for a split "
        "network, whose loop the rounding goes through; {fp16:g} for --fp16 and {bf16:g} for "
        "--bf16, of which 99.9 %% of the voxels may differ by a tenth)".format(
            **{name: budget["max_ppb"] for name, budget in DEFAULTS.items()}
        ),
    )
    p.add_argument("--force", action="store_true", help="overwrite existing outputs")
    p.add_argument("--json", action="store_true", help="the result as one JSON object")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    p.add_argument("--list", action="store_true", help="show the known networks and leave")
    p.add_argument(
        "--describe", type=Path, metavar="FILE", help="say what a checkpoint or model is, and leave"
    )
    p.add_argument(
        "--extract",
        type=Path,
        metavar="FILE",
        help="of the plan that --describe names: write its graph (.onnx) or its engine (.engine)",
    )
    add_version(p)
    return p


def _add_precision(group: "argparse._MutuallyExclusiveGroup") -> None:
    for name in ("fp16", "bf16"):
        group.add_argument(
            f"--{name}",
            dest="precision",
            action="store_const",
            const=name,
            default="fp32",
            help=f"compute in {name} where the network tolerates it; what that costs is measured "
            "by rounding every operator's output, and refused above the gate",
        )

    group.add_argument(
        "--int8",
        dest="precision",
        action="store_const",
        const="int8",
        help="compute convolutions in INT8 as far as the accuracy budget allows, the rest as with "
        "--fp16; needs --calibration",
    )


def _add_engine(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--engine",
        choices=("tensorrt", "tensorrt-rtx"),
        help="what builds the plan, and later runs it; default what is installed, tensorrt first",
    )
    group.add_argument(
        "--shapes",
        metavar="MIN,OPT,MAX",
        help="sizes that the plan serves and is fastest at, each N for a cube or XxYxZ; default "
        "16,160,256, rounded up to what the network divides",
    )
    group.add_argument(
        "--workspace-mb",
        type=positive,
        metavar="MB",
        help="most GPU memory that a layer may take for itself; no limit by default",
    )
    group.add_argument(
        "--layers",
        type=Path,
        metavar="FILE",
        help="write the layers that went into the plan and their precisions as JSON; where there "
        "is a GPU, also those that run, with the kernel (tactic) chosen for each; with --int8 "
        "range, scale, sensitivity and final precision of each",
    )
    group.add_argument(
        "--hardware-compatible",
        choices=("same-capability", "ampere-plus"),
        help="tensorrt: the plan also runs on other models of this GPU's compute capability, or on "
        "all from Ampere on, which is slower; by default on this model only",
    )
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="tensorrt: later versions of the same major version run the plan too, which then "
        "carries code; by default only the one that built it",
    )
    group.add_argument(
        "--compute-capability",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="N.N,...",
        help="tensorrt-rtx: the GPUs that the plan is for, such as 8.9,12.0; default Ampere and "
        "later",
    )


def _add_choices(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--residual",
        choices=("input", "iteration"),
        help="what ir2qsm adds to each iteration: the field (default, as published) or that "
        "iteration's own input",
    )
    group.add_argument(
        "--form",
        choices=("unrolled", "split"),
        help="lpcnn, modl-qsm: everything in the graph (default), or the CNN alone, which runs in "
        "patches while the runtime does the Fourier steps on the whole volume",
    )
    group.add_argument(
        "--orientations", choices=("1", "2", "3"), help="fields that lpcnn takes, default 1"
    )
    group.add_argument(
        "--dipole-op",
        choices=("matmul", "function", "plugin"),
        help="how the unrolled lpcnn and modl-qsm hold their Fourier steps: as matrix products, "
        "which every engine runs (default), as the nodes qsm::DipoleConv with a function that says "
        "what they compute, which ONNX Runtime runs, or as the bare nodes, which only TensorRT "
        "with the plugin runs and no check here",
    )
    group.add_argument(
        "--part",
        choices=("recon", "refine", "bf", "vn"),
        help="which CNN of after-qsm (recon, refine), or of nextqsm (bf, vn)",
    )
    group.add_argument(
        "--normalisation",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=(),
        help="the authors' .mat, .npy or .json files of means, standard deviations and settings",
    )
    group.add_argument(
        "--b0-direction",
        type=float,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="x to the right, y to the front, z to the head; iqsm-plus is folded for this one",
    )


def _list(arguments: argparse.Namespace) -> str:
    from qsm_deploy.export.describe import list_rows, list_text

    rows = list_rows()
    return json.dumps(rows) if arguments.json else list_text(rows)


def _describe(arguments: argparse.Namespace) -> str:
    if arguments.describe is None:
        raise UsageError("--extract: name the plan with --describe")
    with needs_extra("export", NAME):
        from qsm_deploy.export.describe import describe, describe_text, extract

        found = describe(arguments.describe)
        if arguments.extract:
            extract(arguments.describe, arguments.extract, force=arguments.force)
    return json.dumps(found) if arguments.json else describe_text(found)


def _exported(arguments: argparse.Namespace, say: Callable[[str], None]) -> "Exported":
    """Export what was named: a network that is known, a module, or an ONNX file."""
    from qsm_deploy.export.by_name import OF_NETWORKS, PASSED, export_network
    from qsm_deploy.export.order import COMMON

    common: dict[str, Any] = {name: getattr(arguments, name) for name in COMMON}
    common |= {"say": say, "bar": sys.stderr.isatty() and not arguments.quiet}
    if arguments.model is not None:
        if arguments.card is not None:
            raise UsageError(
                "--card is for --module and --onnx; the networks of --list have theirs"
            )
        given = {name: getattr(arguments, name) for name in PASSED}
        return export_network(arguments.model, **(given | common))
    if arguments.module is None and arguments.onnx is None:
        raise UsageError(
            "name a network with --model, of which --list shows those known, or your own with "
            "--module or --onnx"
            + "; what is finished by its FILE or --method"
            * (arguments.triton is not None)
        )
    if strange := [name for name in OF_NETWORKS if getattr(arguments, name)]:
        raise UsageError(f"{flag(strange[0])} is for the networks of --list, with --model")
    from qsm_deploy.export.own.export import export_module, export_onnx

    if arguments.onnx is not None:
        if arguments.weights:
            raise UsageError(f"--weights: {arguments.onnx} holds its own; leave them out")
        return export_onnx(arguments.onnx, arguments.card, **common)
    return export_module(arguments.module, arguments.card, weights=arguments.weights, **common)


def _export(arguments: argparse.Namespace) -> str:

    def say(line: str) -> None:
        if not arguments.quiet:
            print(f"{NAME}: {line}", file=sys.stderr, flush=True)

    if arguments.triton is not None:
        return _write_triton(arguments, say)
    if finished := _finished(arguments):
        raise UsageError(
            f"{finished[0]}: what is finished is for --triton DIR; weights follow --weights, and "
            "--model names their network"
        )
    exported = _exported(arguments, say)
    if arguments.json:
        return json.dumps(_result(exported))
    return _text(exported, say)


def _finished(arguments: argparse.Namespace) -> list[str]:
    """Return what was named that needs no export."""
    methods = [] if arguments.method is None else [f"--method {arguments.method}"]
    return [*map(str, arguments.files), *methods]


def _write_triton(arguments: argparse.Namespace, say: Callable[[str], None]) -> str:
    """Write a model repository of a network that is exported, or of what is finished."""
    from qsm_deploy.export.by_name import PASSED
    from qsm_deploy.export.order import choose_output, given_options
    from qsm_deploy.export.triton.repository import check_repository, write_repository
    from qsm_deploy.runtime.console.held import scratch_folder
    from qsm_deploy.runtime.job.request import maker_from, models_alone

    folder, force, finished = arguments.triton, arguments.force, _finished(arguments)
    check_repository(folder, force=force)
    if arguments.output is not None:
        raise UsageError(f"-o {arguments.output}: the network goes into {folder}; drop it")
    network = arguments.model or arguments.module or arguments.onnx
    if finished and network is not None:
        raise UsageError(f"{finished[0]} is finished, {network} is to be exported; drop one")
    if not finished:
        with scratch_folder() as scratch:
            name, *_ = choose_output(None, arguments.engine, "model", arguments.precision)
            arguments.output = scratch / name
            exported = _exported(arguments, say)
            written = write_repository(folder, [exported.path], force=force)
        exported = dataclasses.replace(exported, path=written.models[0])
        result, text = _result(exported), _text(exported, say)
        del result["card_file"]  # which is in the model
    else:
        passed = {name: getattr(arguments, name) for name in (*PASSED, "card") if name != "force"}
        if strange := [n for n, value in given_options(passed).items() if value != "fp32"]:
            raise UsageError(f"{flag(strange[0])} is for an export, {finished[0]} is finished")
        maker = maker_from(models_alone(arguments.files), method=arguments.method)
        written = write_repository(folder, maker, force=force)
        result, text = dict[str, Any](), ""
    if arguments.json:
        files = list(map(str, written.files))
        return json.dumps(result | {"triton": {"model": written.name, "files": files}})
    return "\n".join([text, *map(str, written.files)]).strip()


def _result(exported: "Exported") -> dict[str, Any]:
    """Return what was exported, for machines."""
    result = {
        "file": str(exported.path),
        "card_file": str(exported.card_path),
        "size_bytes": exported.size_bytes,
        "differences": [dataclasses.asdict(d) for d in exported.differences],
        "rounding": exported.rounding and dataclasses.asdict(exported.rounding),
        "card": json.loads(exported.card.to_json()),
    }
    if exported.int8:
        result["int8"] = int8_result(exported.int8)
    return result


def _text(exported: "Exported", say: Callable[[str], None]) -> str:
    """Return what was exported, for people."""
    from qsm_deploy.kernels.geometry import shape_text
    from qsm_deploy.runtime.card.read import PLAN

    card = exported.card
    if exported.rounding:
        from qsm_deploy.export.measure.rounding import rounding_lines

        for line in rounding_lines(exported.rounding):
            say(line)
    table = int8_text(exported.int8) if exported.int8 else ""
    for d in exported.differences:
        say(f"{d.backend} {shape_text(d.shape)}: within {d.max_ppb:.2g} ppb of PyTorch")
    shapes = ", ".join(map(shape_text, card.verified.shapes))
    unrun = "; the engine in it was not run" if exported.path.suffix == PLAN else ""
    if not card.memory:
        unrun = "; the file itself was not run"
    return table + (
        f"{exported.path}: {exported.size_bytes / 1e6:.1f} MB, within "
        f"{card.verified.max_ppb:.2g} ppb of PyTorch at {shapes}{unrun}"
    )


if __name__ == "__main__":
    sys.exit(main())
