"""Which images belong together, and what is missing when something is."""

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError, GeometryError
from qsm_deploy.runtime.serve.acquisition import echo_time_s, field_strength_t
from qsm_deploy.runtime.serve.grouping import echo_volumes, field_volume
from qsm_deploy.runtime.serve.image_roles import EchoKey, role_of

TE, STRENGTH = "sequenceParameters/TE", "acquisitionSystemInformation/systemFieldStrength_T"
RESONANCE = "experimentalConditions/H1resonanceFrequency_Hz"
HEADER = {TE: ["5", "10"], STRENGTH: ["3"]}
MAGNITUDE, PHASE = 1, 2


@pytest.fixture
def echo(codec_images):
    """Return a function that gives the images of an echo, filled with a number."""

    def make(value, contrast, image_type, series, shape=(4, 3, 2), **more):
        volume = np.full(shape, value, dtype=np.uint16)
        return codec_images(volume, contrast=contrast, image_type=image_type, series=series, **more)

    return make


@pytest.fixture
def two_echoes(echo):
    return [
        *echo(20, 1, PHASE, 2), *echo(1, 0, MAGNITUDE, 1), *echo(10, 0, PHASE, 2),
        *echo(2, 1, MAGNITUDE, 1),
    ]  # fmt: skip


def values(stacks):
    return [int(stack.volume()[0, 0, 0]) for stack in stacks]


class TestEchoes:
    def test_by_series_echo_and_slice(self, two_echoes):
        volumes = echo_volumes(two_echoes, HEADER)
        assert values(volumes.phase) == [10, 20]
        assert values(volumes.magnitude) == [1, 2]
        assert volumes.echo_times_s == (0.005, 0.01)
        assert (volumes.mask, volumes.notes) == (None, ())

    def test_echoes_that_only_their_attributes_tell_apart(self, echo):
        images = [
            i for n in (1, 0) for kind in (MAGNITUDE, PHASE)
            for i in echo(n, 0, kind, 10 * kind + n, EchoTime=[str(5 * n + 5)])
        ]  # fmt: skip
        volumes = echo_volumes(images, {STRENGTH: ["3"]})
        assert volumes.echo_times_s == (0.005, 0.01)
        assert values(volumes.phase) == [0, 1]

    def test_one_of_several_series_and_the_same_for_both(self, echo):
        images = [
            *echo(1, 0, MAGNITUDE, 1, ImageType="ORIGINAL\\PRIMARY\\M\\ND"),
            *echo(2, 0, MAGNITUDE, 2, ImageType="ORIGINAL\\PRIMARY\\M\\DIS2D"),
            *echo(3, 0, PHASE, 3, ImageType="ORIGINAL\\PRIMARY\\P\\DIS2D"),
        ]
        volumes = echo_volumes(images, HEADER)
        assert values(volumes.magnitude) == [2]
        assert volumes.notes == ("magnitude of series 2 taken, not of 1",)

    def test_a_mask_instead_of_magnitude(self, echo):
        images = [*echo(1, 0, PHASE, 1), *echo(1, 5, MAGNITUDE, 9, ImageType="DERIVED\\MASK")]
        volumes = echo_volumes(images, HEADER)
        assert volumes.magnitude == ()
        assert values([volumes.mask]) == [1]

    @pytest.mark.parametrize(
        ("keep", "header", "match"),
        [
            (lambda i: i.head.image_type == MAGNITUDE, HEADER, "no phase images .4 of magnitude"),
            (lambda i: i.head.image_type == PHASE, HEADER, "phase images without magnitude"),
            (lambda i: (i.head.image_type, i.head.contrast) != (1, 1), HEADER, "echo at 10 ms"),
            (lambda i: True, {TE: ["5"]}, "no echo time for echo 2: .* has 1 values"),
            (lambda i: True, {}, "no echo time"),
            (lambda i: True, {TE: ["5", "x"]}, "TE is 'x', not a number"),
            (lambda i: True, {TE: ["0.005", "0.010"]}, "0.01 ms cannot be right"),
        ],
    )
    def test_what_is_missing(self, two_echoes, keep, header, match):
        with pytest.raises(DataError, match=match):
            echo_volumes([i for i in two_echoes if keep(i)], header)

    def test_mixed_matrix_sizes(self, echo, two_echoes):
        with pytest.raises(GeometryError, match=r"\(4, 3, 2\) voxels, .* \(6, 3, 2\)"):
            echo_volumes([*two_echoes[:-2], *echo(2, 1, MAGNITUDE, 1, (6, 3, 2))], HEADER)

    def test_repeated_measurements(self, two_echoes):
        two_echoes[0].head.repetition = 1
        with pytest.raises(DataError, match="phase of series 2 was measured repeatedly"):
            echo_volumes(two_echoes, HEADER)


