"""From what was measured to a susceptibility map, whole or in patches."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.card.card import UNROLLED, ModelCard
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.inversion import require_finite
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import Session

# of the phase or the field that a network takes, where a higher field counts as +
PHASE_SIGN, FIELD_SIGN = "phase_sign", "field_sign"


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


def _field_ppm(card: ModelCard, scan: Scan) -> Volume:
    sign = card.constants.get(FIELD_SIGN, 1)
    return scan.measured if sign == 1 else np.float32(sign) * scan.measured


def _volume(name: str, flag: str) -> Callable[[ModelCard, Scan], Volume]:
    def taken(card: ModelCard, scan: Scan) -> Volume:
        volume: Volume | None = getattr(scan, name)
        if volume is None:
            raise DataError(f"{card.network} takes {name} besides the field; pass {flag} FILE")
        return volume[None]

    return taken


def _number(name: str, value: float | None) -> Volume:
    if value is None:
        flag = name.rsplit("_", 1)[0].replace("_", "-")
        raise DataError(f"this network needs the {flag.replace('-', ' ')}; pass --{flag}")
    return np.array([value], dtype=np.float32)


_INPUTS: dict[str, Callable[[ModelCard, Scan], Volume]] = {
    "local_field_ppm": _field_ppm,
    "total_field_ppm": _field_ppm,
    "chi_ppm": _volume("chi_ppm", "--chi"),
    "r2prime_hz": _volume("r2prime_hz", "--r2prime"),
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
    """Return the first map that a network makes of one acquisition.

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
        Susceptibility, or what else it gives first [ppm], 0 outside the mask.

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
    maps = network_outputs(session, scan, plan, stages, done)
    require_finite(maps)
    first: Volume = maps[0]
    return first


def network_outputs(
    session: Session,
    scan: Scan,
    plan: PatchPlan,
    stages: Stages | None = None,
    done: Callable[[], object] = lambda: None,
    made: Mapping[str, Volume] | None = None,
) -> Volume:
    """Return the (k, x, y, z) maps that a network gives, finite or not, 0 outside the mask.

    The rest as :func:`reconstruct`; ``made`` as for :func:`network_inputs`.
    """
    stages = stages or Stages()
    card = session.card
    if card.pipeline in UNROLLED:
        from qsm_deploy.runtime.reconstruction.unrolled import reconstruct_unrolled

        with stages("inference"):
            return reconstruct_unrolled(
                card, scan, lambda volume: _run(session, plan, {"prior_input": volume}, scan, done)
            )[None]
    if len(scan.measured) > 1 and scan.quantity == "phase_rad":
        return _of_echoes(scan, lambda echo: network_outputs(session, echo, plan, stages, done))
    with stages("prepare"):
        inputs = network_inputs(card, scan, done, made)
    with stages("inference"):
        maps: Volume = _run(session, plan, inputs, scan, done) * scan.mask
    if card.anchor is not None:
        from qsm_deploy.runtime.reconstruction.prior_maps import anchored

        prior = inputs[card.anchor.prior][0]
        del inputs
        with stages("anchor"):
            maps = anchored(card.anchor, maps[0], prior, scan)[None]
    return maps


def _of_echoes(scan: Scan, run: Callable[[Scan], Volume]) -> Volume:
    """Return the mean of the maps of all echoes, by the weight of each, 0 where none has one.

    Gao et al., NeuroImage 259:119410 (2022), doi 10.1016/j.neuroimage.2022.119410.
    """
    times = np.array([scan.echo_time_s, *scan.more_echo_times_s], dtype=np.float32)
    weights = scan.echo_weights
    if weights is None:
        weights = np.broadcast_to((times**2)[:, None, None, None], scan.measured.shape)
    total: Volume | np.float32 = np.float32(0)
    for phase, time, weight in zip(scan.measured, times, weights, strict=True):
        echo = replace(scan, measured=phase[None], echo_time_s=float(time), more_echo_times_s=())
        total = total + weight * run(echo)
    summed = weights.sum(axis=0)
    mean: Volume = np.where(summed > 0, total / np.where(summed > 0, summed, 1), 0)
    return mean.astype(np.float32)


def require_field_count(card: ModelCard, count: int) -> None:
    """Check that a network takes so many fields.

    Raises
    ------
    UsageError
        If not.
    """
    if count not in card.field_counts:
        least, most = card.field_counts[0], card.field_counts[-1]
        kind = "phase" if card.inputs[0].name == "phase_rad" else "field"
        several = f"{least} to {most}" if least < most else f"{most}"
        takes = f"one {kind}" if most == 1 else f"{several} {kind}s"
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
