"""Small networks' weights as their authors have them: names, axes, wrappers, and kinds of file."""

from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qsm_deploy.export.networks.after_qsm import RECON, REFINE
from qsm_deploy.export.networks.autoqsm import AutoQSM, our_layers
from qsm_deploy.export.networks.bfrnet import BFRnet, authors_layers
from qsm_deploy.export.networks.modl_qsm import ModlQsm
from qsm_deploy.export.networks.nextqsm import NextQsmField, keras_keys
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from tests.export.formula import State, fill

TF1_NORMALISATION = {
    f"{name}_{what}": np.array(0.5) for name in ("input", "label") for what in ("mean", "std")
} | {"network_info": np.array(["relu", "qsmnet_deep"])}


def normalisation_of(pattern_of: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return numbers under the authors' names, which are patterns."""
    patterns = pattern_of.values()
    return {p.format(what): np.array(0.5) for p in patterns for what in ("mean", "std")}


def prefixed(state: State) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


def write_pickle(state: State, folder: Path) -> list[Path]:
    torch.save(prefixed(state), folder / "w.pth")
    return [folder / "w.pth"]


def write_wrapped(name: str) -> Callable[[State, Path], list[Path]]:
    def write(state: State, folder: Path) -> list[Path]:
        torch.save({"epoch": 3, name: dict(state)}, folder / "w.pth.tar")
        return [folder / "w.pth.tar"]

    return write


def write_generator(state: State, folder: Path) -> list[Path]:
    content = {"epoch": 3, "netG": dict(state), "netD": {"layer.weight": torch.ones(2)}}
    torch.save(
        content | {"val_loss": np.float64(0.1)},
        folder / "net_best.pt",
        _use_new_zipfile_serialization=False,
    )
    return [folder / "net_best.pt"]


def write_safetensors(state: State, folder: Path) -> list[Path]:
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "w.safetensors")
    return [folder / "w.safetensors"]


def write_npz(state: State, folder: Path) -> list[Path]:
    np.savez(folder / "w.npz", **{key: value.numpy() for key, value in state.items()})
    return [folder / "w.npz"]


def write_h5(state: State, folder: Path) -> list[Path]:
    with h5py.File(folder / "last.h5", "w") as file:
        for key, value in state.items():
            file[key] = value.numpy()
    return [folder / "last.h5"]


def write_lot_apart(state: State, folder: Path) -> list[Path]:
    lot = {key for key in state if key.startswith("conv_")}
    paths = folder / "lot.pth", folder / "unet.pth"
    for path, keys in zip(paths, (lot, state.keys() - lot), strict=True):
        torch.save(prefixed({key: state[key] for key in keys}), path)
    return list(paths)


def write_halves(state: State, folder: Path) -> list[Path]:
    halves = {
        half[:-1]: prefixed({k.removeprefix(half): v for k, v in state.items() if half in k})
        for half in (RECON, REFINE)
    }
    rest = {k: v for k, v in state.items() if RECON not in k and REFINE not in k}
    torch.save(halves | rest, folder / "AFTER-QSM.pkl")
    return [folder / "AFTER-QSM.pkl"]


def without_unet_and_lot(module: nn.Module) -> State:
    return {k.partition(".")[2]: v for k, v in module.state_dict().items()}


def bfrnet_state() -> State:
    """Return a small BFRnet's weights under the names of the authors' layers."""
    layers = dict(authors_layers(depth=2))
    keys = {key: key.rpartition(".") for key in BFRnet(base=1).state_dict()}
    state = BFRnet(base=1).state_dict()
    return {
        f"{layers[layer]}.{what}": state[key]
        for key, (layer, _, what) in keys.items()
        if what != "num_batches_tracked"
    }


def nextqsm_state() -> State:
    """Return the weights of a narrow NeXtQSM, part bf, under Keras names and axes."""
    state = NextQsmField((1, 2, 2, 2, 2, 2, 2)).state_dict()
    return {
        theirs: state[ours].permute(2, 3, 4, 1, 0) if state[ours].ndim == 5 else state[ours]
        for ours, theirs in keras_keys("bf")
    }


def autoqsm_state() -> State:
    """Return a small AutoQSM's weights under Keras names and axes."""
    state, found = AutoQSM((1, 2, 3)).state_dict(), {}
    for kind, layers in our_layers(2).items():
        for number, layer in enumerate(layers, start=1):
            path = f"model_weights/{kind}_{number}/{kind}_{number}"
            found[f"{path}/kernel:0"] = state[f"{layer}.weight"].permute(2, 3, 4, 1, 0)
            found[f"{path}/bias:0"] = state[f"{layer}.bias"]
    return found


def modl_state() -> State:
    """Return a small MoDL-QSM's weights under Keras names and axes."""
    small = ModlQsm(wide_resnet(2, width=4, blocks=2, epsilon=1e-3, last_bias=True))
    state = fill(small.state_dict())
    convs = ["gen.0", *(f"gen.2.{b}.conv{n}" for b in (0, 1) for n in (1, 2))]
    convs += ["gen.3", "gen.5", "gen.7"]
    found = {"my_layer_1/my_layer_1/step:0": torch.tensor(1.1)}
    for n, name in enumerate(convs, start=1):
        found[f"model_1/conv3d_{n}/kernel:0"] = state[f"{name}.weight"].permute(2, 3, 4, 1, 0)
    found["model_1/conv3d_8/bias:0"] = state["gen.7.bias"]
    theirs = {"gamma": "weight", "beta": "bias"}
    theirs |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    for n in range(4):
        for name, ours in theirs.items():
            key = f"gen.2.{n // 2}.bn{n % 2 + 1}.{ours}"
            found[f"model_1/batch_normalization_{n + 1}/{name}:0"] = state[key]
    return found
