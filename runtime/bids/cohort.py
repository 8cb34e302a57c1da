"""``qsm-run --bids``: every recording of a BIDS dataset, with networks that are opened once."""

import argparse
import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from qsm_deploy.kernels.errors import (
    DataError,
    MemoryLimitError,
    QsmDeployError,
    UnitsError,
    UsageError,
)
from qsm_deploy.runtime.bids.layout import BidsImage, Recording
from qsm_deploy.runtime.bids.megre import scan_from_echoes
from qsm_deploy.runtime.bids.metadata import field_unit, load_params_of
from qsm_deploy.runtime.bids.output import Derivative, make_folder
from qsm_deploy.runtime.bids.resume import maps_that_stay, wanted_facts
from qsm_deploy.runtime.bids.search import find_recordings, without_recording
from qsm_deploy.runtime.console.peak_memory import rss_bytes
from qsm_deploy.runtime.console.provenance import NAME
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.networks import Networks, open_networks
from qsm_deploy.runtime.run import report
from qsm_deploy.runtime.run.job import memory_limit, read_scan, run_scan
from qsm_deploy.runtime.run.request import (
    Outputs,
    Request,
    correction_from,
    models_alone,
    patch_options_from,
)
from qsm_deploy.runtime.scan.params import Params
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles

# what a dataset's own files say of every recording, or what is made for one recording only
FROM_DATASET = (
    *("mask", "params", "echo_time", "voxel_size", "b0_direction"),
    *("truth", "labels", "figure", "report"),
)


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
    text
        A line for every map that was made.
    failures
        Those without one.
    """

    text: str
    failures: list[Failure]


def run_cohort(arguments: argparse.Namespace) -> Outcome:
    """Reconstruct the recordings of a dataset.

    A recording that fails does not keep the others from their maps.

    Raises
    ------
    UsageError
        If flags contradict ``--bids``, or maps exist and nothing says what becomes of them.
    DataError
        If it is no BIDS dataset, or holds nothing to reconstruct.
    EngineError
        If the model cannot be loaded.
    """
    _require_flags(arguments)
    dataset: Path = arguments.bids
    output = dataset / "derivatives" / NAME if arguments.output is None else arguments.output
    derivative = Derivative(output, dataset)
    derivative.require_ours()
    recordings = find_recordings(dataset, arguments.participant_label, arguments.bids_input, output)
    limit, baseline = memory_limit(arguments), rss_bytes()
    networks = open_networks(models_alone(arguments.files), arguments, 1, stay=True)
    if networks.card.task != "local_field->chi":
        raise UsageError(
            f"{networks.card.network} takes the wrapped phase of one echo, --bids reconstructs "
            "from local fields; run it on each file"
        )
    wanted = wanted_facts(
        networks.card,
        networks.sessions[-1].precision,
        arguments.out_units,
        correction_from(arguments),
    )
    made = maps_that_stay(
        derivative, recordings, wanted, force=arguments.force, resume=arguments.resume
    )
    if not arguments.dry_run:
        derivative.describe()
    log = TerminalLog(quiet=arguments.quiet)
    for recording in made:
        log.tell(f"{recording.name}: has a map already")
    cohort = _Cohort(arguments, networks, derivative, limit, baseline, log)
    lines, failures = cohort.run([r for r in recordings if r not in made])
    for label in without_recording(recordings, arguments.participant_label or ()):
        reason = "neither a local field nor part-phase MEGRE to begin with"
        failures.append(Failure(f"sub-{label}", reason, DataError.exit_code))
    return Outcome("\n".join(lines), failures)


@dataclass
class _Cohort:
    """What all recordings of a run share."""

    flags: argparse.Namespace
    networks: Networks
    derivative: Derivative
    limit: int
    baseline_bytes: int
    log: TerminalLog

    def run(self, recordings: list[Recording]) -> tuple[list[str], list[Failure]]:
        """Return a line for every map, and the failures."""
        lines, failures = [], []
        for recording in recordings:
            self.log.about(recording.name)
            try:
                lines.append(self._one(recording))
            except QsmDeployError as error:
                failures.append(Failure(recording.name, str(error), error.exit_code))
            except MemoryError as error:
                reason = f"out of memory ({str(error) or 'no size given'})"
                failures.append(Failure(recording.name, reason, MemoryLimitError.exit_code))
            else:
                continue
            self.log.tell(f"failed: {failures[-1].reason}")
        self.log.about("")
        return lines, failures

    def _one(self, recording: Recording) -> str:
        """Reconstruct one recording and return what to print of it."""
        stages = Stages(self.log.stage, baseline_bytes=self.baseline_bytes)
        chi = self.derivative.chi(recording)
        request, measured = self._measured(recording, stages)
        if not self.flags.dry_run:
            make_folder(chi.parent)
        try:
            run = run_scan(request, self.networks, measured, self.limit, self.log, stages)
        except BaseException:
            with contextlib.suppress(OSError):
                os.removedirs(chi.parent)  # as far up as nothing else is in it
            raise
        if self.flags.json:
            return report.json_line({"recording": recording.name, "map": str(chi), **run})
        if self.flags.dry_run:
            return f"{recording.name}: {report.plan_line(run)} -> {chi}"
        self.log.tell(f"{run['total_seconds']:.1f} s")
        return str(chi)

    def _measured(self, recording: Recording, stages: Stages) -> tuple[Request, Scan]:
        """Return what is done with a recording, and its local field."""
        if recording.source == "localfield":
            image = recording.local_field()
            mask = recording.mask(image)
            params = _with_strength(image, self.flags.field_strength)
            unit = field_unit(image, self.flags.units)
            reading = Reading(units=unit, from_file=params, negate=self.flags.negate)
            request = self._request(recording, [image], ScanFiles((image.path,), mask), reading)
            with stages("load"):
                return request, read_scan(request, self.networks)
        pairs = recording.echoes()
        if self.flags.units is not None or self.flags.field_strength is not None:
            raise UsageError(
                "--units and --field-strength are for local fields; the sidecars of a MEGRE state "
                "both"
            )
        mask = recording.mask(pairs[0][0])
        scan = scan_from_echoes(pairs, mask, self.limit, stages, negate=self.flags.negate)
        files = ScanFiles(tuple(phase.path for phase, _ in pairs), mask)
        stated = Params(field_strength_t=scan.field_strength_t)
        reading = Reading(units="rad", from_file=stated, negate=self.flags.negate)
        images = [image for pair in pairs for image in pair]
        return self._request(recording, images, files, reading), scan

    def _request(
        self, recording: Recording, images: list[BidsImage], files: ScanFiles, reading: Reading
    ) -> Request:
        flags, derivative = self.flags, self.derivative
        # a sidecar without its map is what an interrupted run left
        stated = {"units": reading.units, "force": flags.force or flags.resume}
        strength = reading.field_strength_t
        return Request(
            tuple(self.networks.models),
            files,
            Outputs(derivative.chi(recording), derivative.sidecar(recording), None, None),
            reading,
            correction_from(flags),
            patch_options_from(flags),
            argparse.Namespace(**vars(flags) | stated),
            derivative.labels(images, files.mask, flags.out_units, strength),
        )


def _with_strength(image: BidsImage, stated: float | None) -> Params:
    """Return an image's parameters, its field strength from the command line if it has none."""
    params = load_params_of(image)
    if stated is None:
        return params
    if params.field_strength_t not in (None, stated):
        raise UnitsError(
            f"{image.path.name}: MagneticFieldStrength is {params.field_strength_t:g}, "
            f"--field-strength {stated:g}; drop --field-strength"
        )
    return replace(params, field_strength_t=stated)


def _require_flags(arguments: argparse.Namespace) -> None:
    for name in FROM_DATASET:
        if getattr(arguments, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for one recording; --bids takes what it needs "
                "from the dataset"
            )
    if arguments.resume and arguments.force:
        raise UsageError("--resume keeps the maps that --force would overwrite; drop one")
