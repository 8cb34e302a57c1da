"""The pipeline on a GPU against the one on the CPU, on a made-up GPU that runs work late."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError, EngineError, MemoryLimitError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import FIELD, TensorInfo
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.layout import DeviceWorkload
from qsm_deploy.runtime.gpu.reconstruction import network_job, reconstruct_on_device
from qsm_deploy.runtime.metrics.metrics import field_residual
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.scan.scan import Scan

SHAPE = (18, 13, 15)
OBLIQUE = Geometry(SHAPE, (1.0, 0.8, 1.5), (0.1, -0.2, 0.97))


def blurred(tensors):
    """Return what depends on the neighbours, on every input, and on nothing else."""
    total = sum(tensors.values())
    return 0.5 * total + 0.3 * np.roll(total, 1, axis=2) - 0.1 * np.roll(total, -1, axis=4)


class CpuSession:
    """The same network for the pipeline on the CPU."""

    backend, version, precision = "onnxruntime", "0", "fp32"

    def __init__(self, card):
        self.card = card

    def run(self, tensors):
        return blurred(tensors)


@pytest.fixture
def scan():
    random = np.random.default_rng(5)
    mask = np.zeros(SHAPE, bool)
    mask[2:-3, 1:-2, 3:] = True
    mask[4, 5, 6] = False
    field = (0.03 * random.standard_normal(SHAPE)).astype(np.float32) * mask
    return Scan(field[None], mask, OBLIQUE, nib.Nifti1Header(), np.eye(4))


def plan_of(scan, blend):
    if blend == "whole":
        return plan_whole(SHAPE, 4)
    return plan_patches(scan.mask, 4, 8, 3, blend)


each_plan = pytest.mark.parametrize("blend", ["whole", "hann", "gaussian", "crop"])


def run(gpu, scan, blend, correction=None, *, evaluates=False, done=lambda: None):
    work = DeviceWorkload(scan, gpu.session, gpu.library, correction, evaluates)
    stages = Stages()
    job = network_job(gpu, work, plan_of(scan, blend))
    chi, findings = reconstruct_on_device(job, stages, done)
    return chi, findings, stages


def on_cpu(card, scan, blend, correction=None):
    chi = reconstruct(CpuSession(card), scan, plan_of(scan, blend), Stages())
    return chi if correction is None else correction.apply(chi, scan, Stages())[0]


@each_plan
@pytest.mark.parametrize("kind", ["field", "tkd"])
def test_it_does_as_the_cpu_does(fake_device, make_gpu, card, tkd_card, scan, blend, kind):
    card = tkd_card if kind == "tkd" else card
    gpu = make_gpu(fake_device, card, blurred)
    patches = []
    chi, findings, stages = run(gpu, scan, blend, done=lambda: patches.append(1))
    np.testing.assert_allclose(chi, on_cpu(card, scan, blend), atol=2e-7)
    assert (chi[~scan.mask] == 0).all()
    assert findings == {}
    inside = [p for p in plan_of(scan, blend) if scan.mask[p.inside].any()]
    assert len(patches) == len(inside)
    made = ["prepare"] if card.priors else []
    assert list(stages.seconds) == ["upload", *made, "inference", "download"]


@pytest.mark.parametrize("step", [None, Correction(0.1, 2)])
@pytest.mark.parametrize("name", [FIELD, "tv_chi_ppm", "residual_tkd_ppm", "field_noise_ppm"])
def test_nothing_but_the_network_takes_the_field_with_its_sign(
    fake_device, make_gpu, prior_card, scan, name, step
):
    maps = []
    for sign in (1.0, -1.0):
        card = replace(prior_card, constants={"field_sign": sign})
        gpu = make_gpu(fake_device, card, lambda t: t[name] * t["mask"])
        maps.append(run(gpu, scan, "hann", step)[0])
        work = DeviceWorkload(scan, gpu.session, gpu.library, step, False)
        held = max(work.peak_bytes(plan_of(scan, "hann")).values())
        assert fake_device.peak_bytes + gpu.session.weights_bytes == held
    assert np.abs(maps[0]).max() > 1e-3
    if name != FIELD:
        np.testing.assert_array_equal(maps[1], maps[0])
    elif step is None:
        np.testing.assert_array_equal(maps[1], -maps[0])


@pytest.mark.parametrize("front", ["floor", "none"])
def test_the_padding_lies_where_the_card_says(fake_device, make_gpu, card, scan, front):
    seen = []
    plan = plan_whole(SHAPE, 8, front)
    gpu = make_gpu(fake_device, card, lambda t: seen.append(t[FIELD].copy()) or t[FIELD])
    job = network_job(gpu, DeviceWorkload(scan, gpu.session, gpu.library, None, False), plan)
    chi, _ = reconstruct_on_device(job, Stages())
    np.testing.assert_array_equal(chi, scan.measured[0])
    missing = [-n % 8 for n in SHAPE]  # 6, 3, 1
    low = [n // 2 if front == "floor" else 0 for n in missing]
    ends = [(before, n - before) for before, n in zip(low, missing, strict=True)]
    np.testing.assert_array_equal(seen[0][0, 0], np.pad(scan.measured[0], ends))


@pytest.mark.parametrize("iterations", [None, 1, 4])
def test_the_step_towards_the_field_is_the_cpus(fake_device, make_gpu, tkd_card, scan, iterations):
    step = Correction(0.05, iterations)
    gpu = make_gpu(fake_device, tkd_card, blurred)
    chi, findings, stages = run(gpu, scan, "crop", step)
    expected, report = step.apply(on_cpu(tkd_card, scan, "crop"), scan, Stages())
    np.testing.assert_allclose(chi, expected, atol=5e-7)
    seen = findings["data_consistency"]
    assert seen.pop("iterations") == report.pop("iterations") == iterations
    assert seen == pytest.approx(report, rel=1e-5)
    assert "data consistency" in stages.seconds


def test_steps_that_are_not_needed_change_nothing(fake_device, make_gpu, card, scan):
    """With a large weight the map is right at once: further steps divide nothing by nothing."""
    step = Correction(1e3, 12)
    gpu = make_gpu(fake_device, card, blurred)
    chi, _, _ = run(gpu, scan, "whole", step)
    np.testing.assert_allclose(chi, on_cpu(card, scan, "whole", step), atol=5e-7)


def test_the_field_residual_is_the_cpus(fake_device, make_gpu, card, scan):
    gpu = make_gpu(fake_device, card, blurred)
    chi, findings, _ = run(gpu, scan, "hann", evaluates=True)
    expected = field_residual(chi, scan.measured[0], scan.mask, scan.geometry)
    assert findings["field_residual"] == pytest.approx(expected, rel=1e-5)


def test_numbers_and_masks_are_given_to_the_network(fake_device, make_gpu, card, scan):
    more = (
        TensorInfo("mask", "1", ("n", 1, "x", "y", "z")),
        TensorInfo("voxel_size_mm", "mm", (3,)),
        TensorInfo("b0_direction", "1", ("n", 3)),
    )
    seen = {}

    def network(tensors):
        seen.update({name: value.copy() for name, value in tensors.items()})
        return tensors["mask"] + tensors["local_field_ppm"]

    card = replace(card, inputs=(*card.inputs, *more))
    chi, _, _ = run(make_gpu(fake_device, card, network), scan, "whole")
    np.testing.assert_allclose(chi, scan.measured[0] + scan.mask, atol=1e-6)
    np.testing.assert_allclose(seen["voxel_size_mm"], OBLIQUE.voxel_size_mm)
    np.testing.assert_allclose(seen["b0_direction"], [OBLIQUE.b0_direction], rtol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_patches_are_in_flight_and_repeated_as_graphs(
    fake_device, make_gpu, card, scan, capturable
):
    gpu = make_gpu(fake_device, card, blurred, capturable=capturable)
    chi, _, _ = run(gpu, scan, "hann")
    np.testing.assert_allclose(chi, on_cpu(card, scan, "hann"), atol=2e-7)
    count = sum(scan.mask[p.inside].any() for p in plan_of(scan, "hann"))
    assert count >= 6
    assert fake_device.launched == (count - 2 if capturable else 0)
    assert (
        fake_device.most_waiting > 4 * count
    )  # all of them were enqueued before any was waited for


def test_sums_repeat_exactly_in_any_order(fake_device, make_gpu, card, scan):
    gpu = make_gpu(fake_device, card, blurred)
    first, _, _ = run(gpu, scan, "gaussian")
    for _ in range(4):  # the order goes on changing
        np.testing.assert_array_equal(run(gpu, scan, "gaussian")[0], first)


@each_plan
@pytest.mark.parametrize("step", [None, Correction(0.1), Correction(0.1, 2)])
@pytest.mark.parametrize("priors", ["tkd_card", "prior_card"])
def test_memory_is_what_was_predicted(fake_device, make_gpu, request, scan, blend, step, priors):
    gpu = make_gpu(fake_device, request.getfixturevalue(priors), blurred)
    work = DeviceWorkload(scan, gpu.session, gpu.library, step, False)
    predicted = max(work.peak_bytes(plan_of(scan, blend)).values())
    run(gpu, scan, blend, step)
    assert fake_device.peak_bytes + gpu.session.weights_bytes == predicted


def test_a_gpu_with_too_little_memory_is_left_as_it_was(fake_device, make_gpu, tkd_card, scan):
    gpu = make_gpu(fake_device, tkd_card, blurred)
    work = DeviceWorkload(scan, gpu.session, gpu.library, None, False)
    needed = int(max(work.peak_bytes(plan_of(scan, "whole")).values())) - gpu.session.weights_bytes
    for capacity in (needed - 1, needed // 2, 1):
        fake_device.capacity = capacity
        with pytest.raises(MemoryLimitError, match=r"a made-up GPU has no .* left for this run"):
            run(gpu, scan, "whole")
        assert not any(fake_device.held().values())


@pytest.mark.parametrize("fails_at", [1, 2, 3, 5])
def test_an_engine_that_fails_leaves_nothing_behind(fake_device, make_gpu, card, scan, fails_at):
    gpu = make_gpu(fake_device, card, blurred, capturable=False)
    gpu.session.fails_at = fails_at
    with pytest.raises(EngineError, match="the engine refuses"):
        run(gpu, scan, "crop")
    assert not any(fake_device.held().values())


def test_what_went_wrong_first_is_told(fake_device, make_gpu, card, scan, monkeypatch):
    gpu = make_gpu(fake_device, card, blurred)
    gpu.session.fails_at = 2
    lost = EngineError("cannot free memory: an illegal memory access was encountered")

    def refusing(name):
        does = getattr(fake_device, name)

        def fail(*handles):
            does(*handles)
            raise lost

        return fail

    for name in ("synchronize", "release", "close_stream", "release_event"):
        monkeypatch.setattr(fake_device, name, refusing(name))
    with pytest.raises(EngineError, match="the engine refuses"):
        run(gpu, scan, "crop")


def test_an_engine_that_cannot_be_captured_runs_without(fake_device, make_gpu, card, scan):
    gpu = make_gpu(fake_device, card, blurred)
    gpu.session.fails_at = 3  # the first capture
    chi, _, _ = run(gpu, scan, "hann")
    np.testing.assert_allclose(chi, on_cpu(card, scan, "hann"), atol=2e-7)
    count = sum(scan.mask[p.inside].any() for p in plan_of(scan, "hann"))
    assert fake_device.launched == count // 2 - 1  # of the other worker


def test_a_map_that_is_not_finite_is_refused(fake_device, make_gpu, card, scan):
    gpu = make_gpu(fake_device, card, lambda tensors: blurred(tensors) * np.float32(np.nan))
    with pytest.raises(EngineError, match="NaN or Inf voxels"):
        run(gpu, scan, "whole")


def test_an_empty_field_has_no_residual(fake_device, make_gpu, card, scan):
    empty = replace(scan, measured=np.zeros_like(scan.measured))
    with pytest.raises(DataError, match="zero in the whole mask"):
        run(make_gpu(fake_device, card, blurred), empty, "whole", evaluates=True)


def test_two_fields_for_a_network_of_one_are_refused(fake_device, make_gpu, card, scan):
    two = replace(scan, measured=np.concatenate([scan.measured] * 2))
    with pytest.raises(UsageError, match="takes one field, 2 were given"):
        run(make_gpu(fake_device, card, blurred), two, "whole")
