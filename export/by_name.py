"""An export as a user asks for it: a network by its name, weights by their files."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsm_deploy.export.networks.network_spec import flag
from qsm_deploy.export.networks.registry import network_spec, recognise
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import GraphPrecision
from qsm_deploy.runtime.card.read import ONNX, PLAN
from qsm_deploy.runtime.console.command import needs_extra
from qsm_deploy.runtime.gpu.engines.tensorrt_library import Flavour, installed_engines, open_library
from qsm_deploy.runtime.job.request import PathLike
from qsm_deploy.runtime.scan.arrays import vector
from qsm_deploy.runtime.scan.axes import axes_of

if TYPE_CHECKING:
    from qsm_deploy.calibration.int8.calibration import Int8Choices
    from qsm_deploy.export.write_network import Exported

NAME = "qsm-export"
# what is chosen of a network, of a plan, and of INT8, by the names of the flags
OPTIONS = ("residual", "form", "orientations", "dipole_op", "part")
ABOUT_PLANS = (
    *("shapes", "workspace_mb", "layers"),
    *("hardware_compatible", "version_compatible", "compute_capability"),
)
ABOUT_INT8 = (
    *("calibration_units", "collector", "patches", "seed"),
    *("budget_ppb", "budget_xsim", "budget_max_ppb"),
)
PASSED = (
    *("weights", "output", "precision", "normalisation", "b0_direction", "calibration"),
    *("engine", "gate_ppb", "force", *OPTIONS, *ABOUT_PLANS, *ABOUT_INT8),
)
# those that the calibration knows by another name
RENAMED = {"calibration_units": "units"}
BUDGETS = {"budget_ppb": "median_ppb", "budget_xsim": "xsim", "budget_max_ppb": "max_ppb"}


def export_network(
    model: str,
    *,
    weights: PathLike | Sequence[PathLike] | None = None,
    output: PathLike | None = None,
    precision: GraphPrecision = "fp32",
    normalisation: Sequence[PathLike] = (),
    b0_direction: Sequence[float] | None = None,
    calibration: PathLike | None = None,
    engine: Flavour | None = None,
    gate_ppb: float | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    bar: bool = False,
    **chosen: Any,
) -> "Exported":
    """Write a network as a verified ONNX file or as a TensorRT plan, as ``qsm-export`` does.

    Parameters
    ----------
    model
        The network's name; ``qsm-export --list`` has them.
    weights
        The authors' file, or files where there are several; ``None`` takes the bundled ones.
    output
        What to write: .onnx, or .plan for TensorRT; ``None`` follows from network and precision.
    precision
        ``fp32``, ``fp16``, ``bf16`` or ``int8``, which needs a calibration.
    normalisation
        The authors' files of means, standard deviations and network settings.
    b0_direction
        In canonical axes (x to the right, y to the front, z along B0), for a network that is
        folded for one.
    calibration
        A folder or a list of field maps with masks, or ``phantoms``.
    engine
        What builds a plan; ``None`` takes what is installed.
    gate_ppb
        Largest difference from PyTorch that passes.
    force
        Whether existing files are overwritten.
    say
        Called with a line on what is done next.
    bar
        Whether to draw bars on the terminal.
    **chosen
        The other flags of ``qsm-export``, by their names: residual, form, orientations,
        dipole_op, part; shapes, workspace_mb, layers, hardware_compatible, version_compatible,
        compute_capability; calibration_units, collector, patches, seed, budget_ppb, budget_xsim,
        budget_max_ppb.

    Returns
    -------
    Exported
        The file, its card, and how far it is from PyTorch.

    Raises
    ------
    QsmDeployError
        As the command line does, one subclass for each cause.
    """
    if unknown := chosen.keys() - {*OPTIONS, *ABOUT_PLANS, *ABOUT_INT8}:
        raise UsageError(f"export_network has no option {min(unknown)}")
    chosen = {n: v for n, v in chosen.items() if v is not None and v is not False and v != ()}
    spec = network_spec(model)
    _check_int8(precision, calibration, gate_ppb, chosen)
    options = spec.chosen_options({name: chosen.get(name) for name in OPTIONS})
    stated = None if output is None else Path(output)
    path, flavour, why = choose_output(stated, engine, spec.name, precision)
    about_plan = {name: chosen[name] for name in ABOUT_PLANS if name in chosen}
    plan = None
    with needs_extra("export", NAME):
        from qsm_deploy.export.checkpoints.matlab_onnx import load_matlab_onnx
        from qsm_deploy.export.checkpoints.normalisation import load_normalisation
        from qsm_deploy.export.checkpoints.state import load_state
        from qsm_deploy.export.model_files import refuse_models, refuse_quantised
        from qsm_deploy.export.networks.network import Choices
        from qsm_deploy.export.write_network import write_network
        from qsm_deploy.runtime.gpu.building.choices import PlanChoices
    if flavour is not None:
        plan = PlanChoices(flavour, **about_plan, progress=bar)
        open_library(flavour, f"--engine {flavour}")
        say(f"writing {path} for {flavour}: {why}")
    else:
        # layers in INT8 are worth a report without a plan too
        about_plan.pop("layers" if precision == "int8" else "", None)
        if about_plan:
            name = flag(next(iter(about_plan)))
            raise UsageError(f"{name} is about plans, {path} is none; pass -o NAME.plan")
        if output is None and precision != "fp32":
            say(f"writing {path}: {why}")
    licence = spec.published.licence
    if weights is None:
        files = [spec.bundled_file()]
        if spec.bundled:
            licence = spec.bundled[1].licence
            say(f"no --weights: taking the bundled ones, {spec.bundled[1].source}")
    else:
        given = [weights] if isinstance(weights, str | os.PathLike) else weights
        files = [Path(path) for path in given]
    refuse_models(files, spec)
    spec.refuse_foreign(files)
    if spec.onnx_weights and [path.suffix.lower() for path in files] == [ONNX]:
        state = load_matlab_onnx(files[0])
    else:
        state = load_state(*files, fits=recognise, say=say)
    refuse_quantised(state)
    direction = None
    if b0_direction is not None:
        found = Geometry((1, 1, 1), b0_direction=vector(b0_direction))
        direction = axes_of(None, found).vector(found.b0_direction)
    choices = Choices(options, load_normalisation(list(map(Path, normalisation))), direction)
    fp16_path = path
    if precision == "int8" and output is None:  # a file that stays in FP16 is called so
        fp16_path = path.with_name(f"{path.stem.removesuffix('-int8')}-fp16{path.suffix}")
    return write_network(
        spec,
        state,
        path,
        licence=licence,
        choices=choices,
        precision=precision,
        plan=plan,
        int8=None if calibration is None else _int8_choices(calibration, chosen, bar=bar),
        fp16_output=fp16_path,
        gate_ppb=gate_ppb,
        force=force,
        say=say,
    )


def choose_output(
    given: Path | None, engine: Flavour | None, network: str, precision: GraphPrecision
) -> tuple[Path, Flavour | None, str]:
    """Return the file, the engine that it is for, ``None`` for ONNX, and why in words.

    Parameters
    ----------
    given, engine
        What was asked for, if anything was.
    network, precision
        What a file is named after.

    Raises
    ------
    UsageError
        If the suffix is another, or an engine was asked for that an ONNX file does not need.
    """
    installed = installed_engines()
    if given is not None:
        if given.suffix not in (ONNX, PLAN):
            raise UsageError(f"-o {given}: give it the suffix {ONNX}, or {PLAN} for TensorRT")
        if given.suffix == ONNX and engine is not None:
            raise UsageError(f"-o {given}: --engine {engine} builds a plan; give it {PLAN}")
        if given.suffix == ONNX:
            return given, None, "asked for"
        return given, engine or (installed or ("tensorrt",))[0], "asked for"
    stem = f"{network}-{precision}"
    if engine is not None:
        return Path(stem + PLAN), engine, "asked for"
    if precision == "fp32":
        return Path(stem + ONNX), None, "a file for every backend"
    if installed:
        return Path(stem + PLAN), installed[0], f"{installed[0]} is installed"
    return Path(stem + ONNX), None, "no flavour of TensorRT is installed"


def _check_int8(
    precision: GraphPrecision,
    calibration: PathLike | None,
    gate_ppb: float | None,
    chosen: dict[str, Any],
) -> None:
    """Refuse INT8 without calibration data, and what is about INT8 without it."""
    if precision != "int8":
        about = {"calibration": calibration, **chosen}
        given = [n for n in ("calibration", *ABOUT_INT8) if about.get(n) is not None]
        if given:
            raise UsageError(f"{flag(given[0])} is about INT8; pass --int8 too")
        return
    if calibration is None:
        raise UsageError(
            "--int8 needs --calibration: a folder or a list of field maps with masks, or phantoms"
        )
    if gate_ppb is not None:
        raise UsageError("--gate-ppb is for the other precisions; --int8 has --budget-ppb")


def _int8_choices(calibration: PathLike, chosen: dict[str, Any], *, bar: bool) -> "Int8Choices":
    """Return what the user chose about INT8, the defaults for the rest."""
    from qsm_deploy.calibration.int8.calibration import Int8Choices
    from qsm_deploy.calibration.int8.search import Budget
    from qsm_deploy.runtime.console.terminal import bar_on_terminal, no_progress

    names = [name for name in (*ABOUT_INT8, "layers") if name in chosen and name not in BUDGETS]
    budget = {ours: chosen[name] for name, ours in BUDGETS.items() if name in chosen}
    return Int8Choices(
        str(calibration),
        **{RENAMED.get(name, name): chosen[name] for name in names},
        budget=Budget(**budget),
        progress=bar_on_terminal if bar else no_progress,
    )
