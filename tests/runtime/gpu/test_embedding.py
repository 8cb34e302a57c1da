"""Arrays of other libraries on a made-up GPU, by both protocols as those libraries speak them."""

import ctypes
import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from qsm_deploy.kernels.errors import (
    DataError,
    EngineError,
    MemoryLimitError,
    UnitsError,
    UsageError,
)
from qsm_deploy.runtime.card.card import GeometryLimits, TensorInfo
from qsm_deploy.runtime.embedding import Engine, open_engine
from qsm_deploy.runtime.gpu import dlpack
from qsm_deploy.runtime.gpu.dlpack import CUDA, TakenTensor, capsule_of
from qsm_deploy.runtime.gpu.reconstruction import on_device
from qsm_deploy.runtime.gpu.session import GpuSession
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstruction.planning import PatchOptions
from qsm_deploy.runtime.reconstructor import reconstructor_of
from tests.made_up_gpu import CupyLike, JaxLike, OldLike, PycudaLike, TorchLike, read
from tests.runtime.storages import SPREAD, require_one

SHAPE = (18, 13, 15)


def engine_on(gpu):
    return Engine(reconstructor_of(GpuSession(gpu), Path("network.plan")))


GEOMETRY = {"voxel_size_mm": (1.0, 0.8, 1.5), "b0_direction": (0.1, -0.2, 0.97)}


class WithGradient(TorchLike):
    """What PyTorch does where a gradient is wanted."""

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("use var.detach()")

    def __dlpack__(self, *, stream):
        raise BufferError("use tensor.detach()")


each_library = pytest.mark.parametrize("library", [CupyLike, OldLike, PycudaLike])


def twice(tensors):
    return 2 * sum(tensors.values())


@pytest.fixture
def mask():
    inside = np.zeros(SHAPE, bool)
    inside[2:-3, 1:-2, 3:] = True
    return inside


@pytest.fixture
def values():
    return np.random.default_rng(7).normal(0, 0.03, SHAPE).astype(np.float32)


@pytest.fixture
def arrays():
    """Keep arrays until the end, then free them."""
    made = []
    yield lambda library, *arguments: made.append(library(*arguments)) or made[-1]
    for array in made:
        if hasattr(array, "event"):
            array.device.release_event(array.event)
        array.free()


@each_library
def test_a_field_on_the_gpu_gives_a_map_there(
    fake_device, make_gpu, card, mask, values, arrays, library
):
    engine = engine_on(make_gpu(fake_device, card, twice))
    outside = np.where(mask, values, np.nan)  # not read there
    field = arrays(library, fake_device, outside.astype(np.float32))
    chi = engine.reconstruct(field, arrays(library, fake_device, mask), **GEOMETRY)
    np.testing.assert_allclose(read(fake_device, chi)[mask], 2 * values[mask], rtol=1e-6)
    assert engine.last_decision.plan.whole
    del chi


@each_library
def test_the_kernels_read_the_field_where_it_lies(
    fake_device, make_gpu, card, mask, values, arrays, library, monkeypatch
):
    gpu = make_gpu(fake_device, card, twice)
    finish, sources, uploads = gpu.library.patch_finish, [], []
    gpu.library.patch_finish = lambda box, source, *rest, **names: (
        sources.append(source) or finish(box, source, *rest, **names)
    )
    field = arrays(library, fake_device, values)
    copy_in = fake_device.copy_in
    monkeypatch.setattr(
        fake_device, "copy_in", lambda to, *rest: uploads.append(rest[0]) or copy_in(to, *rest)
    )
    chi = engine_on(gpu).reconstruct(field, mask, **GEOMETRY)
    assert sources[0] == field.pointer
    assert not any(np.array_equal(upload, values) for upload in uploads)
    np.testing.assert_allclose(read(fake_device, chi), 2 * values * mask, rtol=1e-6)
    address, _ = chi.__cuda_array_interface__["data"]
    assert address in fake_device.memory
    del chi
    assert address not in fake_device.memory


