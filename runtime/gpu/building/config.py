"""How an engine is built: what it computes in, for which GPUs and versions, in which memory.

What a library cannot do is found by asking it, not by its version.
"""

from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.engines.plan_target import PlanTarget
from qsm_deploy.runtime.gpu.engines.tensorrt_library import (
    Library,
    compute_capabilities,
    error_log,
    open_library,
    start,
)

if TYPE_CHECKING:
    import tensorrt

BYTES_PER_MB = 10**6
LEVELS = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
AMPERE_PLUS = "sm_80+"
TURING = (7, 5)  # which TensorRT for RTX builds for only where it is named


def builder_library(choices: PlanChoices) -> Library:
    """Return the library that builds, which is seen to have a GPU if it needs one.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    EngineError
        If it builds on a GPU and there is none.
    """
    library = open_library(choices.engine, f"--engine {choices.engine}")
    if choices.engine == "tensorrt":
        building_gpu(choices)
    return library


def building_gpu(choices: PlanChoices) -> str:
    """Return the GPU that is measured while it builds, if one is."""
    if choices.engine == "tensorrt-rtx":
        return "no GPU"
    from qsm_deploy.runtime.gpu.cuda_device import device_properties  # of CUDA's bindings

    return str(device_properties(choices.gpu))


def plan_target(choices: PlanChoices) -> PlanTarget:
    """Return what a plan will have been built for, once it is; nothing is built.

    Raises
    ------
    UsageError
        If the library has not what was chosen.
    MissingDependencyError, EngineError
        As :func:`builder_library`.
    """
    library = builder_library(choices)
    builder = start(library.Builder, error_log(library))
    builder_config(library, builder, choices)  # refuses what it cannot do
    if choices.compute_capability:
        gpu = ",".join(f"sm_{c.replace('.', '')}" for c in choices.compute_capability)
    elif choices.engine == "tensorrt-rtx":
        served = sorted(compute_capabilities(library).keys() - {TURING})
        gpu = ",".join("sm_{}{}".format(*capability) for capability in served) + "+"
    elif choices.hardware_compatible == "ampere-plus":
        gpu = AMPERE_PLUS
    else:
        gpu = building_gpu(choices)
        if choices.hardware_compatible:
            gpu, _, _ = gpu.partition(" ")
    return PlanTarget(choices.engine, library.__version__, choices.version_compatible, gpu)


def builder_config(
    library: Library, builder: "tensorrt.Builder", choices: PlanChoices
) -> "tensorrt.IBuilderConfig":
    """Return the configuration that a user chose; FP32 is FP32, without TF32.

    Raises
    ------
    UsageError
        If the library has not what was chosen.
    """
    config = builder.create_builder_config()
    config.clear_flag(library.BuilderFlag.TF32)
    if choices.workspace_mb is not None:
        limit = int(choices.workspace_mb * BYTES_PER_MB)
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, limit)
    if choices.layers is not None:
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    if choices.version_compatible:
        config.set_flag(library.BuilderFlag.VERSION_COMPATIBLE)
    if choices.hardware_compatible is not None:
        _set_hardware(library, config, choices)
    if choices.compute_capability:
        _set_capabilities(library, config, choices)
    return config


def _set_hardware(
    library: Library, config: "tensorrt.IBuilderConfig", choices: PlanChoices
) -> None:
    name = LEVELS[f"{choices.hardware_compatible}"]
    level = getattr(library.HardwareCompatibilityLevel, name, None)
    if level is not None:
        config.hardware_compatibility_level = level
    if level is None or config.hardware_compatibility_level != level:
        instead = " use --compute-capability" if hasattr(library, "ComputeCapability") else ""
        raise UsageError(
            f"--hardware-compatible {choices.hardware_compatible}: {choices.engine} "
            f"{library.__version__} does not build for other GPUs that way;"
            f"{instead or ' leave it out, or take the other level'}"
        )


def _set_capabilities(
    library: Library, config: "tensorrt.IBuilderConfig", choices: PlanChoices
) -> None:
    known = compute_capabilities(library)
    if not known or not (
        hasattr(config, "num_compute_capabilities") and hasattr(config, "set_compute_capability")
    ):
        raise UsageError(
            f"--compute-capability: {choices.engine} {library.__version__} builds for the GPU "
            "that is there; use --hardware-compatible, or --engine tensorrt-rtx"
        )
    config.num_compute_capabilities = len(choices.compute_capability)
    for index, text in enumerate(choices.compute_capability):
        kind = known.get(tuple(map(int, text.split("."))))
        if kind is None or not config.set_compute_capability(kind, index):
            names = ", ".join("{}.{}".format(*capability) for capability in known)
            raise UsageError(
                f"--compute-capability {text}: {choices.engine} {library.__version__} builds for "
                f"{names}"
            )
