"""From a network's weights to verified engines.

    import qsm_deploy.export as export

    export.export_network("ir2qsm", weights="model.pth", output="ir2qsm.onnx", precision="fp16")
    export.export_module(module, "card.toml", output="mine.onnx")
    export.export_onnx("theirs.onnx", "card.toml", output="mine.onnx")

Nothing is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsm_deploy.export.by_name import export_network
    from qsm_deploy.export.own.export import export_module, export_onnx

__all__ = ["export_module", "export_network", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "export_network":
        from qsm_deploy.export import by_name

        return by_name.export_network
    from qsm_deploy.export.own import export

    return getattr(export, name)