def test_an_array_in_the_order_of_fortran_is_refused(
    fake_device, make_gpu, card, mask, values, arrays
):
    field = arrays(PycudaLike, fake_device, values)
    field.values = np.asfortranarray(field.values)  # as gpuarray.to_gpu leaves those of nibabel
    with pytest.raises(DataError, match="local_field_ppm is not contiguous with z fastest"):
        engine_on(make_gpu(fake_device, card, twice)).reconstruct(field, mask, **GEOMETRY)


@pytest.mark.parametrize("library", [JaxLike, TorchLike])
def test_dlpack_is_taken_and_given(fake_device, make_gpu, card, mask, values, arrays, library):
    engine = engine_on(make_gpu(fake_device, card, twice))
    stream = fake_device.open_stream()
    field = arrays(library, fake_device, values, stream)
    chi = engine.reconstruct(field, mask, **GEOMETRY)
    assert chi.__dlpack_device__() == (CUDA, 0)
    taken = TakenTensor(chi.__dlpack__(stream=None))
    del chi
    gc.collect()
    seen = np.empty(SHAPE, np.float32)
    ctypes.memmove(seen.ctypes.data, taken.pointer, seen.nbytes)  # it lives as long as it is used
    np.testing.assert_allclose(seen, 2 * values * mask, rtol=1e-6)
    held = fake_device.held()["memory"]
    del taken
    assert fake_device.held()["memory"] == held - 1
    fake_device.synchronize()
    fake_device.close_stream(stream)


def test_a_field_on_the_host_gives_a_map_on_the_gpu(fake_device, make_gpu, tkd_card, mask, values):
    engine = engine_on(make_gpu(fake_device, tkd_card, twice))
    chi = engine.reconstruct(
        values, mask, **GEOMETRY, wants=Wants(PatchOptions(patch=8), correction=Correction(0.1, 2))
    )
    assert np.isfinite(read(fake_device, chi)).all()
    assert engine.findings["data_consistency"]["iterations"] == 2
    assert engine.last_decision.plan.count > 1
    del chi


def shifted(tensors):
    """Stand in for a network that no flip and no permutation leaves as it is."""
    field = sum(tensors.values())
    return 2 * field + np.roll(field, 1, axis=-1) - 3 * np.roll(field, 2, axis=-2)


def grid_in(storage):
    return {
        "voxel_size_mm": storage.sizes(GEOMETRY["voxel_size_mm"]),
        "b0_direction": storage.vector(GEOMETRY["b0_direction"]),
    }


@pytest.mark.parametrize("there", [False, True])
def test_one_head_in_any_storage(fake_device, make_gpu, card, mask, values, arrays, there):
    engine, found = engine_on(make_gpu(fake_device, card, shifted)), []
    for storage in SPREAD:
        field = storage.of(values)
        field = arrays(CupyLike, fake_device, field) if there else field
        axes = storage.letters
        chi = engine.reconstruct(field, storage.of(mask), **grid_in(storage), axes=axes)
        assert chi.shape == storage.of(mask).shape
        found.append(storage.back(read(fake_device, chi)))
        del chi
    require_one(found)


def test_a_field_in_canonical_axes_stays_where_it_lies(
    fake_device, make_gpu, tkd_card, mask, values, arrays, monkeypatch
):
    engine = engine_on(make_gpu(fake_device, tkd_card, shifted))
    field = arrays(CupyLike, fake_device, values)
    chi = engine.reconstruct(field, mask, **GEOMETRY)
    monkeypatch.setattr("qsm_deploy.runtime.embedding._copied", None)
    again = engine.reconstruct(field, mask, **GEOMETRY, axes="RAS")
    np.testing.assert_array_equal(read(fake_device, again), read(fake_device, chi))
    with pytest.raises(TypeError):
        engine.reconstruct(field, mask, **GEOMETRY, axes="LAS")
    del chi, again


