"""A session that names a method gets its map, and leaves what the server was started with alone."""

import io

import numpy as np
import pytest
from ismrmrd.serialization import ConfigFile, ProtocolDeserializer

from qsm_deploy.kernels.dipole import tkd
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstruction.memory import PAD_VOXELS
from qsm_deploy.runtime.serve.cli import main
from qsm_deploy.runtime.serve.configuration import Request
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.mrd_session import MrdSession
from qsm_deploy.runtime.serve.parameters import parameters_from
from qsm_deploy.runtime.serve.qsm_config import source_from_echoes
from qsm_deploy.runtime.serve.turns import open_taking_turns

TIMES_MS = (5.0, 10.0, 15.0)
ECHOES = (900, 700, 500)  # their signal


@pytest.fixture
def answer(decoded, serialise, mrd_header, mrd_images, local_field):
    """Return a function that sends a session and returns texts, the map [ppb], and the session."""

    def send(engine, config="dipole", images=None, **parameters):
        said = {"sendoriginal": "False", "units": "ppm", **parameters}
        sent = mrd_images(local_field) if images is None else images
        session = MrdSession(Limits())
        for message in decoded(serialise(ConfigFile(config), mrd_header(), said, *sent, None)):
            session.receive(message)
        data = io.BytesIO(b"".join(bytes(frame) for frame in session.answer(engine)))
        parts = list(ProtocolDeserializer(data).deserialize())
        texts = [part.removesuffix("\0") for part in parts if isinstance(part, str)]
        maps = [p for p in parts if not isinstance(p, str) and p.image_series_index >= 99]
        maps.sort(key=lambda image: image.image_index)
        chi = [image.data[0] for image in maps]
        return texts, np.concatenate(chi).transpose(2, 1, 0) - 2048.0 if chi else None, session

    return send


@pytest.fixture
def echo_images(mrd_images):
    """Return three echoes of a ball whose signal grows along x, and the signal of the first."""
    x, y, z = np.ogrid[-1:1:20j, -1:1:20j, -1:1:20j]
    ball = x * x + y * y + z * z < 0.7
    source = np.where(x * x + y * y + z * z < 0.1, 0.05, 0) + 0.3 * z + 0.1 * x
    shape = np.where(ball, 1 + 0.1 * np.round(3 * x), 0.01)
    images = []
    for n, signal in enumerate(ECHOES):
        turns = np.where(ball, 42.577 * 3 * 0.001 * TIMES_MS[n] * source, 0)
        phase = np.rint((turns - np.rint(turns)) * 4096 + 2048).clip(0, 4095).astype(np.uint16)
        phase[0, 0, :2] = 0, 4095
        magnitude = np.rint(signal * shape).astype(np.uint16)
        images += mrd_images(phase, contrast=n, image_type=2, series=2, voxel=(2, 2, 2))
        images += mrd_images(magnitude, contrast=n, image_type=1, series=1, voxel=(2, 2, 2))
    return images, shape


def test_the_sessions_method_wins_and_the_next_one_has_the_servers(answer, engine, local_field):
    texts, chi, session = answer(engine, method="TKD")
    mask = local_field != 0
    grid = Geometry(local_field.shape, (1.0, 1.0, 2.0), (0.0, 0.0, 1.0))
    expected = mask * tkd(local_field, grid, threshold=0.2, pad_voxels=PAD_VOXELS)
    np.testing.assert_allclose(chi, 1000 * expected, atol=0.51)
    assert session.error is None
    assert session.summary.endswith(", tkd")
    for parameters in ({}, {"method": "auto"}, {"method": ""}):
        texts, chi, session = answer(engine, **parameters)
        np.testing.assert_allclose(chi, 2000 * local_field, atol=0.51)
        assert "INFO twice" in texts


def test_what_the_method_found_is_told_and_logged(answer, engine):
    texts, _, session = answer(engine, method="tv")
    (found,) = (text for text in texts if text.startswith("INFO tv; noise of the field 0."))
    for what in ("from the spectrum of the field; alpha ", "; iterations 30", "fitted residual "):
        assert what in found
    assert found.removeprefix("INFO ") in session.summary


