"""Prior maps on a made-up GPU that runs work late, against those on the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qsm_deploy.export.measure.verification import ModuleSession
from qsm_deploy.export.networks.tv_unet import TvUnet
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.layout import DeviceWorkload
from qsm_deploy.runtime.gpu.reconstruction import network_job, reconstruct_on_device
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import network_inputs, reconstruct
from qsm_deploy.runtime.reconstruction.prior_maps import variation_steps
from tests.runtime.gpu.small_scans import GRIDS, WITHIN, each_grid, scan_of


@pytest.fixture
def unet_card(card):
    """Return the card of tv-unet, as far as the pipeline reads it."""
    asked = {"inputs": TvUnet.inputs, "priors": TvUnet.priors, "anchor": TvUnet.anchor}
    return replace(card, divisor=TvUnet.divisor, **asked)


def explained(scan):
    """Return a scan whose field has sources: total variation makes next to nothing of noise."""
    chi = np.random.default_rng(1).choice([0, 0.3], scan.mask.shape, p=[0.8, 0.2])
    field = dipole_convolve(chi.astype(np.float32) * scan.mask, scan.geometry) * scan.mask
    return replace(scan, measured=field[None])


def run(gpu, scan, plan, done=lambda: None):
    work, stages = DeviceWorkload(scan, gpu.session, gpu.library, None, False), Stages()
    chi, _ = reconstruct_on_device(network_job(gpu, work, plan), stages, done)
    return chi, stages


@each_grid
@pytest.mark.parametrize("kind", ["tv-unet", "some"])
def test_the_network_is_given_what_the_cpu_gives(
    fake_device, make_gpu, unet_card, prior_card, grid, box, kind
):
    scan, seen, steps = explained(scan_of(grid, box)), {}, []
    card = replace(unet_card if kind == "tv-unet" else prior_card, divisor=1)

    def network(tensors):
        seen.update({name: value.copy() for name, value in tensors.items()})
        return tensors["tv_chi_ppm"]

    gpu = make_gpu(fake_device, card, network)
    _, stages = run(gpu, scan, plan_whole(grid.shape, 1), lambda: steps.append(1))
    expected = network_inputs(card, scan)
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(value).max() > 5e-3, name
        assert np.linalg.norm(seen[name] - value) <= WITHIN * np.linalg.norm(value), name
        assert value.ndim == 1 or not seen[name][0, :, ~scan.mask].any(), name
    assert len(steps) == variation_steps(card.priors) + 1
    after = ["anchor"] if card.anchor else []
    assert list(stages.seconds) == ["upload", "prepare", "inference", *after, "download"]
    assert fake_device.most_waiting > 3 * variation_steps(card.priors)


@each_grid
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "patches"])
def test_the_map_is_the_cpus(fake_device, make_gpu, unet_card, grid, box, whole):
    scan, network = explained(scan_of(grid, box)), TvUnet(4, 8, 4)
    torch.manual_seed(0)
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    session = ModuleSession(network.eval(), unet_card)
    plan = plan_whole(grid.shape, 4) if whole else plan_patches(scan.mask, 4, 8, 4, "hann")
    assert whole or grid.shape == GRIDS["one slice"][0].shape or plan.count > 1
    chi, _ = run(make_gpu(fake_device, unet_card, session.run), scan, plan)
    expected = reconstruct(session, scan, plan, Stages())
    maps = network_inputs(unet_card, scan)
    assert np.linalg.norm(expected - maps["tv_chi_ppm"]) > 0.1 * np.linalg.norm(expected)
    assert np.linalg.norm(chi - expected) <= WITHIN * np.linalg.norm(expected)
    assert not chi[~scan.mask].any()


def test_a_field_that_is_the_same_everywhere(fake_device, make_gpu, prior_card):
    scan = scan_of(*GRIDS["box inside"])
    flat = replace(scan, measured=np.zeros_like(scan.measured))
    gpu = make_gpu(fake_device, prior_card, lambda tensors: tensors["tv_chi_ppm"])
    with pytest.raises(DataError, match="the same everywhere"):
        run(gpu, flat, plan_whole(flat.mask.shape, 4))
