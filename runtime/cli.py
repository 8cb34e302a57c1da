"""``qsm-run``: a field map in, a susceptibility map out."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.console.command import fail, run_command
from qsm_deploy.runtime.job.arguments import (
    FIELD,
    FILES,
    FOR_A_DATASET,
    FOR_ONE,
    METHOD,
    NAME,
    OF_COHORT,
    OF_DICOM,
    OF_DICOM_OUT,
    STEPS,
    WANTED,
    WRITTEN,
    host_from,
    parser,
)

if TYPE_CHECKING:
    from pathlib import Path

    from qsm_deploy.runtime.cohort.cohort import Cohort
    from qsm_deploy.runtime.cohort.driver import Result
    from qsm_deploy.runtime.cohort.pool import Pool
    from qsm_deploy.runtime.reconstructor import Maker


OF_DASK = ("cluster_config", "cluster_tls", "cluster_insecure")
NOT_OF_STATUS = ("cluster", "force", "resume", "dry_run", "html", "figure", "report")
AFTER_TOTAL = ("quality", "background")  # steps to a local field


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    p = parser()
    arguments = p.parse_intermixed_args(argv)
    _require_mode(p, arguments)
    if arguments.bids is not None and not arguments.stages:
        return _status(arguments) if arguments.status else _run_bids(arguments)
    run = _run if arguments.dicom is None else _run_dicom
    return run_command(NAME, lambda: run(arguments))


def _require_mode(p: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Stop where nothing says which fields to read, or a flag of a dataset stands without one."""
    ci = arguments.qsm_ci or arguments.qsm_ci_stage
    if arguments.bids is not None and ci:
        p.error("--bids and --qsm-ci read different folders; drop one")
    if arguments.dicom is None:
        for name in OF_DICOM:
            if getattr(arguments, name):
                p.error(f"--{name.replace('_', '-')} needs --dicom FOLDER")
    else:
        for name in ("bids", "qsm_ci", "qsm_ci_stage", "phase", "magnitude", "real", "imag"):
            if getattr(arguments, name):
                p.error(f"--dicom finds its images itself; drop --{name.replace('_', '-')}")
    for name in OF_DICOM_OUT:
        if getattr(arguments, name) is not None and arguments.dicom_out is None:
            p.error(f"--{name.replace('_', '-')} needs --dicom-out FOLDER")
    if arguments.bids is None:
        for name in FOR_A_DATASET:
            if getattr(arguments, name):
                p.error(f"--{name.replace('_', '-')} needs --bids DATASET")
        echoes = (arguments.phase, arguments.real, arguments.imag)
        begins = (arguments.dicom, *echoes, arguments.total_field, arguments.local_field)
        if not (arguments.files or any(begins) or ci or arguments.stages):
            p.error(
                "a field map (.nii or .nii.gz) is needed, or --phase and --magnitude, --dicom "
                "FOLDER or --bids DATASET"
                + "; it comes before --magnitude, which takes all files after it"
                * bool(arguments.magnitude)
            )
    if arguments.qsm_ci_folders and not ci:
        p.error("--qsm-ci-folders needs --qsm-ci")


