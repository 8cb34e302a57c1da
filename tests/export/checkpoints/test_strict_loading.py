"""Every network's file, in its own format, as it goes wrong: one line that names the key."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.cli import main
from qsm_deploy.export.networks import chi_sepnet, susep_net
from qsm_deploy.export.networks.after_qsm import RECON, REFINE, AfterRecon, AfterRefine
from qsm_deploy.export.networks.autoqsm import AutoQSM, our_layers
from qsm_deploy.export.networks.bfrnet import BFRnet, authors_layers
from qsm_deploy.export.networks.blocks import ConvBlock
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.chi_sepnet import ChiSepnet
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder
from qsm_deploy.export.networks.iqsm import IQFM, IQSM
from qsm_deploy.export.networks.iqsm_plus import IQSMPlus
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.loopnet import LoopNet
from qsm_deploy.export.networks.lot import LotLayer
from qsm_deploy.export.networks.lpcnn import LPCNN
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.nextqsm import NextQsmField, keras_keys
from qsm_deploy.export.networks.qsmgan import QSMGAN
from qsm_deploy.export.networks.qsmnet import NUMBERS, TORCH, QSMnet
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.networks.spinet_qsm import SpinetWeights
from qsm_deploy.export.networks.susep_net import SusepNet
from qsm_deploy.export.networks.tv_unet import TvUnet
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from qsm_deploy.export.networks.xqsm import XQSM
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet
from qsm_deploy.kernels.errors import WeightsError
from tests.export.small import SEPARATION

State = Mapping[str, Tensor]
TF1_WEIGHTS = Path(__file__).parents[1] / "networks" / "golden" / "qsmnet_tf1_weights.npz"
TF1_NORMALISATION = {
    f"{name}_{what}": np.array(0.5) for name in ("input", "label") for what in ("mean", "std")
} | {"network_info": np.array(["relu", "qsmnet_deep"])}


def normalisation_of(pattern_of: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return numbers under the authors' names, which are patterns."""
    patterns = pattern_of.values()
    return {p.format(what): np.array(0.5) for p in patterns for what in ("mean", "std")}


NORMALISATION = {
    "qsmnet": TF1_NORMALISATION,
    "qsmnet-plus": TF1_NORMALISATION,
    "qsmnet-torch": TF1_NORMALISATION,
    "chi-sepnet": normalisation_of(chi_sepnet.AUTHORS_NUMBERS),
    "susep-net": normalisation_of(susep_net.AUTHORS_NUMBERS),
}
STRANGER = "attention.weight"


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


def iqsm_layers() -> tuple[ConvBlock, EncoderDecoder, LotLayer]:
    return ConvBlock(3, 3), EncoderDecoder(3, base=2, depth=4), LotLayer(3)


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


@dataclass(frozen=True)
class Published:
    """A small network's weights, and how its authors write them to files."""

    state: Callable[[], State]
    write: Callable[[State, Path], list[Path]]


def published(
    module: Callable[[], nn.Module], write: Callable[[State, Path], list[Path]]
) -> Published:
    return Published(lambda: module().state_dict(), write)


TF1 = Published(lambda: load_state(TF1_WEIGHTS), write_npz)
FILES = {
    "ir2qsm": published(lambda: IR2QSM((2, 4, 8), iterations=2), write_pickle),
    "tv-unet": published(lambda: TvUnet(4, 8, 4), write_safetensors),
    "loopnet": published(lambda: LoopNet(4, loops=2), write_safetensors),
    "xqsm": published(lambda: XQSM(base=1), write_pickle),
    "xqsm-unet": published(lambda: XqsmUnet(base=2), write_pickle),
    "qsmnet": TF1,
    "qsmnet-plus": TF1,
    "qsmnet-torch": published(
        lambda: QSMnet((2, 2, 3, 3, 4), 3, TORCH, dict.fromkeys(NUMBERS, 1.0)),
        write_wrapped("state_dict"),
    ),
    "chi-sepnet": published(
        lambda: ChiSepnet((2, 2, 3, 3, 4), 3, TORCH, SEPARATION), write_wrapped("state_dict")
    ),
    "susep-net": published(lambda: SusepNet(2, SEPARATION), write_pickle),
    "bfrnet": Published(bfrnet_state, write_safetensors),
    "nextqsm": Published(nextqsm_state, write_h5),
    "qsmgan": published(lambda: QSMGAN(2, 2), write_generator),
    "autoqsm": Published(autoqsm_state, write_h5),
    "lpcnn": published(lambda: LPCNN(wide_resnet(1, 4, 2)), write_wrapped("model_state")),
    "spinet-qsm": published(lambda: SpinetWeights(wide_resnet(2, 4, 2)), write_pickle),
    "iqsm": Published(
        lambda: without_unet_and_lot(IQSM(*iqsm_layers()[1:], divisor=16)), write_lot_apart
    ),
    "iqfm": Published(
        lambda: without_unet_and_lot(IQFM(*iqsm_layers()[1:], divisor=16)), write_lot_apart
    ),
    "iqsm-plus": Published(lambda: without_unet_and_lot(IQSMPlus(*iqsm_layers())), write_lot_apart),
    "after-qsm": Published(
        lambda: (
            AfterRecon(base=1, depth=2).state_dict()
            | AfterRefine(features=2, growth=2, blocks=2, layers=2, last=3).state_dict()
        ),
        write_halves,
    ),
}
OF_ONE_FORMAT = {
    name: pair
    for pair in (("qsmnet", "qsmnet-plus"), ("iqsm", "iqfm"), ("qsmnet-torch", "chi-sepnet"))
    for name in pair
}
# keys that may lack: settings with a default, the half of the other part, the optimiser's, counters
OPTIONAL = ("setting_", REFINE, "/Adam", "power", "num_batches_tracked")


@pytest.fixture(scope="module")
def files(keras_weights) -> dict[str, Published]:
    return FILES | {"modl-qsm": Published(lambda: keras_weights, write_h5)}


@pytest.fixture(scope="module")
def states(files) -> dict[str, State]:
    return {name: file.state() for name, file in files.items()}


def built(name: str, state: State) -> Network:
    spec = REGISTRY[name]
    given = NORMALISATION.get(name, {})
    return build_network(spec, state, Choices(spec.chosen_options({}), given, (0.0, 0.0, 1.0)))


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
def test_its_own_file_is_taken_whole(name: str, files, states, tmp_path) -> None:
    loaded = load_state(*files[name].write(states[name], tmp_path))
    assert loaded.keys() == states[name].keys()
    assert built(name, loaded).divisor in (1, 2, 4, 8, 16, 64)


@each_network
def test_a_truncated_file_is_named(name: str, files, states, tmp_path) -> None:
    path = files[name].write(states[name], tmp_path)[-1]
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
def test_an_extra_key_is_named(name: str, files, states, tmp_path) -> None:
    state = {**states[name], STRANGER: torch.zeros(3)}
    assert STRANGER in refusal(name, load_state(*files[name].write(state, tmp_path)))


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
    name: str, file: str, words: str, files, states, tmp_path, capsys
) -> None:
    paths = map(str, files[file].write(states[file], tmp_path))
    output = tmp_path / "model.onnx"
    assert main(["--model", name, "-q", "-o", str(output), "--weights", *paths]) == 7
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert not output.exists()
