"""From a network's weights to verified engines.

    import qsm_deploy.export as export

    export.export_network("ir2qsm", weights="model.pth", output="ir2qsm.onnx", precision="fp16")

Nothing is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsm_deploy.export.by_name import export_network

__all__ = ["export_network"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qsm_deploy.export import by_name

    return getattr(by_name, name)
