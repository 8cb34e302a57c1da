"""Golden vectors: what went into a published network, what came out, and how to compare with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from qsm_deploy.export.networks import nextqsm
from tests.export.formula import State

Golden = Mapping[str, np.ndarray]
Arrays = list[np.ndarray]
Pairs = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class GoldenVector:
    """What the authors' code, or a copy of it, gave with weights by the formula.

    Attributes
    ----------
    golden, keys
        The names of the vector and of the list of keys.
    inputs
        From the golden vector to what it takes: volumes (x, y, z), and numbers.
    outputs
        From the golden vector and what it gives, (x, y, z) each, to pairs of equals.
    options
        What is chosen.
    normalisation
        From the golden vector to the authors' numbers.
    fill
        Changes the state that the formula gives.
    """

    golden: str
    keys: str
    inputs: Callable[[Golden], Arrays]
    outputs: Callable[[Golden, Arrays], Pairs]
    options: Mapping[str, str] = field(default_factory=dict)
    normalisation: Callable[[Golden], Mapping[str, np.ndarray]] = lambda golden: {}
    fill: Callable[[Golden, State], None] = lambda golden, state: None


def separation_inputs(golden: Golden) -> Arrays:
    return [golden[name] for name in ("local_field", "chi", "r2prime_hz", "mask")]


def separated(golden: Golden, given: Arrays) -> Pairs:
    names = ("chi_positive", "chi_negative")
    return [(y * golden["mask"], golden[name]) for y, name in zip(given, names, strict=True)]


def statistics(pattern: str) -> Callable[[Golden], Mapping[str, np.ndarray]]:
    """Return what names a golden vector's statistics as the authors do."""
    return lambda golden: {
        pattern.format(name, what): np.array(value)
        for name, row in zip(golden["stats_names"], golden["stats_mean_std"], strict=True)
        for what, value in zip(("mean", "std"), row, strict=True)
    }


def first_block(volume: np.ndarray, context: int, mode: str) -> np.ndarray:
    """Return the first block of 64 voxels a side, with what lies before and behind the volume."""
    behind = [max(0, 64 - context - n) for n in volume.shape]
    return np.pad(volume, [(context, b) for b in behind], mode=mode)[:64, :64, :64]


def louder_prior(golden: Golden, state: State) -> None:
    """Raise what NeXtQSM's prior gives, whose gradient would vanish."""
    state["vn.last_conv.weight"] *= float(golden["vn_last_conv_weight_gain"])
    state["vn.last_conv.bias"][:] = float(golden["vn_last_conv_bias"])


IQFM = GoldenVector(
    "iqfm",
    "iqfm",
    inputs=lambda golden: [
        -golden["phase"][..., 0],
        golden["eroded_mask"],
        golden["te_s"][:1],
        golden["b0_t"].reshape(1),
    ],
    outputs=lambda golden, given: [(given[0] * golden["eroded_mask"], golden["local_field_echo1"])],
)
BFRNET = GoldenVector(
    "bfrnet",
    "bfrnet",
    inputs=lambda golden: [golden["total_field"]],
    outputs=lambda golden, given: [
        (given[0] * golden["mask"], golden["local_field"]),
        (golden["total_field"] - given[0], golden["background"]),
    ],
)
QSMGAN = GoldenVector(
    "qsmgan",
    "qsmgan_c16",
    inputs=lambda golden: [first_block(golden["local_field"], 8, "constant")],
    outputs=lambda golden, given: [
        (np.tanh(10 * given[0])[8:56:2, 8:56:2, 8:56:2], golden["first_patch_tanh_sub2"])
    ],
)
AUTOQSM = GoldenVector(
    "autoqsm",
    "autoqsm",
    inputs=lambda golden: [first_block(golden["total_field"], 16, "edge")],
    outputs=lambda golden, given: [
        (given[0][16:48:2, 16:48:2, 16:48:2], golden["first_patch_sub2"])
    ],
)
NEXTQSM_FIELD = GoldenVector(
    "nextqsm",
    "nextqsm",
    inputs=lambda golden: [golden["total_field"] * golden["mask"]],
    outputs=lambda golden, given: [(given[0] * golden["mask"], golden["local_field"])],
    options={"part": "bf"},
)
NEXTQSM_PRIOR = GoldenVector(
    "nextqsm",
    "nextqsm",
    inputs=lambda golden: [golden["local_field"]],
    outputs=lambda golden, given: [
        (given[0] * golden["mask"] / 64**3, golden["step0_regulariser_gradient"])
    ],
    options={"part": "vn"},
    normalisation=lambda golden: {nextqsm.LAMBDAS: golden["lambdas"]},
    fill=louder_prior,
)
CHI_SEPNET = GoldenVector(
    "chi_sepnet",
    "chi_sepnet",
    inputs=separation_inputs,
    outputs=separated,
    normalisation=statistics("{}_{}"),
)
SUSEP_NET = GoldenVector(
    "susepnet",
    "susepnet",
    inputs=separation_inputs,
    outputs=separated,
    normalisation=statistics("all_mean_std.{}.{}"),
)
