"""A session without its socket: what comes back for what was sent, and CLOSE last, always."""

import io
from dataclasses import replace

import numpy as np
import pytest
from ismrmrd.serialization import ConfigFile, ConfigText, ProtocolDeserializer

from qsm_deploy.kernels.errors import ProtocolError, UsageError
from qsm_deploy.runtime.card.card import GeometryLimits
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.serve import qsm_config
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.mrd_session import MrdSession
from qsm_deploy.runtime.serve.parameters import Parameters, parameters_from

CHI_SERIES = 99


@pytest.fixture
def talk(decoded, engine):
    """Return a function that gives a stream to a session and returns texts and images."""

    def run(stream, engine=engine, **more):
        session = MrdSession(Limits(), **more)
        for message in decoded(stream):
            session.receive(message)
        assert session.complete
        data = b"".join(bytes(frame) for frame in session.answer(engine))
        reader = io.BytesIO(data)
        answer = list(ProtocolDeserializer(reader).deserialize())  # stops at CLOSE
        assert reader.read() == b""
        texts = [part.removesuffix("\0") for part in answer if isinstance(part, str)]
        return texts, [part for part in answer if not isinstance(part, str)], session

    return run


@pytest.fixture
def session_of(serialise, mrd_header, mrd_images, local_field):
    """Return a function that makes a stream of a session, of a field unless told otherwise."""

    def make(config="dipole", parameters=(("units", "ppm"),), images=None, header=None):
        start = [] if config is None else [ConfigFile(config)]
        start += [mrd_header() if header is None else header]
        start += [] if parameters is None else [dict(parameters)]
        return serialise(*start, *(mrd_images(local_field) if images is None else images), None)

    return make


def chi_ppb(images):
    """Return the susceptibility in images, in the order of their index."""
    found = sorted(images, key=lambda image: image.image_index)
    slope, offset = (float(found[0].meta[f"Rescale{n}"]) for n in ("Slope", "Intercept"))
    return np.concatenate([image.data[0] for image in found]).transpose(2, 1, 0) * slope + offset


