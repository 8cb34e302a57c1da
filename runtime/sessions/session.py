"""One small protocol for every inference backend."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import CardError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.card.read import card_from

Backend = str  # of the table in qsm_deploy.runtime.sessions.open, or what runs a network elsewhere
Precision = Literal["fp32", "bf16"]


class Session(Protocol):
    """A loaded model, ready to run."""

    card: ModelCard
    version: str
    precision: Precision

    @property
    def backend(self) -> Backend:
        """The library that runs it."""

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the model once.

        Parameters
        ----------
        tensors
            (n, c, x, y, z) arrays by input name, sizes multiples of the card's divisor.

        Returns
        -------
        (n, 1, x, y, z) array
            The card's output, owned by the caller.
        """


def read_card(path: Path, text: str | None, inputs: list[str], outputs: list[str]) -> ModelCard:
    """Return the card in a model's metadata, checked against the graph's names.

    Raises
    ------
    CardError
        If there is none, or it names other inputs or outputs than the graph has.
    """
    card = card_from(text, path)
    stated = [tensor.name for tensor in card.inputs]
    if sorted(stated) != sorted(inputs) or [card.output.name] != outputs:
        raise CardError(
            f"{path}: the card contradicts the graph: inputs {stated} -> {card.output.name}, "
            f"the graph has {inputs} -> {', '.join(outputs)}; export it again"
        )
    return card