@pytest.mark.parametrize("axes", ["RAS", "LPS"])
def test_prior_maps_of_a_field_on_the_gpu(
    fake_device, make_gpu, prior_card, mask, values, arrays, axes
):
    """Their noise is found on the host, which is given a copy of the field."""
    engine = engine_on(make_gpu(fake_device, prior_card, shifted))
    outside = np.where(mask, values, np.float32(np.nan))
    there = (arrays(CupyLike, fake_device, outside), arrays(CupyLike, fake_device, mask))
    chi = engine.reconstruct(*there, **GEOMETRY, axes=axes)
    expected = engine.reconstruct(values, mask, **GEOMETRY, axes=axes)
    assert np.abs(read(fake_device, expected)).max() > 0.01
    np.testing.assert_array_equal(read(fake_device, chi), read(fake_device, expected))
    del chi, expected


def test_no_memory_for_a_map_from_the_host(fake_device):
    fake_device.capacity = 100
    with pytest.raises(MemoryLimitError):
        on_device(np.zeros(SHAPE, np.float32), fake_device)


def test_a_map_that_nobody_takes_is_freed(fake_device, make_gpu, card, mask, values):
    engine = engine_on(make_gpu(fake_device, card, twice))
    engine.reconstruct(values, mask, **GEOMETRY).__dlpack__()
    gc.collect()
    assert not fake_device.memory
    assert not dlpack._given


class Unlike(CupyLike):
    changes: ClassVar[dict] = {}

    @property
    def __cuda_array_interface__(self):
        return super().__cuda_array_interface__ | self.changes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"strides": (4, 4 * 18, 4 * 18 * 13)}, "not contiguous with z fastest"),
        ({"typestr": "<f8"}, "has type f8, expected float32"),
        ({"typestr": "<f2"}, "has type f2, expected float32"),
        ({"shape": (18, 13)}, r"has shape \(18, 13\), the mask \(18, 13, 15\)"),
    ],
)
def test_arrays_that_cannot_be_used(
    fake_device, make_gpu, card, mask, values, arrays, changes, text
):
    engine = engine_on(make_gpu(fake_device, card, twice))
    field = arrays(type("Wrong", (Unlike,), {"changes": changes}), fake_device, values)
    with pytest.raises(DataError, match=text):
        engine.reconstruct(field, mask, **GEOMETRY)


def test_an_array_that_its_library_does_not_give(fake_device, make_gpu, card, mask, values, arrays):
    engine = engine_on(make_gpu(fake_device, card, twice))
    field = arrays(WithGradient, fake_device, values)
    with pytest.raises(DataError, match=r"local_field_ppm cannot be taken .* tensor\.detach"):
        engine.reconstruct(field, mask, **GEOMETRY)


def test_a_map_is_never_given_as_a_copy(fake_device, make_gpu, card, mask, values):
    chi = engine_on(make_gpu(fake_device, card, twice)).reconstruct(values, mask, **GEOMETRY)
    with pytest.raises(BufferError, match="copy what you took"):
        chi.__dlpack__(copy=True)
    del chi


def test_an_array_on_another_gpu(fake_device, make_gpu, card, mask, values, arrays):
    engine = engine_on(make_gpu(fake_device, card, twice))
    field = arrays(type("Elsewhere", (JaxLike,), {"number": 3}), fake_device, values)
    with pytest.raises(DataError, match="lies on GPU 3, the engine on GPU 0"):
        engine.reconstruct(field, mask, **GEOMETRY)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda field: field * np.float32(np.nan), DataError, "NaN or Inf inside the mask"),
        (lambda field: field * 0, UnitsError, "zero in the whole mask"),
        (lambda field: field * 300, UnitsError, "too much for tissue"),
    ],
)
def test_fields_that_cannot_be_right(
    fake_device, make_gpu, card, mask, values, arrays, change, error, text, there
):
    engine = engine_on(make_gpu(fake_device, card, twice))
    field = change(values)
    with pytest.raises(error, match=text):
        engine.reconstruct(
            arrays(CupyLike, fake_device, field) if there else field, mask, **GEOMETRY
        )


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (np.zeros(SHAPE, bool), "the mask is empty"),
        (np.ones(SHAPE[:2], bool), r"expected \(x, y, z\)"),
    ],
)
def test_masks_that_cannot_be(fake_device, make_gpu, card, values, mask, text):
    with pytest.raises(DataError, match=text):
        engine_on(make_gpu(fake_device, card, twice)).reconstruct(values, mask, **GEOMETRY)


