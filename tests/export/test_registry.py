"""The table of networks, and where weights come from when none are bundled."""

import dataclasses

import pytest

from qsm_deploy.export import network_spec as network_spec_module
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.tkd_unet import TkdUnet
from qsm_deploy.export.registry import REGISTRY, network_spec
from qsm_deploy.kernels.errors import UsageError, WeightsError


def test_each_network_is_listed_under_its_name() -> None:
    assert {"ir2qsm", "tkd-unet"} <= REGISTRY.keys()
    for name, spec in REGISTRY.items():
        assert network_spec(name) is spec
        assert spec.name == name
        assert spec.published.source
        assert spec.published.licence


def test_ir2qsm_is_for_axial_1_mm_and_tkd_unet_for_any_geometry() -> None:
    limits = IR2QSM.geometry
    assert limits.voxel_size_mm == (1, 1, 1)
    assert (limits.voxel_tolerance, limits.b0_tolerance_deg) == (0.1, 5)
    assert limits.b0_direction == (0, 0, 1)
    assert dataclasses.astuple(TkdUnet.geometry) == (None,) * 4


def test_an_unknown_network_is_a_usage_error_that_names_the_known() -> None:
    with pytest.raises(UsageError, match=r"--model qsmgan.*ir2qsm, tkd-unet"):
        network_spec("qsmgan")


@pytest.mark.parametrize("listed", [True, False])
def test_without_bundled_weights_the_authors_are_named(tmp_path, monkeypatch, listed) -> None:
    monkeypatch.setattr(network_spec_module, "WEIGHTS_FOLDER", tmp_path)
    spec = REGISTRY["ir2qsm"]
    if not listed:
        spec = dataclasses.replace(spec, bundled=None)
    with pytest.raises(WeightsError, match=r"drive\.google\.com.*1EGZGxdgVWI8r0.*--weights"):
        spec.bundled_file()


def test_bundled_weights_are_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(network_spec_module, "WEIGHTS_FOLDER", tmp_path)
    (tmp_path / "ir2qsm-demo.safetensors").touch()
    assert REGISTRY["ir2qsm"].bundled_file() == tmp_path / "ir2qsm-demo.safetensors"


def test_options_have_defaults_and_strange_ones_are_refused() -> None:
    ir2qsm, tkd_unet = REGISTRY["ir2qsm"], REGISTRY["tkd-unet"]
    assert ir2qsm.chosen_options({"residual": None}) == {"residual": "input"}
    assert ir2qsm.chosen_options({"residual": "iteration"}) == {"residual": "iteration"}
    assert tkd_unet.chosen_options({"residual": None}) == {}
    with pytest.raises(UsageError, match="--residual input is no option of tkd-unet"):
        tkd_unet.chosen_options({"residual": "input"})
    with pytest.raises(UsageError, match=r"--residual input\|iteration"):
        ir2qsm.chosen_options({"residual": "both"})
