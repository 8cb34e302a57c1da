"""What ``config.pbtxt`` says of a reconstruction: its tensors and parameters."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.reconstruction.inversion import Needs

GRID = (-1, -1, -1)


@dataclass(frozen=True)
class Tensor:
    """An input or output, named in capitals as the argument of ``qsm.reconstruct`` that it is.

    Attributes
    ----------
    name, kind, dims
        As Triton says them; -1 is any size.
    about
        What it holds, for people.
    optional
        Whether a request may come without it.
    """

    name: str
    kind: str
    dims: tuple[int, ...]
    about: str
    optional: bool = False


def model_name(parts: Iterable[str]) -> str:
    """Return the name of a model by those of networks and methods, without what URLs escape."""
    return re.sub(r"\W", "_", "_".join(["qsm", *parts]), flags=re.ASCII)


def inputs_of(needs: Needs, methods: Sequence[Method]) -> list[Tensor]:
    """Return what is sent for a scan; what was measured comes first.

    Parameters
    ----------
    needs
        What is taken of a scan.
    methods
        Those among what makes the map.
    """
    counts, is_phase = needs.field_counts, needs.quantity == "phase_rad"
    several: tuple[int, ...] = ()
    if counts != range(1, 2):
        several = (counts.start if len(counts) == 1 else -1,)
    each = "of each echo" if is_phase else "of each orientation"
    what = "wrapped phase [rad]" if is_phase else f"{needs.quantity.split('_')[0]} field [ppm]"
    field = "PHASE_RAD" if is_phase else "FIELD_PPM"
    directions = () if is_phase else several
    found = [
        Tensor(field, "FP32", several + GRID, f"{what} {each if several else ''}".strip()),
        Tensor("MASK", "UINT8", GRID, "1 inside the brain, 0 outside"),
        Tensor("VOXEL_SIZE_MM", "FP64", (3,), "along x, y and z"),
        Tensor("B0_DIRECTION", "FP64", (*directions, 3), "in voxel axes, of any length"),
    ]
    if is_phase:
        found += [
            Tensor("ECHO_TIME_S", "FP64", (-1,), "of each echo"),
            Tensor("FIELD_STRENGTH_T", "FP64", (1,), "of the scanner"),
        ]
    abouts = {"chi_ppm": "susceptibility [ppm]", "r2prime_hz": "R2' [Hz]"}
    found += [Tensor(name.upper(), "FP32", GRID, abouts[name]) for name in needs.maps]
    where = "affine to RAS [mm], for the map that qsm-run makes of a NIfTI file"
    found.append(Tensor("AXES", "FP64", (4, 4), where, optional=True))
    taken = {option for method in methods for option in method.row.options}
    if "magnitude" in taken or is_phase:
        dims = several + GRID if is_phase else GRID
        found.append(Tensor("MAGNITUDE", "FP32", dims, "signal", optional=not needs.magnitude))
    if "noise_map" in taken:
        found.append(Tensor("NOISE_PPM", "FP32", GRID, "noise of the field [ppm]", optional=True))
    return found


def outputs_of(needs: Needs) -> list[Tensor]:
    """Return what is answered."""
    abouts = {"local_field_ppm": "local field [ppm]"}
    maps = [
        Tensor(name.upper(), "FP32", GRID, abouts.get(name, "susceptibility [ppm]"))
        for name in needs.gives
    ]
    return [*maps, Tensor("NOTES", "STRING", (1,), "what qsm-run would warn of, a line each")]


def tensors_text(tensors: Iterable[Tensor]) -> str:
    """Return tensors as a list of ``config.pbtxt``."""
    return ",\n".join(
        f'  {{ name: "{t.name}" data_type: TYPE_{t.kind} dims: {list(t.dims)}'
        + " optional: true" * t.optional
        + " }"
        for t in tensors
    )


def tensors_table(inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> str:
    """Return tensors as rows of a table in Markdown."""
    rows = [
        f"| {way} `{t.name}` | {t.kind} {list(t.dims)} | {t.about}{'; optional' * t.optional} |"
        for way, tensors in (("in", inputs), ("out", outputs))
        for t in tensors
    ]
    return "\n".join(rows)


def parameters_text(digests: Mapping[str, str], methods: Sequence[Method]) -> str:
    """Return the parameters: models with their SHA-256, and methods with what is said to them."""
    said = {"models": json.dumps(digests)}
    for method in methods:
        said |= {"method": method.name}
        said |= {name: json.dumps(value) for name, value in method.said().items()}
    return "\n".join(
        f'parameters {{ key: "{name}" value {{ string_value: {json.dumps(value)} }} }}'
        for name, value in said.items()
    )
