"""The two forms of an unrolled network, one graph or its CNN in patches, make the same map."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.measure.receptive_field import theoretical_receptive_field
from qsm_deploy.export.networks import lpcnn, modl_qsm
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import ReceptiveField
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import network_outputs
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Backend, Session

DIRECTIONS = ((0.1, 0.2, 0.97), (0.0, 0.6, 0.8))
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def scan() -> Scan:
    """Return two fields of one head, on an odd, oblique grid."""
    grids = [Geometry((40, 35, 37), (1.0, 1.0, 1.05), b) for b in DIRECTIONS]
    head = head_phantom(grids[0], seed=5)
    second = head.mask * dipole_convolve(head.chi_ppm, grids[1])
    return Scan(
        np.stack([head.local_field_ppm, second]),
        head.mask,
        head.geometry,
        nib.Nifti1Header(),
        np.eye(4),
        more_b0_directions=DIRECTIONS[1:],
    )


@pytest.fixture(scope="module")
def weights(formula_state, keras_weights):
    small = lpcnn.LPCNN(wide_resnet(1, width=4, blocks=2))
    return {"lpcnn": formula_state(small.state_dict()), "modl-qsm": keras_weights}


@pytest.fixture
def open_form(weights, tmp_path):
    """Return a function that exports one form of a network and opens it."""

    def open_form(name: str, form: str, orientations: int, backend: Backend) -> Session:
        choices = Choices({"form": form, "orientations": str(orientations)})
        builder = {"lpcnn": lpcnn, "modl-qsm": modl_qsm}[name].network_from_state
        module: Network = builder(weights[name], choices)
        card = provisional_card(REGISTRY[name], module, choices, "test", "0" * 64)
        if form == "split":
            sees = theoretical_receptive_field(module)
            card = replace(card, receptive_field=ReceptiveField(sees, sees, 1.0))
        path = tmp_path / f"{name}-{form}.onnx"
        path.write_bytes(with_card(onnx_from_module(module), card))
        return open_session(path, backend)

    return open_form


@pytest.mark.parametrize(
    ("name", "orientations"), [("lpcnn", 1), ("lpcnn", 2), ("modl-qsm", 1)], ids=str
)
@pytest.mark.parametrize(
    "backend", [pytest.param("onnxruntime", marks=pytest.mark.slow), "openvino"]
)
def test_one_graph_equals_the_cnn_in_patches(name, orientations, backend, scan, open_form) -> None:
    scan = replace(
        scan,
        measured=scan.measured[:orientations],
        more_b0_directions=scan.more_b0_directions[: orientations - 1],
    )
    whole = open_form(name, "unrolled", orientations, backend)
    one_graph = network_outputs(whole, scan, plan_whole(scan.mask.shape, 1))
    split = open_form(name, "split", orientations, backend)
    sees = split.card.receptive_field.theoretical
    plan = plan_patches(scan.mask, 1, 2 * sees + 6, 2 * sees, "crop")
    assert plan.count > 4
    in_patches = network_outputs(split, scan, plan)
    largest = np.abs(one_graph).max()
    assert largest > 1e-3
    assert np.abs(in_patches - one_graph).max() <= 1e-5 * largest
    assert np.isfinite(one_graph).all()