class TestEchoTimes:
    def test_the_header_or_the_attribute(self):
        assert echo_time_s(HEADER, EchoKey(1, None)) == 0.01
        assert echo_time_s({}, EchoKey(1, 7.5)) == 0.0075
        assert echo_time_s({TE: ["5"]}, EchoKey(1, 7.5)) == 0.0075

    def test_a_contradiction(self):
        with pytest.raises(DataError, match="at 5 ms in the header and at 6 ms in the attribute"):
            echo_time_s(HEADER, EchoKey(0, 6.0))


class TestFieldStrength:
    def test_stated_or_from_the_resonance(self):
        assert field_strength_t({STRENGTH: ["2.89"]}) == 2.89
        both = {STRENGTH: ["3"], RESONANCE: ["123250000"]}
        assert field_strength_t(both) == pytest.approx(2.8948, rel=1e-4)
        with pytest.raises(DataError, match="which is that of 3 T; correct one"):
            field_strength_t({STRENGTH: ["1.5"], RESONANCE: ["127731000"]})
        assert field_strength_t({RESONANCE: ["127731000"]}) == pytest.approx(3.0)

    @pytest.mark.parametrize(
        ("header", "match"),
        [
            ({}, "lacks the field strength"),
            ({RESONANCE: ["0"]}, "0 T cannot be right"),
            ({STRENGTH: ["3000"]}, "3000 T cannot be right"),
            ({STRENGTH: ["nan"]}, "nan T cannot be right"),
            ({STRENGTH: ["three"]}, "'three', not a number"),
        ],
    )
    def test_errors(self, header, match):
        with pytest.raises(DataError, match=match):
            field_strength_t(header)


class TestRoles:
    @pytest.mark.parametrize(
        ("image_type", "token", "role"),
        [
            (2, "", "phase"), (1, "", "magnitude"), (3, "", "field"), (0, "P", "phase"),
            (1, "ORIGINAL\\PRIMARY\\P\\ND", "phase"), (0, "M", "magnitude"), (1, "MASK", "mask"),
        ],
    )  # fmt: skip
    def test_by_type_or_token(self, echo, image_type, token, role):
        assert role_of(echo(1, 0, image_type, 1, ImageType=token)[0]) == role

    @pytest.mark.parametrize(("image_type", "match"), [(0, "says neither"), (6, "type colour")])
    def test_neither(self, echo, image_type, match):
        with pytest.raises(DataError, match=match):
            role_of(echo(1, 0, image_type, 1)[0])

    def test_complex_pixels(self, codec_images):
        image = codec_images(np.ones((4, 3, 2), dtype=np.complex64), image_type=1)[0]
        with pytest.raises(DataError, match="complex64 with 1 channels"):
            role_of(image)

    @pytest.mark.parametrize("number", ["x", "nan", ""])
    def test_an_echo_number_that_is_none(self, echo, number):
        with pytest.raises(DataError, match="EchoNumber"):
            echo_volumes(echo(1, 0, PHASE, 1, EchoNumber=[number, "2"]), HEADER)


class TestField:
    def test_of_any_type_with_a_mask(self, echo):
        found = field_volume([*echo(3, 0, PHASE, 1), *echo(1, 0, MAGNITUDE, 2, ImageType="MASK")])
        assert values([found.field, found.mask]) == [3, 1]

    def test_two_fields(self, two_echoes):
        with pytest.raises(DataError, match=r"2 volumes of a local field .echoes 2, 1."):
            field_volume(two_echoes)

    def test_only_a_mask(self, echo):
        with pytest.raises(DataError, match="no images of a local field"):
            field_volume(echo(1, 0, MAGNITUDE, 2, ImageType="MASK"))
