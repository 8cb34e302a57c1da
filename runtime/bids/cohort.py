"""``qsm-run --bids``: every recording of a BIDS dataset, with networks that are opened once."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qsm_deploy.kernels.errors import (
    DataError,
    MemoryLimitError,
    QsmDeployError,
    UnitsError,
    UsageError,
)
from qsm_deploy.runtime.bids.layout import BidsImage, Recording
from qsm_deploy.runtime.bids.metadata import echo_image, field_unit, load_params_of
from qsm_deploy.runtime.bids.output import SUFFIXES, Derivative, claim
from qsm_deploy.runtime.bids.resume import maps_that_stay, wanted_facts
from qsm_deploy.runtime.bids.search import find_recordings, without_recording
from qsm_deploy.runtime.console.peak_memory import rss_bytes
from qsm_deploy.runtime.console.provenance import NAME
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.job import report
from qsm_deploy.runtime.job.beginning import Beginning
from qsm_deploy.runtime.job.memory_limit import within_process
from qsm_deploy.runtime.job.one_scan import LOCAL, measured_scan, read_scan, run_scan
from qsm_deploy.runtime.job.outputs import OutDtype, Outputs, OutUnits, require_dtype
from qsm_deploy.runtime.job.request import Request, begins_with
from qsm_deploy.runtime.local_field.echo_images import EchoImages
from qsm_deploy.runtime.local_field.from_echoes import STEPS, Steps
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, Maker, Reconstructor, open_reconstructor
from qsm_deploy.runtime.scan.params import Params
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles
from qsm_deploy.runtime.scan.unit_names import NOMINAL, FieldUnit

if TYPE_CHECKING:
    from qsm_deploy.runtime.bids.pages import Pages

HAS_MAP = "has a map already"


@dataclass(frozen=True)
class Failure:
    """A recording without a map, and why."""

    name: str
    reason: str
    exit_code: int


@dataclass(frozen=True)
class Outcome:
    """What a run over a dataset has to say.

    Attributes
    ----------
    lines
        One for every map that was made.
    reports
        Of these.
    failures
        Those without one.
    """

    lines: list[str] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Cohort:
    """A dataset, and what becomes of its recordings.

    Attributes
    ----------
    dataset, output
        Where it lies, and where the maps go: ``None`` is its own derivatives.
    participant_labels, source
        Only these, and only what begins with ``localfield`` or ``megre``; ``None`` is all.
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
    html, html_names
        The folder of pages, if there are to be some, and whether these name files.
    """

    dataset: Path
    output: Path | None = None
    participant_labels: Sequence[str] | None = None
    source: Literal["localfield", "megre"] | None = None
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
    html: Path | None = None
    html_names: bool = False


def run_cohort(cohort: Cohort, maker: Maker, host: Host, log: TerminalLog) -> Outcome:
    """Reconstruct the recordings of a dataset, with networks that are opened once, or a method.

    A recording that fails does not keep the others from their maps.

    Raises
    ------
    UsageError
        If maps exist and nothing says what becomes of them, or the network takes no local field.
    DataError
        If it is no BIDS dataset, or holds nothing to reconstruct.
    EngineError
        If the model cannot be loaded.
    """
    if cohort.resume and cohort.force:
        raise UsageError("--resume keeps the maps that --force would overwrite; drop one")
    dataset = cohort.dataset
    output = dataset / "derivatives" / NAME if cohort.output is None else cohort.output
    derivative = Derivative(output, dataset)
    derivative.require_ours()
    if cohort.source is None and begins_with(maker) != LOCAL:
        cohort = replace(cohort, source="megre")
    found = find_recordings(dataset, cohort.participant_labels, cohort.source, output)
    recordings = found.recordings
    for note in found.notes():
        log.warn(note)
    baseline = rss_bytes()
    cohort = replace(cohort, wants=within_process(cohort.wants, host.device, maker))
    limit = cohort.wants.memory_limit
    reconstructor = open_reconstructor(maker, host, log, memory_limit=limit)
    needs = reconstructor.needs
    if needs.quantity == "local_field_ppm":
        reconstructor.inversion.require_fields(1)
    if needs.maps or needs.gives[0] not in SUFFIXES:
        raise UsageError(
            f"{needs.network} takes {' and '.join((needs.quantity, *needs.maps))} and gives "
            f"{' and '.join(needs.gives)}, which --bids does not find or name; run it on each "
            "recording"
        )
    require_dtype(cohort.out_dtype, needs.gives)
    derivative = replace(derivative, gives=needs.gives[0])
    facts = reconstructor.inversion.facts()["model"]
    first = reconstructor.first_weights()
    wanted = wanted_facts(facts, first, cohort.out_units, cohort.out_dtype, cohort.wants.correction)
    made = maps_that_stay(derivative, recordings, wanted, force=cohort.force, resume=cohort.resume)
    without = without_recording(found, cohort.participant_labels or ())
    failures = found.failures | {f"sub-{label}": reason for label, reason in without.items()}
    run = _Run(cohort, reconstructor, derivative, wanted, baseline, log)
    if not cohort.dry_run:
        run.begin([*(r.name for r in recordings), *failures])
    for recording in made:
        run.keep(recording)
    log.about("")
    for name, reason in failures.items():
        run.fail(Failure(name, reason, DataError.exit_code))
    run.all([r for r in recordings if r not in made])
    return run.outcome


@dataclass
class _Run:
    """What all recordings of a run share, and what came of them."""

    cohort: Cohort
    reconstructor: Reconstructor
    derivative: Derivative
    wanted: dict[str, Any]
    baseline_bytes: int
    log: TerminalLog
    outcome: Outcome = field(default_factory=Outcome)
    pages: "Pages | None" = None

    def begin(self, names: Iterable[str]) -> None:
        """Make the folders of what is written."""
        if self.cohort.html is not None:
            from qsm_deploy.runtime.bids.pages import Pages

            self.pages = Pages(self.cohort.html, self.cohort.dataset)
            self.pages.begin(names)
        self.derivative.describe()

    def keep(self, recording: Recording) -> None:
        """Note a recording that has a map."""
        self.log.about(recording.name)
        self.log.tell(HAS_MAP)
        if self.pages is not None:
            self.pages.kept(recording.name)

    def fail(self, failure: Failure) -> None:
        """Note a recording without a map."""
        self.outcome.failures.append(failure)
        if self.pages is not None:
            with self._warning():
                self.pages.failed(failure.name, failure.reason)

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Say what went wrong with pages, which no map depends on."""
        try:
            yield
        except QsmDeployError as error:
            self.log.warn(str(error))

    def all(self, recordings: list[Recording]) -> None:
        """Reconstruct recordings one after the other, last those that another process is at."""
        theirs = [r for r in recordings if not self._tried(r, wait=False)]
        for recording in theirs:
            self._tried(recording, wait=True)
        self.log.about("")

    def _tried(self, recording: Recording, *, wait: bool) -> bool:
        """Reconstruct a recording, or note why not; false if another process is at it."""
        self.log.about(recording.name)
        try:
            if self.cohort.dry_run:
                self._one(recording)
                return True
            with claim(self.derivative.chi(recording), wait=wait) as ours:
                if ours:
                    self._missing(recording)
                return ours
        except QsmDeployError as error:
            failure = Failure(recording.name, str(error), error.exit_code)
        except MemoryError as error:
            reason = f"out of memory ({str(error) or 'no size given'})"
            failure = Failure(recording.name, reason, MemoryLimitError.exit_code)
        except Exception as error:  # a fault of ours, or of a library, in one of many
            reason = f"{type(error).__name__}: {error}"
            failure = Failure(recording.name, reason, QsmDeployError.exit_code)
        self.fail(failure)
        self.log.tell(f"failed: {failure.reason}")
        return True

    def _missing(self, recording: Recording) -> None:
        """Reconstruct a recording, unless another process has meanwhile."""
        cohort = self.cohort
        how = {"force": cohort.force, "resume": cohort.resume}
        if maps_that_stay(self.derivative, [recording], self.wanted, **how):
            self.keep(recording)
        else:
            self._one(recording)

    def _one(self, recording: Recording) -> None:
        """Reconstruct one recording."""
        if self.pages is not None:
            self.pages.clear(recording.name)
        stages = Stages(self.log.stage, baseline_bytes=self.baseline_bytes)
        chi = self.derivative.chi(recording)
        request, measured, kept = self._measured(recording, stages)
        finished = run_scan(request, self.reconstructor, measured, self.log, stages, kept)
        run = finished.report
        self.outcome.reports.append({"recording": recording.name, "map": str(chi), **run})
        if request.dry_run:
            self.outcome.lines.append(f"{recording.name}: {report.plan_line(run)} -> {chi}")
            return
        self.log.tell(f"{run['total_seconds']:.1f} s")
        self.outcome.lines.append(str(chi))
        if self.pages is not None:
            with self._warning():
                self.pages.index()

    def _measured(
        self, recording: Recording, stages: Stages
    ) -> tuple[Request, Scan, dict[Path, bytes]]:
        """Return what is done with a recording, its local field, and the maps on the way."""
        cohort = self.cohort
        if recording.source == "localfield" and self.reconstructor.needs.quantity != LOCAL:
            raise DataError(
                f"{recording.name}: a local field, and {self.reconstructor.needs.network} begins "
                "before; pass --bids-input megre"
            )
        if recording.source == "localfield":
            image = recording.local_field()
            mask = recording.mask(image)
            params = _with_strength(image, cohort.field_strength)
            reading = Reading(
                units=field_unit(image, cohort.units), from_file=params, negate=cohort.negate
            )
            magnitude = self._magnitude(recording)
            files = ScanFiles((image.path,), mask, magnitude=tuple(m.path for m in magnitude))
            request = self._request(recording, [image, *magnitude], files, reading)
            with stages("load"):
                scan = read_scan(request, self.reconstructor)
            if mask is None:
                scan.notes.extend(recording.unused_masks(image))
            return request, scan, {}
        pairs = recording.echoes()
        if cohort.units is not None or cohort.field_strength is not None:
            raise UsageError(
                "--units and --field-strength are for local fields; the sidecars of a MEGRE state "
                "both"
            )
        mask = recording.mask(pairs[0][0])
        phase, second = ([echo_image(image) for image in side] for side in zip(*pairs, strict=True))
        echoes = EchoImages(phase, second, are_parts=pairs[0][0].part == "real")
        files = ScanFiles(tuple(phase.path for phase, _ in pairs), mask)
        reading = Reading(units="rad", negate=cohort.negate, phase_scale=cohort.phase_scale)
        begins = Beginning(files.fields, echoes, steps=cohort.steps)
        request = self._request(recording, [i for pair in pairs for i in pair], files, reading)
        request = replace(request, begins=begins)
        scan, kept = measured_scan(request, self.reconstructor, self.log, stages)
        scan.notes.extend(recording.left_over())
        if mask is None:
            scan.notes.extend(recording.unused_masks(pairs[0][0]))
        labels = {**request.labels, "MagneticFieldStrength": scan.field_strength_t}
        return replace(request, labels=labels), scan, kept

    def _magnitude(self, recording: Recording) -> list[BidsImage]:
        """Return the magnitudes beside a local field, if they are needed."""
        needs = self.reconstructor.inversion.needs
        found = [image for image in recording.images if needs.magnitude and image.part == "mag"]
        if needs.magnitude and not found:
            raise DataError(
                f"{needs.network} takes the edges of a magnitude, and {recording.name} has none "
                "(part-mag) beside its local field; add it, or pass --method tv"
            )
        return found

    def _request(
        self, recording: Recording, images: list[BidsImage], files: ScanFiles, reading: Reading
    ) -> Request:
        cohort, derivative = self.cohort, self.derivative
        # a sidecar without its map is what an interrupted run left
        force = cohort.force or cohort.resume
        outputs = Outputs(
            derivative.chi(recording),
            units=cohort.out_units,
            dtype=cohort.out_dtype,
            force=force,
            html=None if self.pages is None else self.pages.path(recording.name),
            html_names=cohort.html_names,
            name=recording.name,
        )
        labels = derivative.labels(images, files.mask, cohort.out_units, reading.field_strength_t)
        return Request(files, reading, cohort.wants, outputs, labels=labels, dry_run=cohort.dry_run)


def _with_strength(image: BidsImage, stated: float | None) -> Params:
    """Return an image's parameters, its field strength from the command line if it has none."""
    params = load_params_of(image)
    if stated is None:
        return params
    if params.field_strength_t is None:
        return replace(params, field_strength_t=stated)
    if abs(params.field_strength_t - stated) > NOMINAL * stated:
        raise UnitsError(
            f"{image.path.name}: MagneticFieldStrength is {params.field_strength_t:g}, "
            f"--field-strength {stated:g}; drop --field-strength"
        )
    return params
