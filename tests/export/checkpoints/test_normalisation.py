"""Files of means, standard deviations and network settings, whole, strange and damaged."""

import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from qsm_deploy.export.checkpoints.normalisation import load_normalisation, number_from
from qsm_deploy.kernels.errors import WeightsError

NUMBERS = {"input_mean": -2.5e-05, "input_std": 0.011, "label_mean": 0.0, "label_std": 0.028}


@pytest.fixture(params=["v6", "v7"])
def mat(request, tmp_path: Path) -> Path:
    path = tmp_path / "norm_factor_QSMnet_64.mat"
    scipy.io.savemat(
        path,
        {
            **NUMBERS,
            "single": np.float32([[0.1]]),
            "whole": np.uint8([[7]]),
            "grid": np.arange(24.0).reshape(2, 3, 4),
            "text": "leaky_relu",
            "record": {"a": 1.0, "text": "b", "deeper": {"mean": 2.0, "empty": np.zeros((0, 0))}},
            "records": np.array([(1.0,), (2.0,)], dtype=[("a", object)]),
            "cells": np.array([1.0, "b"], dtype=object),
            "complex": np.array([1 + 2j]),
        },
        do_compression=request.param == "v7",
    )
    return path


def test_reads_the_numbers_of_a_mat_file_as_scipy_does(mat: Path) -> None:
    arrays = load_normalisation([mat])
    in_structures = {"record.a": 1.0, "record.deeper.mean": 2.0}
    assert {name: arrays.pop(name) for name in in_structures} == in_structures
    assert arrays.pop("record.deeper.empty").size == 0
    assert arrays.keys() == {*NUMBERS, "single", "whole", "grid"}
    scipys = scipy.io.loadmat(mat, squeeze_me=True)
    for name, array in arrays.items():
        assert np.array_equal(array, scipys[name]), name
        assert array.dtype.isnative


def test_reads_what_a_big_endian_machine_wrote(tmp_path: Path) -> None:
    def element(kind: int, data: bytes) -> bytes:
        return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

    matrix = element(6, struct.pack(">II", 6, 0)) + element(5, struct.pack(">ii", 1, 1))
    matrix += struct.pack(">HH4s", 2, 1, b"mu") + element(9, struct.pack(">d", 0.25))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(">H", 0x0100) + b"MI"
    path = tmp_path / "old.mat"
    path.write_bytes(header + element(14, matrix))
    assert number_from(load_normalisation([path]), "mu", "old.mat") == 0.25


def test_reads_the_published_file_of_modl_qsm(shared: Path) -> None:
    arrays = load_normalisation([shared / "data" / "checkpoints" / "modl_qsm_norm.mat"])
    assert arrays["CosTrnMean"].shape == arrays["CosTrnStd"].shape == (2,)
    assert (arrays["CosTrnStd"] > 0).all()


def test_arrays_without_a_name_get_the_files(tmp_path: Path, mat: Path) -> None:
    info, mean = tmp_path / "network_info_QSMnet_64.npy", tmp_path / "train_gt_mean.npy"
    np.save(info, ["leaky_relu", "qsmnet_deep"])
    np.save(mean, np.array([[0.01]]))
    arrays = load_normalisation([mat, info, mean])
    assert arrays["network_info"].tolist() == ["leaky_relu", "qsmnet_deep"]
    assert number_from(arrays, "train_gt_mean", "train_gt_mean.npy") == 0.01
    assert number_from(arrays, "input_std", "norm_factor.mat", positive=True) == 0.011


def test_no_files_hold_nothing() -> None:
    assert load_normalisation([]) == {}