class TestDipole:
    def test_the_map_and_the_originals(self, talk, session_of, local_field):
        texts, images, session = talk(session_of())
        assert session.error is None
        assert not [text for text in texts if not text.startswith("INFO")]
        originals = [image for image in images if image.image_series_index == 1]
        maps = [image for image in images if image.image_series_index == CHI_SERIES]
        assert (len(originals), len(maps)) == (8, 8)
        assert images[:8] == originals
        np.testing.assert_allclose(chi_ppb(maps), 2000 * local_field, atol=0.5)

    def test_headers_and_attributes_of_the_map(self, talk, session_of, mrd_images, local_field):
        extra = {"IceMiniHead": "x", "SOPInstanceUID": "1.2", "ImageRowDir": ["1", "0", "0"]}
        sources = mrd_images(local_field, **extra)
        _, images, _ = talk(session_of(images=sources))
        maps = [image for image in images if image.image_series_index == CHI_SERIES]
        by_place = {tuple(image.position): image for image in sources}
        for n, image in enumerate(maps):
            source = by_place[tuple(image.position)]
            for name in ("field_of_view", "read_dir", "phase_dir", "slice_dir", "matrix_size"):
                assert tuple(getattr(image, name)) == tuple(getattr(source, name))
            assert (image.slice, image.data_type, image.image_type) == (source.slice, 1, 1)
            assert image.image_index == n + 1
            meta = image.meta
            assert meta["DataRole"] == ["Image", "Quantitative"]
            assert (meta["WindowCenter"], meta["WindowWidth"]) == ("0", "400")
            assert (meta["RescaleSlope"], meta["RescaleIntercept"]) == ("1.0", "-2048.0")
            assert meta["NumberOfSlices"] == meta["ImagesInAcquisition"] == "8"
            assert meta["SliceNo"] == str(image.slice)
            assert meta["Keep_image_geometry"] == "1"
            assert "twice" in meta["ImageComments"]
            assert all(len(word) <= 16 for word in meta["ImageType"].split("\\"))
            assert meta["ImageRowDir"] == ["1", "0", "0"]
            assert not meta.keys() & {"IceMiniHead", "SOPInstanceUID"}
        places = [np.dot(image.position, image.slice_dir) for image in maps]
        assert places == sorted(places)

    @pytest.mark.parametrize(
        ("units", "factor"),
        [("ppm", 1), ("ppb", 1e-3), ("hz", 1 / (42.577 * 3)),
         ("rad", 1 / (2 * np.pi * 0.005 * 42.577 * 3))],
    )  # fmt: skip
    def test_units(self, talk, session_of, mrd_images, local_field, units, factor):
        field = (local_field / factor).astype(np.float32)
        stream = session_of(parameters=[("units", units)], images=mrd_images(field))
        _, images, session = talk(stream)
        assert session.error is None
        np.testing.assert_allclose(chi_ppb(images[8:]), 2000 * local_field, atol=0.51)

    def test_stored_numbers_are_rescaled(self, talk, session_of, mrd_images, local_field):
        stored = np.rint(local_field * 5e4 + 5000).astype(np.uint16)
        mask = (local_field != 0).astype(np.uint16)
        images = [
            *mrd_images(stored, RescaleSlope="0.02", RescaleIntercept="-100"),
            *mrd_images(mask, series=2, image_type=1, ImageType="DERIVED\\MASK"),
        ]
        texts, images, _ = talk(session_of(parameters=[("units", "ppb")], images=images))
        assert any("field in ppb of 0.02 value + -100; mask as sent" in text for text in texts)
        np.testing.assert_allclose(chi_ppb(images[16:]), 2000 * local_field, atol=0.53)

    def test_the_opposite_sign(self, talk, session_of, local_field):
        _, images, _ = talk(session_of(parameters=[("units", "ppm"), ("negate", "True")]))
        np.testing.assert_allclose(chi_ppb(images[8:]), -2000 * local_field, atol=0.5)

    def test_a_slab_comes_back_as_a_slab(self, talk, session_of, mrd_images, local_field):
        stream = session_of(images=mrd_images(local_field, slab=True))
        _, images, _ = talk(stream)
        assert [tuple(image.matrix_size) for image in images] == 2 * [(12, 10, 8)]
        np.testing.assert_allclose(chi_ppb(images[1:]), 2000 * local_field, atol=0.5)

    def test_clipped_voxels_are_counted_and_at_the_bound(
        self, talk, session_of, mrd_images, local_field
    ):
        field = local_field.copy()
        field[5, 5, 4], field[5, 5, 5], field[5, 5, 3] = 1.5, -1.2, 1.0235
        texts, images, _ = talk(session_of(images=mrd_images(field)))
        assert [t for t in texts if t.startswith("WRN")] == [
            "WRN 2 voxels lie beyond 2.047 ppm and were put at the bound of the scale"
        ]
        assert chi_ppb(images[8:])[5, 5, 3:6].tolist() == [2047, 2047, -2047]
        assert min(image.data.min() for image in images[8:]) == 1  # 0 is left for no value

    def test_a_series_of_that_number_is_not_taken(self, talk, session_of, mrd_images, local_field):
        _, images, _ = talk(session_of(images=mrd_images(local_field, series=CHI_SERIES)))
        assert {image.image_series_index for image in images[8:]} == {100}


class TestParameters:
    def test_the_json_overrides_the_configuration_message(self, talk, session_of):
        stream = session_of("openrecon", [("config", "dipole"), ("units", "PPM")])
        assert talk(stream)[2].error is None
        stream = session_of(
            "qsm", [("config", "qsm"), ("customconfig", "dipole"), ("units", "ppm")]
        )
        assert talk(stream)[2].error is None

    def test_everything_may_come_as_text(self, talk, session_of):
        _, images, _ = talk(session_of(parameters=[("units", "ppm"), ("sendoriginal", "False")]))
        assert len(images) == 8
        assert parameters_from({"sendOriginal": "true", "negate": "0", "phasescale": ""}) == (
            Parameters()
        )

    def test_configuration_text_and_xml(self, talk, serialise, mrd_header, mrd_images, local_field):
        for text in ("dipole", "<configuration>dipole</configuration>"):
            stream = serialise(
                ConfigText(text), mrd_header(), {"units": "ppm"}, *mrd_images(local_field), None
            )
            assert talk(stream)[2].error is None

    def test_unknown_names_are_told(self, talk, session_of):
        texts, _, session = talk(session_of(parameters=[("units", "ppm"), ("sigma", "3")]))
        assert texts[0] == "WRN parameters without meaning here: sigma"
        assert session.error is None

    @pytest.mark.parametrize(
        ("values", "match"),
        [
            ({"config": "grappa"}, "no configuration 'grappa'; this server has qsm and dipole"),
            ({"sendoriginal": "maybe"}, "sendoriginal is 'maybe'; it may be True or False"),
            ({"units": "gauss"}, "units is 'gauss'; it may be ppm, ppb, hz, rad"),
            ({"phasescale": "12"}, "phasescale is '12'; it may be auto, "),
        ],
    )
    def test_wrong_values(self, values, match):
        with pytest.raises(UsageError, match=match):
            parameters_from(values)


