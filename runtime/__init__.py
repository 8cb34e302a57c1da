"""The runtime: from field maps to susceptibility maps.

    import qsm_deploy.runtime as qsm

    chi = qsm.reconstruct(field_ppm, mask, voxel_size_mm=(1, 1, 1), b0_direction=(0, 0, 1))
    result = qsm.run("field.nii.gz", mask="mask.nii.gz", output="chi.nii.gz")
    result = qsm.run(phase=[...], magnitude=[...], mask="brain.nii.gz", output="chi.nii.gz")
    local = qsm.local_field_from_echoes(phase_rad, magnitude, echo_times_s=(0.004, 0.01), ...)
    model = qsm.open_model("ir2qsm.onnx")  # once, for many scans

Nothing is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsm_deploy.kernels.errors import QsmDeployError
    from qsm_deploy.runtime.job.echo_arrays import local_field_from_echoes
    from qsm_deploy.runtime.model import Model, Result, open_model, reconstruct, run

    __version__: str

__all__ = [
    "Model",
    "QsmDeployError",
    "Result",
    "__version__",
    "local_field_from_echoes",
    "open_model",
    "reconstruct",
    "run",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from qsm_deploy.runtime.console.provenance import version

        return version()
    if name.endswith("Error"):  # all of them, one for each cause
        return getattr(importlib.import_module("qsm_deploy.kernels.errors"), name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "job.echo_arrays" if name == "local_field_from_echoes" else "model"
    return getattr(importlib.import_module(f"qsm_deploy.runtime.{home}"), name)
