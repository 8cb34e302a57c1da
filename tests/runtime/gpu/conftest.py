"""Networks on a made-up GPU."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from qsm_deploy.kernels.cuda_library import CudaLibrary
from qsm_deploy.runtime.card.card import FIELD, ModelCard, PriorMap, TensorInfo
from qsm_deploy.runtime.gpu.pipeline import Gpu
from qsm_deploy.runtime.gpu.run import Place
from tests.made_up_gpu import FakeDevice, FakeLibrary, FakeSession


@pytest.fixture(params=[0, 1, 2], ids=lambda seed: f"order {seed}")
def fake_device(request: pytest.FixtureRequest) -> Iterator[FakeDevice]:
    """Return a made-up GPU that runs streams in one of several orders, and must end empty."""
    device = FakeDevice(seed=request.param)
    yield device
    assert not any(device.held().values()), f"not given back: {device.held()}"


@pytest.fixture
def prior_card(card: ModelCard) -> ModelCard:
    """Return the card of a model that takes some prior maps, the mask and the noise."""
    priors = (
        PriorMap("tv_chi_ppm", "tv", FIELD, 2),
        PriorMap("later_field_ppm", "tv_field", FIELD, 3),
        PriorMap("residual_ppm", "tv_residual", FIELD, 2),  # the network does not take it
        PriorMap("residual_tkd_ppm", "tkd", "residual_ppm", 2, threshold=0.1),
        PriorMap("tkd_ppm", "tkd", FIELD, 1, threshold=0.2),
    )
    names = (FIELD, *(prior.name for prior in priors if prior.method != "tv_residual"))
    volumes = (TensorInfo(name, "ppm", card.output.shape) for name in names)
    mask = TensorInfo("mask", "1", card.output.shape)
    inputs = (*volumes, mask, TensorInfo("field_noise_ppm", "ppm", (1,)))
    return replace(card, inputs=inputs, priors=priors)


@pytest.fixture
def place(fake_device: FakeDevice, twin_handle: ctypes.CDLL) -> Place:
    """Return the made-up GPU with its kernels."""
    library: Any = FakeLibrary(CudaLibrary(twin_handle), fake_device)
    return Place(fake_device, library)  # type: ignore[arg-type]


@pytest.fixture
def make_gpu(twin_handle: ctypes.CDLL) -> Callable[..., Gpu]:
    """Return what puts a network on a made-up GPU."""

    def make(device: FakeDevice, card: ModelCard, network: Any, **choices: Any) -> Gpu:
        library: Any = FakeLibrary(CudaLibrary(twin_handle), device)
        return Gpu(device, library, FakeSession(card, device, network, **choices))

    return make
