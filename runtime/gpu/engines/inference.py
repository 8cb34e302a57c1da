"""What the pipeline asks of an engine: inference on device pointers, nothing more.

Pointers and streams are integers, as in :mod:`qsm_deploy.kernels.cuda_library`. The pipeline owns
all memory, the engine's scratch memory included, so that it is known before anything is allocated.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

from qsm_deploy.runtime.card.card import ModelCard

DeviceBackend = Literal["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"]
Shapes = Mapping[str, tuple[int, ...]]


class Inference(Protocol):
    """One execution context for one set of shapes; one stream uses it at a time."""

    def enqueue(self, inputs: Mapping[str, int], output: int, stream: int) -> None:
        """Enqueue one run; nothing waits for the GPU.

        Parameters
        ----------
        inputs
            Device pointers to contiguous float32 tensors of the shapes, by name.
        output
            Device pointer to the output, which is written whole.
        stream
            A ``cudaStream_t``.

        Raises
        ------
        EngineError
            If the engine refuses.
        """


class DeviceSession(Protocol):
    """An engine on a GPU.

    Attributes
    ----------
    card
        Of its network.
    backend, version
        The library that runs it.
    device
        The number of the GPU.
    weights_bytes
        Device memory that the loaded engine holds.
    capturable
        Whether :meth:`Inference.enqueue` may be captured in a CUDA graph, after it ran once.
    """

    card: ModelCard
    backend: DeviceBackend
    version: str
    device: int
    weights_bytes: int
    capturable: bool

    def output_shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Return the output's shape for inputs of these shapes.

        Raises
        ------
        EngineError
            If the engine was not built for them; the message names what it serves.
        """

    def scratch_bytes(self, shapes: Shapes) -> int:
        """Return the device memory that one inference needs besides inputs and output.

        Raises
        ------
        EngineError
            If the engine was not built for these shapes.
        """

    def own_bytes(self, shapes: Shapes) -> int | None:
        """Return what the library takes for itself in one inference, ``None`` if nobody knows."""

    def open_inference(self, shapes: Shapes, scratch: int) -> Inference:
        """Return an execution context for shapes.

        Parameters
        ----------
        shapes
            Of every input, by name.
        scratch
            Device pointer to ``scratch_bytes``, aligned to 256 bytes, which must outlive it.
        """

    def close(self) -> None:
        """Free the engine; its inferences must not be used any more."""
