"""The flags of ``qsm-run``, and those that other commands share with it."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.command import Parser, add_version
from qsm_deploy.runtime.console.time_limit import LONGEST_S, MOST_S
from qsm_deploy.runtime.job.qsm_ci import STAGES
from qsm_deploy.runtime.local_field.background.names import REMOVAL_NAMES
from qsm_deploy.runtime.methods.method import DEFAULT, METHODS
from qsm_deploy.runtime.scan.unit_names import SCALES, UNITS, FieldUnit, unit_named
from qsm_deploy.runtime.sessions.bundled import BUNDLED
from qsm_deploy.runtime.sessions.session import CHOICES

if TYPE_CHECKING:
    from qsm_deploy.runtime.reconstructor import Host

NAME = "qsm-run"
# flags of one acquisition, of the field, of the reconstruction, of what is written
FILES = (
    *("mask", "truth", "labels", "magnitude", "noise_map", "chi", "r2prime", "params"),
    *("phase", "real", "imag", "total_field", "local_field", "quality", "r2star", "brain_mask"),
)
STEPS = ("echo_times", "background_removal", "erode")
FIELD = (
    *("units", "echo_time", "field_strength", "b0_direction", "voxel_size"),
    *("negate", "phase_scale"),
)
WANTED = (
    *("patch", "overlap", "blend", "data_consistency", "dc_iterations"),
    *("allow_geometry", "memory_limit"),
)
METHOD = ("method", "alpha", "iterations", "robust", "threshold", "lam")
WRITTEN = (
    *("report", "figure", "html", "html_names", "slices", "window"),
    *("out_units", "out_dtype", "force", "dry_run", "dicom_out"),
)
# what a dataset's own files say of every recording, or what is made for one recording only
FOR_ONE = (
    *(*FILES, "echo_time", "echo_times", "voxel_size", "b0_direction", "until"),
    *("slices", "window"),
)
OF_DICOM = ("list", "series", "dicom_out")
OF_DICOM_OUT = ("dicom_out_kind", "dicom_series", "burn_in")
OF_COHORT = (
    *("units", "field_strength", "negate", "phase_scale"),
    *("html", "html_names", "out_units", "out_dtype", "force", "resume", "dry_run"),
    *("figure", "report", "outcomes", "table"),
)
# flags of a dataset
FOR_A_DATASET = (
    *("participant_label", "bids_input", "resume", "shard", "status", "outcomes", "table"),
    *("cluster", "cluster_config", "cluster_tls", "cluster_insecure"),
)
EPILOG = """\
examples:
  qsm-run --phase phase_e*.nii.gz --magnitude mag_e*.nii.gz -m brain.nii.gz   # with sidecars
  qsm-run --phase phase.nii.gz --magnitude mag.nii.gz --echo-times 0.004 0.010 0.016 \\
      --field-strength 3 --total-field total.nii.gz --local-field local.nii.gz
  qsm-run --dicom study/ --list                          # which series there are
  qsm-run --dicom study/ --dicom-out map/                # a map for viewers that read DICOM
  qsm-run field.nii.gz                                   # total variation, tuned to the noise
  qsm-run --method medi field.nii.gz --magnitude magnitude.nii.gz -m mask.nii.gz
  qsm-run --method tv-unet field.nii.gz                  # the network that comes along
  qsm-run ir2qsm.onnx field.nii.gz -m mask.nii.gz -o chi.nii.gz --report run.json
  qsm-run phase.nii.gz --units rad --params params.json --figure chi.png --html chi.html
  qsm-run lpcnn.onnx field1.nii.gz field2.nii.gz -m mask.nii.gz
  qsm-run recon.onnx refine.onnx field.nii.gz -m mask.nii.gz
  qsm-run bfrnet.onnx ir2qsm.onnx total.nii.gz -m mask.nii.gz   # each takes what the last gave
  qsm-run chi-sepnet.onnx local.nii.gz --chi chi.nii.gz --r2prime r2prime.nii.gz -m mask.nii.gz
  qsm-run iqsm.onnx wrapped.nii.gz -m mask.nii.gz --echo-time 0.02 --field-strength 3
  qsm-run ir2qsm.onnx --bids study --participant-label 01 02 --html pages
  qsm-run --bids study --cluster local:4                 # four recordings at once
  qsm-run --bids study --shard 3/100                     # one task of an array of a hundred
  qsm-run --bids study --status                          # what is done, failed, missing

