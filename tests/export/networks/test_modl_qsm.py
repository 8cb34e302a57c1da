"""MoDL-QSM from the authors' file: its keys, its loop, and its two forms."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from qsm_deploy.export.checkpoints.normalisation import load_normalisation
from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.modl_qsm import PUBLISHED, ModlQsm, network_from_state
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.networks.unrolled import Prior
from qsm_deploy.kernels.errors import WeightsError

UNROLLED, SPLIT = Choices({"form": "unrolled"}), Choices({"form": "split"})
SPEC = REGISTRY["modl-qsm"]


@pytest.fixture
def keras(keras_weights) -> dict[str, torch.Tensor]:
    return dict(keras_weights)


@pytest.fixture
def h5_file(tmp_path: Path, keras) -> Path:
    path = tmp_path / "last.h5"
    with h5py.File(path, "w") as file:
        for key, value in keras.items():
            file[key] = value.numpy()
    return path


def inputs(size: tuple[int, int, int], direction=(0.0, 0.0, 1.0)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    field = 0.02 * torch.randn(1, 1, *size, generator=generator)
    mask = (torch.rand(1, 1, *size, generator=generator) > 0.2).float()
    return [field * mask, mask, torch.tensor([1.0, 1.0, 1.1]), torch.tensor([direction])]


def test_the_h5_file_is_read_key_by_key(h5_file, keras) -> None:
    state = load_state(h5_file)
    assert state.keys() == keras.keys()
    assert all(torch.equal(state[key], keras[key]) for key in keras)
    network = build_network(SPEC, state, UNROLLED)
    assert network.constants == {"step": pytest.approx(1.1), "iterations": 3}


def test_a_kernel_is_turned_from_keras_to_torch(keras) -> None:
    network = network_from_state(keras, UNROLLED)
    kernel = keras["model_1/conv3d_1/kernel:0"]
    assert network.gen[0].weight[3, 1, 0, 1, 2] == kernel[0, 1, 2, 1, 3]
    assert network_from_state(keras, SPLIT).gen[2][0].bn1.eps == 1e-3


def twin(network: ModlQsm, tensors: list[torch.Tensor]) -> np.ndarray:
    """Return the loop in complex double precision, with the prior in single."""
    field, mask = (t[0, 0].double().numpy() for t in tensors[:2])
    k = np.meshgrid(
        *(np.fft.fftfreq(n, float(d)) for n, d in zip(field.shape, tensors[2], strict=True)),
        indexing="ij",
    )
    k2 = sum(a * a for a in k)
    along = sum(a * float(b) for a, b in zip(k, tensors[3][0], strict=True))
    k2[0, 0, 0] = 1
    dipole = 1 / 3 - along**2 / k2
    dipole[0, 0, 0] = 0

    def d(x: np.ndarray) -> np.ndarray:
        return np.fft.ifftn(dipole * np.fft.fftn(x)).real

    n = network.normalisation
    mean = np.array([n["chi_mean"], n["field_mean"]]).reshape(2, 1, 1, 1)
    std = np.array([n["chi_std"], n["field_std"]]).reshape(2, 1, 1, 1)
    t = network.step.item()
    y = t * np.stack([d(field), field])
    z = x = y
    for iteration in range(3):
        if iteration:
            residual = d(x[0]) + x[1]
            z = x - t * np.stack([d(residual), residual]) + y
        with torch.inference_mode():
            p = network.gen(torch.from_numpy((z - mean) / std * mask).float()[None])[0]
        x = p.double().numpy() * mask * std + mean
    return x * mask


@pytest.mark.parametrize("size", [(8, 10, 12), (7, 9, 11)])
def test_the_loop_equals_a_plain_one_in_double_precision(keras, size) -> None:
    network = network_from_state(keras, UNROLLED)
    tensors = inputs(size)
    with torch.inference_mode():
        got = network.both_channels(*tensors)[0].numpy()
    expected = twin(network, tensors)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_mean_outside_the_mask_counts(keras) -> None:
    network = network_from_state(keras, UNROLLED)
    tensors = inputs((8, 10, 12))
    with torch.inference_mode():
        right = network(*tensors)
        network.normalisation = {**network.normalisation, "chi_mean": 0.0}
        assert (network(*tensors) - right).abs().max() > 1e-3


def test_the_split_form_is_the_prior_alone(keras) -> None:
    prior = network_from_state(keras, SPLIT)
    assert isinstance(prior, Prior)
    assert (prior.pipeline, prior.why_whole) == ("modl", None)
    assert prior.normalisation == PUBLISHED
    whole = network_from_state(keras, UNROLLED)
    x = torch.randn(1, 2, 6, 7, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(prior(x), whole.gen(x), atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("model_1/conv3d_5/kernel:0"), r"model_1/conv3d_5/kernel:0 \(here gen\.2"),
        (lambda s: s.pop("my_layer_1/my_layer_1/step:0"), "no my_layer_1/my_layer_1/step:0"),
        (lambda s: s.update({"model_2/x:0": torch.zeros(2)}), "model_2/x:0"),
        (lambda s: s.update({"model_1/conv3d_8/bias:0": torch.zeros(3)}), r"gen\.7\.bias"),
    ],
)
def test_anything_else_is_refused_by_name(keras, spoil, message) -> None:
    spoil(keras)
    with pytest.raises(WeightsError, match=message):
        network_from_state(keras, UNROLLED)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.9])
def test_a_truncated_or_strange_file_is_refused(h5_file, kept) -> None:
    data = h5_file.read_bytes()
    h5_file.write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    with pytest.raises(WeightsError, match=r"last\.h5"):
        load_state(h5_file)
    h5_file.write_bytes(b"not hdf5")
    with pytest.raises(WeightsError, match="not an HDF5 file"):
        load_state(h5_file)


class TestPublished:
    @pytest.fixture
    def state(self, shared: Path) -> dict[str, torch.Tensor]:
        return load_state(shared / "data" / "checkpoints" / "modl_qsm.h5")

    def test_the_keys_are_those_listed(self, state, shared) -> None:
        rows = (shared / "specs" / "keys" / "modl_qsm_keras_h5.txt").read_text().splitlines()
        listed = {r.split("\t")[0]: r.split("\t")[1] for r in rows if not r.startswith("#")}
        assert {key: str(tuple(value.shape)) for key, value in state.items()} == listed

    def test_it_computes_what_an_independent_port_did(self, state, shared) -> None:
        golden = shared / "specs" / "golden"
        given = np.load(golden / "input.npz")
        field, mask = (torch.from_numpy(given[k].astype(np.float32)) for k in ("input", "mask"))
        network = build_network(SPEC, state, UNROLLED)
        with torch.inference_mode():
            got = network.both_channels(field, mask, torch.ones(3), torch.tensor([[0.0, 0, 1]]))
        expected = np.load(golden / "modl_qsm_realckpt_ourport.npz")["output"]
        assert np.abs(got[0].numpy() - expected).max() <= 1e-5

    def test_the_authors_normalisation_is_the_published_one(self, state, shared) -> None:
        file = shared / "data" / "checkpoints" / "modl_qsm_norm.mat"
        choices = Choices({"form": "split"}, load_normalisation([file]))
        assert build_network(SPEC, state, choices).normalisation == pytest.approx(PUBLISHED)
