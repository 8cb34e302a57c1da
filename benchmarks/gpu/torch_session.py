"""PyTorch as an engine on a GPU: what a user has without TensorRT, behind the same protocol."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.machine import Machine
from qsm_deploy.export.networks.network import Network
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.gpu.engines.inference import DeviceBackend, Shapes

MODES = ("fp32", "tf32", "fp16")
COMPILED = "compiled fp16"


class TorchSession:
    """A copy of a module on the current GPU.

    A ``DeviceSession`` (``runtime/gpu/engines/inference.py``). PyTorch allocates its activations
    for itself, so the memory predicted is without them.
    """

    backend: DeviceBackend = "onnxruntime-cuda"  # stands where an engine would
    version = f"PyTorch {torch.__version__}"
    device, capturable = 0, False

    def __init__(self, machine: Machine, module: Network, card: ModelCard, mode: str) -> None:
        self.machine, self.card = machine, card
        torch.backends.cudnn.allow_tf32 = mode == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        half = "fp16" in mode
        # of a copy: `to` changes the module itself, and FP16 rounds its weights
        kept = copy.deepcopy(module)
        moved: Any = kept.to(machine.torch_device, machine.half if half else torch.float32)
        if half:
            moved = moved.to(memory_format=torch.channels_last_3d)
        self._module = torch.compile(moved, backend=machine.compiler) if mode == COMPILED else moved
        self._type = machine.half if half else torch.float32
        self.weights_bytes = sum(p.nbytes for p in kept.parameters())

    def run(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Return the output for float32 tensors on the GPU."""
        taken = [tensor.to(self._type) for tensor in inputs]
        if self._type is not torch.float32:
            taken = [
                t.contiguous(memory_format=torch.channels_last_3d) if t.ndim == 5 else t
                for t in taken
            ]
        with torch.inference_mode():
            output: torch.Tensor = self._module(*taken)
        return output.float()

    def output_shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Return the output's shape: one channel."""
        first = shapes[self.card.inputs[0].name]
        return (first[0], 1, *first[2:])

    def scratch_bytes(self, shapes: Shapes) -> int:
        """Return 0: nothing of what PyTorch takes comes from the caller."""
        return 0

    def own_bytes(self, shapes: Shapes) -> int:
        """Return 0: what PyTorch takes for itself is not predicted."""
        return 0

    def open_inference(self, shapes: Shapes, scratch: int) -> "_TorchInference":
        """Return what runs the module on pointers."""
        return _TorchInference(self, shapes)

    def close(self) -> None:
        """Let the module go."""
        del self._module
        torch.cuda.empty_cache()


@dataclass
class _TorchInference:
    session: TorchSession
    shapes: Shapes

    def enqueue(self, inputs: Mapping[str, int], output: int, stream: int) -> None:
        """Enqueue one run after the work of a stream and before what it does next."""
        session, shapes = self.session, self.shapes
        pointers = dict(inputs)

        def run() -> None:
            tensor = session.machine.tensor
            taken = [tensor(pointers[t.name], shapes[t.name]) for t in session.card.inputs]
            tensor(output, session.output_shape(shapes)).copy_(session.run(taken))

        session.machine.run_torch(stream, run)
