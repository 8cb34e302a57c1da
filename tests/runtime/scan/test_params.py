import json

import pytest

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.scan.params import Params, load_params

EXPECTED = Params((0.02,), 3.0, (0.0, 0.6, 0.8), (1.0, 1.0, 2.0))


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "params.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize(
    "names",
    [
        ("echo_time_s", "field_strength_t", "b0_direction", "voxel_size_mm"),
        ("EchoTime_s", "MagneticFieldStrength_T", "B0_direction", "voxel_size_mm"),
        ("TE", "B0", "B0_dir", "voxel_size"),
        ("EchoTime", "MagneticFieldStrength", "B0_dir", "voxel_size"),
    ],
    ids=["own", "in vivo", "QSM-CI", "BIDS"],
)
def test_reads_every_dialect(write, names):
    values = (0.02, 3, [0, 0.6, 0.8], [1, 1, 2])
    assert load_params(write(dict(zip(names, values, strict=True)))) == EXPECTED


def test_what_is_not_said_stays_open(write):
    assert load_params(write({"TE": [0.02], "seed": 1})) == Params(echo_times_s=(0.02,))


def test_several_echo_times_do_not_tell_which_one_counts(write):
    assert load_params(write({"TE": [0.004, 0.012]})).echo_time_s is None
    assert load_params(write({"TE": [0.004, 0.012], "B0": 7})) == Params((0.004, 0.012), 7.0)


def test_reads_the_in_vivo_folder(shared):
    params = load_params(shared / "data/invivo_haemorrhage/params.json")
    assert params == Params((0.00125,), 3.0, (0.0, 0.0, 1.0), (0.86, 0.86, 2.0))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not a JSON file"),
        ("\xff\xfe", "not a JSON file"),
        ([1, 2], "holds a list"),
        ({}, "no known parameter .found nothing."),
        ({"tesla": 3}, "no known parameter .found tesla."),
        ({"B0": "3"}, "B0 is '3', expected one number"),
        ({"B0": True}, "B0 is True"),
        ({"B0": [3, 3]}, "expected one number"),
        ({"B0": float("nan")}, "B0 is nan"),
        ({"EchoTime": 10**400}, "EchoTime is 1000"),
        ({"B0_dir": [0, 1]}, "expected three numbers"),
        ({"B0_dir": 1}, "expected three numbers"),
        ({"TE": ["a"]}, "expected a number or a list"),
        ({"TE": 0.02, "echo_time_s": 0.03}, "echo_time_s = 0.03 and TE = 0.02 disagree"),
    ],
)
def test_refuses_what_it_cannot_read(write, content, says):
    with pytest.raises(DataError, match=says):
        load_params(write(content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: No such file"):
        load_params(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("content", "strength"),
    [
        ({"MagneticFieldStrength": 3}, 3),
        ({"MagneticFieldStrength": 3, "ImagingFrequency": 123.25}, 2.8948),
        ({"ImagingFrequency": 297.2}, 6.9803),
    ],
)
def test_the_frequency_is_more_exact_than_a_nominal_strength(tmp_path, content, strength):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    assert load_params(path).field_strength_t == pytest.approx(strength, rel=1e-4)


def test_a_frequency_of_another_scanner_is_refused(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"MagneticFieldStrength": 1.5, "ImagingFrequency": 127.7}))
    with pytest.raises(DataError, match=r"1\.5 T, the frequency 127\.7 MHz, which is that of 3 T"):
        load_params(path)