def test_what_is_odd_about_a_map_is_a_warning(answer, engine, monkeypatch):
    monkeypatch.setattr("qsm_deploy.runtime.methods.inversion.MANY_OUTLIERS", -1)
    texts, _, _ = answer(engine, method="tv")
    assert any(text.startswith("WRN") and "ten times the noise" in text for text in texts)


def test_what_is_asked_of_the_servers_network_is_not_asked_of_a_method(
    answer, engine, in_turns, local_field
):
    strict = in_turns(engine.session, Wants(correction=Correction(0.05), memory_limit=1 << 40))
    assert answer(strict, method="tikhonov")[2].error is None
    assert "inversion" in answer(strict, method="tv")[2].stages.seconds
    tight = in_turns(engine.session, Wants(memory_limit=1000))
    assert "tv would need" in answer(tight, method="tv")[2].error


def test_a_method_is_opened_once_and_takes_its_turn(engine):
    tv = engine.named("tv")
    assert engine.named("tv") is tv
    with tv.turn():
        assert engine.busy
    assert engine.named(None) is engine


def test_the_bundled_network_beside_a_method(answer, local_field):
    server = open_taking_turns(Method("tkd"), warm_up_voxels=16)
    assert server.named("tkd") is server
    texts, chi, session = answer(server, method="tv-unet")
    assert session.error is None
    assert "INFO tv-unet" in texts
    assert np.abs(chi - answer(server)[1]).max() > 1


@pytest.mark.parametrize("method", ["tv", "tkd", "tikhonov", "medi", "ilsqr"])
def test_every_method_is_warmed_up(method):
    assert open_taking_turns(Method(method), warm_up_voxels=16).name.startswith(f"{method} (")


class TestMedi:
    def test_it_takes_the_magnitude_of_the_session(self, answer, engine, echo_images):
        maps = []
        for method in ("medi", "tv"):
            _, chi, session = answer(engine, "qsm", echo_images[0], units="", method=method)
            assert session.error is None
            maps.append(chi)
        assert np.abs(maps[0] - maps[1]).max() > 1

    @pytest.mark.parametrize("keeps", [True, False])
    def test_which_is_of_all_echoes(self, codec_images, decoded, serialise, echo_images, keeps):
        images, shape = echo_images
        header = {"sequenceParameters/TE": [str(t) for t in TIMES_MS]}
        header["acquisitionSystemInformation/systemFieldStrength_T"] = ["3"]
        lines = source_from_echoes(
            Request(decoded(serialise(*images)), header, keeps_magnitude=keeps), Stages()
        )
        scan = _value_of(lines).scan
        if not keeps:
            assert scan.magnitude is None
            return
        stored = scan.turned(scan.axes.inverse)
        expected = np.linalg.norm(ECHOES) * shape * stored.mask
        np.testing.assert_allclose(stored.magnitude, expected, atol=1)

    def test_without_one_it_is_refused(self, answer, engine, echo_images, mrd_images):
        phase = [image for image in echo_images[0] if image.image_type == 2]
        mask = mrd_images(
            np.ones((20, 20, 20), np.uint16), series=3, ImageType="MASK", voxel=(2, 2, 2)
        )
        for config, images in (("dipole", None), ("qsm", [*phase, *mask])):
            texts, chi, _ = answer(engine, config, images, method="medi")
            assert chi is None
            assert texts[-1].startswith("ERR medi takes the edges of a magnitude, and this session")


def _value_of(lines):
    while True:
        try:
            next(lines)
        except StopIteration as finished:
            return finished.value


@pytest.mark.parametrize("name", ["cosmos", "nlopt"])
def test_what_the_server_cannot_do_with_one_field(name):
    with pytest.raises(UsageError, match=f"the parameter method is '{name}'; it may be auto, tv"):
        parameters_from({"method": name})


def test_a_method_of_several_orientations_is_none_for_the_server():
    with pytest.raises(UsageError, match=r"cosmos \(.* takes 2 fields and gives chi_ppm; the"):
        open_taking_turns(Method("cosmos"))


def test_a_model_and_a_method(capsys, card, write_model):
    assert main([str(write_model(card)), "--method", "tv"]) == 2
    assert "is a model, and --method tv needs none; drop one" in capsys.readouterr().err