exit codes: 0 done, 2 usage, 3 data or geometry, 4 model or backend, 6 memory, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = Parser(
        prog=NAME,
        usage=f"{NAME} [MODEL.onnx ...] --phase FILE ... --magnitude FILE ... [options]\n"
        f"       {NAME} [MODEL.onnx ...] FIELD [FIELD2 ...] [options]\n"
        f"       {NAME} [MODEL.onnx ...] --dicom FOLDER [options]\n"
        f"       {NAME} [MODEL.onnx ...] --bids DATASET [options]\n"
        f"       {NAME} [MODEL.onnx ...] --qsm-ci [options]",
        description="Reconstruct a susceptibility map [ppm] from phase and magnitude, or from a "
        "field map.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="MODEL.onnx made by qsm-export (several where each takes what the one before gives), "
        "else a --method; FIELD (.nii or .nii.gz), local or total as the network takes it, for "
        "some one for each orientation, registered, or the wrapped phase of each echo",
    )
    p.add_argument(
        "-m",
        "--mask",
        type=Path,
        help="above 0 inside the brain; else where FIELD is not 0, or found on the magnitude",
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        help="susceptibility map, or what else a network gives; default FIELD_chi.nii.gz, "
        "FIELD_localfield.nii.gz, or FIELD_chi-positive.nii.gz and FIELD_chi-negative.nii.gz",
    )
    p.add_argument(
        "--chi", type=Path, metavar="FILE", help="susceptibility [ppm], for networks that part it"
    )
    p.add_argument("--r2prime", type=Path, metavar="FILE", help="R2' [Hz], for the same")
    _add_echoes(p.add_argument_group("from phase and magnitude, or from a total field"))
    add_method(p.add_argument_group("without a model of your own"))
    _add_dicom(p.add_argument_group("from DICOM, and to it"))
    _add_bids(p.add_argument_group("a whole dataset"))
    _add_qsm_ci(p.add_argument_group("as a submission to QSM-CI"))
    add_physics(p.add_argument_group("the field"))
    add_consistency(p.add_argument_group("data consistency"))
    _add_patches(p.add_argument_group("memory and patches"))
    add_backend(p.add_argument_group("backend"))
    _add_outputs(p.add_argument_group("outputs"))
    add_version(p)
    return p


def _add_echoes(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--phase",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="of every echo in order, or all in one 4-D file; the JSON beside each is read",
    )
    for part in ("real", "imag"):
        group.add_argument(
            f"--{part}",
            type=Path,
            nargs="+",
            metavar="FILE",
            help="parts of the complex images, in place of --phase and --magnitude (GE)",
        )
    group.add_argument(
        "--echo-times",
        type=float,
        nargs="+",
        metavar="S",
        help="in seconds, one for each echo, where no sidecar states them",
    )
    group.add_argument(
        "--total-field",
        type=Path,
        metavar="FILE",
        help="field of all sources [ppm or --units]: written with --phase, else where it begins",
    )
    group.add_argument(
        "--local-field",
        type=Path,
        metavar="FILE",
        help="field without background [ppm or --units]: written with --phase or --total-field, "
        "else FIELD",
    )
    group.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="misfit of the echoes over their noise: written with --phase, read with --total-field",
    )
    group.add_argument(
        "--brain-mask",
        type=Path,
        metavar="FILE",
        help="the mask before erosion, written with --phase: look at it where none is given",
    )
    group.add_argument(
        "--r2star", type=Path, metavar="FILE", help="R2* [1/s], written with --phase"
    )
    group.add_argument(
        "--background-removal", choices=REMOVAL_NAMES, help=f"default {REMOVAL_NAMES[0]}"
    )
    group.add_argument(
        "--erode",
        type=float,
        metavar="MM",
        help="of the mask's edge, where bone adjoins; default 2, at least one voxel but for 0",
    )
    group.add_argument(
        "--until",
        choices=("total-field", "local-field", "chi"),
        help="the last map that is made; default chi",
    )
    group.add_argument(
        "--stages", action="store_true", help="print the steps and their parameters, and stop"
    )


