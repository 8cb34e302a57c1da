"""The C library computes in canonical axes, those of the Python runtime, and stores back."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import qsm_deploy.runtime as qsm
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.scan.axes import Axes, axes_named, canonical_axes, directions_named

TOLERANCE_PPM = 1e-6
X_FASTEST, Z_FASTEST = 0, 1
STORAGES = [
    "".join(ends)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for ends in itertools.product(*order)
]
HEADS = {
    "oblique": ((15, 18, 13), (0.8, 0.9, 2.0), (0.3, -0.2, 0.9)),
    "lying on its ear": ((15, 18, 13), (1.2, 1.0, 0.9), (0.9, 0.1, -0.3)),
    "half way": ((16, 16, 15), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0)),
}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is asked of Python, and of C
    "tkd": ({"method": "tkd"}, {}),
    "tv": ({"method": "tv", "iterations": 2}, {"iterations": 2}),
    "whole": ({"patch": "off"}, {"patch": -1}),
    "patches": ({"patch": 12, "overlap": 4}, {"patch": 12, "overlap": 4}),
}


class Head:
    """A field whose mask lies off the centre, in RAS, and as it may be stored."""

    def __init__(self, name: str) -> None:
        rng = np.random.default_rng(7)
        self.geometry = Geometry(*HEADS[name])
        shape = self.geometry.shape
        at = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
        centre = np.array([0.2, -0.15, 0.1])[:, None, None, None]
        self.mask = ((at - centre) ** 2).sum(axis=0) < 0.75
        chi = gaussian_filter(rng.standard_normal(shape), 1).astype(np.float32) * self.mask
        field = dipole_convolve(chi * np.float32(0.05) / chi.std(), self.geometry)
        self.field = np.where(self.mask, field, 0).astype(np.float32)

    def stored(self, axes: Axes) -> tuple[Any, ...]:
        grid = axes.geometry(self.geometry)
        return axes.turn(self.field), axes.turn(self.mask), grid.voxel_size_mm, grid.b0_direction


@pytest.fixture
def engine_of(
    open_engine: Callable[..., Any], open_method: Callable[..., Any], prior_model: Path
) -> Callable[[str], Any]:
    return lambda run: open_method(run) if run in ("tkd", "tv") else open_engine(prior_model)


@pytest.mark.parametrize("run", list(RUNS))
@pytest.mark.parametrize(
    "name",
    [name if name == "oblique" else pytest.param(name, marks=pytest.mark.slow) for name in HEADS],
)
def test_one_head_gives_one_map_however_it_is_stored(
    engine_of: Callable[[str], Any], name: str, run: str
) -> None:
    head, (_, params) = Head(name), RUNS[run]
    engine = engine_of(run)
    expected = engine.reconstruct(*head.stored(axes_named("RAS")), axes=b"RAS", **params)
    assert expected.any()
    for letters, order in itertools.product(STORAGES, (X_FASTEST, Z_FASTEST)):
        axes = axes_named(letters)
        chi = engine.reconstruct(
            *head.stored(axes), memory_order=order, axes=letters.encode(), **params
        )
        np.testing.assert_array_equal(axes.turn_back(chi), expected, err_msg=letters)


@pytest.mark.filterwarnings("ignore:patches approximate")
@pytest.mark.parametrize("run", list(RUNS))
@pytest.mark.parametrize("letters", ["RAS", "PSR", "LIA", None])
def test_the_map_is_that_of_python(
    engine_of: Callable[[str], Any], prior_model: Path, letters: str | None, run: str
) -> None:
    asked, params = RUNS[run]
    network = {} if "method" in asked else {"model": prior_model}
    field, mask, size, b0 = Head("oblique").stored(axes_named(letters or "SLP"))
    expected = qsm.reconstruct(
        field, mask, voxel_size_mm=size, b0_direction=b0, axes=letters, **asked, **network
    )
    chi = engine_of(run).reconstruct(field, mask, size, b0, axes=(letters or "").encode(), **params)
    np.testing.assert_allclose(chi, expected, atol=TOLERANCE_PPM, rtol=0)


@pytest.mark.parametrize("run", list(RUNS))
def test_without_letters_the_axis_along_b0_becomes_the_third(
    engine_of: Callable[[str], Any], run: str
) -> None:
    """The others keep their order, so the six permutations make two maps, not one."""
    head, (_, params) = Head("oblique"), RUNS[run]
    engine, maps = engine_of(run), []
    for order in itertools.permutations(range(3)):
        axes = Axes(order)
        field, mask, size, b0 = head.stored(axes)
        chi = engine.reconstruct(field, mask, size, b0, **params)
        canonical = axes.then(canonical_axes(np.eye(3), b0))
        assert canonical.order[2] == 2
        maps.append((canonical.order, axes.turn_back(chi)))
    for (order, chi), (other, more) in itertools.combinations(maps, 2):
        if order == other:
            np.testing.assert_array_equal(chi, more)
    assert len({order for order, _ in maps}) == 2


def test_the_axes_are_those_of_python(fake: Any, card: ModelCard, tmp_path: Path) -> None:
    """The network adds where a voxel lies, so that the map shows the axes it was computed in."""
    rng = np.random.default_rng(2)
    ties = itertools.product((-1, 0, 1, 1 + 2e-4, 1 + 5e-3), repeat=3)
    directions = [*(b for b in ties if any(b)), *rng.normal(size=(50, 3))]
    shape = (3, 4, 5)
    field = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    mask = np.ones(shape, bool)
    for of_card in ("RAS", "LPS", "PIR"):
        path = tmp_path / "position.onnx"
        path.write_text(
            replace(card, divisor=1, options={"fake": "position"}, axes=of_card).to_json()
        )
        engine = fake.open(path)
        for n, b0 in enumerate(directions):
            letters = [*STORAGES, ""][n * 7 % 49]
            runs_to = directions_named(letters) if letters else np.eye(3)
            axes = canonical_axes(runs_to, b0).then(axes_named(of_card))
            x, y, z = np.indices(axes.sizes(shape))
            position = (0.001 * (x + 2 * y + 3 * z)).astype(np.float32)
            expected = axes.turn_back(2 * axes.turn(field) + position)
            said = {"memory_order": n % 2, "axes": letters.encode(), "patch": -1}
            chi = engine.reconstruct(field, mask, (1, 1, 1), b0, **said)
            np.testing.assert_allclose(chi, expected, atol=1e-6, err_msg=f"{letters} {b0}")
        engine.close()
