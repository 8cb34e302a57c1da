"""Networks that other packages add: one file and one spec each, and none breaks the others."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qsm_deploy.export.cli import main
from qsm_deploy.export.networks import registry
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY, additions, network_spec, recognise
from qsm_deploy.kernels.errors import UsageError

FILE = """
from torch import nn
from qsm_deploy.export.checkpoints.state import load_strictly
from qsm_deploy.export.networks.network import ANY_GEOMETRY, Network
from qsm_deploy.export.networks.network_spec import NetworkSpec, Weights

def spec(name, module="added_network"):
    return NetworkSpec(
        name=name, module=module, inputs=("local_field_ppm",), parameters=28, divisor=1,
        gmac_64=0.01, marks=("added.weight",), published=Weights("nowhere", "theirs"),
    )

SPEC, TAKEN, NO_FILE = spec("added"), spec("ir2qsm"), spec("elsewhere", "no_such_file")
NUMBER = 3

class Added(Network):
    divisor = 1
    geometry = ANY_GEOMETRY
    def __init__(self):
        super().__init__()
        self.added = nn.Conv3d(1, 1, 3, padding=1)
    def forward(self, local_field_ppm):
        return self.added(local_field_ppm)

def network_from_state(state, choices):
    network = Added()
    load_strictly(network, state)
    return network.eval()
"""
POINTS = """[qsm_deploy.networks]
added = added_network:SPEC
twice = added_network:SPEC
taken = added_network:TAKEN
no-file = added_network:NO_FILE
number = added_network:NUMBER
missing = added_network:NOTHING
gone = no_such_package.at_all:SPEC
"""


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder with a package's file, as if it was installed."""
    (tmp_path / "added_network.py").write_text(FILE)
    info = tmp_path / "added_network-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: added-network\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    additions.cache_clear()
    yield tmp_path
    additions.cache_clear()


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"added": torch.nn.Conv3d(1, 1, 3, padding=1)}).state_dict()


def test_they_stand_beside_those_of_this_package(added: Path) -> None:
    spec = network_spec("added")
    assert list(registry.known_networks()) == [*REGISTRY, "added", "elsewhere"]
    assert recognise(state().keys()) == (spec, network_spec("elsewhere"))
    network = build_network(spec, state(), Choices())
    assert type(network).__name__ == "Added"
    assert network_spec("ir2qsm") is REGISTRY["ir2qsm"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twice", "a network is called added already"),
        ("taken", "a network is called ir2qsm already"),
        ("number", "no NetworkSpec, but a int"),
        ("missing", "AttributeError"),
        ("gone", "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_one_that_cannot_be_used_is_named_and_breaks_no_other(
    added: Path, capsys, name: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        network_spec(name)
    assert message in str(caught.value)
    assert main(["--list"]) == 0
    table = capsys.readouterr().out
    assert "\nadded\n" in table
    assert any(line.startswith(f"refused: {name}, ") for line in table.splitlines())
    assert main(["--list", "--json"]) == 0
    assert "added" in [row["network"] for row in json.loads(capsys.readouterr().out)]


def test_a_file_that_is_not_there_is_one_line(added: Path) -> None:
    with pytest.raises(UsageError, match="no_such_file cannot be imported"):
        build_network(network_spec("elsewhere"), state(), Choices())


@pytest.mark.usefixtures("quick")
def test_the_whole_export_of_one(added: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(added)
    monkeypatch.setattr("qsm_deploy.export.measure.verification.SHAPES", ((24, 20, 22),))
    torch.save(state(), "w.pth")
    assert main(["--model", "added", "--weights", "w.pth", "-q"]) == 0
    assert "added-fp32.onnx: " in capsys.readouterr().out
    assert json.loads(Path("added-fp32.json").read_text())["licence"] == "theirs"
