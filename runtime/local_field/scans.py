"""From echoes or a total field to a scan of the local field, with the maps on the way."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import DataError, UnitsError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.echo_images import EchoImages, load_echoes
from qsm_deploy.runtime.local_field.field_mapping import FieldMap
from qsm_deploy.runtime.local_field.from_echoes import (
    Steps,
    local_field_from_total,
    result_of,
    total_field_from_echoes,
)
from qsm_deploy.runtime.scan.axes import axes_of
from qsm_deploy.runtime.scan.nifti import load_volumes
from qsm_deploy.runtime.scan.scan import (
    Reading,
    Scan,
    ScanFiles,
    echo_weights,
    labels_of_file,
    maps_of_files,
    mask_of_file,
    truth_of_file,
)
from qsm_deploy.runtime.scan.units import require_ppm
from qsm_deploy.runtime.scan.wraps import undo_half_turns

TOTAL, LOCAL, NOISE = "total_field", "local_field", "noise_map"
QUALITY, R2_STAR, BRAIN = "quality", "r2star", "brain_mask"
UNITS = {TOTAL: "ppm", LOCAL: "ppm", NOISE: "ppm", QUALITY: "1", R2_STAR: "1/s", BRAIN: "1"}


def phase_scan(images: EchoImages, files: ScanFiles, reading: Reading, limit_bytes: float) -> Scan:
    """Return a scan of the wrapped phase of all echoes, for a network that takes it.

    Parameters
    ----------
    images
        The echoes.
    files
        A mask; truth and labels.
    reading
        What the user states.
    limit_bytes
        The memory that the echoes may take.

    Raises
    ------
    QsmDeployError
        As :func:`load_echoes` and :func:`mask_of_file`.
    """
    loaded = load_echoes(images, reading, limit_bytes)
    first, echoes, notes = loaded.first, loaded.echoes, loaded.notes
    assert files.mask is not None  # whoever calls has seen to it
    mask = mask_of_file(files.mask, first, notes)
    times, weights = echoes.echo_times_s, None
    if images.magnitude:
        weights = echo_weights(echoes.magnitude, times) * mask
    scan = Scan(
        echoes.phase_rad * mask,
        mask,
        echoes.geometry,
        first.header,
        first.directed_affine,
        quantity="phase_rad",
        echo_time_s=times[0],
        more_echo_times_s=tuple(times[1:]),
        field_strength_t=echoes.field_strength_t,
        echo_weights=weights,
        truth_ppm=None if files.truth is None else truth_of_file(files.truth, first, mask),
        labels=None if files.labels is None else labels_of_file(files.labels, first),
        b0_from=loaded.b0_from,
        notes=notes,
        facts={"phase_scales": loaded.scales, "negated": reading.negate},
    ).canonical()
    notes += undo_half_turns(scan.measured, scan.mask, scan.axes)
    return scan


def with_maps(scan: Scan, files: ScanFiles) -> Scan:
    """Return a scan with the maps that are taken besides its field."""
    first, *_ = load_volumes(files.fields[0])
    maps = maps_of_files(files, first, scan.axes.turn_back(scan.mask))
    turned: dict[str, Any] = {name: scan.axes.turn(volume) for name, volume in maps.items()}
    return replace(scan, **turned)


DRY = Steps(
    map_field=lambda echoes, mask: FieldMap(np.zeros(mask.shape, dtype=np.float32))
)  # what finds nothing but the mask


def total_field_scan(
    images: EchoImages,
    files: ScanFiles,
    reading: Reading,
    steps: Steps,
    *,
    limit_bytes: float,
    stages: Stages,
    keeps_magnitude: bool = False,
    wants_r2_star: bool = False,
) -> tuple[Scan, dict[str, Volume]]:
    """Return a scan of the field of all sources, and the maps, by the names of their flags.

    Parameters
    ----------
    images
        The echoes.
    files
        Mask, truth and labels; without a mask the brain is found on the magnitude.
    reading
        What the user states.
    steps
        What does it.
    limit_bytes
        The memory that the steps may take.
    stages
        Takes their time and memory.
    keeps_magnitude
        Whether the scan has the magnitude of all echoes.
    wants_r2_star
        Whether the decay is made too.

    Raises
    ------
    QsmDeployError
        As :func:`load_echoes` and :func:`total_field_from_echoes`.
    """
    if not (images.magnitude or files.mask):
        raise DataError("without a magnitude nothing tells where the brain is; pass a mask with -m")
    with stages("load"):
        loaded = load_echoes(images, reading, limit_bytes)
        first, b0_from, notes, echoes = loaded.first, loaded.b0_from, loaded.notes, loaded.echoes
        read = {"phase_scales": loaded.scales, "negated": reading.negate}
        read["echo_times_s"] = list(echoes.echo_times_s)
        del loaded
        mask = None if files.mask is None else mask_of_file(files.mask, first, notes)
        affine, stored = first.directed_affine, echoes.geometry
        axes = axes_of(affine, stored)
        echoes, mask = echoes.turned(axes), None if mask is None else axes.turn(mask)
        strength, grid = echoes.field_strength_t, echoes.geometry
        signal = echoes.signal if keeps_magnitude else None
    lines = total_field_from_echoes(
        echoes,
        mask,
        steps,
        limit_bytes=limit_bytes,
        stages=stages,
        axes=axes,
        wants_r2_star=wants_r2_star,
    )
    del echoes
    total = result_of(lines)
    found, brain = total.found, total.brain
    inside = axes.turn_back(brain)
    truth = None if files.truth is None else axes.turn(truth_of_file(files.truth, first, inside))
    labels = None if files.labels is None else axes.turn(labels_of_file(files.labels, first))
    scan = Scan(
        found.field_ppm[None],
        brain,
        grid,
        first.header,
        None if affine is None else axes.affine(affine, stored.shape),
        quantity="total_field_ppm",
        field_strength_t=strength,
        magnitude=None if signal is None else signal * brain,
        noise_ppm=found.noise_ppm,
        misfit=found.misfit,
        truth_ppm=truth,
        labels=labels,
        axes=axes,
        b0_from=b0_from,
        notes=[*notes, *total.notes],
        facts=read | total.facts,
    )
    maps = {TOTAL: found.field_ppm, NOISE: found.noise_ppm, QUALITY: found.misfit}
    maps |= {R2_STAR: total.r2_star, BRAIN: brain.astype(np.uint8)}
    return scan, {name: volume for name, volume in maps.items() if volume is not None}


def local_field_scan(
    total: Scan,
    steps: Steps,
    *,
    limit_bytes: float,
    stages: Stages,
    done: Callable[[], object] = lambda: None,
) -> Scan:
    """Return the scan of the local field of one of the field of all sources.

    Parameters
    ----------
    total
        With noise and misfit, where they are known.
    steps
        What does it.
    limit_bytes
        The memory that the steps may take.
    stages
        Takes their time and memory.
    done
        Called after each of ``steps.remove.steps``.

    Raises
    ------
    QsmDeployError
        As :func:`local_field_from_total`.
    """
    found = FieldMap(total.measured[0], total.noise_ppm, total.misfit)
    local = local_field_from_total(
        found,
        total.mask,
        total.geometry,
        steps,
        limit_bytes=limit_bytes,
        stages=stages,
        done=done,
    )
    inside = local.mask
    changed: dict[str, Any] = {
        name: None if (volume := getattr(total, name)) is None else volume * inside
        for name in ("magnitude", "noise_ppm", "truth_ppm", "chi_ppm", "r2prime_hz")
    }
    try:
        notes = local.notes + require_ppm(local.field_ppm[inside], "ppm")
    except UnitsError as error:
        raise DataError(
            f"the local field that was made varies by {local.field_ppm[inside].std():.3g} ppm, "
            "which no tissue makes: check that the mask is one of the brain, and the total field"
        ) from error
    return replace(
        total,
        measured=local.field_ppm[None],
        mask=inside,
        quantity="local_field_ppm",
        misfit=None,
        notes=[*total.notes, *notes],
        facts=local.facts | total.facts,
        **changed,
    )


def require_maps(wanted: set[str], made: dict[str, Volume]) -> None:
    """Refuse to keep a map that was not made.

    Raises
    ------
    DataError
        If there is one.
    """
    if lacking := wanted - made.keys():
        name = min(lacking).replace("_", "-")
        raise DataError(f"one echo tells no {name}; drop --{name}, or pass several echoes")
