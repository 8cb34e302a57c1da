"""One recording of a cohort after the other, with networks that are opened once, or a method."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import (
    DataError,
    MemoryLimitError,
    QsmDeployError,
    UnitsError,
    UsageError,
)
from qsm_deploy.runtime.bids.layout import BidsImage, Recording
from qsm_deploy.runtime.bids.metadata import echo_image, field_unit, load_params_of
from qsm_deploy.runtime.bids.output import SUFFIXES, Derivative, claim, make_folder
from qsm_deploy.runtime.bids.resume import maps_that_stay, wanted_facts
from qsm_deploy.runtime.cohort.cohort import Cohort, file_of
from qsm_deploy.runtime.cohort.findings import findings_of
from qsm_deploy.runtime.cohort.outcomes import Outcome, OutcomeFile
from qsm_deploy.runtime.cohort.pages import page_of
from qsm_deploy.runtime.console.peak_memory import rss_bytes
from qsm_deploy.runtime.console.provenance import version
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.job import report
from qsm_deploy.runtime.job.beginning import Beginning
from qsm_deploy.runtime.job.memory_limit import within_process
from qsm_deploy.runtime.job.one_scan import LOCAL, measured_scan, read_scan, run_scan
from qsm_deploy.runtime.job.outputs import Outputs, require_dtype
from qsm_deploy.runtime.job.request import Request
from qsm_deploy.runtime.local_field.echo_images import EchoImages
from qsm_deploy.runtime.local_field.from_echoes import parameters
from qsm_deploy.runtime.reconstructor import open_reconstructor
from qsm_deploy.runtime.scan.params import Params
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles
from qsm_deploy.runtime.scan.unit_names import NOMINAL


@dataclass(frozen=True)
class Facts:
    """What all maps of a cohort have alike.

    Attributes
    ----------
    gives
        What they are, by the name in cards.
    wanted
        What their sidecars say; see :func:`wanted_facts`.
    """

    gives: str
    wanted: dict[str, Any]


class CohortReconstructor:
    """What makes the maps of a cohort, opened once.

    Parameters
    ----------
    cohort
        What is asked of all.
    log
        Takes notes and progress.

    Raises
    ------
    UsageError
        If the network takes what is not found in a dataset.
    EngineError
        If the model cannot be loaded.
    MemoryLimitError
        If the program alone takes what it may.
    """

    def __init__(self, cohort: Cohort, log: TerminalLog) -> None:
        self._baseline_bytes = rss_bytes()
        host, maker = cohort.host, cohort.maker
        wants = within_process(cohort.wants, host.device, maker)
        self.cohort, self.log = replace(cohort, wants=wants), log
        self.reconstructor = open_reconstructor(maker, host, log, memory_limit=wants.memory_limit)
        needs = self.reconstructor.needs
        if needs.quantity == LOCAL:
            self.reconstructor.inversion.require_fields(1)
        if needs.maps or needs.gives[0] not in SUFFIXES:
            raise UsageError(
                f"{needs.network} takes {' and '.join((needs.quantity, *needs.maps))} and gives "
                f"{' and '.join(needs.gives)}, which --bids does not find or name; run it on each "
                "recording"
            )
        require_dtype(cohort.out_dtype, needs.gives)
        model = self.reconstructor.inversion.facts()["model"]
        first = self.reconstructor.first_weights()
        stored = cohort.out_units, cohort.out_dtype
        wanted = wanted_facts(model, first, *stored, wants.correction, parameters(cohort.steps))
        self.facts = Facts(needs.gives[0], wanted)
        self._weights_sha256 = model.get("weights_sha256")

    @property
    def derivative(self) -> Derivative:
        """Where the maps go."""
        return replace(self.cohort.derivative, gives=self.facts.gives)

    def outcome(self, recording: Recording, *, wait: bool) -> Outcome:
        """Reconstruct a recording, whatever comes of it.

        Parameters
        ----------
        recording
            Which one.
        wait
            Whether to wait while another process is at it.
        """
        self.log.about(recording.name)
        chi = self.derivative.chi(recording)
        outcome = Outcome(
            recording.name,
            "done",
            map=str(chi),
            version=version(),
            weights_sha256=self._weights_sha256,
            attempt=self.cohort.attempt,
        )
        began = time.perf_counter()
        try:
            if self.cohort.dry_run:
                outcome = self._made(recording, outcome)
            else:
                with claim(chi, wait=wait) as ours:
                    if not ours:
                        outcome = replace(outcome, state="taken")
                    elif self._stays(recording):
                        outcome = replace(outcome, again=True)
                    else:
                        outcome = self._made(recording, outcome)
        except QsmDeployError as error:
            outcome = _failed(outcome, error.exit_code, str(error))
        except MemoryError as error:
            reason = f"out of memory ({str(error) or 'no size given'})"
            outcome = _failed(outcome, MemoryLimitError.exit_code, reason)
        except Exception as error:  # a fault of ours, or of a library, in one of many
            reason = f"{type(error).__name__}: {error}"
            outcome = _failed(outcome, QsmDeployError.exit_code, reason)
        finally:
            self.log.about("")
        seconds = round(time.perf_counter() - began, 3)
        outcome = replace(outcome, seconds=seconds, finished_s=time.time())
        if outcome.state not in ("done", "failed") or self.cohort.dry_run:
            return outcome
        try:  # at once: whoever asked for it may be gone
            OutcomeFile(self.cohort.outcomes_folder, self.cohort.shard).append(outcome)
        except DataError as error:
            self.log.warn(str(error))
        return replace(outcome, is_written=True)

    def _stays(self, recording: Recording) -> bool:
        """Return whether there is a map of it that this run would make.

        Whoever begins has looked at those that there were; one that has come since, by another
        process or an attempt that was thought lost, is no reason to fail.
        """
        force = self.cohort.force
        how = {"force": force, "resume": not force}
        return bool(maps_that_stay(self.derivative, [recording], self.facts.wanted, **how))

    def _made(self, recording: Recording, outcome: Outcome) -> Outcome:
        """Reconstruct one recording."""
        stages = Stages(self.log.stage, baseline_bytes=self._baseline_bytes)
        request, measured, kept = self._measured(recording, stages)
        if not request.dry_run:
            for path in (request.outputs.figure, request.outputs.report):
                if path is not None:
                    make_folder(path.parent, "--figure or --report")
            if request.outputs.html is not None:  # gone while the map is made
                request.outputs.html.unlink(missing_ok=True)
        finished = run_scan(request, self.reconstructor, measured, self.log, stages, kept)
        run = finished.report
        if self.cohort.reports:
            outcome = replace(outcome, report=run)
        if request.dry_run:
            return replace(outcome, state="planned", reason=report.plan_line(run))
        peak = max(stages.peak_bytes.values(), default=0)
        found, wrong = findings_of(finished, recording)
        for text in wrong:  # the map is there, whatever else fails
            self.log.warn(text)
        return replace(outcome, peak_bytes=peak, findings=found)

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
            report=None if cohort.report is None else file_of(cohort.report, recording.name),
            figure=None if cohort.figure is None else file_of(cohort.figure, recording.name),
            html=None if cohort.html is None else page_of(cohort.html, recording.name),
            html_names=cohort.html_names,
            name=recording.name,
        )
        labels = derivative.labels(images, files.mask, cohort.out_units, reading.field_strength_t)
        return Request(files, reading, cohort.wants, outputs, labels=labels, dry_run=cohort.dry_run)


def _failed(outcome: Outcome, code: int, reason: str) -> Outcome:
    return replace(outcome, state="failed", exit_code=code, reason=reason)


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
