"""What a plan was built for: flavour and version of TensorRT, GPUs, shapes; and what else it needs.

It stands in the options of the plan's card, for the runtime to compare with what is there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from qsm_deploy.kernels.errors import CardError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.gpu.device import DeviceProperties
from qsm_deploy.runtime.gpu.engines.tensorrt_library import Flavour

ARCHITECTURES = re.compile(r"sm_\d{2,3}(,sm_\d{2,3})*\+?( \S.*)?")
OPTIONS = ("engine", "versions", "gpu")  # of the card
# other ones of the card that are flags of qsm-export, of the same name
FLAGS = (
    *("residual", "form", "orientations", "dipole_op", "part"),
    *("shapes", "compute_capability", "collector"),
)
NEWER = "newer"  # among versions: later ones of the same major version too


@dataclass(frozen=True)
class PlanTarget:
    """What a plan was built for.

    Attributes
    ----------
    engine, version
        The library that built it.
    newer
        Whether later versions of the same major version run it too.
    gpu
        ``sm_90 NVIDIA H100``: this model only; ``sm_90``: all of this compute capability;
        ``sm_89,sm_120``: of these; a ``+`` at the end: and of higher ones.
    """

    engine: Flavour
    version: str
    newer: bool
    gpu: str

    def options(self) -> dict[str, str]:
        """Return it as options of a card."""
        versions = {"versions": NEWER} if self.newer else {}
        return {"engine": f"{self.engine} {self.version}", "gpu": self.gpu} | versions

    def mismatch(self, version: str, gpu: DeviceProperties) -> str | None:
        """Return how the library's version or the GPU differ, naming both sides, if they do."""
        if not self._serves_version(version):
            newer = " or a later one of that major version" if self.newer else ""
            return f"it was built for {self.engine} {self.version}{newer}, this is {version}"
        if not self.serves(gpu):
            return f"it was built for the GPU {self.gpu}, GPU {gpu.number} is {gpu}"
        return None

    def serves(self, gpu: DeviceProperties) -> bool:
        """Return whether it was built for a GPU."""
        architectures, _, model = self.gpu.partition(" ")
        named = architectures.removesuffix("+").split(",")
        if architectures.endswith("+") and gpu.capability > divmod(int(named[-1][3:]), 10):
            return True
        return gpu.architecture in named and model in ("", gpu.name)

    def _serves_version(self, version: str) -> bool:
        if version == self.version or not self.newer:
            return version == self.version
        here, built = _numbers(version), _numbers(self.version)
        return here[:1] == built[:1] and here >= built


def target_from_card(card: ModelCard, plan: Path | str = "the plan") -> PlanTarget:
    """Return what a plan's card says that it was built for.

    Raises
    ------
    CardError
        If it does not say so.
    """
    options = card.options
    engine, _, version = options.get("engine", "").partition(" ")
    gpu, versions = options.get("gpu", ""), options.get("versions")
    known = engine in get_args(Flavour) and version and versions in (None, NEWER)
    if not (known and ARCHITECTURES.fullmatch(gpu)):
        said = {name: options[name] for name in OPTIONS if name in options}
        raise CardError(
            f"{plan}: its card does not say which engine and GPU it was built for, only {said}; "
            "export it again with this version"
        )
    return PlanTarget(cast(Flavour, engine), version, versions == NEWER, gpu)


def rebuild_command(card: ModelCard, file: str, changes: Mapping[str, str] | None = None) -> str:
    """Return the command that builds a plan again.

    Parameters
    ----------
    card
        Of the plan.
    file
        The plan.
    changes
        Options of the card to change, such as ``shapes`` or ``engine``.
    """
    options = card.options | dict(changes or {})
    bundled = (Path(__file__).parents[2] / "models" / f"{card.network}.onnx").is_file()
    words = ["qsm-export --model", card.network, *([] if bundled else ["--weights FILE"])]
    words += ["-o", file, "--engine", options.get("engine", "tensorrt").split()[0]]
    words += [
        f"--{name.replace('_', '-')} {value}" for name, value in options.items() if name in FLAGS
    ]
    words += ["--version-compatible"] if options.get("versions") == NEWER else []
    words += [] if card.precision == "fp32" else [f"--{card.precision}"]
    words += ["--calibration MAPS"] if card.precision == "int8" else []
    return " ".join([*words, "--force"])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))
