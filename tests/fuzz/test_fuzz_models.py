"""Damaged models and cards, from the file to a small map: refused, or the map has its shape."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.errors import QsmDeployError
from qsm_deploy.runtime.card.card import (
    METADATA_KEY,
    MemoryUse,
    ReceptiveField,
    Verification,
    parse_card,
)
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.console.peak_memory import peak_rss_bytes, reset_peak, rss_bytes
from qsm_deploy.runtime.model import open_model
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import BACKENDS, Backend
from tests.export.table import SMALL
from tests.fuzz.damage import damaged, damaged_json

SHAPE = (8, 8, 8)
LONGEST_S, MOST_BYTES = 10.0, 2**29
FIELD = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) / 50


@pytest.fixture(scope="module")
def model(kept_traces: None) -> bytes:
    torch.manual_seed(0)
    network = SMALL["tv-unet"]().eval()
    card = provisional_card(REGISTRY["tv-unet"], network, Choices(), "none", "0" * 64)
    card = replace(
        card,
        priors=tuple(replace(prior, steps=1) for prior in card.priors),
        memory=dict.fromkeys(BACKENDS, MemoryUse(10**6, 1000)),
        receptive_field=ReceptiveField(20, 8, 0.99),
        verified=Verification("PyTorch", 1.0, ((16, 16, 16),)),
    )
    return with_card(onnx_from_module(network), card)


def run(path: Path, backend: Backend) -> tuple[int, ...]:
    given = dict.fromkeys(REGISTRY["tv-unet"].inputs, FIELD[None, None])
    session = open_session(path, backend, threads=1)
    return session.run(given | {"field_noise_ppm": np.float32([0.003])}).shape[2:]


def reconstruct(path: Path) -> tuple[int, ...]:
    opened = open_model(path)
    chi = opened.reconstruct(FIELD, voxel_size_mm=(1, 1, 1), b0_direction=(0, 0, 1))
    return tuple(chi.shape)


def try_each(
    tries: int, path: Path, damage: Callable[[], bytes | None], use: Callable[[Path], object]
) -> Counter[str]:
    """Use damaged files, and count what was refused and what ran to a map of the right shape."""
    counts, longest = Counter[str](), 0.0
    reset_peak()
    before = rss_bytes()
    for _ in range(tries):
        if (content := damage()) is None:
            continue
        path.write_bytes(content)
        start = time.monotonic()
        try:
            counts["whole" if use(path) == SHAPE else "another shape"] += 1
        except QsmDeployError:
            counts["refused"] += 1
        longest = max(longest, time.monotonic() - start)
    assert longest < LONGEST_S
    assert peak_rss_bytes() - before < MOST_BYTES
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_damaged_model_is_refused_or_runs(backend: Backend, model, tmp_path, note_counts) -> None:
    tries, dice = {"onnxruntime": 600, "openvino": 200}[backend], random.Random(backend)
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    assert run(path, backend) == SHAPE
    counts = try_each(
        tries,
        path,
        lambda: damaged(model, dice, within=dice.choice((None, 400, 6000))),
        lambda damaged_path: run(damaged_path, backend),
    )
    assert counts.keys() == {"whole", "refused"}
    assert counts.total() == tries
    assert counts["refused"] > tries // 2
    name = {"onnxruntime": "ONNX files, in ONNX Runtime", "openvino": "ONNX files, in OpenVINO"}
    note_counts(name[backend], inputs=tries, refused=counts["refused"], other=counts["whole"])


def with_other_card(model: onnx.ModelProto, dice: random.Random) -> bytes | None:
    """Return the model with damage in its card, unless that is no text."""
    card = json.loads({prop.key: prop.value for prop in model.metadata_props}[METADATA_KEY])
    other = onnx.ModelProto()
    other.CopyFrom(model)
    try:
        onnx.helper.set_model_props(other, {METADATA_KEY: damaged_json(card, dice)})
    except ValueError:  # which protobuf does not take
        return None
    return other.SerializeToString()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # what a card makes it say of the scan
def test_a_damaged_card_is_refused_or_a_card(model, tmp_path, note_counts) -> None:
    proto, dice = onnx.load_from_string(model), random.Random("card")
    path, tries = tmp_path / "model.onnx", 1500
    path.write_bytes(model)
    assert reconstruct(path) == SHAPE

    def use(damaged_path: Path) -> tuple[int, ...]:
        assert parse_card(load_card(damaged_path).to_json()) == load_card(damaged_path)
        return reconstruct(damaged_path)

    counts = try_each(tries, path, lambda: with_other_card(proto, dice), use)
    assert counts.keys() == {"whole", "refused"}
    assert counts.total() > tries * 0.9
    assert counts["whole"] > 5
    seen = {"refused": counts["refused"], "other": counts["whole"]}
    note_counts("cards in them, to a map", inputs=counts.total(), **seen)
