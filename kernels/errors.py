"""The errors a user can meet, one class per cause, each with its process exit code."""

from typing import ClassVar


class QsmDeployError(Exception):
    """Base of every error this package raises on purpose; its message is one readable line."""

    exit_code: ClassVar[int] = 1


class UsageError(QsmDeployError):
    """Options that contradict each other, or an existing output without ``--force``."""

    exit_code = 2


class DataError(QsmDeployError):
    """A file that is missing, unreadable, unwritable, or holds values that cannot be right."""

    exit_code = 3


class GeometryError(DataError):
    """Shapes, voxel sizes, affines or B0 directions that are invalid or do not agree."""


class UnitsError(DataError):
    """A field whose values cannot be in the stated unit, or a unit that lacks its parameters."""


class ProtocolError(DataError):
    """A message stream that breaks the protocol, or a session beyond the server's limits."""


class EngineError(QsmDeployError):
    """A model file, backend or device that cannot run what was asked for."""

    exit_code = 4


class UnservedShapeError(EngineError):
    """Shapes that an engine was not built for; others, as smaller patches, may do.

    ``profile`` is MIN,OPT,MAX of an engine that would serve them, if one could.
    """

    def __init__(self, message: str, profile: str | None = None) -> None:
        super().__init__(message)
        self.profile = profile


class CardError(EngineError):
    """A model card that is missing, malformed, or contradicts its model."""


class MissingDependencyError(EngineError):
    """An optional library that is not installed; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed; "
            f"install it, in the source of qsm-deploy, with: pip install '.[{extra}]'"
        )


class ExportError(EngineError):
    """A network that could not be written as ONNX."""


class AccuracyError(QsmDeployError):
    """An exported model whose output differs from its reference by more than the gate."""

    exit_code = 5


class MemoryLimitError(QsmDeployError):
    """A volume that does not fit the memory limit, even in patches."""

    exit_code = 6


class WeightsError(QsmDeployError):
    """A weights file that is missing, unreadable, or belongs to another network."""

    exit_code = 7
