"""Tensors of every make in a checkpoint: dense float32 on the way out, or refused in one line."""

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qsm_deploy.export.checkpoints import file_kind
from qsm_deploy.export.checkpoints.state import load_state, state_sha256
from qsm_deploy.kernels.errors import WeightsError
from qsm_deploy.runtime.console.peak_memory import peak_rss_bytes, reset_peak, rss_bytes

VALUES = torch.tensor([[0.5, 0.0, -2.0], [0.0, 0.0, 1.0]])
# what only warns that it is new or old
QUIET = pytest.mark.filterwarnings("ignore::UserWarning")


def loaded(value: object, folder: Path) -> Tensor:
    torch.save({"weight": value}, folder / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_state(folder / "w.pth")["weight"]


@QUIET
@pytest.mark.parametrize(
    "make",
    [
        nn.Parameter,
        lambda t: nn.Parameter(t) * 1,
        lambda t: nn.Parameter(t.half()),
        nn.Buffer,
        Tensor.double,
        Tensor.bfloat16,
        lambda t: t.to(torch.float8_e4m3fn),
        Tensor.to_sparse,
        Tensor.to_sparse_csr,
        Tensor.to_sparse_csc,
        lambda t: t.to_sparse_bsr((1, 1)),
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t, t])[2:],
        lambda t: torch.imag(torch.complex(t, -t).conj()),
    ],
)
def test_it_becomes_what_a_network_takes(make, tmp_path) -> None:
    value = loaded(make(VALUES), tmp_path)
    assert (type(value), value.dtype, value.layout) == (Tensor, torch.float32, torch.strided)
    assert not value.requires_grad
    assert torch.equal(value, VALUES)
    assert state_sha256({"weight": value}) == state_sha256({"weight": VALUES})


def test_one_value_for_all_is_spread(tmp_path) -> None:
    value = loaded(torch.full((1,), 3.0).expand(4, 5), tmp_path)
    assert torch.equal(value, torch.full((4, 5), 3.0))
    assert value.is_contiguous()


@QUIET
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VALUES.to("meta"), r"has no values \(device meta\)"),
        (lambda: VALUES.to(torch.complex64), "is of type complex64, expected real numbers"),
        (
            lambda: torch.quantize_per_tensor(VALUES, 0.1, 0, torch.qint8),
            r"is quantised already \(qint8\)",
        ),
        (
            lambda: torch.quantize_per_channel(
                VALUES, torch.ones(2), torch.zeros(2), 0, torch.quint8
            ),
            r"is quantised already \(quint8\)",
        ),
        (lambda: torch.nested.nested_tensor([VALUES, VALUES[:1]]), "is a nested tensor"),
        (
            lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            "none of plain numbers",
        ),
        (lambda: torch.ones(1).expand(10**6, 10**6), "unpack to 4e[+]03 GB"),
        (lambda: torch.ones(1).half().expand(10**5, 10**4), "unpack to 4 GB"),
        (
            lambda: torch.sparse_coo_tensor(
                torch.zeros(2, 1).long(), torch.ones(1), (10**6, 10**6)
            ),
            "unpack to 4e[+]03 GB",
        ),
        (
            lambda: torch.sparse_coo_tensor(
                torch.full((2, 1), 10**9), torch.ones(1), (2, 3), check_invariants=False
            ),
            "truncated, or not a PyTorch file",
        ),
        (lambda: VALUES.numpy(), r"more than tensors in it \(numpy"),
    ],
)
def test_it_is_refused_in_one_line(make, words: str, tmp_path) -> None:
    reset_peak()
    before = rss_bytes()
    with pytest.raises(WeightsError, match=words) as caught:
        loaded(make(), tmp_path)
    assert "\n" not in str(caught.value)
    assert peak_rss_bytes() - before < 2**28


@pytest.mark.parametrize("suffix", ["npz", "pth"])
def test_a_small_archive_that_unpacks_to_far_more(suffix: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(file_kind, "MOST_BYTES", 2**20)
    path = tmp_path / f"w.{suffix}"
    with path.open("wb") as file:
        np.savez_compressed(file, w=np.zeros(2**17))
    with pytest.raises(WeightsError, match=r"MB that unpack to 0\.00105 GB, which no weights do"):
        load_state(path)
    monkeypatch.setattr(file_kind, "MOST_BYTES", 2**21)
    assert load_state(path)["w"].shape == (2**17,)


@pytest.mark.parametrize(
    ("create", "words"),
    [
        (
            lambda file, other: file.create_dataset(
                "w", (4,), "f4", external=[(other, 0, h5py.h5f.UNLIMITED)]
            ),
            "the values of w are in another file",
        ),
        (
            lambda file, other: file.create_virtual_dataset("w", _layout_of(other)),
            "the values of w are in another file",
        ),
        (
            lambda file, other: file.create_dataset("w", (10**6, 10**6), "f4", fillvalue=1.0),
            "unpack to 4e[+]03 GB",
        ),
    ],
)
def test_hdf5_whose_values_are_elsewhere_or_nowhere(create, words: str, tmp_path) -> None:
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["w"] = np.ones(4, dtype=np.float32)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        create(file, str(other))
    with pytest.raises(WeightsError, match=words):
        load_state(tmp_path / "w.h5")


def test_hdf5_is_measured_as_a_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(file_kind, "MOST_BYTES", 2**20)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for name in ("a", "b"):
            file.create_dataset(name, (2**17,), "f4")
    assert load_state(tmp_path / "w.h5").keys() == {"a", "b"}
    with h5py.File(tmp_path / "w.h5", "a") as file:
        file.create_dataset("c", (2,), "f4")
    with pytest.raises(WeightsError, match=r"unpack to 0\.00105 GB"):
        load_state(tmp_path / "w.h5")


def _layout_of(other: str) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(other, "w", (4,))
    return layout
