"""Networks on a made-up GPU."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qsm_deploy.kernels.cuda_library import CudaLibrary
from qsm_deploy.runtime.card.card import ModelCard
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