def _add_dicom(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--dicom",
        type=Path,
        metavar="FOLDER",
        help="with the images of a study: its phase and magnitude, or real and imaginary parts, "
        "are found; the map goes to FOLDER_chi.nii.gz",
    )
    group.add_argument(
        "--list", action="store_true", help="print the series of --dicom and what each is, and stop"
    )
    group.add_argument(
        "--series",
        type=positive_count,
        nargs="+",
        metavar="NUMBER",
        help="that of the phase, where several have one; more of them where each echo has its own, "
        "or for that of the magnitude",
    )
    group.add_argument(
        "--dicom-out",
        type=Path,
        metavar="FOLDER",
        help="write the map as a new DICOM series of the same study, in ppb; -o adds a NIfTI file",
    )
    group.add_argument(
        "--dicom-out-kind",
        choices=("mr", "pm"),
        help="mr: MR images in whole ppb, which every viewer shows (default); pm: a parametric "
        "map in float32",
    )
    group.add_argument(
        "--dicom-series",
        type=positive_count,
        metavar="NUMBER",
        help="of the new series; default the phase's times 100 plus 1",
    )
    group.add_argument(
        "--burn-in",
        metavar="TEXT",
        help="draw a text into a corner of every image of the new series",
    )


def _add_bids(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--bids",
        type=Path,
        metavar="DATASET",
        help="reconstruct every recording of a BIDS dataset, from its local field or its MEGRE; "
        "--output is a folder, default DATASET/derivatives/qsm-deploy",
    )
    group.add_argument(
        "--participant-label", nargs="+", metavar="LABEL", help="only these, default all"
    )
    group.add_argument(
        "--bids-input",
        choices=("localfield", "megre"),
        help="begin with these only; default the local field, where there is none the MEGRE",
    )
    group.add_argument(
        "--resume", action="store_true", help="keep the maps that exist and make the others"
    )
    group.add_argument(
        "--shard",
        metavar="K/N|auto|auto/N",
        help="only the K-th of N parts, K from 1, whose subjects are chosen by their labels; "
        "auto: as the array task of SLURM, PBS, SGE, LSF or Kubernetes says; means --resume",
    )
    group.add_argument(
        "--cluster",
        metavar="local:N|ADDRESS|slurm",
        help="reconstruct N recordings at once, in processes with an equal share of cores and "
        "memory; one that dies takes only its own map with it; or on the workers of a Dask "
        "scheduler, tls://HOST:8786; or in jobs of SLURM",
    )
    group.add_argument(
        "--cluster-config",
        type=Path,
        metavar="FILE.toml",
        help="the jobs of --cluster slurm; --dry-run prints their script",
    )
    group.add_argument(
        "--cluster-tls",
        type=Path,
        nargs=3,
        metavar=("CA", "CERT", "KEY"),
        help="with which scheduler, workers and this program know each other, in PEM",
    )
    group.add_argument(
        "--cluster-insecure",
        action="store_true",
        help="without TLS beyond this computer: who reaches the port runs programs there",
    )
    group.add_argument(
        "--status",
        action="store_true",
        help="say which recordings are done, failed and why, or missing, and stop; exit code 3 "
        "unless all have maps",
    )
    group.add_argument(
        "--outcomes",
        type=Path,
        metavar="FOLDER",
        help="where it is written down what became of each recording; default OUTPUT/outcomes",
    )
    group.add_argument(
        "--table",
        type=Path,
        metavar="FILE.tsv",
        help="a row of each recording: residual, noise, mask, deep grey nuclei where a _dseg is; "
        "default OUTPUT/group_Chimap.tsv, with --shard and --status none",
    )


def _add_qsm_ci(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--qsm-ci",
        action="store_true",
        help="read /input/localfield.nii.gz, mask.nii.gz and params.json, write "
        "/output/chimap.nii.gz",
    )
    group.add_argument(
        "--qsm-ci-stage",
        choices=tuple(STAGES),
        help="what the folders hold; default dipole",
    )
    group.add_argument(
        "--qsm-ci-folders",
        type=Path,
        nargs=2,
        metavar=("INPUT", "OUTPUT"),
        help="instead of /input and /output",
    )


