"""``qsm::DipoleConv`` for TensorRT 10 and 11 in Python, over the CUDA library.

It does what ``csrc/tensorrt_plugin.h`` does and says, and needs no C++ but that library. Fields
and workspace are the same, so either should run what was built with the other. It has met
TensorRT's registry and parser, and not yet a GPU.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from qsm_deploy.kernels.cuda_build import BUILD_FOLDER, PLUGIN_NAME
from qsm_deploy.kernels.cuda_library import (
    CudaLibrary,
    DipoleOperator,
    MultiplierName,
    open_cuda_library,
)
from qsm_deploy.kernels.errors import (
    EngineError,
    GeometryError,
    MissingDependencyError,
    UsageError,
)
from qsm_deploy.kernels.geometry import Geometry

NAME, VERSION = "DipoleConv", "1"
NAMESPACE = ""  # where parsers look whatever the node's domain
ONNX_DOMAIN = "qsm"
INPUTS = ("x", "voxel_size_mm", "b0_direction")
MULTIPLIERS = get_args(MultiplierName)
LIBRARY_VARIABLE = "QSM_TENSORRT_PLUGIN"


@dataclass(frozen=True)
class DipoleNode:
    """What a node is told once; the names and numbers of :class:`DipoleOperator`."""

    multiplier: MultiplierName = DipoleOperator.multiplier
    threshold: float = DipoleOperator.threshold
    lam: float = DipoleOperator.lam

    @classmethod
    def from_fields(cls, fields: Iterable[Any]) -> "DipoleNode":
        """Return the node of TensorRT's plugin fields, ``multiplier``, ``threshold``, ``lambda``.

        Raises
        ------
        UsageError
            If a field is unknown, of another type, or cannot be.
        """
        given: dict[str, Any] = {}
        for field in fields:
            if field.name == "multiplier" and field.type.name == "CHAR":
                given["multiplier"] = field.data.tobytes().rstrip(b"\0").decode(errors="replace")
            elif field.name in ("threshold", "lambda") and field.type.name == "FLOAT32":
                if field.size != 1:
                    raise UsageError(f"{NAME}: {field.name} must be one number, got {field.size}")
                given[field.name.replace("lambda", "lam")] = float(field.data[0])
            else:
                raise UsageError(
                    f"{NAME} has no field {field.name!r} of type {field.type.name}; it has "
                    "multiplier (CHAR), threshold and lambda (FLOAT32)"
                )
        return cls(**given)._checked()

    def operator(self, sizes: Sequence[int]) -> DipoleOperator:
        """Return the operator on x of these (n, c, x, y, z) sizes, of any geometry.

        Raises
        ------
        GeometryError
            If a size is unknown or below 1, or there are not five.
        """
        if len(sizes) != 5 or min(sizes) < 1:
            raise GeometryError(f"x must be (n, c, x, y, z) voxels, each at least 1, got {sizes}")
        n, c, *shape = sizes
        geometry = Geometry(cast(tuple[int, int, int], tuple(shape)))
        return DipoleOperator(geometry, self.multiplier, n * c, self.threshold, self.lam)

    def _checked(self) -> "DipoleNode":
        if self.multiplier not in MULTIPLIERS:
            raise UsageError(
                f"unknown multiplier {self.multiplier!r}; known are {', '.join(MULTIPLIERS)}"
            )
        # In float32, which rounds 2/3 up.
        if self.multiplier == "tkd" and not 0 < self.threshold <= np.float32(2 / 3):
            raise UsageError(f"the TKD threshold must lie in (0, 2/3], got {self.threshold}")
        if self.multiplier == "tikhonov" and not 0 < self.lam < float("inf"):
            raise UsageError(f"Tikhonov's lambda must be positive and finite, got {self.lam}")
        return self


def workspace_bytes(
    library: CudaLibrary, node: DipoleNode, smallest: Sequence[int], largest: Sequence[int]
) -> int:
    """Return the workspace for x of the largest sizes and all between them and the smallest."""
    operator = node.operator(largest)
    if tuple(smallest) == tuple(largest):
        return library.dipole_workspace_bytes(operator)
    return library.dipole_workspace_bound(operator)


def check_inputs(shapes: Sequence[Sequence[int]]) -> None:
    """Check what is known of the inputs' shapes, -1 being any size.

    Raises
    ------
    GeometryError
        If there are not three inputs, or one has another rank or size.
    """
    if len(shapes) != len(INPUTS) or len(shapes[0]) != 5:
        raise GeometryError(f"{NAME} takes {', '.join(INPUTS)}, x (n, c, x, y, z), got {shapes}")
    for name, shape in zip(INPUTS[1:], shapes[1:], strict=True):
        if len(shape) != 1 or shape[0] not in (3, -1):
            raise GeometryError(f"{name} must have the shape (3,), got {tuple(shape)}")


def plugin_creator(trt: Any, library: CudaLibrary) -> Any:
    """Return a new creator of the plugin.

    Parameters
    ----------
    trt
        The module ``tensorrt``, or one that is like it.
    library
        What computes.
    """

    class DipoleConvPlugin(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        def __init__(self, node: DipoleNode) -> None:
            for base in DipoleConvPlugin.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.num_outputs = 1
            self.node = node
            self.fields = _fields(trt, node)  # TensorRT keeps pointers into it
            self.operator: DipoleOperator | None = None
            self.workspace_bytes = 0

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def get_output_data_types(self, input_types: list[Any]) -> list[Any]:
            return [trt.DataType.FLOAT]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, expr_builder: Any) -> Any:
            check_inputs([_known_sizes(dimensions) for dimensions in inputs])
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            tensor = in_out[pos].desc
            is_float32 = tensor.type == trt.DataType.FLOAT
            return bool(is_float32 and tensor.format == trt.TensorFormat.LINEAR)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            self.node.operator(tuple(inputs[0].max))

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            x = inputs[0]
            return workspace_bytes(library, self.node, tuple(x.min), tuple(x.max))

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            check_inputs([tuple(tensor.dims) for tensor in inputs])
            operator = self.node.operator(tuple(inputs[0].dims))
            self.operator, needed = None, library.dipole_workspace_bytes(operator)
            if needed > (bound := library.dipole_workspace_bound(operator)):
                raise EngineError(f"cuFFT needs {needed} bytes, at most {bound} were expected")
            self.operator, self.workspace_bytes = operator, needed

        def enqueue(
            self,
            input_desc: Any,
            output_desc: Any,
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            operator = self.node.operator(tuple(input_desc[0].dims))
            if operator != self.operator:
                raise EngineError("x has another shape than on_shape_change was told")
            x, voxel_size_mm, b0_direction = inputs
            library.dipole_apply_device_geometry(
                operator,
                (voxel_size_mm, b0_direction),
                x,
                outputs[0],
                workspace,
                self.workspace_bytes,
                stream,
            )

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            """TensorRT calls it even where there is nothing to choose."""

        def get_fields_to_serialize(self) -> Any:
            return self.fields.collection

        def clone(self) -> Any:
            return DipoleConvPlugin(self.node)

    class DipoleConvCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.fields = _fields(trt, DipoleNode())
            self.field_names = self.fields.collection

        def create_plugin(self, name: str, fields: Iterable[Any], phase: Any) -> Any:
            return DipoleConvPlugin(DipoleNode.from_fields(fields))

    return DipoleConvCreator()


_registered: list[Any] = []  # creators; TensorRT does not own them


def load_dipole_plugin() -> None:
    """Make ``qsm::DipoleConv`` known to TensorRT: in C++ if that was built, else in Python.

    The library of the one in C++ is ``$QSM_TENSORRT_PLUGIN``, else where it is built.

    Raises
    ------
    MissingDependencyError
        If TensorRT is not installed.
    EngineError
        If neither can be loaded.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    library = Path(named) if named else BUILD_FOLDER / PLUGIN_NAME
    if not named and not library.is_file():
        register_dipole_plugin()
        return
    registry = _registry()
    if _is_known(registry):
        return
    if not library.is_file():
        raise EngineError(f"${LIBRARY_VARIABLE} names {library}, where there is no file")
    if not registry.load_library(str(library.resolve())) or not _is_known(registry):
        raise EngineError(
            f"TensorRT cannot load the plugin {NAME} from {library}; build it for this version "
            "of TensorRT with: python -m qsm_deploy.kernels.cuda_build --tensorrt-include FOLDER"
        )


