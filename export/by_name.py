"""An export as a user asks for it: a network by its name, weights by their files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsm_deploy.export.networks.registry import network_spec, recognise
from qsm_deploy.export.order import ABOUT_INT8, ABOUT_PLANS, COMMON, Order, given_options
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import GraphPrecision
from qsm_deploy.runtime.card.read import ONNX
from qsm_deploy.runtime.console.command import needs_extra
from qsm_deploy.runtime.gpu.engines.tensorrt_library import Flavour
from qsm_deploy.runtime.job.request import PathLike, paths_of
from qsm_deploy.runtime.scan.arrays import vector
from qsm_deploy.runtime.scan.axes import axes_of

if TYPE_CHECKING:
    from qsm_deploy.export.write_network import Exported

NAME = "qsm-export"
OPTIONS = ("residual", "form", "orientations", "dipole_op", "part")  # what is chosen of a network
OF_NETWORKS = ("normalisation", "b0_direction", *OPTIONS)  # what other exports have not
PASSED = ("weights", *COMMON, *OF_NETWORKS)


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
    chosen = given_options(chosen)
    spec = network_spec(model)
    asked = (output, precision, calibration, engine, gate_ppb, force, say, bar)
    order = Order(spec.name, *asked, chosen)
    options = spec.chosen_options({name: chosen.get(name) for name in OPTIONS})
    with needs_extra("export", NAME):
        from qsm_deploy.export.checkpoints.matlab_onnx import load_matlab_onnx
        from qsm_deploy.export.checkpoints.normalisation import load_normalisation
        from qsm_deploy.export.checkpoints.state import load_state, state_sha256
        from qsm_deploy.export.model_files import refuse_models, refuse_quantised
        from qsm_deploy.export.networks.build_network import build_network
        from qsm_deploy.export.networks.network import Choices
        from qsm_deploy.export.write_network import provisional_card
    licence = spec.published.licence
    if weights is None:
        files = [spec.bundled_file()]
        if spec.bundled:
            licence = spec.bundled[1].licence
            say(f"no --weights: taking the bundled ones, {spec.bundled[1].source}")
    else:
        files = list(paths_of(weights))
    refuse_models(files, spec.name, may_be_onnx=spec.onnx_weights)
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
    order.check_outputs()
    module = build_network(spec, state, choices)
    return order.write(
        module, provisional_card(spec, module, choices, licence, state_sha256(state))
    )