def add_physics(group: "argparse._ArgumentGroup") -> None:
    """Add how a field is to be understood, the same for every command that reads one."""
    group.add_argument(
        "--units",
        type=field_unit,
        metavar="|".join(UNITS),
        help="of FIELD, default ppm; rad for a network that takes the wrapped phase",
    )
    group.add_argument("--echo-time", type=float, metavar="S", help="in seconds, for rad")
    group.add_argument(
        "--field-strength", type=float, metavar="T", help="in tesla, for all but ppm and ppb"
    )
    group.add_argument(
        "--phase-scale",
        choices=tuple(SCALES),
        metavar="NAME",
        help=f"what the values of wrapped phases mean, where they do not tell: {', '.join(SCALES)}",
    )
    group.add_argument(
        "--negate",
        action="store_true",
        help="FIELD has the opposite sign: its phase falls where the field is higher",
    )
    group.add_argument(
        "--b0-direction",
        type=float,
        nargs=3,
        action="append",
        metavar=("X", "Y", "Z"),
        help="in voxel axes; once for each FIELD",
    )
    group.add_argument("--voxel-size", type=float, nargs=3, metavar=("X", "Y", "Z"), help="in mm")
    group.add_argument(
        "--params", type=Path, help="JSON with these parameters (ours, BIDS or QSM-CI names)"
    )
    add_geometry(group)


def add_method(group: "argparse._ArgumentGroup") -> None:
    """Add what makes a map where no model is named, and what is said to it."""
    group.add_argument(
        "--method",
        choices=(*METHODS, *BUNDLED),
        help="; ".join(f"{name}: {row.title}" for name, row in METHODS.items())
        + f"; {' '.join(BUNDLED)}: the network that comes along; default {DEFAULT}",
    )
    group.add_argument(
        "--magnitude",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="of the same acquisition, of each echo: goes with --phase; its edges, for medi; trust "
        "in each voxel, for tv and medi",
    )
    group.add_argument(
        "--noise-map",
        type=Path,
        metavar="FILE",
        help="of the field [ppm], in place of its own estimate; written with --phase",
    )
    group.add_argument(
        "--alpha",
        type=edge_weight,
        metavar="auto|PPM_MM",
        help="weight of edges, 1e-9 to 1000, more is smoother; auto: from the noise (default)",
    )
    group.add_argument(
        "--iterations",
        type=positive_count,
        metavar="N",
        help="of the method, instead of its own, at most 10000",
    )
    group.add_argument(
        "--robust",
        action="store_true",
        help="drop voxels that no map explains, such as wrong wraps; twice the time",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="of tkd, smallest |D| divided by, 0.001 to 2/3, default 0.2",
    )
    group.add_argument(
        "--lam", type=float, metavar="L", help="of tikhonov, 1e-9 to 1000, default 0.01"
    )


def add_geometry(group: "argparse._ActionsContainer") -> None:
    """Add what becomes of a geometry that is not the training's."""
    group.add_argument(
        "--allow-geometry",
        action="store_true",
        help="stay on the native grid although the network was trained at another voxel size or B0 "
        "direction; default: resample and turn for it, and bring the map back",
    )


def add_consistency(group: "argparse._ArgumentGroup") -> None:
    """Add the data-consistency step, the same for every command that has it."""
    group.add_argument(
        "--data-consistency",
        type=consistency_weight,
        metavar="auto|LAMBDA",
        help="move the map towards the field, less where LAMBDA (1e-9 to 1000) is large; auto: "
        "0.05 in 10 iterations, or 0.3 in closed form where the field was turned or resampled for "
        "the network; default not at all",
    )
    group.add_argument(
        "--dc-iterations",
        type=positive_count,
        metavar="N",
        help="by conjugate gradients that trust the field in the mask only, at most 10000; else in "
        "closed form",
    )


def _add_patches(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--memory-limit",
        type=memory_size,
        metavar="SIZE",
        help="such as 6G; default four fifths of what is free",
    )
    group.add_argument(
        "--patch",
        type=patch_size,
        default="auto",
        metavar="auto|off|N",
        help="auto: the whole volume if it fits, else the largest patches that do (default)",
    )
    group.add_argument("--overlap", type=int, metavar="VOXELS", help="shared by neighbours")
    group.add_argument(
        "--blend", choices=("hann", "gaussian", "crop"), help="how overlaps are joined"
    )
    group.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")


def add_backend(group: "argparse._ArgumentGroup") -> None:
    """Add where a network runs, the same for every command that runs one."""
    group.add_argument(
        "--backend",
        choices=CHOICES,
        default="auto",
        help="auto: the fastest that is installed (default)",
    )
    add_device(group)
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: fp32, and int8 for a file in INT8 where that was found accurate (default); "
        "bf16: faster where the CPU has it; its error is measured and printed",
    )
    group.add_argument(
        "--threads",
        type=thread_count,
        default=0,
        help="CPU threads, default all cores, in a job of SLURM those of its task",
    )
    group.add_argument(
        "--time-limit",
        type=seconds,
        metavar="S",
        default=LONGEST_S,
        help="seconds for opening a model on the CPU, and for each time that it runs, which is "
        "once for each patch (default 3600)",
    )


