"""Small models made by hand, and volumes to run them on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qsm_deploy.runtime.card.card import (
    METADATA_KEY,
    GeometryLimits,
    MemoryUse,
    ModelCard,
    PriorMap,
    ReceptiveField,
    TensorInfo,
    Verification,
)
from qsm_deploy.runtime.card.plan_file import FORM, PROMISE, plan_bytes
from qsm_deploy.runtime.scan.nifti import nifti_bytes

SHAPE = ("n", 1, "x", "y", "z")


@pytest.fixture
def card() -> ModelCard:
    """Return the card of a model that takes the field, any geometry, divisor 4."""
    return ModelCard(
        schema=1,
        network="twice",
        task="local_field->chi",
        pipeline="cnn",
        inputs=(TensorInfo("local_field_ppm", "ppm", SHAPE),),
        output=TensorInfo("chi_ppm", "ppm", SHAPE),
        divisor=4,
        patchable="yes",
        why_whole=None,
        receptive_field=ReceptiveField(0, 2, 1.0),
        geometry=GeometryLimits(None, None, None, None),
        normalisation={},
        constants={},
        options={},
        precision="fp32",
        memory={"onnxruntime": MemoryUse(0, 100), "openvino": MemoryUse(0, 100)},
        verified=Verification("pytorch", 0.0, ((8, 8, 8),)),
        weights_sha256="0" * 64,
        licence="MIT",
        doi=None,
        made_by="tests",
    )


@pytest.fixture
def tkd_card(card: ModelCard) -> ModelCard:
    """Return the card of a model that takes a prior map too, of TKD."""
    return replace(
        card,
        network="tkd-twice",
        inputs=(*card.inputs, TensorInfo("tkd_chi_ppm", "ppm", SHAPE)),
        priors=(PriorMap("tkd_chi_ppm", "tkd", "local_field_ppm", 1, threshold=0.2),),
    )


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a model with a card: it gives a factor times the last input.

    With the factor of 2 no test passes by returning its input; ``nan`` makes a broken network.
    Further outputs are twice, three times as much.
    """

    def write(card: ModelCard | None, name: str = "model.onnx", factor: float = 2.0) -> Path:
        taken = {t.name: t.shape for t in card.inputs} if card else {"local_field_ppm": SHAPE}
        names = list(taken)
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, taken[n]) for n in names]
        gives = [t.name for t in card.outputs] if card else ["chi_ppm"]
        outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, SHAPE) for n in gives]
        constant = onnx.numpy_helper.from_array(np.float32(factor), "factor")
        nodes = [helper.make_node("Mul", [names[-1], "factor"], ["chi"])]
        zero = onnx.numpy_helper.from_array(np.float32(0), "zero")
        nodes.append(helper.make_node("Mul", [names[0], "zero"], ["nothing"]))  # uses every input
        given = "nothing"
        for output in gives:
            nodes.append(helper.make_node("Add", ["chi", given], [output]))
            given = output
        graph = helper.make_graph(nodes, "twice", values, outputs, [constant, zero])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        if card is not None:
            helper.set_model_props(model, {METADATA_KEY: card.to_json()})
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return write


@pytest.fixture
def write_plan(tmp_path: Path, write_model: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes the model of a card as a plan, whose engine nothing runs."""

    def write(card: ModelCard, name: str = "model.plan", gpu: str = "sm_90") -> Path:
        for_gpu = {"engine": "tensorrt 11.4.0.106", "gpu": gpu, PROMISE: f"{FORM}"}
        engine = replace(card, options=card.options | for_gpu)
        graph = write_model(card, f"{name}.onnx").read_bytes()
        path = tmp_path / name
        path.write_bytes(plan_bytes(b"engine" + engine.to_json().encode(), graph))
        return path

    return write


@pytest.fixture
def write_volume(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a NIfTI volume into the test's folder."""

    def write(data: np.ndarray, name: str, affine: np.ndarray | None = None) -> Path:
        path = tmp_path / name
        matrix = np.eye(4) if affine is None else affine
        path.write_bytes(nifti_bytes(data, matrix, compress=name.endswith(".gz")))
        return path

    return write


@pytest.fixture
def field() -> np.ndarray:
    """Return a field of odd size [ppm], zero around a box."""
    rng = np.random.default_rng(3)
    volume = np.zeros((21, 18, 15), dtype=np.float32)
    volume[3:-2, 2:-3, 4:-1] = 0.02 * rng.standard_normal((16, 13, 10), dtype=np.float32)
    return volume
