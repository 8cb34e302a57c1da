"""Patches lie in heads, hold the network's real inputs, and air counts for nothing."""

from collections.abc import Mapping
from dataclasses import replace

import nibabel as nib
import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from qsm_deploy.calibration.int8.activations import (
    coarsened,
    collect_histograms,
    multiply_accumulates,
)
from qsm_deploy.calibration.int8.evaluation import middle_of
from qsm_deploy.calibration.int8.patches import RIM, CalibrationPatch, sample_patches
from qsm_deploy.kernels.bounding_box import corner_around
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import ModelCard, TensorInfo, Tiles
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import Session

SHAPE = (40, 36, 30)
GRAPH = """<ir_version: 10, opset_import: ["": 20]>
g (float[1, 1, x, y, z] a) => (float[1, 2, u, v, w] d) {
  b = Conv <pads=[1, 1, 1, 1, 1, 1]> (a, w1)
  c = MaxPool <kernel_shape=[2, 2, 2], strides=[2, 2, 2]> (b)
  d = ConvTranspose <strides=[2, 2, 2]> (c, w2)
}"""


def scan_of(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Scan:
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, dtype=bool)
    mask[5:-5, 5:-5, 5:-5] = True
    field = rng.standard_normal((1, *shape), dtype=np.float32) * 0.01 * mask
    return Scan(field, mask, Geometry(shape), nib.Nifti1Header(), np.eye(4))


def no_session() -> Session:
    raise AssertionError("this network does not have to run")


def test_patches_are_cut_from_the_whole_and_the_seed_decides_where(any_card) -> None:
    scans = [scan_of(), scan_of((32, 32, 48), 1)]
    found = [
        sample_patches(any_card, scans, no_session, count=6, seed=seed, size=24)
        for seed in (3, 3, 4)
    ]
    for patch in found[0]:
        volume = patch.tensors["local_field_ppm"]
        assert volume.shape == (1, 1, 24, 24, 24)
        assert patch.mask.any()
        assert not patch.mask[:3].any()
        assert not patch.mask[..., -3:].any()
    first = found[0][0].tensors["local_field_ppm"][0, 0]
    whole = scans[0].measured[0]
    places = np.argwhere(whole[:17, :13, :7] == first[0, 0, 0])
    assert any(
        np.array_equal(whole[x : x + 24, y : y + 24, z : z + 24], first) for x, y, z in places
    )
    same, other = (
        [np.array_equal(p.tensors["local_field_ppm"], q.tensors["local_field_ppm"])
         for p, q in zip(found[0], others, strict=True)]
        for others in found[1:]
    )  # fmt: skip
    assert all(same)
    assert not all(other)


def test_a_small_map_is_padded_to_the_divisor(any_card: ModelCard) -> None:
    scan = scan_of((21, 17, 19))
    (patch,) = sample_patches(any_card, [scan], no_session, count=1, seed=0)
    assert patch.tensors["local_field_ppm"].shape == (1, 1, 22, 18, 20)
    assert patch.mask.shape == (22, 18, 20)


def test_a_head_thinner_than_the_rim_is_refused(any_card: ModelCard) -> None:
    scan = replace(scan_of((70, 70, 70)), mask=np.zeros((70, 70, 70), dtype=bool))
    scan.mask[:3] = True
    with pytest.raises(DataError, match="not next to its edge"):
        sample_patches(any_card, [scan], no_session, count=2, seed=0)
    assert RIM >= 3


