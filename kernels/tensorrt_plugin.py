"""Loads ``libqsm_tensorrt.so``, the plugin ``qsm::DipoleConv``, into TensorRT 10 and 11."""

import os
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.cuda_build import BUILD_FOLDER, PLUGIN_NAME
from qsm_deploy.kernels.errors import EngineError, MissingDependencyError

NAME = "DipoleConv"
NAMESPACE = ""  # where parsers look whatever the node's domain
ONNX_DOMAIN = "qsm"
LIBRARY_VARIABLE = "QSM_TENSORRT_PLUGIN"
BUILD = "python -m qsm_deploy.kernels.cuda_build --tensorrt-include FOLDER"


def load_dipole_plugin() -> None:
    """Make ``qsm::DipoleConv`` known to TensorRT's parser, builder and runtime.

    Its library is ``$QSM_TENSORRT_PLUGIN``, else where it is built. A plugin of that name that is
    there already stays.

    Raises
    ------
    MissingDependencyError
        If TensorRT is not installed.
    EngineError
        If there is no such library, it cannot be loaded, or TensorRT is older than 10.
    """
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        raise MissingDependencyError("tensorrt", "tensorrt", f"the plugin {NAME}") from error
    if not hasattr(trt, "IPluginV3"):
        raise EngineError(
            f"the plugin {NAME} needs TensorRT 10 or later, this is {trt.__version__}"
        )
    registry = trt.get_plugin_registry()
    if _is_known(registry):
        return
    named = os.environ.get(LIBRARY_VARIABLE)
    library = Path(named) if named else BUILD_FOLDER / PLUGIN_NAME
    if not library.is_file():
        if named:
            raise EngineError(f"${LIBRARY_VARIABLE} names {library}, where there is no file")
        raise EngineError(
            f"no TensorRT plugin at {library}; build it with: {BUILD}, name another one in "
            f"${LIBRARY_VARIABLE}, or export with --dipole-op matmul, which needs none"
        )
    if not registry.load_library(str(library.resolve())) or not _is_known(registry):
        raise EngineError(
            f"TensorRT cannot load the plugin {NAME} from {library}; build it for this version "
            f"of TensorRT with: {BUILD}"
        )


def _is_known(registry: Any) -> bool:
    return any((c.name, c.plugin_namespace) == (NAME, NAMESPACE) for c in registry.all_creators)
