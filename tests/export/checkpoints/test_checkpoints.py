"""Weights files as people have them: prefixed, wrapped, damaged, hostile, of another network."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qsm_deploy.export.checkpoints.state import load_state, load_strictly, state_sha256
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.ir2qsm import IR2QSM, unused_keys
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.kernels.errors import WeightsError

State = dict[str, Tensor]


def build(state: State) -> torch.nn.Module:
    return build_network(REGISTRY["ir2qsm"], state, Choices({"residual": "input"}))


def published_state(network: IR2QSM) -> State:
    """Return what the authors' file holds: the used keys and the unused ones."""
    state = dict(network.state_dict())
    for key in unused_keys(network.levels):
        like = state.get(key.replace("iteration0", "iteration1"))
        state[key] = torch.ones(1) if like is None else torch.ones_like(like)
    return state


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_unused_keys_are_those_of_the_published_file(shared: Path) -> None:
    rows = (shared / "specs" / "keys" / "ir2qsm.txt").read_text().splitlines()
    listed = [row.split("\t") for row in rows if not row.startswith("#")]
    unused = {row[0] for row in listed if row[-1] == "UNUSED"}
    assert unused_keys(levels=3) == unused
    assert len(unused) == 37
    assert IR2QSM().state_dict().keys() == {row[0] for row in listed} - unused


def test_the_unused_keys_number_37() -> None:
    assert len(unused_keys(levels=3)) == 37
    assert not unused_keys(levels=3) & IR2QSM().state_dict().keys()


def test_the_unused_keys_may_be_there_or_not(tiny_ir2qsm) -> None:
    full = published_state(tiny_ir2qsm)
    assert len(full) > len(tiny_ir2qsm.state_dict())
    assert same(build(full).state_dict(), tiny_ir2qsm.state_dict())
    assert same(build(tiny_ir2qsm.state_dict()).state_dict(), tiny_ir2qsm.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state"])
def test_prefix_and_wrapper_are_removed(tmp_path, tiny_ir2qsm, prefix, wrapper) -> None:
    state = {prefix + key: value for key, value in tiny_ir2qsm.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    assert same(load_state(tmp_path / "w.pth"), tiny_ir2qsm.state_dict())


def test_safetensors_in_half_precision(tmp_path, tiny_ir2qsm) -> None:
    state = {
        k: v.half() if v.is_floating_point() else v for k, v in published_state(tiny_ir2qsm).items()
    }
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_state(tmp_path / "w.safetensors")
    key = "iteration0_middle.out_gate.conv.0.weight"
    assert loaded[key].dtype == torch.float32
    assert torch.equal(loaded[key], state[key].float())
    build(loaded)


def test_the_digest_does_not_depend_on_the_file_format(tmp_path, tiny_ir2qsm) -> None:
    state = tiny_ir2qsm.state_dict()
    torch.save(dict(reversed(state.items())), tmp_path / "w.pth")
    save_file(dict(state), tmp_path / "w.safetensors")
    digests = {state_sha256(load_state(tmp_path / f"w.{e}")) for e in ("pth", "safetensors")}
    assert len(digests) == 1
    state = {**state, "post_transform_conv_block2.0.bias": torch.ones(1)}
    assert state_sha256(state) not in digests


def lacking(state: State) -> None:
    del state["iteration1_layer0_encoder_conv1.conv.0.weight"]


def with_stranger(state: State) -> None:
    state["attention.weight"] = torch.zeros(3)


def with_unused_key_of_a_deeper_network(state: State) -> None:
    state["iteration0_layer2_encoder_conv1.conv.0.weight"] = torch.zeros(3)


def of_another_shape(state: State) -> None:
    state["post_transform_conv_block2.0.weight"] = torch.zeros(1, 7, 1, 1, 1)


def not_finite(state: State) -> None:
    state["iteration0_pre_transform.0.conv.0.bias"][1] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacking, r"lack 1 .*iteration1_layer0_encoder_conv1\.conv\.0\.weight"),
        (with_stranger, r"1 keys that IR2QSM does not know.*attention\.weight"),
        (with_unused_key_of_a_deeper_network, r"does not know.*iteration0_layer2_encoder_conv1"),
        (of_another_shape, r"block2\.0\.weight has shape \(1, 7, 1, 1, 1\).*needs \(1, 2, 1"),
        (not_finite, r"pre_transform\.0\.conv\.0\.bias holds NaN"),
    ],
)
def test_anything_else_is_refused_by_name(tiny_ir2qsm, spoil, message: str) -> None:
    state = {key: value.clone() for key, value in tiny_ir2qsm.state_dict().items()}
    spoil(state)
    with pytest.raises(WeightsError, match=message):
        build(state)


def test_another_networks_file_is_refused(shared: Path, tiny_tv_unet) -> None:
    with pytest.raises(WeightsError, match=r"not the weights of ir2qsm.*look like tv-unet"):
        build(tiny_tv_unet.state_dict())
    with pytest.raises(WeightsError, match=r"not the weights of ir2qsm.*look like spinet-qsm"):
        build(load_state(shared / "data" / "checkpoints" / "spinet_qsm.pth"))


class Trap:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_code_in_a_pickle_is_not_run(tmp_path, save) -> None:
    sprung = tmp_path / "sprung"
    save({"weight": Trap(sprung)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="refused without running it"):
        load_state(tmp_path / "w.pth")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(3)], torch.zeros(3), {"a": 1.5}, {}, {"state_dict": {"a": "b"}}]
)
def test_what_is_no_state_dict_is_refused(tmp_path, content) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"not a state dict.*save model\.state_dict\(\)"):
        load_state(tmp_path / "w.pth")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path, tiny_ir2qsm, kept: float, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(tiny_ir2qsm.state_dict(), path)
    else:
        save_file(tiny_ir2qsm.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(WeightsError, match=path.name):
        load_state(path)


@pytest.mark.parametrize(
    "data", [b"not a checkpoint", b"\x80\x02garbage", b"\x80\x02e.", b"PK\x03\x04" + bytes(90)]
)
def test_garbage_is_refused(tmp_path, data: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(WeightsError, match=r"w\.pth"):
        load_state(tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_never_raise_anything_else(tmp_path, zipped: bool) -> None:
    path = tmp_path / "w.pth"
    state = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_state(path)
        except WeightsError:
            refused += 1
    assert refused > 150


def test_what_is_missing_or_no_file_is_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    seen = {"none.pth": "no such file", "pipe.pth": "no regular file", "": "no regular file"}
    seen["loop.pth"] = "leads back to itself"
    for name, says in seen.items():
        with pytest.raises(WeightsError, match=says) as caught:
            load_state(tmp_path / name)
        assert caught.value.exit_code == 7


def test_loading_says_nothing_of_unused_keys_that_are_not_allowed(tiny_ir2qsm) -> None:
    state = published_state(tiny_ir2qsm)
    with pytest.raises(WeightsError, match="does not know"):
        load_strictly(IR2QSM((2, 4, 8), 2), state)


def test_the_demo_checkpoint_loads(shared: Path) -> None:
    network = build(load_state(shared / "data" / "checkpoints" / "ir2qsm_demo_half.pt"))
    assert network.divisor == 8
    assert sum(p.numel() for p in network.parameters()) > 2.5e6
