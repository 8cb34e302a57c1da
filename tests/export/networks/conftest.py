"""Networks of the published keys, filled by the formula."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from tests.export.golden import Golden, GoldenVector
from tests.export.table import VECTORS

Known = tuple[Network, GoldenVector, Golden]


@pytest.fixture(scope="session")
def known(shared: Path, formula_state) -> Callable[[str], Known]:
    """Return what makes a network of the published keys, which strict loading thus compares."""

    def make(case: str) -> Known:
        name, vector = VECTORS[case]
        golden = np.load(shared / "specs" / "golden" / f"{vector.golden}.npz")
        keys = keys_in(shared / "specs" / "keys" / f"{vector.keys}.txt")
        state = formula_state({key: torch.zeros(shape, dtype=kind) for key, shape, kind in keys})
        vector.fill(golden, state)
        options = REGISTRY[name].chosen_options(vector.options)
        choices = Choices(options, vector.normalisation(golden))
        return build_network(REGISTRY[name], state, choices), vector, golden

    return make


def keys_in(path: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return key, shape and type of each entry of a list."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    entries = [line.split("\t")[:3] for line in lines]
    return [
        (key, tuple(map(int, shape.strip("()").replace(",", " ").split())), getattr(torch, kind))
        for key, shape, kind in entries
    ]
