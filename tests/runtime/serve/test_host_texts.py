"""Texts as hosts write them: no error where nothing is lost, and the images always go back."""

import json
import struct

import numpy as np
import pytest
from ismrmrd.serialization import ConfigFile, ConfigText

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.serve.codec import text_frame
from qsm_deploy.runtime.serve.image_roles import role_of
from qsm_deploy.runtime.serve.parameters import Parameters, parameters_from
from qsm_deploy.runtime.serve.texts import (
    LINE_CHARACTERS,
    decoded,
    parse_attributes,
    parse_parameters,
)

NAME = "ProtocolName"


def meta(value, name=NAME):
    return f"<meta><name>{name}</name><value>{value}</value></meta>"


def xml(*metas):
    return f"<ismrmrdMeta>{''.join(metas)}</ismrmrdMeta>"


UMLAUTS, KANJI = xml(meta("Schädel 3°")), xml(meta("ソフト表"))
DECLARED = '<?xml version="1.0" encoding="{}"?>\n'

FINE = {
    "Latin-1": UMLAUTS.encode("latin-1"),
    "Windows-1252": xml(meta("“T2*” 3 €")).encode("cp1252"),
    "Shift-JIS": KANJI.encode("shift_jis"),
    "EUC-KR": xml(meta("머리")).encode("euc_kr"),
    "a lone surrogate": xml(meta("a\ud800b")).encode("utf-8", "surrogatepass"),
    "Latin-1 as declared": (DECLARED.format("ISO-8859-1") + UMLAUTS).encode("latin-1"),
    "Latin-1 declared as UTF-8": (DECLARED.format("UTF-8") + UMLAUTS).encode("latin-1"),
    "UTF-8 declared as UTF-16": (DECLARED.format("utf-16") + UMLAUTS).encode(),
    "an unknown encoding": (DECLARED.format("martian") + UMLAUTS).encode(),
    "UTF-16": (DECLARED.format("UTF-16") + UMLAUTS).encode("utf-16"),
    "UTF-16 without a mark": UMLAUTS.encode("utf-16-le"),
    "UTF-16 of the other order": b"\xfe\xff" + UMLAUTS.encode("utf-16-be"),
    "a byte order mark": UMLAUTS.encode("utf-8-sig"),
    "a line before the declaration": ("\n" + DECLARED.format("UTF-8") + UMLAUTS).encode(),
    "control characters": xml(meta("a\x01\x08\x1b[31m\x7f")).encode(),
    "references to control characters": xml(meta("a&#1;&#x1b;b")).encode(),
    "no characters": xml(meta("\ufffe\uffff")).encode(),
    "a bare ampersand": xml(meta("head & neck &nbsp;")).encode(),
    "CDATA": xml(meta("<![CDATA[a < b & c]]>")).encode(),
    "bytes after NUL": UMLAUTS.encode() + b"\0\xff\xfe<not><xml",
    "NUL in a value": xml(meta("a\0b")).encode(),
    "nothing": b"",
    "NUL": b"\0\0",
    "blanks": b" \r\n\t",
    "a comment": xml("<!-- a -->", meta("b")).encode(),
}
BROKEN = {
    "no XML": b"ProtocolName=head",
    "another root": b"<other/>",
    "a bare bracket": xml(meta("TE < 5"), meta("head", "BodyPart")).encode(),
    "no name": xml("<meta><value>1</value></meta>").encode(),
    "a document type": b'<!DOCTYPE a [<!ENTITY b "c">]>' + xml(meta("&b;")).encode(),
    "an end tag too many": (xml(meta("a")) + "</ismrmrdMeta>").encode(),
}


@pytest.fixture
def field_stream(serialise, mrd_header, mrd_images, image_message, local_field):
    """Return what makes a session of a field, and its images, with these bytes as attributes."""

    def make(attributes=b"", **what):
        start = serialise(ConfigFile("dipole"), mrd_header(), {"units": "ppm"})
        images = [image_message(image, attributes) for image in mrd_images(local_field, **what)]
        return start + b"".join(images) + serialise(None), b"".join(images)

    return make


@pytest.fixture
def plain_map(answered, field_stream):
    """Return the map of a session without attributes."""
    found = answered(field_stream()[0])
    assert (len(found.map), found.told) == (8, [])
    return found.map


@pytest.fixture
def first_image(decoded, field_stream):
    """Return what gives the first image of a field, with these bytes as attributes."""

    def make(attributes, **what):
        return next(m for m in decoded(field_stream(attributes, **what)[0]) if hasattr(m, "head"))

    return make


