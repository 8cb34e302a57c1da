"""One small protocol for every inference backend, and the table of those of the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qsm_deploy.runtime.card.card import ModelCard

Backend = str  # a key of the table, or what runs a network elsewhere
Precision = Literal["auto", "fp32", "bf16", "int8"]  # auto: INT8 files in INT8 where it is right
AUTO = "auto"


class Session(Protocol):
    """A loaded model, ready to run."""

    card: "ModelCard"
    version: str
    precision: Precision

    @property
    def backend(self) -> Backend:
        """The library that runs it."""

    def run(self, tensors: "Mapping[str, NDArray[np.float32]]") -> "NDArray[np.float32]":
        """Run the model once.

        Parameters
        ----------
        tensors
            (n, c, x, y, z) arrays by input name, sizes multiples of the card's divisor.

        Returns
        -------
        (n, c, x, y, z) array
            The card's outputs one after the other, owned by the caller.
        """


@dataclass(frozen=True)
class BackendRow:
    """What the others know of a backend of the CPU.

    Attributes
    ----------
    label
        The library's name for people.
    session
        Its class, in the module of the backend's name here; built of path, precision and threads.
    precisions
        That it may be asked for.
    graphs
        Precisions of the graphs that it runs.
    dipole_ops
        Forms of the dipole operator that it runs.
    """

    label: str
    session: str
    precisions: tuple[Precision, ...]
    graphs: tuple[str, ...]
    dipole_ops: tuple[str, ...]


# The fastest first. A new backend is its module here and a row; ONNX Runtime has no convolution in
# bf16 on a CPU.
BACKENDS: dict[Backend, BackendRow] = {
    "openvino": BackendRow(
        "OpenVINO",
        "OpenVinoSession",
        precisions=("auto", "fp32", "bf16", "int8"),
        graphs=("fp32", "fp16", "bf16", "int8"),
        dipole_ops=("matmul",),
    ),
    "onnxruntime": BackendRow(
        "ONNX Runtime",
        "OnnxRuntimeSession",
        precisions=("auto", "fp32"),
        graphs=("fp32", "fp16", "int8"),
        dipole_ops=("matmul", "function"),
    ),
}
CHOICES = (AUTO, *sorted(BACKENDS))
