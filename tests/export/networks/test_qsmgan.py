"""QSMGAN's generator: its settings, its limits, and the blocks that it runs on."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qsm_deploy.export.checkpoints.normalisation import load_normalisation
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.qsmgan import LARGEST_TANH, QSMGAN, network_from_state
from qsm_deploy.kernels.errors import WeightsError

CONFIG = {
    "netG_args": {"chans": 2, "tanh": True, "norm": None},
    "dset_args": {
        "input_patch_size": [64, 64, 64],
        "input_scale": 50,
        "output_scale": 5.0,
        "output_transform": "tanh",
    },
}


def settings(folder: Path, content: object) -> Choices:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return Choices(normalisation=load_normalisation([path]))


@pytest.fixture
def state(formula_state) -> dict[str, torch.Tensor]:
    return formula_state(QSMGAN(3, 2).state_dict())


def test_size_and_scales_are_read(state, tmp_path) -> None:
    network = network_from_state(state, settings(tmp_path, CONFIG))
    assert (network.divisor, network.conv2[0].in_channels) == (4, 3)
    assert (network.input_scale, network.output_scale) == (50, 5)
    published = network_from_state(state, Choices())
    assert (published.input_scale, published.output_scale) == (100, 10)


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("netG_args", "tanh", False, "tanh is False in config.json, expected True"),
        ("dset_args", "output_transform", "none", "output_transform is none in config.json"),
        ("dset_args", "input_scale", 0, "input_scale is 0.0, expected one finite number above"),
    ],
)
def test_other_settings_are_refused(part, name, value, words, state, tmp_path) -> None:
    other = CONFIG | {part: CONFIG[part] | {name: value}}
    with pytest.raises(WeightsError, match=words):
        network_from_state(state, settings(tmp_path, other))


def test_it_is_the_inverse_of_a_limited_tangent(state) -> None:
    state["conv2.1.weight"] *= 40
    network = network_from_state(state, Choices())
    field = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        chi = network(field).double().numpy()
        inner: list[torch.Tensor] = []
        network.conv2.register_forward_hook(lambda module, given, y: inner.append(y))
        network(field)
    tangent = np.clip(np.tanh(inner[0].double().numpy()), -LARGEST_TANH, LARGEST_TANH)
    assert np.abs(tangent).max() == LARGEST_TANH
    assert np.abs(chi).max() == pytest.approx(math.atanh(LARGEST_TANH) / 10)
    assert np.abs(chi - np.arctanh(tangent) / 10).max() <= 1e-6


def test_what_is_no_object_of_json_is_refused(tmp_path) -> None:
    for text in ("[1, 2]", "{", "\u0000"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=r"config\.json"):
            load_normalisation([tmp_path / "config.json"])
