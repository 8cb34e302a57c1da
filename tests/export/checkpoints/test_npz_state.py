"""NumPy files of TensorFlow variables, whole, strange and damaged."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from qsm_deploy.export.checkpoints.npz_state import load_npz
from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.kernels.errors import WeightsError

ARRAYS = {
    "qsmnet/conv11/biases": np.arange(3, dtype=np.float32),
    "qsmnet/out/weights": np.arange(12.0).reshape(1, 1, 1, 4, 3),
    "global_step": np.array(25),
}


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def npz(request, tmp_path: Path) -> Path:
    request.param(tmp_path / "weights.npz", **ARRAYS)
    return tmp_path / "weights.npz"


def test_reads_every_array_by_name(npz: Path) -> None:
    state = load_npz(npz)
    assert state.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert torch.equal(state[name], torch.from_numpy(array))
    assert load_state(npz)["qsmnet/out/weights"].dtype == torch.float32


def test_reads_another_byte_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", a=np.arange(5, dtype=">f4"))
    assert torch.equal(load_npz(tmp_path / "weights.npz")["a"], torch.arange(5.0))


class Trap:
    """Creates a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(tmp_path / "weights.npz", **ARRAYS, trap=trap)
    with pytest.raises(WeightsError, match="refused without running it"):
        load_npz(tmp_path / "weights.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("value", ["text", True, 1 + 2j, np.datetime64("2020-01-01")])
def test_refuses_what_are_no_real_numbers(value: object, tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", odd=value)
    with pytest.raises(WeightsError, match=r"odd is of type .*, expected numbers"):
        load_npz(tmp_path / "weights.npz")


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(WeightsError, match="not a NumPy"):
        load_npz(path)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        with pytest.raises(WeightsError):
            load_npz(path)


def test_damaged_files_are_read_or_refused(npz: Path) -> None:
    whole = npz.read_bytes()
    generator = random.Random(0)
    refusals: list[str] = []
    for _ in range(300):
        data = bytearray(whole[: generator.choice([len(whole), generator.randrange(len(whole))])])
        for _ in range(generator.choice([1, 4]) if data else 0):
            data[generator.randrange(len(data))] = generator.choice([0, 1, 14, 15, 255])
        npz.write_bytes(data)
        try:
            load_npz(npz)
        except WeightsError as error:
            refusals.append(str(error))
    assert len(refusals) > 150
    assert not [refusal for refusal in refusals if "\n" in refusal]
