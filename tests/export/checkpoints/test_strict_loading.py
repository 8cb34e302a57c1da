"""Every network's file, in its own format, as it goes wrong: one line that names the key."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.cli import main
from qsm_deploy.export.networks.after_qsm import REFINE
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.kernels.errors import WeightsError
from tests.export.table import NETWORKS

State = Mapping[str, Tensor]
STRANGER = "attention.weight"


OF_ONE_FORMAT = {
    name: pair
    for pair in (("qsmnet", "qsmnet-plus"), ("iqsm", "iqfm"), ("qsmnet-torch", "chi-sepnet"))
    for name in pair
}
# keys that may lack: settings with a default, the half of the other part, the optimiser's, counters
OPTIONAL = ("setting_", REFINE, "/Adam", "power", "num_batches_tracked")


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    return {name: row.state() for name, row in NETWORKS.items()}


def built(name: str, state: State) -> Network:
    spec = REGISTRY[name]
    options, numbers = spec.chosen_options({}), NETWORKS[name].numbers
    return build_network(spec, state, Choices(options, numbers, (0.0, 0.0, 1.0)))


def refusal(name: str, state: State) -> str:
    """Return the one line that a state is refused with."""
    with pytest.raises(WeightsError) as caught:
        built(name, state)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def required(state: State) -> list[str]:
    return [key for key in state if not any(part in key for part in OPTIONAL)]


each_network = pytest.mark.parametrize("name", list(REGISTRY))


@each_network
def test_its_own_file_is_taken_whole(name: str, states, tmp_path) -> None:
    loaded = load_state(*NETWORKS[name].write(states[name], tmp_path))
    assert loaded.keys() == states[name].keys()
    assert built(name, loaded).divisor in (1, 2, 4, 8, 16, 64)


@each_network
def test_a_truncated_file_is_named(name: str, states, tmp_path) -> None:
    path = NETWORKS[name].write(states[name], tmp_path)[-1]
    data = path.read_bytes()
    for share in (0.1, 0.7, 0.99):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(WeightsError, match=path.name) as caught:
            load_state(path)
        assert "\n" not in str(caught.value)


@each_network
def test_a_missing_key_is_named(name: str, states) -> None:
    keys = required(states[name])
    marks = [key for key in REGISTRY[name].marks if key in keys]
    kernels = [key for key in keys if states[name][key].ndim == 5][:40:4]
    for key in {*marks, *kernels, *keys[:: len(keys) // 5], keys[-1]}:
        assert key in refusal(name, {k: v for k, v in states[name].items() if k != key})


@each_network
def test_an_extra_key_is_named(name: str, states, tmp_path) -> None:
    state = {**states[name], STRANGER: torch.zeros(3)}
    assert STRANGER in refusal(name, load_state(*NETWORKS[name].write(state, tmp_path)))


@each_network
@pytest.mark.parametrize("wrong", ["no axes", "no values", "one more axis", "twice as long"])
def test_a_wrong_shape_is_named(name: str, wrong: str, states) -> None:
    change: Callable[[Tensor], Tensor] = {
        "no axes": lambda t: torch.ones(()) if t.ndim else torch.ones(1),
        "no values": lambda t: t.reshape(-1)[:0],
        "one more axis": lambda t: t[None],
        "twice as long": lambda t: torch.cat([t.reshape(-1)] * 2),
    }[wrong]
    keys = required(states[name])
    for key in (*keys[:: len(keys) // 4], keys[-1]):
        message = refusal(name, {**states[name], key: change(states[name][key])})
        assert "shape" in message
    assert keys[-1] in message


@each_network
def test_another_networks_file_is_recognised(name: str, states) -> None:
    for other in states.keys() - {name, *OF_ONE_FORMAT.get(name, ())}:
        likely = " or ".join(OF_ONE_FORMAT.get(other, (other,)))
        assert refusal(name, states[other]).startswith(f"these are not the weights of {name}: ")
        advice = f"look like {likely}: pass --model {likely}"
        assert refusal(name, states[other]).endswith(advice)


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("ir2qsm", "xqsm", "look like xqsm: pass --model xqsm"),
        ("qsmnet-torch", "qsmnet", "look like qsmnet or qsmnet-plus: pass --model qsmnet"),
        ("lpcnn", "modl-qsm", "look like modl-qsm"),
    ],
)
def test_the_command_line_says_so_in_one_line(
    name: str, file: str, words: str, states, tmp_path, capsys
) -> None:
    paths = map(str, NETWORKS[file].write(states[file], tmp_path))
    output = tmp_path / "model.onnx"
    assert main(["--model", name, "-q", "-o", str(output), "--weights", *paths]) == 7
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert not output.exists()
