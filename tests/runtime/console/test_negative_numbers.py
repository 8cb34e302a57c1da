"""Numbers below 0, however they are written, are no flags."""

import pytest

from qsm_deploy.calibration.phantom.arguments import parser as parser_of_phantom
from qsm_deploy.export.check.cli import parser as parser_of_check
from qsm_deploy.runtime.job.arguments import parser as parser_of_run


@pytest.mark.parametrize("parser", [parser_of_run, parser_of_phantom, parser_of_check])
@pytest.mark.parametrize("text", ["-1e-05", "-1E5", "-.5e+3", "-2.", "-1.5", "-3"])
def test_a_number_below_0_is_taken(parser, text) -> None:
    given = parser().parse_args(["a", "--voxel-size", "1", text, "2"])
    assert given.voxel_size == [1, float(text), 2]


def test_a_window_below_0() -> None:
    assert parser_of_run().parse_args(["--window", "-1e38", "1e38"]).window == [-1e38, 1e38]
