"""A dataset, and what is asked of all its recordings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.bids.output import Derivative
from qsm_deploy.runtime.bids.search import Found, find_recordings, without_recording
from qsm_deploy.runtime.cohort.outcomes import FOLDER
from qsm_deploy.runtime.cohort.sharding import Shard
from qsm_deploy.runtime.console.provenance import NAME
from qsm_deploy.runtime.job.one_scan import LOCAL
from qsm_deploy.runtime.job.outputs import OutDtype, OutUnits
from qsm_deploy.runtime.job.request import begins_with
from qsm_deploy.runtime.local_field.from_echoes import STEPS, Steps
from qsm_deploy.runtime.methods.method import DEFAULT, Method
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, Maker, gpu_number, models_of
from qsm_deploy.runtime.scan.unit_names import FieldUnit

RECORDING = "{recording}"  # in the names of files that are made for each


@dataclass(frozen=True)
class Cohort:
    """A dataset, and what becomes of its recordings.

    Attributes
    ----------
    dataset, output
        Where it lies, and where the maps go: ``None`` is its own derivatives.
    maker, host
        What makes the maps, and where it runs.
    participant_labels, source, shard
        Only these, only what begins with ``localfield`` or ``megre``, and only a part of it;
        ``None`` is all.
    wants
        What is asked of every reconstruction.
    units, field_strength, negate, phase_scale
        How local fields and phases are to be understood where the dataset does not say.
    steps
        How local fields are made of echoes.
    out_units, out_dtype
        Of the maps, as they are stored.
    force, resume
        Whether maps that exist are made again, or kept.
    dry_run
        Whether to stop before anything is computed.
    figure, report
        The files of each recording, ``{recording}`` in their names for its own.
    html, html_names
        The folder of pages, if there are to be some, and whether these name files.
    outcomes, table
        The folder of what became of each recording, and the table of all; ``None`` is beside the
        maps, but no table of a shard.
    reports
        Whether all that is known of every run is wanted back.
    attempt
        The how many-th at each recording.
    """

    dataset: Path
    maker: Maker = field(default_factory=lambda: Method(DEFAULT))
    host: Host = field(default_factory=Host)
    output: Path | None = None
    participant_labels: Sequence[str] | None = None
    source: Literal["localfield", "megre"] | None = None
    shard: Shard | None = None
    wants: Wants = field(default_factory=Wants)
    units: FieldUnit | None = None
    field_strength: float | None = None
    negate: bool = False
    phase_scale: str | None = None
    steps: Steps = STEPS
    out_units: OutUnits = "ppm"
    out_dtype: OutDtype = "float32"
    force: bool = False
    resume: bool = False
    dry_run: bool = False
    figure: Path | None = None
    report: Path | None = None
    html: Path | None = None
    html_names: bool = False
    outcomes: Path | None = None
    table: Path | None = None
    reports: bool = False
    attempt: int = 1

    @property
    def derivative(self) -> Derivative:
        """Where its maps go."""
        beside = self.dataset / "derivatives" / NAME
        return Derivative(beside if self.output is None else self.output, self.dataset)

    @property
    def outcomes_folder(self) -> Path:
        """Where it is written down what became of each recording."""
        return self.derivative.root / FOLDER if self.outcomes is None else self.outcomes

    @property
    def on_gpu(self) -> bool:
        """Whether its maps are made on one."""
        return gpu_number(self.host.device, models_of(self.maker)) is not None

    def from_anywhere(self) -> "Cohort":
        """Return it with paths that do not depend on the folder that a process runs in."""
        maker = self.maker
        if not isinstance(maker, Method):
            maker = [one if isinstance(one, Method) else one.absolute() for one in maker]
        names = ("output", "figure", "report", "html", "outcomes", "table")
        given = {name: path for name in names if (path := getattr(self, name)) is not None}
        absolute: dict[str, Any] = {name: path.absolute() for name, path in given.items()}
        return replace(self, dataset=self.dataset.absolute(), maker=maker, **absolute)

    def sharing(self, threads: int, memory_bytes: int | None) -> "Cohort":
        """Return what one of several processes does, with its share of what nobody has allotted.

        On a GPU neither is shared.
        """
        if self.on_gpu:
            return self
        host = replace(self.host, threads=self.host.threads or threads)
        limit = self.wants.memory_limit or memory_bytes
        return replace(self, host=host, wants=replace(self.wants, memory_limit=limit))

    def find(self) -> Found:
        """Return the recordings, and participants that have none among the failures.

        See :func:`find_recordings`.
        """
        source, labels = self.source, self.participant_labels
        if source is None and begins_with(self.maker) != LOCAL:
            source = "megre"
        has = None if self.shard is None else self.shard.has
        found = find_recordings(self.dataset, labels, source, self.derivative.root, has)
        asked = [label.removeprefix("sub-") for label in labels or ()]
        without = without_recording(found, filter(has, asked) if has else asked)
        more = {f"sub-{label}": reason for label, reason in without.items()}
        return replace(found, failures=found.failures | more)


def file_of(pattern: Path, name: str) -> Path:
    """Return the file of a recording."""
    return Path(str(pattern).replace(RECORDING, name))


def require_pattern(pattern: Path, flag: str, ending: str) -> None:
    """Refuse names of files that would be one for all recordings.

    Raises
    ------
    UsageError
        If the pattern does not name the recording, or has another ending.
    """
    if RECORDING not in str(pattern) or pattern.suffix != ending:
        raise UsageError(
            f"--{flag} {pattern}: with --bids it is made of every recording; write {RECORDING} for "
            f"its name and end in {ending}, such as --{flag} '{flag}s/{RECORDING}{ending}'"
        )
