"""Checkpoints as training tools leave them: wrapped, prefixed, averaged, without counters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_state, state_sha256
from qsm_deploy.export.cli import main
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import recognise
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet, network_from_state
from qsm_deploy.kernels.errors import WeightsError

State = dict[str, Tensor]
KEY = "stem.weight"


@pytest.fixture
def state(tiny_tv_unet: nn.Module) -> State:
    return dict(tiny_tv_unet.state_dict())


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], tuple[State, list[str]]]:
    """Return what saves a checkpoint, and loads it again with the notes on it."""

    def save_and_load(content: Any) -> tuple[State, list[str]]:
        notes: list[str] = []
        torch.save(content, tmp_path / "w.pth")
        return load_state(tmp_path / "w.pth", fits=recognise, say=notes.append), notes

    return save_and_load


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def with_prefix(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "net.", "network.", "generator.", "a.b.c."),
        *("module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module.", "net.model."),
        "_fsdp_wrapped_module.model._checkpoint_wrapped_module.",
    ],
)
def test_prefixes_of_all_keys_go_and_are_said(prefix: str, state, load) -> None:
    loaded, notes = load(with_prefix(prefix, state))
    assert same(loaded, state)
    (note,) = notes
    assert note.endswith(f"w.pth: {prefix}{KEY} is read as {KEY}, the others likewise")


@pytest.mark.parametrize("outer", ["", "model."])
@pytest.mark.parametrize("inside", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_part_compiled_by_itself(outer: str, inside: str, state, load) -> None:
    wrapped = {k.replace("stem.", f"stem.{inside}"): v for k, v in state.items()}
    assert wrapped.keys() != state.keys()
    loaded, notes = load(with_prefix(outer, wrapped))
    assert same(loaded, state)
    assert f"{outer}stem.{inside}weight is read as {KEY}" in notes[0]


@pytest.mark.parametrize("prefix", ["model.", "net.", "generator.", ""])
def test_keys_of_a_network_of_its_own_stay(prefix: str, load) -> None:
    unknown = with_prefix(prefix, {"0.weight": torch.ones(2), "2.weight": torch.ones(3)})
    loaded, notes = load(unknown)
    assert same(loaded, unknown)
    assert notes == []


def test_a_network_that_calls_its_own_parts_so_is_not_damaged(tmp_path) -> None:
    own = with_prefix("module.net.", {"weight": torch.ones(2), "module.weight": torch.zeros(2)})
    save_file(own, tmp_path / "w.safetensors")
    assert same(
        load_state(tmp_path / "w.safetensors", fits=lambda keys: own.keys() == {*keys}), own
    )


def test_what_does_not_make_all_keys_fit_stays(state, load) -> None:
    mixed = with_prefix("model.", state) | {"loss.weight": torch.ones(1)}
    assert same(load(mixed)[0], mixed)
    twice = state | with_prefix("module.", other(state))
    assert same(load(twice)[0], twice)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "hyper_parameters": {"lr": 0.1}},
        lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
        lambda s: {"params": s},
        lambda s: {"net": {"state_dict": with_prefix("model.", s)}},
        lambda s: {"generator": s, "discriminator": {"conv.weight": torch.ones(1)}},
        lambda s: {"params": other(s), "params_ema": s},
        lambda s: {"model": other(s), "ema": with_prefix("module.", s), "best": other(s)},
        lambda s: {"state_dict": other(s), "ema": {"shadow": dict(s)}},
        lambda s: {"n_averaged": torch.tensor(3), **with_prefix("module.", s)},
        lambda s: {"swa": {"n_averaged": torch.tensor(3), **with_prefix("module.", s)}},
    ],
)
def test_the_one_state_dict_that_fits_is_found(wrap, state, load) -> None:
    loaded, notes = load(wrap(state))
    assert same(loaded, state)
    assert len(notes) == 1
    assert f"is read as {KEY}" in notes[0]


def test_one_state_dict_under_two_names_is_one(state, load) -> None:
    content: dict[str, Any] = {"model": state, "best": state, "": {}}
    content[""][""] = content[""]
    assert same(load(content)[0], state)


def test_what_no_network_fits_is_the_largest_there_is(load) -> None:
    unknown = {"0.weight": torch.ones(2), "2.weight": torch.ones(3)}
    assert same(load({"step": torch.tensor(3), "weights": unknown})[0], unknown)


def test_a_mapping_among_the_weights_is_no_tensor(state, load) -> None:
    with pytest.raises(WeightsError, match="'config' is not a tensor"):
        load(state | {"config": {"depth": 2}})


def test_the_averaged_weights_are_taken_and_the_others_named(state, load) -> None:
    _, (note,) = load({"params": other(state), "params_ema": state})
    assert f"params_ema.{KEY} is read as {KEY}" in note
    assert note.endswith("; left out: params")


@pytest.mark.parametrize("names", [("params", "best"), ("ema_1", "ema_2"), ("schema", "model")])
def test_several_that_fit_are_refused_by_name(names: tuple[str, str], state, load) -> None:
    with pytest.raises(WeightsError, match=rf"several .*\({', '.join(names)}\).*\['{names[0]}'\]"):
        load({name: dict(state) for name in names})


def test_two_files_each_with_its_wrapper(load, tmp_path) -> None:
    unet = dict(XqsmUnet(base=2, depth=4).state_dict())
    torch.save({"state_dict": with_prefix("model._orig_mod.", unet)}, tmp_path / "unet.pth")
    torch.save(with_prefix("module._orig_mod.", {"conv_x": torch.ones(1)}), tmp_path / "lot.pth")
    loaded = load_state(tmp_path / "unet.pth", tmp_path / "lot.pth", fits=recognise)
    assert loaded.keys() == {*unet, "conv_x"}


@pytest.mark.parametrize("argument", ["--describe", "--model"])
def test_the_command_line_takes_it_all_off(argument, state, tmp_path, quick, capsys) -> None:
    path = tmp_path / "w.pth"
    torch.save({"ema": with_prefix("model._orig_mod.", state), "epoch": 1}, path)
    output = ["--weights", str(path), "-o", str(tmp_path / "x.onnx")]
    command = [argument, *([str(path)] if argument == "--describe" else ["tv-unet", *output])]
    assert main(command) == 0
    out, err = capsys.readouterr()
    said = f"qsm-export: {path}: ema.model._orig_mod.{KEY} is read as {KEY}, the others likewise\n"
    assert err.count(said) == (argument == "--model")
    assert (f"sha256 {state_sha256(state)[:12]}" in out) == (argument == "--describe")


def test_counters_of_batches_may_lack_as_in_old_files() -> None:
    torch.manual_seed(0)
    network = XqsmUnet(base=2).eval()
    state = network.state_dict()
    old = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    assert len(old) < len(state)
    volume = torch.randn(1, 1, 4, 4, 4)
    assert torch.equal(network_from_state(old, Choices())(volume), network(volume))
    with pytest.raises(WeightsError, match="1 keys that XqsmUnet does not know"):
        network_from_state(old | {"loss.num_batches_tracked": torch.tensor(1)}, Choices())
    lacking = {key: value for key, value in old.items() if not key.endswith("running_var")}
    with pytest.raises(WeightsError, match=r"lack \d+ of XqsmUnet's keys.*running_var"):
        network_from_state(lacking, Choices())
