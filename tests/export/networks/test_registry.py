"""The table of networks, and where weights come from when none are bundled."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qsm_deploy.export.describe import list_rows
from qsm_deploy.export.networks import network_spec as network_spec_module
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.network import Network
from qsm_deploy.export.networks.registry import REGISTRY, network_spec
from qsm_deploy.export.networks.tv_unet import TvUnet
from qsm_deploy.export.write_network import task_of
from qsm_deploy.kernels.errors import UsageError, WeightsError
from tests.export.table import NETWORKS

SIZE = 64


def without_storage(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def gmac(network: Network) -> float:
    """Return the multiply-accumulates of all convolutions for one cube, in billions."""
    sizes = {"n": 1, "x": SIZE, "y": SIZE, "z": SIZE}
    with (
        torch.device("meta"),
        torch.inference_mode(),
        FlopCounterMode(display=False) as counter,
    ):
        network(*(torch.zeros([sizes.get(d, d) for d in i.shape]) for i in network.inputs))
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2e9


@pytest.mark.parametrize("name", list(REGISTRY))
def test_declared_numbers_are_those_of_the_published_size(name: str) -> None:
    spec, graphs = REGISTRY[name], [without_storage(make) for make in NETWORKS[name].graphs]
    more = NETWORKS[name].trained
    trained = [without_storage(more)] if more else graphs
    assert spec.parameters == sum(p.numel() for module in trained for p in module.parameters())
    assert spec.divisor == graphs[0].divisor
    assert spec.gmac_64 == pytest.approx(sum(map(gmac, graphs)), abs=0.0051)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_declared_inputs_and_units_are_the_graphs(name: str) -> None:
    network = without_storage(NETWORKS[name].graphs[0])
    (row,) = [row for row in list_rows() if row["network"] == name]
    assert row["inputs"] == {info.name: info.unit for info in network.inputs}
    outputs = (network.output, *network.further_outputs)
    assert row["output"] == {info.name: info.unit for info in outputs}
    assert tuple(row["inputs"]) == REGISTRY[name].inputs
    assert row["task"] == task_of(network)


def test_convolutions_are_counted_by_hand() -> None:
    network = without_storage(lambda: TvUnet(1, 1, 1))
    fine, half, quarter = (n**3 for n in (SIZE, SIZE // 2, SIZE // 4))
    taken = 9  # volumes, the noise among them
    convs = 27 * (fine * (taken + 1 + 1 + taken) + half * (2 + 2) + quarter * 4)
    down = 8 * (half * taken + quarter)
    assert gmac(network) * 1e9 == convs + down + 8 * (quarter + half)  # and up again


def test_documents_that_are_named_exist() -> None:
    root = Path(__file__).parents[3]
    words = " ".join(spec.published.source for spec in REGISTRY.values()).split()
    named = [word.strip(",;") for word in words if word.startswith(("docs/", "examples/"))]
    assert named
    assert all((root / name).is_file() for name in named)


def test_each_network_is_listed_under_its_name() -> None:
    assert {"ir2qsm", "tv-unet"} <= REGISTRY.keys()
    for name, spec in REGISTRY.items():
        assert network_spec(name) is spec
        assert spec.name == name
        assert spec.published.source
        assert spec.published.licence


def test_ir2qsm_is_for_axial_1_mm_and_tv_unet_for_any_geometry() -> None:
    limits = IR2QSM.geometry
    assert limits.voxel_size_mm == (1, 1, 1)
    assert (limits.voxel_tolerance, limits.b0_tolerance_deg) == (0.1, 2)
    assert limits.b0_direction == (0, 0, 1)
    assert dataclasses.astuple(TvUnet.geometry) == (None,) * 4


def test_an_unknown_network_is_a_usage_error_that_names_the_known() -> None:
    with pytest.raises(UsageError, match=r"--model deepqsm.*ir2qsm, tv-unet"):
        network_spec("deepqsm")


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


@pytest.mark.parametrize(
    ("name", "file", "word"),
    [
        ("iqsm", "iQFM_40_v2.pth", "iqfm"),
        ("iqsm", "LoTLayer_lfs_40_v2.pth", "lfs"),
        ("iqsm-plus", "iqfmv2.pth", "iqfm"),
        ("iqfm", "IQSM-50.pth", "iqsm"),
        ("iqfm", "LPLayer_chi_50_v2.pth", "chi"),
    ],
)
def test_a_file_named_as_another_network_of_the_same_keys_is_refused(name, file, word) -> None:
    with pytest.raises(WeightsError, match=f"'{word}' in its name is none of {name}'s"):
        REGISTRY[name].refuse_foreign([Path("own.pth"), Path(file)])


def test_only_whole_words_of_the_files_own_name_count() -> None:
    REGISTRY["iqfm"].refuse_foreign([Path("iQSM/chi/iQFM_40_v2.pth"), Path("machine.pth")])
    REGISTRY["iqsm"].refuse_foreign([Path("iqfm/iQSM_50_v2.pth"), Path("halfsize.pth")])


def test_options_have_defaults_and_strange_ones_are_refused() -> None:
    ir2qsm, tv_unet = REGISTRY["ir2qsm"], REGISTRY["tv-unet"]
    assert ir2qsm.chosen_options({"residual": None}) == {"residual": "input"}
    assert ir2qsm.chosen_options({"residual": "iteration"}) == {"residual": "iteration"}
    assert tv_unet.chosen_options({"residual": None}) == {}
    with pytest.raises(UsageError, match="--residual input is no option of tv-unet"):
        tv_unet.chosen_options({"residual": "input"})
    with pytest.raises(UsageError, match=r"--residual input\|iteration"):
        ir2qsm.chosen_options({"residual": "both"})
