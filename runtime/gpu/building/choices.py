"""What a user chooses about a plan."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.gpu.engines.tensorrt_library import Flavour

Hardware = Literal["same-capability", "ampere-plus"]


@dataclass(frozen=True)
class PlanChoices:
    """What the user chose about a plan.

    Attributes
    ----------
    engine
        The flavour that builds, and later runs, the plan.
    shapes
        ``MIN,OPT,MAX``, if not the default ones.
    workspace_mb
        Most memory that a layer may take for itself while it runs [MB]; no limit by default.
    layers
        The file for a report on the layers, if there is to be one.
    hardware_compatible
        Which GPUs besides this model TensorRT is to build for.
    version_compatible
        Whether later versions of TensorRT are to run the plan.
    compute_capability
        ``8.9``: those that TensorRT for RTX is to build for, if not its default ones.
    progress
        Whether to draw a bar while the engine is built.
    gpu
        The number of the GPU that measures, this thread's current one.

    Raises
    ------
    UsageError
        If the flavour has no such choice, or a compute capability is none.
    """

    engine: Flavour
    shapes: str | None = None
    workspace_mb: float | None = None
    layers: Path | None = None
    hardware_compatible: Hardware | None = None
    version_compatible: bool = False
    compute_capability: tuple[str, ...] = ()
    progress: bool = False
    gpu: int = 0

    def __post_init__(self) -> None:
        if wrong := [c for c in self.compute_capability if not re.fullmatch(r"\d+\.\d", c)]:
            raise UsageError(f"--compute-capability {wrong[0]}: expected one such as 8.9")
        if len(set(self.compute_capability)) < len(self.compute_capability):
            raise UsageError(f"--compute-capability {','.join(self.compute_capability)}: one twice")
        if self.engine == "tensorrt-rtx" and self.version_compatible:
            raise UsageError(
                "--version-compatible needs --engine tensorrt: a plan of TensorRT for RTX runs in "
                "the version that built it"
            )
