"""From what was measured to a susceptibility map, whole or in patches."""

from collections.abc import Callable, Mapping

import numpy as np

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.card.card import UNROLLED, ModelCard
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.inversion import require_finite
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import Session

PHASE_SIGN = "phase_sign"  # of the phase that a network takes, where a higher field counts as +


def network_inputs(
    card: ModelCard,
    scan: Scan,
    done: Callable[[], object] = lambda: None,
    made: Mapping[str, Volume] | None = None,
) -> dict[str, Volume]:
    """Return what a network takes, by name and in order.

    Volumes are (c, x, y, z), other inputs as the card says. ``done`` is called after every step of
    what takes many, ``made`` are the prior maps if they are there already.
    """
    if made is None:
        made = _prior_maps(card, scan, done) if card.priors else {}
    return {
        tensor.name: made[tensor.name][None]
        if tensor.name in made
        else network_input(card, scan, tensor.name)
        for tensor in card.inputs
    }


def _prior_maps(card: ModelCard, scan: Scan, done: Callable[[], object]) -> dict[str, Volume]:
    from qsm_deploy.runtime.reconstruction.prior_maps import prior_maps

    return prior_maps(card.priors, scan, done)


def network_input(card: ModelCard, scan: Scan, name: str) -> Volume:
    """Return one of what a network takes that is no prior map."""
    return _INPUTS[name](card, scan)


def _field_noise_ppm(card: ModelCard, scan: Scan) -> Volume:
    from qsm_deploy.runtime.reconstruction.prior_maps import field_noise_ppm

    return np.array([field_noise_ppm(scan)], dtype=np.float32)


def _phase_rad(card: ModelCard, scan: Scan) -> Volume:
    phase: Volume = np.float32(card.constants.get(PHASE_SIGN, 1)) * scan.measured
    return phase


def _number(name: str, value: float | None) -> Volume:
    if value is None:
        flag = name.rsplit("_", 1)[0].replace("_", "-")
        raise DataError(f"this network needs the {flag.replace('-', ' ')}; pass --{flag}")
    return np.array([value], dtype=np.float32)


_INPUTS: dict[str, Callable[[ModelCard, Scan], Volume]] = {
    "local_field_ppm": lambda card, scan: scan.measured,
    "phase_rad": _phase_rad,
    "rough_chi_ppm": lambda card, scan: scan.measured,
    "mask": lambda card, scan: scan.mask[None].astype(np.float32),
    "field_noise_ppm": _field_noise_ppm,
    "voxel_size_mm": lambda card, scan: np.array(scan.geometry.voxel_size_mm, dtype=np.float32),
    "b0_direction": lambda card, scan: scan.b0_directions,
    "echo_time_s": lambda card, scan: _number("echo_time_s", scan.echo_time_s),
    "field_strength_t": lambda card, scan: _number("field_strength_t", scan.field_strength_t),
}


def input_shapes(card: ModelCard, scan: Scan, plan: PatchPlan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a network takes: a patch of each volume, and the numbers."""
    return {
        tensor.name: (1, int(tensor.shape[1]), *plan.patch_shape)
        if tensor.is_volume
        else network_input(card, scan, tensor.name).shape
        for tensor in card.inputs
    }


def reconstruct(
    session: Session,
    scan: Scan,
    plan: PatchPlan,
    stages: Stages,
    done: Callable[[], object] = lambda: None,
) -> Volume:
    """Return the susceptibility map of one acquisition.

    Parameters
    ----------
    session
        The network.
    scan
        The acquisition, on a geometry the network may be used for.
    plan
        Whole volume or patches, made for the scan's mask.
    stages
        Takes the time and memory of the stages ``prepare``, ``inference`` and, if the map keeps
        some of a prior map, ``anchor``.
    done
        Called after each iteration of total variation for a prior map, and each patch.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], 0 outside the mask.

    Raises
    ------
    UsageError
        If the network takes more or fewer fields than the scan has.
    DataError
        If the network needs a parameter that the scan does not have.
    EngineError
        If the backend fails, or the result is not finite.
    """
    require_field_count(session.card, len(scan.measured))
    chi = network_output(session, scan, plan, stages, done)
    require_finite(chi)
    return chi


def network_output(
    session: Session,
    scan: Scan,
    plan: PatchPlan,
    stages: Stages | None = None,
    done: Callable[[], object] = lambda: None,
    made: Mapping[str, Volume] | None = None,
) -> Volume:
    """Return what :func:`reconstruct` does, finite or not; ``made`` as for network_inputs."""
    stages = stages or Stages()
    card = session.card
    if card.pipeline in UNROLLED:
        from qsm_deploy.runtime.reconstruction.unrolled import reconstruct_unrolled

        with stages("inference"):
            return reconstruct_unrolled(
                card, scan, lambda volume: _run(session, plan, {"prior_input": volume}, scan, done)
            )
    with stages("prepare"):
        inputs = network_inputs(card, scan, done, made)
    with stages("inference"):
        chi: Volume = _run(session, plan, inputs, scan, done)[0] * scan.mask
    if card.anchor is not None:
        from qsm_deploy.runtime.reconstruction.prior_maps import anchored

        prior = inputs[card.anchor.prior][0]
        del inputs
        with stages("anchor"):
            chi = anchored(card.anchor, chi, prior, scan)
    return chi


def require_field_count(card: ModelCard, count: int) -> None:
    """Check that a network takes so many fields.

    Raises
    ------
    UsageError
        If not.
    """
    if count not in card.field_counts:
        least, most = card.field_counts[0], card.field_counts[-1]
        takes = "one field" if most == 1 else f"{least} to {most} fields" if least < most else most
        again = "; export it with --orientations" if "orientations" in card.options else ""
        raise UsageError(
            f"{card.network} takes {takes}, {count} were given{again}; the model, if named, comes "
            "first and ends in .onnx"
        )


def _run(
    session: Session,
    plan: PatchPlan,
    inputs: Mapping[str, Volume],
    scan: Scan,
    done: Callable[[], object],
) -> Volume:
    volumes = {name: value for name, value in inputs.items() if value.ndim == 4}
    numbers = {name: value for name, value in inputs.items() if value.ndim != 4}
    return plan.run(
        lambda patches: run_patch(session, dict(zip(volumes, patches, strict=True)) | numbers),
        list(volumes.values()),
        scan.mask,
        done,
    )


def run_patch(session: Session, patch: Mapping[str, Volume]) -> Volume:
    """Return the network's (c, x, y, z) output of one patch; numbers pass as they are."""
    tensors = {name: value[None] if value.ndim == 4 else value for name, value in patch.items()}
    output: Volume = session.run(tensors)[0]
    return output
