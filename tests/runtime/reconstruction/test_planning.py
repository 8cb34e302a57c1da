from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import CardError, MemoryLimitError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import MemoryUse, ReceptiveField
from qsm_deploy.runtime.reconstruction.memory import Workload, available_bytes, inference_memory
from qsm_deploy.runtime.reconstruction.planning import (
    PatchOptions,
    decide,
    overlap_and_blend,
    smallest_patch,
)
from qsm_deploy.runtime.scan.scan import Scan

PLENTY = 10**12


@pytest.fixture
def scan():
    shape = (60, 50, 40)
    mask = np.zeros(shape, dtype=bool)
    mask[10:50, 5:45, 8:36] = True
    return Scan(np.float32(0.01) * mask[None], mask, Geometry(shape), nib.Nifti1Header(), np.eye(4))


@pytest.fixture
def workload(scan, card):
    hungry = replace(card, memory={"onnxruntime": MemoryUse(10**6, 10**4)})
    return Workload(scan, hungry, "onnxruntime", evaluates=False, draws=False)


def test_the_whole_volume_when_it_fits(workload):
    decision = decide(workload, PatchOptions(), PLENTY)
    assert decision.plan.whole
    assert decision.plan.patch_shape == (60, 52, 40)
    assert decision.reason == "it fits the memory"
    assert decision.peak_bytes == decision.stage_bytes["inference"] > 10**4 * 60 * 52 * 40


def fits(workload, size, limit):
    return decide(workload, PatchOptions(patch=size), PLENTY).peak_bytes <= limit


def test_else_the_patches_that_fit_and_compute_least(workload):
    limit = 0.5e9
    decision = decide(workload, PatchOptions(), limit)
    assert not decision.plan.whole
    assert decision.peak_bytes <= limit
    assert "the whole volume would need 1.1" in decision.reason

    def computed(size):
        plan = decide(workload, PatchOptions(patch=size), PLENTY).plan
        return plan.count * np.prod(plan.patch_shape)

    fitting = [n for n in range(16, 61, 4) if fits(workload, n, limit)]
    chosen = decision.plan.count * np.prod(decision.plan.patch_shape)
    assert chosen == min(map(computed, fitting)) < computed(max(fitting))


def test_not_even_in_patches(workload):
    with pytest.raises(
        MemoryLimitError, match=r"even patches of 16 would need .* MiB in the stage inference"
    ) as caught:
        decide(workload, PatchOptions(), 2e6)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("options", [PatchOptions(patch="off"), PatchOptions(patch=48)])
def test_what_was_asked_for_must_fit_too(workload, options):
    assert decide(workload, options, PLENTY).reason == "asked for"
    with pytest.raises(MemoryLimitError):
        decide(workload, options, 0.2e9)


def test_a_network_that_must_not_be_patched(workload):
    whole_only = replace(
        workload, card=replace(workload.card, patchable="no", why_whole="it looks everywhere")
    )
    assert decide(whole_only, PatchOptions(), PLENTY).plan.whole
    with pytest.raises(UsageError, match="cannot be run in patches: it looks everywhere"):
        decide(whole_only, PatchOptions(patch=32), PLENTY)
    with pytest.raises(MemoryLimitError):
        decide(whole_only, PatchOptions(), 0.5e9)


@pytest.mark.parametrize("stated", [{"overlap": 8}, {"blend": "hann"}])
def test_options_of_patches_need_patches(workload, stated):
    with pytest.raises(UsageError, match="need patches"):
        decide(workload, PatchOptions(patch="off", **stated), PLENTY)


def test_a_volume_smaller_than_any_patch(workload, card):
    far = replace(card, receptive_field=ReceptiveField(90, 80, 0.99))
    with pytest.raises(MemoryLimitError, match="the whole volume would need"):
        decide(replace(workload, card=far), PatchOptions(), 1e6)


@pytest.mark.parametrize(
    ("halo", "theoretical", "patch", "stated", "expected"),
    [
        (8, 12, 64, {}, (24, "crop")),
        (8, 20, 64, {}, (16, "crop")),
        (8, 12, 64, {"overlap": 8}, (8, "hann")),
        (8, 12, 64, {"overlap": 20}, (20, "crop")),
        (40, 180, 64, {}, (32, "hann")),
        (40, 180, 160, {}, (80, "crop")),
        (40, 180, 64, {"blend": "gaussian"}, (32, "gaussian")),
    ],
)
def test_overlap_and_blend(card, halo, theoretical, patch, stated, expected):
    card = replace(card, receptive_field=ReceptiveField(theoretical, halo, 0.999999))
    assert overlap_and_blend(card, PatchOptions(**stated), patch) == expected


def test_only_what_is_exact_by_construction_is_called_so(workload):
    card = replace(workload.card, receptive_field=ReceptiveField(5, 3, 0.999999))
    workload = replace(workload, card=card)
    options = {"off": {}, 24: {}, 20: {"overlap": 10}, 16: {}}
    exact = [decide(workload, PatchOptions(n, **o), PLENTY).exact for n, o in options.items()]
    assert exact == [True, True, True, False]
    hann = PatchOptions(24, blend="hann")
    assert not decide(workload, hann, PLENTY).exact
    assert decide(workload, PatchOptions(64), PLENTY).exact


def test_the_smallest_patch_is_more_than_halo_and_divisor(card):
    assert smallest_patch(card) == 16
    wide = replace(card, receptive_field=replace(card.receptive_field, halo=30))
    assert smallest_patch(wide) == 36


def test_an_unmeasured_backend_needs_as_much_as_the_hungriest():
    memory = {"a": MemoryUse(1, 300), "b": MemoryUse(2, 500)}
    assert inference_memory(memory, "a").bytes_per_voxel == 300
    assert inference_memory(memory, "c").bytes_per_voxel == 500
    with pytest.raises(CardError, match="no memory measurements"):
        inference_memory({}, "a")


def test_truth_report_and_figure_are_counted(workload, scan):
    more = replace(workload, scan=replace(scan, truth_ppm=scan.measured[0]))
    more = replace(more, evaluates=True, draws=True, compares_precision=True)
    plan = decide(workload, PatchOptions(), PLENTY).plan
    few, many = workload.peak_bytes(plan), more.peak_bytes(plan)
    assert many.keys() - few.keys() == {
        "precision check", "field residual", "metrics", "figure",
    }  # fmt: skip
    assert all(many[stage] > few[stage] for stage in few)


def test_some_memory_is_available():
    assert 2**28 < available_bytes() < 2**63
