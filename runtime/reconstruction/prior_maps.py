"""The maps that a network's card asks for, made of the whole volume, so that patches equal it."""

import math
from collections.abc import Callable, Iterable, Sequence

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.kernels.inversion import prior_maps as inversion
from qsm_deploy.kernels.inversion.field_noise import alpha_of_noise
from qsm_deploy.kernels.inversion.grid import padded_box
from qsm_deploy.runtime.card.card import TV_MAPS, Anchor, PriorMap
from qsm_deploy.runtime.scan.scan import Scan

FLOAT = 4  # bytes of a voxel
VARIATION, TKD, TKD_AGAIN = 53, 17, 31  # per padded voxel, as measured


def prior_maps(
    priors: Iterable[PriorMap], scan: Scan, done: Callable[[], object] = lambda: None
) -> dict[str, Volume]:
    """Return prior maps (x, y, z) [ppm], 0 outside the mask, by name and in order.

    Parameters
    ----------
    priors
        Each of the field, or of one before it.
    scan
        One local field on its grid.
    done
        Called after every iteration of total variation.

    Raises
    ------
    DataError
        If the field is the same everywhere.
    """
    made: dict[str, Volume] = {}
    variation: dict[int, tuple[Volume, Volume, Volume]] = {}  # by its steps
    for prior in priors:
        if prior.method == "tkd":
            made[prior.name] = _tkd(prior, made.get(prior.of, scan.measured[0]), scan)
            continue
        if prior.steps not in variation:
            variation[prior.steps] = _variation(prior.steps, scan, done)
        made[prior.name] = variation[prior.steps][TV_MAPS.index(prior.method)]
    return made


def anchored(anchor: Anchor, chi_ppm: Volume, prior_ppm: Volume, scan: Scan) -> Volume:
    """Return a map (x, y, z) that keeps what a prior map has next to the magic cone [ppm]."""
    grid = padded_box(scan.mask, scan.geometry)
    return grid.restore(
        inversion.anchored(
            grid.embed(chi_ppm),
            grid.embed(prior_ppm),
            grid.embed_mask(scan.mask),
            grid.geometry,
            threshold=anchor.threshold,
        )
    )


def anchor_bytes(scan: Scan) -> float:
    """Return what :func:`anchored` takes besides the maps [bytes]."""
    padded = math.prod(padded_box(scan.mask, scan.geometry).geometry.shape)
    return TKD_AGAIN * padded + FLOAT * scan.mask.size


def variation_steps(priors: Iterable[PriorMap]) -> int:
    """Return how many iterations of total variation prior maps take."""
    return sum({prior.steps for prior in priors if prior.method in TV_MAPS})


def prior_bytes(priors: Sequence[PriorMap], scan: Scan) -> float:
    """Return what making prior maps takes, with those that were made [bytes]."""
    padded = math.prod(padded_box(scan.mask, scan.geometry).geometry.shape)
    each, steps, made, peak = FLOAT * scan.mask.size, set[int](), 0, 0
    for prior in priors:
        if prior.method == "tkd":
            peak = max(peak, made + (TKD if prior.steps == 1 else TKD_AGAIN) * padded)
            made += each
        elif prior.steps not in steps:
            peak = max(peak, made + VARIATION * padded)
            made += len(TV_MAPS) * each
            steps.add(prior.steps)
    return peak


def field_noise_ppm(scan: Scan) -> float:
    """Return the noise of a field [ppm].

    Raises
    ------
    DataError
        If it is the same everywhere.
    """
    sigma = scan.spectrum_noise_ppm
    if not sigma > 0:
        raise DataError("the field is the same everywhere, so that no map can be told from it")
    return sigma


def _variation(steps: int, scan: Scan, done: Callable[[], object]) -> tuple[Volume, Volume, Volume]:
    return inversion.variation_maps(
        scan.measured[0],
        scan.mask,
        scan.geometry,
        alpha_ppm_mm=alpha_of_noise(field_noise_ppm(scan), scan.geometry),
        iterations=steps,
        done=done,
    )


def _tkd(prior: PriorMap, field: Volume, scan: Scan) -> Volume:
    assert prior.threshold is not None  # the card was checked
    grid = padded_box(scan.mask, scan.geometry)
    inside = grid.embed_mask(scan.mask)
    chi = inversion.iterated_tkd(
        grid.embed(field) * inside,
        inside,
        grid.geometry,
        threshold=prior.threshold,
        steps=prior.steps,
    )
    return grid.restore(chi)
