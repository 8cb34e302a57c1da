"""The self-check: it passes what is right, and catches what is wrong, NaN included."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.measure.verification import (
    SHAPES,
    Difference,
    apply_gate,
    measure_differences,
    phantom_scan,
)
from qsm_deploy.export.networks.network import LOCAL_FIELD, PHASE, Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.errors import AccuracyError
from qsm_deploy.runtime.card.card import TensorInfo

BACKENDS = ("openvino", "onnxruntime")
SPEC = REGISTRY["tv-unet"]


@pytest.fixture(scope="module")
def model(tiny_tv_unet: Network) -> onnx.ModelProto:
    return onnx_from_module(tiny_tv_unet)


@pytest.fixture
def differences(model: onnx.ModelProto, tiny_tv_unet: Network, tmp_path: Path) -> Callable:
    def measure(change: Callable[[onnx.ModelProto], None]) -> list[Difference]:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        change(changed)
        path = tmp_path / "m.onnx"
        card = provisional_card(SPEC, tiny_tv_unet, Choices(), "none", "0" * 64)
        path.write_bytes(with_card(changed, card))
        return measure_differences(path, tiny_tv_unet, card, BACKENDS)

    return measure


def weight(model: onnx.ModelProto, name: str) -> np.ndarray:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = np.frombuffer(tensor.raw_data, dtype=np.float32).copy()
    tensor.raw_data = b""
    return values


def set_weight(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    next(t for t in model.graph.initializer if t.name == name).raw_data = values.tobytes()


def test_the_right_model_passes_in_every_backend(differences) -> None:
    measured = differences(lambda model: None)
    assert {(d.backend, d.shape) for d in measured} == {(b, s) for b in BACKENDS for s in SHAPES}
    verified = apply_gate(measured, 0.01)
    assert verified.shapes == SHAPES
    assert verified.max_ppb == max(d.max_ppb for d in measured) < 0.01
    assert verified.reference == "pytorch, against openvino and onnxruntime"


@pytest.mark.parametrize("spoil", [lambda w: w * np.float32(1.01), lambda w: w * np.nan])
def test_a_changed_weight_or_nan_fails(differences, spoil) -> None:
    def change(model: onnx.ModelProto) -> None:
        values = weight(model, "last.weight")
        set_weight(model, "last.weight", spoil(values).astype(np.float32))

    with pytest.raises(AccuracyError, match=r"ppb.*the gate is 0\.01 ppb") as caught:
        apply_gate(differences(change), 0.01)
    assert caught.value.exit_code == 5


def test_swapped_inputs_fail(differences) -> None:
    def change(model: onnx.ModelProto) -> None:
        names = {"local_field_ppm": "tv_field_ppm", "tv_field_ppm": "local_field_ppm"}
        for node in model.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]

    with pytest.raises(AccuracyError):
        apply_gate(differences(change), 0.01)


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), 0.011])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_gate_sees_the_worst_wherever_it_is(worst: float, place: int) -> None:
    values = [0.001, 0.002]
    values.insert(place, worst)
    measured = [Difference("openvino", (8, 8, 8 + n), v) for n, v in enumerate(values)]
    with pytest.raises(AccuracyError, match=f"8x8x{8 + place}"):
        apply_gate(measured, 0.01)


def test_the_shapes_are_a_cube_an_odd_one_and_three_different_axes() -> None:
    cube, odd, mixed = SHAPES
    assert len(set(cube)) == 1
    assert any(n % 2 for n in odd)
    assert len(set(mixed)) == 3


@pytest.mark.parametrize(
    ("inputs", "quantity"), [((LOCAL_FIELD,), "local_field_ppm"), ((PHASE,), "phase_rad")]
)
def test_the_phantom_is_measured_as_the_network_needs_it(tiny_ir2qsm, inputs, quantity) -> None:
    tiny_ir2qsm.inputs = inputs
    card = provisional_card(REGISTRY["ir2qsm"], tiny_ir2qsm, Choices(), "none", "0" * 64)
    del tiny_ir2qsm.inputs
    scan = phantom_scan(card, SHAPES[1])
    assert scan.quantity == quantity
    assert scan.measured.shape == (1, *SHAPES[1])
    assert not scan.measured[0][~scan.mask].any()
    largest = np.abs(scan.measured).max()
    assert (3 < largest <= np.float32(np.pi)) if quantity == "phase_rad" else largest < 1


def test_further_orientations_are_tilted_and_differ(tiny_ir2qsm) -> None:
    tiny_ir2qsm.inputs = (TensorInfo("local_field_ppm", "ppm", ("n", 3, "x", "y", "z")),)
    card = provisional_card(REGISTRY["ir2qsm"], tiny_ir2qsm, Choices(), "none", "0" * 64)
    del tiny_ir2qsm.inputs
    scan = phantom_scan(card, (24, 24, 24))
    assert scan.b0_directions.shape == (3, 3)
    np.testing.assert_allclose(np.linalg.norm(scan.b0_directions, axis=1), 1, atol=1e-6)
    first, second, third = scan.measured
    assert np.abs(first - second).max() > 0.01 < np.abs(second - third).max()