class Halves:
    """The prior of an unrolled network that halves its input."""

    backend, version, precision = "onnxruntime", "test", "fp32"

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.seen: list[np.ndarray] = []

    def run(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        self.seen.append(tensors["prior_input"])
        return tensors["prior_input"] / 2


def test_a_prior_gets_what_it_takes_at_every_iteration(any_card: ModelCard) -> None:
    volume = ("n", 1, "x", "y", "z")
    card = replace(
        any_card,
        pipeline="lpcnn",
        patchable="split",
        inputs=(TensorInfo("prior_input", "1", volume),),
        output=TensorInfo("prior_output", "1", volume),
        constants={"alpha": 1.5, "iterations": 3.0},
        normalisation={"chi_mean": 0.0, "chi_std": 0.03},
    )
    session = Halves(card)
    patches = sample_patches(card, [scan_of()], lambda: session, count=6, seed=0, size=24)
    assert len(session.seen) == 3
    assert len(patches) == 6
    for n, patch in enumerate(patches):
        assert np.isin(patch.tensors["prior_input"], session.seen[n // 2]).all()


def test_a_network_for_the_whole_gets_boxes_of_their_own(any_card: ModelCard) -> None:
    card = replace(any_card, patchable="no", why_whole="Fourier steps")
    patches = sample_patches(card, [scan_of()], no_session, count=2, seed=0, size=24)
    assert {p.tensors["local_field_ppm"].shape for p in patches} == {(1, 1, 24, 24, 24)}


def test_a_network_in_tiles_gets_tiles(any_card: ModelCard) -> None:
    size = (16, 24, 36)
    tiles = Tiles(size, size, size, "zero", "none")
    card = replace(any_card, patchable="no", why_whole="in tiles", tiles=tiles)
    scan = scan_of()  # shorter than a tile along the third axis
    patches = sample_patches(card, [scan], no_session, count=4, seed=0)
    for patch in patches:
        volume = patch.tensors["local_field_ppm"]
        assert volume.shape == (1, 1, *size)
        assert patch.mask.shape == size
        assert not volume[..., 30:].any()
        assert np.isin(volume, scan.measured).all()


def test_corners_are_on_the_grid_and_on_the_divisor() -> None:
    for centre in ((0, 0, 0), (39, 35, 19), (20, 18, 10)):
        corner = corner_around(centre, (24, 24, 24), (40, 36, 20), divisor=4)
        assert all(c % 4 == 0 and c >= 0 for c in corner)
        assert corner[0] + 24 <= 40
        assert corner[2] == 0
    assert middle_of(scan_of(), 24, 2).mask.shape == (24, 24, 24)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    model = onnx.parser.parse_model(GRAPH)
    rng = np.random.default_rng(0)
    for name, shape in {"w1": (3, 1, 3, 3, 3), "w2": (3, 2, 2, 2, 2)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def test_air_is_not_counted(model: onnx.ModelProto) -> None:
    mask = np.zeros((8, 8, 8), dtype=bool)
    mask[2:6, 2:6, 2:6] = True
    volume = np.where(mask, np.float32(1), np.float32(1000))[None, None]
    patches = [CalibrationPatch({"a": volume}, mask)]
    found = collect_histograms(model, ["a", "b"], patches)
    assert found["a"].largest == 1
    assert found["a"].total == mask.sum() // 4
    assert found["b"].largest > 100  # next to air, but in the mask
    bad = [CalibrationPatch({"a": np.where(mask, np.nan, volume)}, mask)]
    with pytest.raises(DataError, match="not finite on the calibration data"):
        collect_histograms(model, ["a"], bad)


def test_a_coarser_mask_holds_what_is_half_inside() -> None:
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[:2, :2, :2] = True
    mask[2, :2, :2] = True
    mask[2, 2, 2] = True
    assert np.argwhere(coarsened(mask, (2, 2, 2))).tolist() == [[0, 0, 0], [1, 0, 0]]
    with pytest.raises(DataError, match="does not lie on a patch"):
        coarsened(mask, (3, 2, 2))


def test_multiply_accumulates_of_a_pyramid(model: onnx.ModelProto) -> None:
    macs = multiply_accumulates(model, {"a": np.zeros((1, 1, 8, 6, 4), dtype=np.float32)})
    assert macs == {"b": 8 * 6 * 4 * 3 * 27, "d": 4 * 3 * 2 * 3 * 2 * 8}