def test_a_mask_of_another_type(fake_device, make_gpu, card, values, arrays):
    mask = arrays(CupyLike, fake_device, np.ones(SHAPE, np.float32))
    with pytest.raises(DataError, match="has type f4, expected bool or uint8"):
        engine_on(make_gpu(fake_device, card, twice)).reconstruct(values, mask, **GEOMETRY)


def test_a_geometry_outside_the_training(fake_device, make_gpu, card, mask, values, arrays):
    card = replace(card, geometry=GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 2.0))
    engine = engine_on(make_gpu(fake_device, card, twice))
    maps = []
    for field in (values, arrays(CupyLike, fake_device, values)):
        with pytest.warns(UserWarning, match=r"turned by 13\.0 degrees and resampled to 1 mm"):
            chi = engine.reconstruct(field, mask, **GEOMETRY)
        maps.append(read(fake_device, chi))
        del chi
    np.testing.assert_array_equal(maps[0], maps[1])
    assert not maps[0][~mask].any()
    assert np.corrcoef(maps[0][mask], values[mask])[0, 1] > 0.5
    chi = engine.reconstruct(values, mask, **GEOMETRY, wants=Wants(allow_geometry=True))
    np.testing.assert_array_equal(read(fake_device, chi)[mask], 2 * values[mask])
    del chi


def test_a_map_that_is_not_finite(fake_device, make_gpu, card, mask, values):
    engine = engine_on(make_gpu(fake_device, card, lambda tensors: twice(tensors) + np.nan))
    with pytest.raises(EngineError, match="NaN or Inf voxels"):
        engine.reconstruct(values, mask, **GEOMETRY)


def test_too_little_memory(fake_device, make_gpu, card, mask, values):
    engine = engine_on(make_gpu(fake_device, card, twice))
    fake_device.capacity = 10_000
    with pytest.raises(MemoryLimitError, match="would need"):
        engine.reconstruct(values, mask, **GEOMETRY)


def test_networks_of_more_than_a_field(fake_device, make_gpu, card):
    rough = TensorInfo("rough_chi_ppm", "ppm", ("n", 1, "x", "y", "z"))
    card = replace(card, inputs=(*card.inputs, rough))
    with pytest.raises(UsageError, match="takes other than a local field"):
        engine_on(make_gpu(fake_device, card, twice))


def test_without_a_gpu_there_is_no_engine(card, write_model):
    with pytest.raises(EngineError):
        open_engine(write_model(card))


class TestCapsules:
    """Against numpy, which gives and takes capsules of its own."""

    def test_a_capsule_of_numpy_is_taken_and_let_go(self):
        array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        before = sys.getrefcount(array)
        taken = TakenTensor(array.__dlpack__())
        assert (taken.pointer, taken.shape, taken.kind) == (array.ctypes.data, (2, 3, 4), "f4")
        assert sys.getrefcount(array) == before + 1
        del taken
        assert sys.getrefcount(array) == before

    def test_strides_and_offsets_are_seen(self):
        array = np.zeros((4, 5), np.uint8)[1:, ::2]
        taken = TakenTensor(array.__dlpack__())
        assert (taken.pointer, taken.strides, taken.kind) == (array.ctypes.data, (5, 2), "u1")

    def test_a_type_that_is_not_known(self):
        assert TakenTensor(np.zeros(3, np.complex64).__dlpack__()).kind is None

    def test_a_capsule_is_taken_once(self):
        capsule = np.zeros(3, np.float32).__dlpack__()
        kept = TakenTensor(capsule)
        with pytest.raises(ValueError, match="PyCapsule"):
            TakenTensor(capsule)
        assert kept.shape == (3,)

    def test_torch_takes_ours(self, monkeypatch):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        monkeypatch.setattr(dlpack, "CUDA", 1)  # there is no other memory here
        array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
        tensor = torch.utils.dlpack.from_dlpack(capsule_of(array, array.ctypes.data, (1, 2, 3), 0))
        assert tensor.tolist() == array.tolist()
        assert tensor.data_ptr() == array.ctypes.data
        del tensor
        gc.collect()
        assert not dlpack._given