def test_refuses_a_name_twice(mat: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds .*, as another of the files"):
        load_normalisation([mat, mat])


@pytest.mark.parametrize("name", ["nowhere.mat", "nowhere.npy"])
def test_refuses_a_missing_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"{name}: no such file"):
        load_normalisation([tmp_path / name])


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("stats.txt", b"0 1", r"expected a MATLAB \.mat, a NumPy \.npy or a \.json"),
        ("stats.mat", b"", "not a MATLAB 5 file"),
        ("stats.mat", b"version https://git-lfs.github.com/spec/v1\n" * 9, "git lfs pull"),
        ("stats.mat", b"MATLAB 7.3".ljust(124) + b"\x00\x02IM\x89HDF", r"7\.3 .* '-v7'"),
        ("stats.npy", b"", "not a NumPy file"),
        ("stats.npy", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_refuses_strange_files(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=match):
        load_normalisation([tmp_path / name])


class Trap:
    """Creates a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "network_info_x.npy", np.array([Trap(tmp_path / "sprung")], dtype=object))
    with pytest.raises(WeightsError, match=r"holds a pickle.*numpy\.array\(\[str") as refusal:
        load_normalisation([tmp_path / "network_info_x.npy"])
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "sprung").exists()


def test_several_arrays_under_the_suffix_of_one_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "stats.npy").open("wb") as file:
        np.savez(file, a=1, b=2)
    with pytest.raises(WeightsError, match="holds several arrays"):
        load_normalisation([tmp_path / "stats.npy"])


def test_damaged_files_are_read_or_refused(tmp_path: Path, mat: Path) -> None:
    names = tmp_path / "network_info_x.npy"
    np.save(names, ["leaky_relu", "qsmnet_deep"])
    generator = random.Random(0)
    refusals: list[str] = []
    for path in (mat, names):
        whole = path.read_bytes()
        for _ in range(300):
            data = bytearray(
                whole[: generator.choice([len(whole), generator.randrange(len(whole))])]
            )
            for _ in range(generator.choice([1, 4]) if data else 0):
                data[generator.randrange(len(data))] = generator.choice([0, 1, 14, 15, 255])
            path.write_bytes(data)
            try:
                load_normalisation([path])
            except WeightsError as error:
                refusals.append(str(error))
    assert len(refusals) > 200
    assert not [refusal for refusal in refusals if "\n" in refusal]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.nan, "is nan, expected one finite number"),
        (np.inf, "is inf, expected one finite number"),
        (0.0, "is 0.0, expected one finite number above zero"),
        (-1, "is -1.0, expected one finite number above zero"),
        ([1.0, 2.0], r"is an array of float64 of shape \(2,\), expected one finite number"),
        ("0.5", "is an array of <U3"),
        (True, "is an array of bool"),
    ],
)
def test_refuses_what_is_no_standard_deviation(value: object, match: str) -> None:
    with pytest.raises(WeightsError, match=rf"std {match}.*stats\.mat") as refusal:
        number_from({"std": np.array(value)}, "std", "stats.mat", positive=True)
    assert refusal.value.exit_code == 7


def test_a_missing_number_names_the_file_and_what_was_found() -> None:
    with pytest.raises(WeightsError, match=r"lacks std \(found: no files passed\).*stats\.mat"):
        number_from({}, "std", "stats.mat")
    with pytest.raises(WeightsError, match=r"lacks std \(found: mean\)"):
        number_from({"mean": np.array(0.0)}, "std", "stats.mat")


def test_what_is_compressed_inflates_to_what_its_tag_announces(tmp_path: Path) -> None:
    path, header = tmp_path / "bomb.mat", b"MATLAB 5.0".ljust(124) + b"\0\1IM"
    for announced, said in ((100, "truncated or damaged"), (2**31, "unpack to 2.15 GB")):
        packed = zlib.compress(struct.pack("<II", 14, announced) + bytes(2**26))
        path.write_bytes(header + struct.pack("<II", 15, len(packed)) + packed)
        tracemalloc.start()
        with pytest.raises(WeightsError, match=said):
            load_normalisation([path])
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


@pytest.mark.parametrize("mat", ["v7"], indirect=True)
def test_no_bit_of_a_compressed_file_turns_over_unseen(mat: Path) -> None:
    whole, dice = mat.read_bytes(), random.Random(7)
    expected, seen = load_normalisation([mat]), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[dice.randrange(128, len(whole))] ^= 1 << dice.randrange(8)
        mat.write_bytes(damaged)
        try:
            arrays = load_normalisation([mat])
        except WeightsError:
            seen += 1
            continue
        assert arrays.keys() <= expected.keys()
        assert all(np.array_equal(array, expected[name]) for name, array in arrays.items())
    assert seen > 250