def _run_dicom(arguments: argparse.Namespace) -> str:
    """Reconstruct the acquisition in a folder of DICOM, or say which there are."""
    from qsm_deploy.runtime.console.terminal import TerminalLog
    from qsm_deploy.runtime.dicom.output import DicomOut
    from qsm_deploy.runtime.job.from_dicom import folder_series, volumes_from
    from qsm_deploy.runtime.job.request import models_alone

    models_alone(arguments.files)
    if arguments.list:
        return folder_series(arguments.dicom)
    how = {"series": arguments.series or (), "field_strength": arguments.field_strength}
    with volumes_from(arguments.dicom, TerminalLog(quiet=arguments.quiet), **how) as taken:
        acquisition, files = taken
        vars(arguments).update(files)
        if (folder := arguments.dicom_out) is not None:
            arguments.dicom_out = DicomOut(
                folder,
                acquisition,
                arguments.dicom_out_kind or "mr",
                arguments.dicom_series,
                arguments.burn_in,
            )
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> str:
    """Reconstruct one acquisition and return what to print."""
    from qsm_deploy.runtime.console.terminal import TerminalLog
    from qsm_deploy.runtime.job import report
    from qsm_deploy.runtime.job.beginning import Until
    from qsm_deploy.runtime.job.memory_limit import within_process
    from qsm_deploy.runtime.job.one_scan import run_field, run_request
    from qsm_deploy.runtime.job.outputs import beside
    from qsm_deploy.runtime.job.request import (
        gives_of,
        make_request,
        maker_from,
        models_and_fields,
    )
    from qsm_deploy.runtime.reconstruction.inversion import CPU
    from qsm_deploy.runtime.reconstructor import models_of

    if arguments.qsm_ci or arguments.qsm_ci_stage:
        _take_contract(arguments)
    models, fields = models_and_fields(arguments.files)
    maker = maker_from(models, **{name: getattr(arguments, name) for name in METHOD})
    until: Until = arguments.until or "chi"
    if arguments.stages:
        return _stages_text(arguments, fields, maker)
    echoes = arguments.phase or arguments.real or ()
    folder = None if arguments.dicom is None else arguments.dicom.resolve()
    begins = (folder, *fields, *echoes, arguments.total_field, arguments.local_field)
    output, gives = arguments.output, gives_of(maker)
    if until == "chi" and output is None and arguments.dicom_out is None:
        output = next((beside(path, gives) for path in begins if path is not None), None)
    request = make_request(
        fields,
        **{name: getattr(arguments, name) for name in (*FILES, *FIELD, *WANTED, *WRITTEN, *STEPS)},
        until=until,
        output=output,
        inputs=models_of(maker),
        gives=gives,
        evaluates=arguments.json and not arguments.dry_run,
    )
    log = TerminalLog(quiet=arguments.quiet)
    if until != "chi":
        said = [*models, *(f"--{name}" for name in METHOD if getattr(arguments, name))]
        if said:
            raise UsageError(f"{said[0]} makes a map, and --until {until} makes none; drop one")
        wants = within_process(request.wants, CPU, ())
        made, _ = run_field(replace(request, wants=wants), log)
        if arguments.json:
            return report.json_line(made)
        if arguments.dry_run:
            return "\n".join(f"would write {path}" for path in request.outputs.maps.values())
        log.tell(*report.field_text(made).split("\n"))
        return str(request.outputs.maps[until.replace("-", "_")])
    finished = run_request(request, maker, host_from(arguments), log)
    outputs = "\n".join(map(str, request.outputs.shown))
    if arguments.json:
        return report.json_line(finished.report)
    if arguments.dry_run:
        return report.dry_run_text(finished.report, finished.planned.limit_bytes, outputs)
    log.tell(*report.result_text(finished.report).split("\n"))
    return outputs


def _stages_text(arguments: argparse.Namespace, fields: Sequence["Path"], maker: "Maker") -> str:
    """Return the steps of a run and their parameters, the inversion last."""
    from qsm_deploy.runtime.job.beginning import steps_from
    from qsm_deploy.runtime.job.report import stages_text
    from qsm_deploy.runtime.job.request import begins_with
    from qsm_deploy.runtime.local_field.from_echoes import parameters
    from qsm_deploy.runtime.methods.method import Method

    steps = parameters(steps_from(arguments.background_removal, arguments.erode))
    echoes = arguments.phase or arguments.real
    first = begins_with(maker)
    if first != "local_field_ppm":
        made = echoes and first == "total_field_ppm"
        steps = {name: said for name, said in steps.items() if made and name not in AFTER_TOTAL}
    elif fields or (arguments.local_field and not (echoes or arguments.total_field)):
        steps = {}
    elif arguments.total_field and not echoes:
        steps = {name: steps[name] for name in AFTER_TOTAL}
    said = maker.said() if isinstance(maker, Method) else {}
    names = [maker] if isinstance(maker, Method) else maker
    steps["inversion"] = {"by": ", ".join(one.name for one in names), **said}
    return stages_text(steps)


def _take_contract(arguments: argparse.Namespace) -> None:
    """Let a folder say what the command line else does."""
    from qsm_deploy.runtime.job import qsm_ci
    from qsm_deploy.runtime.job.request import gives_of, models_alone

    for name in qsm_ci.FIXED:
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: --qsm-ci fixes it; drop the flag")
    source, target = arguments.qsm_ci_folders or qsm_ci.FOLDERS
    arguments.files = models_alone(arguments.files)
    stage = arguments.qsm_ci_stage or qsm_ci.DIPOLE
    fixed = qsm_ci.contract(source, target, stage)
    if fixed["until"] == "local-field" and gives_of(arguments.files) == ("local_field_ppm",):
        fixed |= {"until": None, "output": fixed["local_field"], "local_field": None}
    flags = qsm_ci.flags_of(source / qsm_ci.CONFIG, stage)
    set_there = parser().parse_args([*flags.values()])
    vars(arguments).update(fixed | {name: getattr(set_there, name) for name in flags})


