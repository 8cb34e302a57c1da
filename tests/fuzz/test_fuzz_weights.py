"""Damaged weights, from the file to the network: refused, or right as far as seen."""

import io
import random
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qsm_deploy.export.checkpoints.state import load_state, state_sha256
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY, recognise
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet
from qsm_deploy.kernels.errors import WeightsError
from qsm_deploy.runtime.console.peak_memory import peak_rss_bytes, reset_peak, rss_bytes
from tests.fuzz.damage import damaged

State = dict[str, Tensor]
Damage = Callable[[bytes, random.Random], bytes]
TRIES = 800
LONGEST_S, MOST_BYTES = 10.0, 2**28


def somewhere(content: bytes, dice: random.Random) -> bytes:
    return damaged(content, dice, within=dice.choice((None, 400, 4000)))


def in_a_member(content: bytes, dice: random.Random) -> bytes:
    """Damage what is in a ZIP archive and make its checksum right, as who means harm does."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        entries = [entry.filename for entry in old.infolist()]
        likely = [name for name in entries if name.endswith(("data.pkl", "0.weight.npy"))]
        chosen = dice.choice((dice.choice(entries), dice.choice(likely)))
        for name in entries:
            part = old.read(name)
            new.writestr(name, somewhere(part, dice) if name == chosen and part else part)
    return file.getvalue()


def write_npz(state: State, path: Path, save: Callable[..., None] = np.savez) -> None:
    with path.open("wb") as file:
        save(file, **{key: value.numpy() for key, value in state.items()})


def write_h5(state: State, path: Path) -> None:
    with h5py.File(path, "w") as file:
        for key, value in state.items():
            packed = {"chunks": True, "compression": "gzip"} if value.ndim == 5 else {}
            file.create_dataset(key, data=value.numpy(), **packed)


def write_pickle(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


# what is written, how it is damaged, and whether checksums tell every change of a value
CASES: dict[str, tuple[Callable[[State, Path], None], Damage, bool]] = {
    "zip": (torch.save, somewhere, True),
    "npz": (write_npz, somewhere, True),
    "npz packed": (lambda s, p: write_npz(s, p, np.savez_compressed), somewhere, True),
    "zip member": (torch.save, in_a_member, False),
    "npz member": (write_npz, in_a_member, False),
    # none of these has checksums: a flipped bit of a weight is another weight
    "pickle": (write_pickle, somewhere, False),
    "safetensors": (save_file, somewhere, False),
    "h5": (write_h5, somewhere, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_damage_is_refused_or_does_no_harm(case: str, tmp_path: Path, note_counts) -> None:
    write, damage, checked = CASES[case]
    torch.manual_seed(0)
    state = dict(XqsmUnet(base=2).state_dict())
    shapes = {key: value.shape for key, value in state.items()}
    path = tmp_path / "weights"
    write(state, path)
    whole, right = path.read_bytes(), state_sha256(load_state(path))
    assert right == state_sha256(state)
    dice, counts, longest = random.Random(case), Counter[str](), 0.0
    reset_peak()
    before = rss_bytes()
    for _ in range(TRIES):
        path.write_bytes(damage(whole, dice))
        start = time.monotonic()
        try:
            loaded = load_state(path, fits=recognise)
            network = build_network(REGISTRY["xqsm-unet"], loaded, Choices())
        except WeightsError:
            counts["refused"] += 1
        else:
            same = state_sha256(loaded) == right
            assert same or not checked
            counts["same" if same else "other"] += 1
            built = network.state_dict()
            assert {key: value.shape for key, value in built.items()} == shapes
            assert all(value.isfinite().all() for value in built.values())
        longest = max(longest, time.monotonic() - start)
    assert counts.total() == TRIES
    assert counts["refused"] > TRIES // 3, counts
    assert counts["same"] + counts["other"] > 0, counts
    assert longest < LONGEST_S
    assert peak_rss_bytes() - before < MOST_BYTES
    note_counts("checkpoints: eight kinds of file", inputs=TRIES, **counts)