class TestAttributes:
    @pytest.mark.parametrize("kind", FINE)
    def test_what_is_not_needed_may_be_anything(self, answered, field_stream, plain_map, kind):
        stream, images = field_stream(FINE[kind])
        found = answered(stream)
        assert (found.told, found.map) == ([], plain_map)
        assert found.data.count(images) == 1

    @pytest.mark.parametrize("kind", BROKEN)
    def test_broken_ones_are_told(self, answered, field_stream, plain_map, kind):
        stream, images = field_stream(BROKEN[kind])
        found = answered(stream)
        assert len(found.told) == 1
        assert found.told[0].startswith("WRN the attributes of 8 images are broken, and used")
        assert found.map == plain_map
        assert found.data.count(images) == 1

    @pytest.mark.parametrize(
        ("attributes", "name"),
        [
            (xml(meta("<2>", "RescaleSlope")), "RescaleSlope"),
            (xml("<meta><name>ImageType</name><value>MASK</meta>"), "ImageType"),
            (xml(meta("1")).replace("</ismrmrdMeta>", "<meta><na"), "ImageRowDir"),
            (xml(meta("a<b"), "<meta>EchoTime</meta>"), "EchoTime"),
        ],
    )
    def test_what_is_needed_and_cannot_be_read_is_an_error(
        self, answered, field_stream, attributes, name
    ):
        stream, images = field_stream(attributes.encode())
        found = answered(stream)
        assert found.told[0].startswith("WRN the attributes of 8 images are broken")
        assert found.told[1].startswith(f"ERR cannot read the attribute {name} of an image: ")
        assert found.map == []
        assert found.data.count(images) == 1

    def test_those_that_are_whole_are_used(self, answered, field_stream, local_field):
        scale = meta("2", "RescaleSlope") + meta("0", "RescaleIntercept") + meta("a<b")
        found = answered(field_stream(xml(scale).encode())[0])
        pixels = [np.frombuffer(f[-240:], "<u2").reshape(10, 12) - 2048.0 for f in found.map]
        np.testing.assert_allclose(np.array(pixels).T, 4000 * local_field, atol=0.51)

    def test_the_header_stands_in_for_the_role_and_the_echo(self, first_image):
        cut = xml(meta("P", "Comment")).replace("</ismrmrdMeta>", "<meta><name>Ima").encode()
        image = first_image(cut, image_type=2)
        assert role_of(image) == "phase"
        assert image.values("EchoNumber") == []
        with pytest.raises(DataError, match="cannot read the attribute ImageRowDir"):
            image.values("ImageRowDir")

    def test_a_longer_name_is_not_the_name(self, first_image):
        image = first_image(xml(meta("M", "ImageTypeValue3"), meta("a<b")).encode())
        assert (image.values("ImageTypeValue3"), image.values("ImageType")) == (["M"], [])

    def test_values_and_names_are_read_as_xml(self):
        text = '<x:ismrmrdMeta xmlns:x="y">' + meta("a &lt; b") + meta("c") + "</x:ismrmrdMeta>"
        assert parse_attributes(text) == {NAME: ["a < b", "c"]}


HEADER = """<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><subjectInformation><patientName>
{}</patientName></subjectInformation><acquisitionSystemInformation><systemFieldStrength_T>3
</systemFieldStrength_T></acquisitionSystemInformation></ismrmrdHeader>"""


@pytest.mark.parametrize(
    "header",
    [
        HEADER.format("Müller").encode("latin-1"),
        (DECLARED.format("ISO-8859-1") + HEADER.format("Müller")).encode("latin-1"),
        HEADER.format("表ソ").encode("shift_jis"),
        HEADER.format("Smith & Sons \x01 &#2;").encode() + b"\0\xff",
        HEADER.format("a\0b").encode(),
        HEADER.format("é").encode("utf-8-sig"),
    ],
)
def test_headers(answered, serialise, mrd_images, image_message, local_field, plain_map, header):
    start = serialise(ConfigFile("dipole"), {"units": "hz"})
    start += struct.pack("<HI", 3, len(header)) + header
    images = b"".join(image_message(i, b"") for i in mrd_images(local_field * 42.577 * 3))
    found = answered(start + images + serialise(None))
    assert (found.told, len(found.map)) == ([], 8)
    assert found.data.count(images) == 1
    for one, other in zip(found.map, plain_map, strict=True):
        here, there = (np.frombuffer(f[-240:], "<u2").astype(int) for f in (one, other))
        assert np.abs(here - there).max() <= 1


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (b"<c>dip\xe4", {"config": "dipole", "units": "ppm"}),  # broken, and not needed
        (
            b"\xef\xbb\xbf<?xml version='1.0'?><c><!--Sch\xe4del & Hals-->dipole</c>",
            {"units": "ppm"},
        ),
        (b"dipole\0\xe4\xff", {"units": "ppm"}),
        (b" dipole\r\n", {"units": "ppm"}),
    ],
)
def test_configurations(
    answered, serialise, mrd_header, mrd_images, local_field, config, parameters
):
    start = struct.pack("<HI", 2, len(config)) + config
    stream = serialise(mrd_header(), parameters, *mrd_images(local_field), None)
    found = answered(start + stream)
    assert (found.told, len(found.map)) == ([], 8)