def _run_bids(arguments: argparse.Namespace) -> int:
    """Run a whole dataset; what failed comes last, the first failure decides the exit code."""
    results: list[Result] = []

    def command() -> str:
        from qsm_deploy.runtime.cohort.driver import Result, run_cohort
        from qsm_deploy.runtime.console.terminal import TerminalLog
        from qsm_deploy.runtime.job import report

        if arguments.cluster == "slurm" and arguments.dry_run:
            from qsm_deploy.runtime.cohort.dask.choice import script_from

            return script_from(arguments.cluster_config).rstrip()
        log, result = TerminalLog(quiet=arguments.quiet), Result()
        results.append(result)
        run_cohort(_cohort(arguments), _pool(arguments), log, result)
        if arguments.json:
            return "\n".join(map(report.json_line, result.reports))
        return "\n".join(result.lines)

    code = run_command(NAME, command)
    failures = [failure for result in results for failure in result.failures]
    failures.sort(key=lambda failure: failure.recording)  # in whichever order they ended
    for failure in failures:
        fail(NAME, f"{failure.recording}: {failure.reason}", failure.exit_code)
    return code or (failures[0].exit_code if failures else 0)


def _status(arguments: argparse.Namespace) -> int:
    """Say how far a dataset is."""
    everything = []

    def command() -> str:
        from qsm_deploy.runtime.cohort.status import status_of, status_text
        from qsm_deploy.runtime.console.terminal import TerminalLog
        from qsm_deploy.runtime.job.report import json_line

        for name in NOT_OF_STATUS:
            if getattr(arguments, name):
                flag = name.replace("_", "-")
                raise UsageError(f"--status looks and makes nothing; drop --{flag}")
        status = status_of(_cohort(arguments), TerminalLog(quiet=arguments.quiet))
        everything.append(status["done"] == status["recordings"])
        return json_line(status) if arguments.json else status_text(status)

    code = run_command(NAME, command)
    return code or (0 if everything == [True] else DataError.exit_code)


def _cohort(arguments: argparse.Namespace) -> "Cohort":
    """Return what is asked of a dataset."""
    from qsm_deploy.runtime.cohort.cohort import Cohort, require_pattern
    from qsm_deploy.runtime.cohort.sharding import shard_from
    from qsm_deploy.runtime.job.beginning import steps_from
    from qsm_deploy.runtime.job.request import maker_from, models_alone, wants_from

    for name in FOR_ONE:
        if getattr(arguments, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for one recording; --bids takes what it needs "
                "from the dataset"
            )
    if arguments.html_names and arguments.html is None:
        raise UsageError("--html-names is of pages; add --html FOLDER")
    if arguments.report is not None:
        require_pattern(arguments.report, "report", ".json")
    if arguments.figure is not None:
        from qsm_deploy.runtime.page.figure import require_matplotlib

        require_matplotlib()
        require_pattern(arguments.figure, "figure", ".png")
    shard = None if arguments.shard is None else shard_from(arguments.shard, os.environ)
    wants = wants_from(**{name: getattr(arguments, name) for name in WANTED})
    draws = arguments.html is not None or arguments.figure is not None
    models = models_alone(arguments.files)
    cohort = Cohort(
        dataset=arguments.bids,
        maker=maker_from(models, **{name: getattr(arguments, name) for name in METHOD}),
        host=host_from(arguments),
        output=arguments.output,
        participant_labels=arguments.participant_label,
        source=arguments.bids_input,
        shard=shard,
        wants=replace(wants, draws=draws, evaluates=not arguments.dry_run),
        steps=steps_from(arguments.background_removal, arguments.erode),
        reports=arguments.json,
        **{name: getattr(arguments, name) for name in OF_COHORT},
    )
    if not (arguments.cluster or "local").startswith("local"):  # elsewhere folders are others
        cohort = cohort.from_anywhere()
    return cohort if shard is None or cohort.force else replace(cohort, resume=True)


def _pool(arguments: argparse.Namespace) -> "Pool":
    """Return where a dataset is reconstructed."""
    from qsm_deploy.runtime.cohort.pool import ThisProcess

    for name in OF_DASK:
        if getattr(arguments, name) and arguments.cluster is None:
            raise UsageError(f"--{name.replace('_', '-')} needs --cluster")
    if arguments.cluster is None:
        return ThisProcess()
    pool: Pool
    kind, _, count = arguments.cluster.partition(":")
    if kind == "local" and count.isdecimal() and int(count) > 0:
        from qsm_deploy.runtime.cohort.children import Children

        for name in OF_DASK:
            if getattr(arguments, name):
                raise UsageError(f"--{name.replace('_', '-')} is not of --cluster local:N; drop it")
        pool = Children(int(count))
    else:
        from qsm_deploy.runtime.cohort.dask.choice import pool_from

        pool = pool_from(
            arguments.cluster,
            arguments.cluster_config,
            arguments.cluster_tls,
            insecure=arguments.cluster_insecure,
            device=arguments.device,
        )
    return ThisProcess() if arguments.dry_run else pool


if __name__ == "__main__":
    sys.exit(main())
