from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.kernels.inversion.field_noise import alpha_of_noise
from qsm_deploy.kernels.threads import workers
from qsm_deploy.runtime.card.card import PriorMap, TensorInfo
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction import prior_maps
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstruction.network import CpuNetwork
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import network_inputs, reconstruct
from qsm_deploy.runtime.reconstruction.planning import PatchOptions
from qsm_deploy.runtime.reconstructor import Host, open_reconstructor
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles, load_scan
from qsm_deploy.runtime.sessions.open import open_session


@pytest.fixture
def scan(field, write_volume):
    rotation = np.array([[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1.0, 1.2, 2.0])
    return load_scan(ScanFiles((write_volume(field, "field.nii.gz", affine),)), Reading())


def plans(scan, divisor):
    yield plan_whole(scan.mask.shape, divisor)
    for patch, overlap, blend in ((8, 0, "crop"), (8, 3, "hann"), (12, 4, "gaussian")):
        yield plan_patches(scan.mask, divisor, patch, overlap, blend)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_pointwise_network_gives_the_same_whole_and_in_patches(scan, card, write_model, backend):
    session = open_session(write_model(card), backend)
    for plan in plans(scan, card.divisor):
        chi = reconstruct(session, scan, plan, Stages())
        assert chi.dtype == np.float32
        np.testing.assert_allclose(chi, 2 * scan.measured[0], atol=1e-7)


TV_CHI = TensorInfo("tv_chi_ppm", "ppm", ("n", 1, "x", "y", "z"))
NOISE = TensorInfo("field_noise_ppm", "ppm", (1,))
TV = PriorMap("tv_chi_ppm", "tv", "local_field_ppm", 3)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("last", [TV_CHI, NOISE], ids=lambda tensor: tensor.name)
def test_what_is_made_of_the_whole_volume_is_the_same_in_patches(
    scan, card, write_model, backend, last
):
    first = next(tensor for tensor in (TV_CHI, NOISE) if tensor != last)
    taking = replace(card, inputs=(*card.inputs, first, last), priors=(TV,))
    session = open_session(write_model(taking), backend)  # twice what it takes last
    expected = 2 * scan.mask * network_inputs(taking, scan)[last.name]
    assert np.unique(expected).size > (1000 if last is TV_CHI else 1)
    for plan in plans(scan, card.divisor):
        chi = reconstruct(session, scan, plan, Stages())
        np.testing.assert_allclose(chi, expected.reshape(scan.mask.shape), atol=1e-7)


def test_every_iteration_and_every_patch_is_told(scan, card, write_model):
    taking = replace(card, inputs=(*card.inputs, TV_CHI), priors=(TV,))
    inversion = CpuNetwork(open_session(write_model(taking), "onnxruntime"), Path("twice.onnx"))
    task = inversion.task(scan, scan, Wants(PatchOptions(patch=8)), 1e12)
    told: list[str] = []
    inversion.make(task, Stages(announce=told.append), lambda: told.append("done"))
    patches = task.decision.plan.count
    assert patches > 1
    assert told == ["prepare", *["done"] * TV.steps, "inference", *["done"] * patches]
    assert task.runs == TV.steps + patches


def test_every_echo_is_told(scan, card, write_model):
    taking = replace(
        card, task="phase->chi", inputs=(TensorInfo("phase_rad", "rad", TV_CHI.shape),)
    )
    echoes = np.concatenate([scan.measured] * 3)
    scan = replace(scan, measured=echoes, quantity="phase_rad", echo_time_s=0.005)
    scan = replace(scan, more_echo_times_s=(0.01, 0.015))
    inversion = CpuNetwork(open_session(write_model(taking), "onnxruntime"), Path("twice.onnx"))
    task = inversion.task(scan, scan, Wants(PatchOptions(patch=8)), 1e12)
    told: list[int] = []
    inversion.make(task, Stages(), lambda: told.append(1))
    assert task.runs == len(told) == 3 * task.decision.plan.count


def test_prior_maps_take_the_threads_that_were_asked_for(scan, card, write_model, monkeypatch):
    seen = set()
    monkeypatch.setattr(
        prior_maps, "alpha_of_noise", lambda *args: seen.add(workers()) or alpha_of_noise(*args)
    )
    taking = replace(card, inputs=(*card.inputs, TV_CHI), priors=(TV,))
    model = write_model(taking)
    for asked, expected in ((1, 1), (3, 3), (0, workers())):
        seen.clear()
        opened = open_reconstructor([model], Host("onnxruntime", threads=asked))
        opened.run(opened.plan(scan, Wants()), Stages())
        assert seen == {expected}


def test_outside_the_mask_the_map_is_zero(scan, card, write_model):
    half = np.zeros_like(scan.mask)
    half[:, 4:8] = scan.mask[:, 4:8]
    session = open_session(write_model(card), "onnxruntime")
    masked = replace(scan, mask=half)
    chi = reconstruct(session, masked, plan_whole(half.shape, 4), Stages())
    assert np.array_equal(chi != 0, half)


def test_a_network_that_returns_nan_is_an_error(scan, card, write_model):
    session = open_session(write_model(card, factor=float("nan")), "onnxruntime")
    with pytest.raises(EngineError, match="NaN or Inf voxels"):
        reconstruct(session, scan, plan_whole(scan.mask.shape, 4), Stages())


def test_stages_take_time_and_memory(scan, card, write_model):
    session = open_session(write_model(card), "onnxruntime")
    stages = Stages()
    reconstruct(session, scan, plan_whole(scan.mask.shape, 4), stages)
    assert list(stages.seconds) == list(stages.peak_bytes) == ["prepare", "inference"]
    with stages("large"):
        ballast = np.ones(40_000_000, dtype=np.uint8)
    assert 0.9 * ballast.nbytes < stages.peak_bytes["large"] - stages.peak_bytes["prepare"]