class TestParameters:
    @pytest.mark.parametrize(
        "text",
        [
            b'{"parameters": {"units": "ppm"}, "protocol": "Sch\xe4del"}',
            '{"protocol": "ソフト表", "parameters": {"units": "ppm"}}'.encode("shift_jis"),
            '{"protocol": "許功蓋", "parameters": {"units": "ppm"}}'.encode("big5"),
            b'\xef\xbb\xbf{"parameters": {"units": "ppm"}}\r\n\0',
            '{"parameters": {"units": "ppm"}}'.encode("utf-16"),
            '{"parameters": {"units": "ppm"}}'.encode("utf-16-le"),
            b'{"protocol": "a\x01\tb", "parameters": {"units": "ppm"}}',
            b'{"parameters": {"Units": "ppm", "units": "ppm", "negate": null, "phasescale": ""}}',
            b'{"units": "ppm"}',
            b'{"n": [NaN, -Infinity, 1e999, 1'
            + b"0" * 5000
            + b'], "parameters": {"units": "ppm"}}',
        ],
    )
    def test_json_as_hosts_write_it(self, text):
        found = parse_parameters(decoded(text))
        assert parameters_from(found) == Parameters(units="ppm")

    @pytest.mark.parametrize("inner", ["{}", "null", "[]", '{"units": null}'])
    def test_none(self, inner):
        text = f'{{"parameters": {inner}}}'.encode()
        assert parameters_from(parse_parameters(decoded(text))) == Parameters()

    @pytest.mark.parametrize("value", [None, [], ["a", None], {"a": {}}, 1e999, "", "\ud800"])
    def test_unknown_ones_are_told(self, answered, dipole_session, plain_map, value):
        found = answered(dipole_session({"units": "ppm", "roi": value, "Zoom": None}))
        assert found.told == ["WRN parameters without meaning here: Zoom, roi"]
        assert found.map == plain_map

    @pytest.mark.parametrize("value", [["ppm"], [], {}, {"unit": "ppm"}, 10**400, float("nan")])
    @pytest.mark.parametrize(
        ("name", "choices"),
        [
            ("units", "it may be ppm, "),
            ("phasescale", "it may be auto, "),
            ("sendoriginal", "it may be True or False"),
            ("config", "this server has qsm and dipole"),
        ],
    )
    def test_known_ones_have_a_value_that_is_allowed(
        self, answered, dipole_session, name, choices, value
    ):
        found = answered(dipole_session({"units": "ppm", name: value}))
        (told,) = found.told
        assert told.startswith("ERR ")
        assert choices in told
        assert name in told or name == "config"
        assert found.data.count(struct.pack("<H", 1022)) >= 8
        assert found.map == []

    def test_two_that_differ(self):
        with pytest.raises(UsageError, match="the parameter units is 'ppm' and 'ppb'; send one"):
            parameters_from({"units": "ppm", "Units": "ppb"})

    def test_an_empty_text_is_not_the_json(
        self, answered, serialise, mrd_header, mrd_images, local_field
    ):
        stream = serialise(ConfigText("dipole"), mrd_header(), "", " ", {"units": "ppm"})
        found = answered(stream + serialise(*mrd_images(local_field), "for people", None))
        assert (found.told, len(found.map)) == ([], 8)


@pytest.fixture
def dipole_session(serialise, mrd_header, mrd_images, image_message, local_field):
    """Return a function that makes a session of a field with parameters."""

    def make(parameters):
        start = serialise(ConfigFile("dipole"), mrd_header(), parameters)
        images = [image_message(image, b"") for image in mrd_images(local_field)]
        return start + b"".join(images) + serialise(None)

    return make


class TestLines:
    STRANGE = "\x1b[31m\ud800\x07\u202e\x00\x9b\u2028\r\n"

    def test_nothing_that_cannot_be_shown(self):
        assert text_frame("ERR", f"a{self.STRANGE}b")[6:-1].decode() == (
            "ERR a\ufffd[31m\ufffd\ufffd\ufffd\ufffd\ufffd b"
        )

    def test_one_line_of_bounded_length(self):
        line = text_frame("WRN", "ab \n" * 10**6)[6:-1].decode()
        assert len(line) == len("WRN ") + LINE_CHARACTERS + len("...")
        assert 500 <= LINE_CHARACTERS <= 1000

    @pytest.mark.parametrize(
        "parameters",
        [
            {"units": "ppm", STRANGE * 500: 1},
            {"units": STRANGE * 500},
            {"config": STRANGE * 500},
            {"units": [STRANGE * 500]},
        ],
    )
    def test_what_a_host_wrote(self, answered, dipole_session, parameters):
        found = answered(dipole_session(parameters))
        for line in [*found.told, found.session.error or ""]:
            assert line.isprintable()
            assert len(line) < LINE_CHARACTERS + 10
        assert found.told

    def test_the_log_of_the_server(self, serve, dipole_session):
        running = serve()
        text = json.dumps({"parameters": {"units": self.STRANGE * 500}})
        bad = struct.pack("<HI", 3, len(text)) + text.encode()  # no header
        answer = running.talk(dipole_session({"units": "ppm"})[:-2] + bad + struct.pack("<H", 4))
        assert len(answer.errors) == 1
        running.stop()
        (line,) = running.log
        assert line.isprintable()
        assert len(line) < 1000
        assert "8 images" in line