def _add_outputs(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--out-units", choices=("ppm", "ppb"), default="ppm", help="of the map")
    group.add_argument(
        "--out-dtype",
        choices=("float32", "int16"),
        default="float32",
        help="of the map; int16: whole ppb, a third of the room (the header scales to --out-units)",
    )
    group.add_argument(
        "--report",
        type=Path,
        help="JSON: times, memory, geometry, metrics; with --bids {recording} in its name stands "
        "for that of each",
    )
    group.add_argument(
        "--figure",
        type=Path,
        help="PNG of three planes, R on the left; with --bids as --report",
    )
    group.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="a page for any browser: linked planes to move through, and what is known of the run; "
        "with --bids a FOLDER, for a page of each recording and an index",
    )
    group.add_argument(
        "--html-names", action="store_true", help="let the page name the files that were read"
    )
    group.add_argument(
        "--slices",
        type=float,
        nargs=3,
        metavar=("R", "A", "S"),
        help="where the planes of --figure and --html lie, in mm as their titles tell (L, P, I "
        "negative); "
        "default the centre of the mask",
    )
    group.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="susceptibility that is black and white in --figure and --html, in --out-units; "
        "default -0.1 0.2 ppm",
    )
    group.add_argument("--truth", type=Path, help="true susceptibility [ppm], for metrics")
    group.add_argument("--labels", type=Path, help="regions of the truth, for regional metrics")
    group.add_argument("--force", action="store_true", help="overwrite existing outputs")
    group.add_argument("--json", action="store_true", help="print the report on stdout")
    group.add_argument("-q", "--quiet", action="store_true", help="errors and warnings only")


def field_unit(text: str) -> FieldUnit:
    """Return a unit of a field by its name, in any case of letters."""
    unit = unit_named(text)
    if unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(UNITS)}")
    return unit


def memory_size(text: str) -> int:
    """Return the bytes that ``6G``, ``1500M`` or ``2000000`` mean (binary multiples)."""
    from qsm_deploy.runtime.job.request import memory_bytes

    try:
        return memory_bytes(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def patch_size(text: str) -> int | str:
    """Return ``auto``, ``off`` or a positive number of voxels."""
    if text in ("auto", "off"):
        return text
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto, off nor a number of voxels")
    return int(text)


def consistency_weight(text: str) -> float | str:
    """Return ``auto`` or a positive, finite number."""
    if text == "auto":
        return text
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a positive number")
    return number


def edge_weight(text: str) -> float | None:
    """Return ``auto`` as None, or a positive, finite number."""
    weight = consistency_weight(text)
    return None if isinstance(weight, str) else weight


def host_from(arguments: argparse.Namespace) -> "Host":
    """Return what the flags of :func:`add_backend` say."""
    from qsm_deploy.runtime.reconstructor import Host

    return Host(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Host)})


def add_device(group: "argparse._ActionsContainer") -> None:
    """Add on which device, and where engines are kept that had to be built again for it."""
    group.add_argument(
        "--device",
        type=device_name,
        default="auto",
        metavar="auto|cpu|cuda:N",
        help="auto: a plan on the first GPU, where there is one, all else on the CPU (default); no "
        "engine but PyTorch has run on a GPU yet",
    )
    group.add_argument(
        "--plan-cache",
        default="auto",
        metavar="DIR|off",
        help="for engines of plans that do not fit the GPU and are built again; default a folder "
        "of the user's caches",
    )


def device_name(text: str) -> str:
    """Return ``auto``, ``cpu`` or ``cuda:N``."""
    kind, _, number = text.partition(":")
    if text in ("auto", "cpu") or (kind == "cuda" and number.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto, cpu nor cuda:N")


def positive_count(text: str) -> int:
    """Return a positive whole number."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def seconds(text: str) -> float:
    """Return a positive number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < MOST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return number


def thread_count(text: str) -> int:
    """Return a number of threads, 0 for all cores."""
    cores = os.cpu_count() or 1
    if not text.isdecimal() or int(text) > cores:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 (all cores) to {cores}")
    return int(text)
