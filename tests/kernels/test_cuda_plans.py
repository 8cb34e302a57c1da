"""The cache of FFT plans: bounded, honest about memory, and safe while a graph is captured."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest

from qsm_deploy.kernels.cuda_library import CudaLibrary, DipoleOperator
from qsm_deploy.kernels.errors import EngineError, MemoryLimitError
from qsm_deploy.kernels.geometry import Geometry

CAPACITY = 8


def operator(n: int, batch: int = 1) -> DipoleOperator:
    return DipoleOperator(Geometry((n, 2, 2)), batch=batch)


def prepare(twin: ctypes.CDLL, *sizes: int) -> None:
    for n in sizes:
        CudaLibrary(twin).dipole_workspace_bytes(operator(n))


def run(twin: ctypes.CDLL, n: int) -> None:
    memory = ctypes.create_string_buffer(1 << 14)
    start = ctypes.addressof(memory) + -ctypes.addressof(memory) % 256
    x = (ctypes.c_double * (4 * n))()
    CudaLibrary(twin).dipole_apply(
        operator(n), ctypes.addressof(x), ctypes.addressof(x), start, 1 << 13
    )


def made(twin: ctypes.CDLL, *sizes: int) -> int:
    """Return how many plans the preparation of shapes made."""
    before = twin.host_twin_plans_made()
    prepare(twin, *sizes)
    return int(twin.host_twin_plans_made() - before)


def test_a_shape_is_planned_once(twin):
    assert made(twin, 3, 3, 4, 3) == 2
    CudaLibrary(twin).dipole_workspace_bytes(operator(3, batch=2))
    assert twin.host_twin_living_plans() == 3


def test_the_shape_used_longest_ago_goes_first(twin):
    prepare(twin, *range(1, CAPACITY + 1))
    prepare(twin, 1)  # used again: 2 is the oldest now
    prepare(twin, 20)
    assert twin.host_twin_living_plans() == CAPACITY
    assert made(twin, 1, 20, *range(3, CAPACITY + 1)) == 0
    assert made(twin, 2) == 1


def test_a_full_memory_puts_out_the_other_plans(twin):
    prepare(twin, 1, 2, 3)
    twin.host_twin_fail_plans(1)
    prepare(twin, 4)
    assert twin.host_twin_living_plans() == 1


def test_a_plan_that_cannot_be_made_is_reported_and_leaves_the_library_working(twin):
    prepare(twin, 1)
    twin.host_twin_fail_plans(2)
    with pytest.raises(MemoryLimitError, match="out of memory"):
        prepare(twin, 4)
    run(twin, 4)
    prepare(twin, 1)
    assert twin.host_twin_living_plans() == 2


def test_a_new_shape_is_refused_while_captured(twin):
    twin.host_twin_set_capturing(1)
    with pytest.raises(EngineError, match="before the capture"):
        run(twin, 4)
    twin.host_twin_set_capturing(0)
    run(twin, 4)


def test_plans_of_a_captured_shape_stay_until_released(twin):
    prepare(twin, 100)
    twin.host_twin_set_capturing(1)
    run(twin, 100)
    twin.host_twin_set_capturing(0)
    prepare(twin, *range(1, CAPACITY + 3))
    assert twin.host_twin_living_plans() == CAPACITY + 1
    assert made(twin, 100) == 0
    CudaLibrary(twin).release_plans()
    assert twin.host_twin_living_plans() == 0


def test_many_threads_leave_a_bounded_number(twin):
    sizes = [n % 13 + 1 for n in range(400)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: run(twin, n), sizes))
    assert twin.host_twin_living_plans() == CAPACITY
