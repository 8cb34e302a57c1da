"""The images of one head give one map, bit for bit, whatever their directions and order."""

import numpy as np
import pytest
from ismrmrd.serialization import ConfigFile

from qsm_deploy.runtime.scan.units import ppm_per_unit
from qsm_deploy.runtime.serve import mrd_session
from qsm_deploy.runtime.serve.limits import Limits
from tests.runtime.storages import SHAPE, SPREAD, head, require_one

TIMES_MS = (5.0, 10.0, 15.0)
VOXEL_MM = {"tilted": (5, 5, 5), "45 degrees": (5, 5, 5), "thick slices": (4.4, 4.4, 9.7)}


@pytest.fixture
def map_of(decoded, serialise, mrd_header, engine, monkeypatch):
    """Return a function that returns the map [ppm] of a session."""
    kept = []

    def keep(chi_ppm):
        kept.append(chi_ppm)
        return encode(chi_ppm)

    encode = mrd_session.encode_chi
    monkeypatch.setattr(mrd_session, "encode_chi", keep)

    def send(config, images, **parameters):
        session = mrd_session.MrdSession(Limits())
        sent = (ConfigFile(config), mrd_header(TIMES_MS), parameters, *images, None)
        for message in decoded(serialise(*sent)):
            session.receive(message)
        list(session.answer(engine))
        assert session.error is None
        return kept.pop()

    return send


@pytest.fixture
def images_of(mrd_images):
    """Return a function that cuts a volume of a head into images, as it is stored."""

    def cut(name, storage, volume, **what):
        affine = storage.affine(head(name).affine, SHAPE)[:3, :3]
        directions = (affine / np.linalg.norm(affine, axis=0)).T * (-1, -1, 1)
        voxel = storage.sizes(VOXEL_MM[name])
        return mrd_images(storage.of(volume), axes=directions, voxel=voxel, **what)

    return cut


@pytest.mark.parametrize("slab", [False, True])
@pytest.mark.parametrize("name", VOXEL_MM)
def test_local_fields(map_of, images_of, name, slab):
    volumes, found = head(name).volumes, []
    for storage in SPREAD:
        images = images_of(name, storage, volumes["field"] * volumes["mask"], slab=slab)
        found.append(storage.back(map_of("dipole", images, units="ppm", method="tkd")))
    require_one(found)


def test_echoes(map_of, images_of):
    volumes, found = head("tilted").volumes, []
    x, y, z = np.indices(SHAPE) / 15 - 1
    total = volumes["field"] + 0.2 * x + 0.1 * (x * x - y * y) + 0.1 * y * z
    for storage in SPREAD:
        images = []
        for n, time in enumerate(TIMES_MS):
            turn = 2 * np.pi * ppm_per_unit("rad", echo_time_s=time / 1000, field_strength_t=3)
            steps = np.rint((total / turn - np.rint(total / turn)) * 4096 + 2048).clip(0, 4095)
            steps[0, 0, :2] = 0, 4095
            signal = np.rint(500 * np.exp(-time / 30) * volumes["magnitude"] + 5)
            for kind, volume in ((2, steps), (1, signal)):
                how = {"contrast": n, "image_type": kind, "series": kind}
                images += images_of("tilted", storage, volume.astype(np.uint16), **how)
        found.append(storage.back(map_of("qsm", images, method="medi")))
    require_one(found)