class TestErrors:
    """The reason as text, the originals, CLOSE."""

    @pytest.mark.parametrize(
        ("session", "match"),
        [
            ({"config": "grappa"}, "no configuration 'grappa'"),
            ({"config": None}, "no configuration: send CONFIG_FILE"),
            ({"parameters": None}, "the unit of the local field is not stated"),
            ({"parameters": [("units", "G")]}, "the parameter units is 'G'"),
            ({"parameters": [("units", "ppm"), ("sendoriginal", "?")]}, "sendoriginal"),
            ({"parameters": [("units", "hz"), ("sendoriginal", "False")]}, "too much for tissue"),
            ({"config": "qsm"}, "no phase images"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_told_and_the_images_go_back(
        self, talk, session_of, mrd_images, local_field, session, match
    ):
        volume = local_field * (1e4 if match == "too much for tissue" else 1)
        texts, images, found = talk(session_of(images=mrd_images(volume), **session))
        assert [text for text in texts if text.startswith("ERR") and match in text]
        assert match in found.error
        assert len(images) == 8

    def test_no_field_strength(self, talk, session_of, mrd_header):
        header = mrd_header(field_strength_t=None, resonance_hz=0)
        texts, images, _ = talk(session_of(parameters=[("units", "hz")], header=header))
        assert "a field strength of 0 T cannot be right" in texts[-1]
        assert len(images) == 8

    def test_no_header(self, talk, serialise, mrd_images, local_field):
        texts, images, _ = talk(serialise(ConfigFile("dipole"), *mrd_images(local_field), None))
        assert texts == ["ERR images without a header; send it (3) before them"]
        assert len(images) == 8

    def test_a_header_that_is_none(self, talk, serialise, mrd_images, local_field):
        header = b"\x03\x00\x04\x00\x00\x00<a/>"
        stream = (
            serialise(ConfigFile("dipole")) + header + serialise(*mrd_images(local_field), None)
        )
        texts, images, _ = talk(stream)
        assert texts == ["ERR the header is <a>, expected <ismrmrdHeader>"]
        assert len(images) == 8

    def test_raw_data(self, talk, serialise, mrd_header):
        import ismrmrd

        raw = ismrmrd.Acquisition.from_array(np.ones((2, 16), dtype=np.complex64))
        texts, _, _ = talk(serialise(ConfigFile("qsm"), mrd_header(), raw, None))
        assert texts[0].startswith("ERR raw data (ACQUISITION)")

    @pytest.mark.parametrize("messages", [(), (ConfigFile("qsm"),), ("text",)])
    def test_a_query_without_header_or_images(self, talk, serialise, messages):
        texts, images, session = talk(serialise(*messages, None))
        assert (len(texts), images) == (1, [])
        assert session.complete

    def test_a_network_for_another_geometry(self, talk, session_of, card, engine, in_turns):
        limits = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 5.0)
        engine.session.card = replace(card, geometry=limits)
        texts, images, session = talk(session_of(), in_turns(engine.session))
        assert session.error is None
        assert len(images) == 16
        assert any(text.startswith("WRN resampled to 1 mm for") for text in texts)
        allowed = in_turns(engine.session, Wants(allow_geometry=True))
        texts, images, session = talk(session_of(), allowed)
        assert session.error is None
        assert len(images) == 16
        assert any(text.startswith("WRN outside the training: voxel") for text in texts)

    def test_a_network_that_fails(self, talk, session_of, engine):
        engine.session.run = lambda tensors: np.full_like(tensors["local_field_ppm"], np.nan)
        texts, images, _ = talk(session_of())
        assert "NaN or Inf voxels" in texts[-1]
        assert len(images) == 8  # once, not twice

    def test_no_memory(self, talk, session_of, engine):
        def run(tensors):
            raise MemoryError

        engine.session.run = run
        texts, _, _ = talk(session_of())
        assert texts[-1] == "ERR out of memory; send a smaller volume"

    def test_limits(self, decoded, dipole_stream):
        messages, whole = decoded(dipole_stream), MrdSession(Limits())
        [whole.receive(message) for message in messages[:4]]  # up to the first image
        few = MrdSession(Limits(images=3))
        small = MrdSession(Limits(session_bytes=whole.held_bytes))
        for session in (few, small):
            with pytest.raises(ProtocolError, match="more than"):
                [session.receive(message) for message in messages]
        assert (len(few.images), len(small.images)) == (3, 1)


def test_nan_in_the_field(talk, session_of, mrd_images, local_field):
    local_field[4, 4, 4] = np.nan
    texts, _, _ = talk(session_of(images=mrd_images(local_field)))
    assert "1 of 384 voxels inside the mask are NaN or Inf" in texts[-1]


def test_values_beyond_single_precision(talk, session_of, mrd_images, local_field):
    field = local_field.astype(np.float64)
    field[4, 4, 4] = 1e300
    images = mrd_images(field, RescaleSlope="1e38", RescaleIntercept="0")
    texts, images, session = talk(session_of(images=images))
    assert texts[-1].startswith("ERR ")
    assert "NaN or Inf" in texts[-1]
    assert (len(images), session.trace) == (8, "")


def test_a_mask_of_nothing(talk, session_of, mrd_images, local_field):
    texts, _, _ = talk(session_of(images=mrd_images(np.zeros_like(local_field))))
    assert "the mask is empty" in texts[-1]


@pytest.fixture
def echo_images(mrd_images):
    """Return the images of three echoes of a ball in a smooth field, all of it background."""
    x, y, z = np.ogrid[-1:1:20j, -1:1:20j, -1:1:20j]
    ball = x * x + y * y + z * z < 0.7
    field = np.where(ball, 0.3 * z + 0.1 * x, 0).astype(np.float32)
    images = []
    for n in range(3):
        turns = 42.577 * 3 * 0.005 * (n + 1) * field
        phase = np.rint((turns - np.rint(turns)) * 4096 + 2048).clip(0, 4095).astype(np.uint16)
        phase[0, 0, :2] = 0, 4095
        magnitude = np.where(ball, 1000, 10).astype(np.uint16)
        images += mrd_images(phase, contrast=n, image_type=2, series=2, voxel=(2, 2, 2))
        images += mrd_images(magnitude, contrast=n, image_type=1, series=1, voxel=(2, 2, 2))
    return images


class TestEchoes:
    def test_every_step_is_told(self, talk, session_of, echo_images):
        texts, images, session = talk(session_of("qsm", None, echo_images))
        assert session.error is None
        steps = ["phase in 0 to 4095, 4096 per turn", "mask of the signal", "field mapped"]
        for text, step in zip(texts[1:], [*steps, "background removed"], strict=False):
            assert text.startswith(f"INFO {step}")
        assert "echoes at 5, 10, 15 ms; 3 T" in texts[0]
        assert list(session.stages.seconds) == [
            "group", "phase scale", "mask", "field mapping", "quality mask", "background removal",
            "prepare", "inference", "encode",
        ]  # fmt: skip
        assert np.abs(chi_ppb(images[120:])).max() < 30
        assert len(images) == 140

    def test_the_opposite_sign(self, talk, session_of, echo_images):
        maps = []
        for negate in ("False", "True"):
            _, images, _ = talk(session_of("qsm", [("negate", negate)], echo_images))
            maps.append(chi_ppb(images[120:]))
        np.testing.assert_allclose(maps[0], -maps[1], atol=1.01)
        assert np.abs(maps[0]).max() > 3

    @pytest.mark.parametrize(
        ("fault", "match"),
        [
            ("only magnitude", "no phase images (60 of magnitude); send phase and magnitude"),
            ("only phase", "phase images without magnitude"),
            ("echo times", "no echo time for echo 2: the header's sequenceParameters/TE has 1"),
            ("matrix sizes", "send one acquisition at a time"),
            ("a slice", "one is missing, or they are not equally spaced"),
        ],
    )
    def test_what_is_missing_is_told_and_the_images_go_back(
        self, talk, session_of, mrd_header, mrd_images, echo_images, fault, match
    ):
        header = mrd_header([5.0]) if fault == "echo times" else None
        if fault.startswith("only"):
            kind = 1 if fault == "only magnitude" else 2
            echo_images = [image for image in echo_images if image.image_type == kind]
        if fault == "matrix sizes":
            small = np.ones((18, 20, 20), dtype=np.uint16)
            echo_images[-20:] = mrd_images(small, contrast=2, image_type=1, series=1)
        if fault == "a slice":
            del echo_images[-3]
        texts, images, _ = talk(session_of("qsm", None, echo_images, header))
        assert texts[-1].startswith("ERR ")
        assert match in texts[-1]
        assert len(images) == len(echo_images)

    def test_an_unknown_phase_scale(self, talk, session_of, mrd_images, echo_images):
        for image in echo_images:
            if image.image_type == 2:
                image.data[:] = image.data // 3
        texts, images, _ = talk(session_of("qsm", None, echo_images))
        assert "the phase reaches from 0 to 1365" in texts[-1]
        assert len(images) == 120

    @pytest.mark.parametrize(("limit", "match"), [(1e3, "3 echoes would"), (4e5, "field mapping")])
    def test_too_little_memory(self, talk, session_of, echo_images, monkeypatch, limit, match):
        monkeypatch.setattr(qsm_config, "available_bytes", lambda: limit)
        texts, _, _ = talk(session_of("qsm", None, echo_images))
        assert match in texts[-1]
