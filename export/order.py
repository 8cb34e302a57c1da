"""What is asked of an export, whatever network it is of: file, precision, engine, calibration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsm_deploy.export.networks.network_spec import flag
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import GraphPrecision, ModelCard
from qsm_deploy.runtime.card.read import ONNX, PLAN
from qsm_deploy.runtime.gpu.engines.tensorrt_library import Flavour, installed_engines, open_library
from qsm_deploy.runtime.job.request import PathLike

if TYPE_CHECKING:
    from qsm_deploy.calibration.int8.calibration import Int8Choices
    from qsm_deploy.export.networks.network import Network
    from qsm_deploy.export.write_network import Exported
    from qsm_deploy.runtime.gpu.building.choices import PlanChoices

# what is chosen of a plan, and of INT8, by the names of the flags
ABOUT_PLANS = (
    *("shapes", "workspace_mb", "layers"),
    *("hardware_compatible", "version_compatible", "compute_capability"),
)
ABOUT_INT8 = (
    *("calibration_units", "collector", "patches", "seed"),
    *("budget_ppb", "budget_xsim", "budget_max_ppb"),
)
COMMON = (
    *("output", "precision", "calibration", "engine", "gate_ppb", "force"),
    *ABOUT_PLANS,
    *ABOUT_INT8,
)
# those that the calibration knows by another name
RENAMED = {"calibration_units": "units"}
BUDGETS = {"budget_ppb": "median_ppb", "budget_xsim": "xsim", "budget_max_ppb": "max_ppb"}


@dataclass(frozen=True)
class Order:
    """What a user asks for; the keywords are those of ``export_network``.

    Attributes
    ----------
    name
        The network's, which a file is named after.
    chosen
        What was chosen of a plan and of INT8, by the names of the flags.

    Raises
    ------
    UsageError
        If these contradict each other.
    MissingDependencyError
        If the engine's library is not installed.
    """

    name: str
    output: PathLike | None = None
    precision: GraphPrecision = "fp32"
    calibration: PathLike | None = None
    engine: Flavour | None = None
    gate_ppb: float | None = None
    force: bool = False
    say: Callable[[str], None] = lambda line: None
    bar: bool = False
    chosen: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_int8()
        if self.flavour is not None:
            open_library(self.flavour, f"--engine {self.flavour}")
            self.say(f"writing {self.path} for {self.flavour}: {self._target[2]}")
            return
        # layers in INT8 are worth a report without a plan too
        about = set(self._about_plan) - {"layers" if self.precision == "int8" else ""}
        for name in (name for name in ABOUT_PLANS if name in about):
            raise UsageError(f"{flag(name)} is about plans, {self.path} is none; pass -o NAME.plan")
        if self.output is None and self.precision != "fp32":
            self.say(f"writing {self.path}: {self._target[2]}")

    @cached_property
    def _target(self) -> tuple[Path, Flavour | None, str]:
        stated = None if self.output is None else Path(self.output)
        return choose_output(stated, self.engine, self.name, self.precision)

    @property
    def path(self) -> Path:
        """The file to write."""
        return self._target[0]

    @property
    def flavour(self) -> Flavour | None:
        """The engine that it is for, ``None`` for ONNX."""
        return self._target[1]

    @property
    def _about_plan(self) -> dict[str, Any]:
        return {name: self.chosen[name] for name in ABOUT_PLANS if name in self.chosen}

    @property
    def fp16_path(self) -> Path:
        """The file of a network that is better left in FP16."""
        if self.precision == "int8" and self.output is None:
            return self.path.with_name(
                f"{self.path.stem.removesuffix('-int8')}-fp16{self.path.suffix}"
            )
        return self.path

    def check_outputs(self) -> None:
        """Refuse what could not be written, before anything takes long."""
        from qsm_deploy.export.write_network import check_outputs

        check_outputs({self.path, self.fp16_path}, self.chosen.get("layers"), force=self.force)

    def write(self, module: "Network", card: ModelCard) -> "Exported":
        """Write a network; see :func:`qsm_deploy.export.write_network.write_network`."""
        from qsm_deploy.export.write_network import write_network

        return write_network(
            module,
            card,
            self.path,
            precision=self.precision,
            plan=self._plan(),
            int8=self._int8(),
            fp16_output=self.fp16_path,
            gate_ppb=self.gate_ppb,
            force=self.force,
            say=self.say,
        )

    def _plan(self) -> "PlanChoices | None":
        if self.flavour is None:
            return None
        from qsm_deploy.runtime.gpu.building.choices import PlanChoices

        return PlanChoices(self.flavour, **self._about_plan, progress=self.bar)

    def _check_int8(self) -> None:
        """Refuse INT8 without calibration data, and what is about INT8 without it."""
        if self.precision != "int8":
            about = {"calibration": self.calibration, **self.chosen}
            given = [n for n in ("calibration", *ABOUT_INT8) if about.get(n) is not None]
            if given:
                raise UsageError(f"{flag(given[0])} is about INT8; pass --int8 too")
            return
        if self.calibration is None:
            raise UsageError(
                "--int8 needs --calibration: a folder or a list of field maps with masks, or "
                "phantoms"
            )
        if self.gate_ppb is not None:
            raise UsageError("--gate-ppb is for the other precisions; --int8 has --budget-ppb")

    def _int8(self) -> "Int8Choices | None":
        """Return what the user chose about INT8, the defaults for the rest."""
        if self.calibration is None:
            return None
        from qsm_deploy.calibration.int8.calibration import Int8Choices
        from qsm_deploy.calibration.int8.search import Budget
        from qsm_deploy.runtime.console.terminal import bar_on_terminal, no_progress

        chosen = self.chosen
        names = [n for n in (*ABOUT_INT8, "layers") if n in chosen and n not in BUDGETS]
        budget = {ours: chosen[name] for name, ours in BUDGETS.items() if name in chosen}
        return Int8Choices(
            str(self.calibration),
            **{RENAMED.get(name, name): chosen[name] for name in names},
            budget=Budget(**budget),
            progress=bar_on_terminal if self.bar else no_progress,
        )


def given_options(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say something, as a command line leaves the others at nothing."""
    return {n: v for n, v in chosen.items() if v is not None and v is not False and v != ()}


def choose_output(
    given: Path | None, engine: Flavour | None, network: str, precision: GraphPrecision
) -> tuple[Path, Flavour | None, str]:
    """Return the file, the engine that it is for, ``None`` for ONNX, and why in words.

    Parameters
    ----------
    given, engine
        What was asked for, if anything was.
    network, precision
        What a file is named after.

    Raises
    ------
    UsageError
        If the suffix is another, or an engine was asked for that an ONNX file does not need.
    """
    installed = installed_engines()
    if given is not None:
        if given.suffix not in (ONNX, PLAN):
            raise UsageError(f"-o {given}: give it the suffix {ONNX}, or {PLAN} for TensorRT")
        if given.suffix == ONNX and engine is not None:
            raise UsageError(f"-o {given}: --engine {engine} builds a plan; give it {PLAN}")
        if given.suffix == ONNX:
            return given, None, "asked for"
        return given, engine or (installed or ("tensorrt",))[0], "asked for"
    stem = f"{network}-{precision}"
    if engine is not None:
        return Path(stem + PLAN), engine, "asked for"
    if precision == "fp32":
        return Path(stem + ONNX), None, "a file for every backend"
    if installed:
        return Path(stem + PLAN), installed[0], f"{installed[0]} is installed"
    return Path(stem + ONNX), None, "no flavour of TensorRT is installed"