def register_dipole_plugin(library: CudaLibrary | None = None) -> None:
    """Make ``qsm::DipoleConv`` known to TensorRT's parser, builder and runtime.

    A plugin of that name that is there already stays, as the one in C++.

    Parameters
    ----------
    library
        What computes; by default the one that :func:`open_cuda_library` finds.

    Raises
    ------
    MissingDependencyError
        If TensorRT is not installed.
    EngineError
        If the CUDA library cannot be loaded, or TensorRT is older than 10.
    """
    registry = _registry()
    if _is_known(registry):
        return
    import tensorrt as trt

    creator = plugin_creator(trt, library or open_cuda_library())
    if not registry.register_creator(creator, NAMESPACE):
        raise EngineError(f"TensorRT {trt.__version__} did not take the plugin {NAME}")
    _registered.append(creator)


def _registry() -> Any:
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        raise MissingDependencyError("tensorrt", "tensorrt", f"the plugin {NAME}") from error
    if not hasattr(trt, "IPluginV3"):
        raise EngineError(
            f"the plugin {NAME} needs TensorRT 10 or later, this is {trt.__version__}"
        )
    return trt.get_plugin_registry()


def _is_known(registry: Any) -> bool:
    return any((c.name, c.plugin_namespace) == (NAME, NAMESPACE) for c in registry.all_creators)


class _fields:
    """A node as TensorRT's fields, with the memory that they point to."""

    def __init__(self, trt: Any, node: DipoleNode) -> None:
        kinds = trt.PluginFieldType
        self.values = (
            ("multiplier", np.frombuffer(node.multiplier.encode(), np.int8), kinds.CHAR),
            ("threshold", np.array([node.threshold], np.float32), kinds.FLOAT32),
            ("lambda", np.array([node.lam], np.float32), kinds.FLOAT32),
        )
        self.collection = trt.PluginFieldCollection(
            [trt.PluginField(name, value, kind) for name, value, kind in self.values]
        )


def _known_sizes(dimensions: Any) -> tuple[int, ...]:
    return tuple(
        size.get_constant_value() if size.is_constant() else -1
        for size in (dimensions[axis] for axis in range(len(dimensions)))
    )
