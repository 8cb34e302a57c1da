"""Messages from bytes and to bytes: the sizes of the protocol, and every way to get them wrong."""

import ctypes
import io
import struct

import numpy as np
import pytest
from ismrmrd.serialization import ConfigFile, ConfigText, ProtocolDeserializer

from qsm_deploy.kernels.errors import ProtocolError
from qsm_deploy.runtime.serve.codec import (
    PIXEL_TYPES,
    Id,
    Image,
    ImageHeader,
    Other,
    Text,
    close_frame,
    image_frames,
    resent_frames,
    text_frame,
)
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.texts import (
    parse_attributes,
    parse_config,
    parse_header,
    parse_parameters,
)

# the byte offsets that hosts in other languages use
OFFSETS = {
    "data_type": 2, "measurement_uid": 12, "matrix_size": 16, "field_of_view": 22, "channels": 34,
    "position": 36, "read_dir": 48, "phase_dir": 60, "slice_dir": 72, "slice": 98, "contrast": 100,
    "image_type": 124, "image_index": 126, "image_series_index": 128, "attribute_string_len": 194,
}  # fmt: skip


def test_the_image_header_has_the_layout_of_the_protocol():
    assert ctypes.sizeof(ImageHeader) == 198
    assert {name: getattr(ImageHeader, name).offset for name in OFFSETS} == OFFSETS


def test_a_session_of_the_ismrmrd_package_is_read(decoded, dipole_stream, local_field):
    config, header, parameters, *images, close = decoded(dipole_stream)
    assert config == Text(Id.CONFIG_FILE, "dipole")
    assert header.id == Id.HEADER
    assert parse_header(header.text)["sequenceParameters/TE"] == ["5.0", "10.0", "15.0"]
    assert parse_parameters(parameters.text) == {"units": "ppm"}
    assert close == Other(Id.CLOSE)
    assert len(images) == local_field.shape[2]
    for image in images:
        k = image.head.slice
        np.testing.assert_array_equal(image.pixels[0, 0].T, local_field[:, :, k])


def test_images_go_back_byte_for_byte(decoded, serialise, mrd_images, local_field):
    stream = serialise(*mrd_images(local_field, Vendor="<&>", Other="é"))
    images = decoded(stream)
    assert images[0].attributes == {"Vendor": ["<&>"], "Other": ["é"]}
    assert b"".join(part for image in images for part in map(bytes, resent_frames(image))) == stream


def test_what_is_written_is_read_by_the_ismrmrd_package(codec_images, local_field):
    head = codec_images(local_field)[0].head
    pixels = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    data = image_frames(head, {"DataRole": ["Image", "Quantitative"], "A": ["1"]}, pixels)
    stream = io.BytesIO(data + text_frame("WRN", "two\nlines") + close_frame())
    image, text = ProtocolDeserializer(stream).deserialize()
    np.testing.assert_array_equal(image.data[0], pixels)
    assert image.meta == {"DataRole": ["Image", "Quantitative"], "A": "1"}
    assert text == "WRN two lines\0"


@pytest.mark.parametrize(
    ("number", "size"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 4), (6, 8), (7, 8)]
)
def test_pixel_types_have_the_size_of_the_protocol(number, size):
    assert PIXEL_TYPES[number].itemsize == size


@pytest.mark.parametrize(
    ("message", "id_"),
    [(ConfigFile("qsm"), Id.CONFIG_FILE), (ConfigText("qsm"), Id.CONFIG_TEXT), ("note", Id.TEXT)],
)
def test_texts(decoded, serialise, message, id_):
    assert decoded(serialise(message)) == [Text(id_, str(message))]


def test_an_empty_text_is_a_message(decoded):
    assert decoded(struct.pack("<HI", 5, 0)) == [Text(Id.TEXT, "")]


def test_waveforms_and_raw_data_are_skipped(decoded, serialise):
    import ismrmrd

    raw = ismrmrd.Acquisition.from_array(np.ones((2, 16), dtype=np.complex64))
    wave = ismrmrd.Waveform.from_array(np.ones((3, 5), dtype=np.uint32))
    seen = decoded(serialise(raw, wave, None))
    assert [message.id for message in seen] == [Id.ACQUISITION, Id.WAVEFORM, Id.CLOSE]


