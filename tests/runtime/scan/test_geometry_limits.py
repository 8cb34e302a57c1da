import math
import re

import pytest

from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import GeometryLimits
from qsm_deploy.runtime.scan.geometry_limits import deviations

AXIAL_1MM = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 5.0)
ANY = GeometryLimits(None, None, None, None)


def tilted(degrees):
    angle = math.radians(degrees)
    return (0.0, math.sin(angle), math.cos(angle))


@pytest.mark.parametrize("voxel", [(1, 1, 1), (0.91, 1.09, 1.0)])
@pytest.mark.parametrize("direction", [tilted(0), tilted(4.9), tilted(180), tilted(-4.9)])
def test_allows_what_is_close(voxel, direction):
    assert deviations(AXIAL_1MM, Geometry((8, 8, 8), voxel, direction)) == []


@pytest.mark.parametrize(
    ("voxel", "direction", "says"),
    [
        ((1, 1, 1.11), tilted(0), r"voxel size \(1, 1, 1.11\) mm.*trained at \(1, 1, 1\) mm"),
        ((0.89, 1, 1), tilted(0), r"voxel size \(0.89, 1, 1\)"),
        ((1, 1, 1), tilted(5.2), r"B0 direction .*5.2 degrees off the \(0, 0, 1\)"),
        ((1, 1, 1), tilted(20), r"expected error about 68 % \(2 sin 20 deg\)"),
        ((1, 1, 1), (1, 0, 0), "90.0 degrees"),
        ((2, 2, 2), (1, 0, 0), "voxel size .*; B0 direction "),
    ],
)
def test_names_both_values_of_what_is_not(voxel, direction, says):
    found = deviations(AXIAL_1MM, Geometry((8, 8, 8), voxel, direction))
    assert re.search(says, "; ".join(found))


def test_a_network_for_any_geometry_has_no_deviations():
    assert deviations(ANY, Geometry((8, 8, 8), (0.3, 1, 7), (1, 2, 3))) == []