class TestMalformed:
    def test_every_truncation_says_where(self, decoded, serialise, mrd_images, local_field):
        stream = serialise(ConfigFile("qsm"), "text", mrd_images(local_field)[0])
        for end in range(1, len(stream)):
            if end in (1026, 1036):  # between two messages
                decoded(stream[:end])
                continue
            with pytest.raises(ProtocolError, match="the stream ends in the"):
                decoded(stream[:end])

    @pytest.mark.parametrize("number", [0, 6, 7, 8, 1030, 65535])
    def test_unknown_ids(self, decoded, number):
        with pytest.raises(ProtocolError, match=f"unknown message id {number}; .* 1022 IMAGE"):
            decoded(struct.pack("<H", number))

    @pytest.mark.parametrize("id_", [2, 3, 5])
    def test_absurd_text_lengths(self, decoded, id_):
        with pytest.raises(ProtocolError, match="announces 4294967295 bytes; this server takes"):
            decoded(struct.pack("<HI", id_, 2**32 - 1))

    @pytest.fixture
    def head(self, codec_images, local_field):
        return codec_images(local_field)[0].head

    def test_absurd_attribute_lengths(self, decoded, head):
        start = struct.pack("<H", 1022) + bytes(head) + struct.pack("<Q", 2**63)
        with pytest.raises(ProtocolError, match="IMAGE announces 9223372036854775808 bytes"):
            decoded(start)

    @pytest.mark.parametrize(
        ("field", "value", "match"),
        [
            ("matrix_size", (65535, 65535, 65535), "matrix 65535 x 65535 x 65535"),
            ("matrix_size", (0, 4, 4), "matrix 0 x 4 x 4"),
            ("channels", 0, "0 channels"),
            ("channels", 2000, "2000 channels"),
            ("data_type", 0, "data type 0"),
            ("data_type", 9, "data type 9"),
        ],
    )
    def test_absurd_images(self, decoded, head, field, value, match):
        if field == "matrix_size":
            head.matrix_size[:] = value
        else:
            setattr(head, field, value)
        with pytest.raises(ProtocolError, match=match):
            decoded(struct.pack("<H", 1022) + bytes(head) + bytes(8))

    def test_an_image_within_the_matrix_but_beyond_the_message(self, decoded, head):
        head.matrix_size[:] = (1024, 1024, 1024)
        with pytest.raises(ProtocolError, match="announces 4294967296 bytes"):
            decoded(struct.pack("<H", 1022) + bytes(head) + bytes(8), Limits())

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("<ismrmrdMeta>", "not XML"),
            ("<other/>", "are <other>, expected <ismrmrdMeta>"),
            ("<ismrmrdMeta><meta/></ismrmrdMeta>", "a meta of 0 names"),
            ('<!DOCTYPE x [<!ENTITY a "b">]><ismrmrdMeta/>', "document type"),
        ],
    )
    def test_attributes(self, text, match):
        with pytest.raises(ProtocolError, match=match):
            parse_attributes(text)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("", "not XML"),
            ("<ismrmrdHeader>", "not XML"),
            ("<other/>", "<other>, expected <ismrmrdHeader>"),
            ('<!DOCTYPE a [<!ENTITY b "c">]><ismrmrdHeader/>', "document type"),
        ],
    )
    def test_headers(self, text, match):
        with pytest.raises(ProtocolError, match=match):
            parse_header(text)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("{", "not JSON"),
            ("[" * 100_000, "not JSON"),
            ("[]", "no object"),
            ("null", "no object"),
            ('{"parameters": [1]}', "no object"),
            ('{"parameters": "units"}', "no object"),
        ],
    )
    def test_parameters(self, text, match):
        with pytest.raises(ProtocolError, match=match):
            parse_parameters(text)

    def test_configurations(self):
        assert parse_config("<configuration>qsm</configuration>") == "qsm"
        assert parse_config("dipole\0") == "dipole"
        with pytest.raises(ProtocolError, match="not XML"):
            parse_config("<configuration>")

    def test_random_corruptions_raise_nothing_else(self, decoded, dipole_stream):
        rng = np.random.default_rng(11)
        refused = 0
        for _ in range(300):
            data = bytearray(dipole_stream)
            for position in rng.integers(0, len(data), rng.integers(1, 20)):
                data[position] = rng.integers(0, 256)
            try:
                messages = decoded(bytes(data))
                assert all(isinstance(m, Text | Image | Other) for m in messages)
            except ProtocolError:
                refused += 1
        assert 0 < refused < 300
