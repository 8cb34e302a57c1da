"""What a run says about itself: the sidecar, the report, and the lines a user reads."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qsm_deploy.kernels.geometry import vector_text
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.job.request import Request
from qsm_deploy.runtime.reconstruction.inversion import CPU, grid_facts
from qsm_deploy.runtime.reconstruction.planning import Decision
from qsm_deploy.runtime.reconstruction.preparation import Prepared
from qsm_deploy.runtime.reconstructor import Planned, Reconstructor
from qsm_deploy.runtime.scan.params import is_number
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

READ = ("mask", "truth", "labels", "noise_map", "chi", "r2prime")
MM3_PER_ML = 1000.0
COMPARED = ("field_residual", "noise_ppb", "mask_ml")  # of the maps of a cohort
LIBRARIES = ("numpy", "scipy", "nibabel")

METRIC_TEXT = {
    "nrmse_percent": "NRMSE [%]",
    "nrmse_detrended_percent": "NRMSE, detrended [%]",
    "xsim_uniform5": "XSIM (uniform 5x5x5)",
    "hfen_percent": "HFEN [%]",
    "psnr_db": "PSNR [dB]",
    "correlation": "correlation",
    "mean_abs_error_ppb": "mean |error| [ppb]",
    "p999_abs_error_ppb": "99.9th percentile of |error| [ppb]",
    "nrmse_tissue_detrended_percent": "NRMSE, tissue, detrended [%]",
    "nrmse_deep_grey_detrended_percent": "NRMSE, deep grey, detrended [%]",
    "nrmse_blood_detrended_percent": "NRMSE, blood, detrended [%]",
    "dgm_linearity": "deep-grey linearity |1 - slope|",
    "calc_moment_ppm_voxels": "calcification moment error [ppm voxels]",
    "calc_streak": "calcification streaks",
}


def describe_run(
    request: Request, reconstructor: Reconstructor, planned: Planned
) -> dict[str, Any]:
    """Return everything that decided the result, as the sidecar holds it."""
    files, scan, inversion = request.files, planned.task.scan, reconstructor.inversion.facts()
    measured = planned.prepared.measured
    stored, step = measured.axes.inverse, planned.wants.correction
    name, version = (inversion["backend"].pop(key) for key in ("name", "version"))
    return {
        "made_by": made_by(),
        "units": request.outputs.units,
        "dtype": request.outputs.dtype,
        "title": reconstructor.inversion.name,
        "model": inversion["model"],
        "backend": {"name": name, "version": version, "why": reconstructor.why_backend}
        | ({"missing_gpu": reconstructor.missing_gpu} if reconstructor.missing_gpu else {})
        | inversion["backend"],
        "input": {
            "fields": [path.name for path in files.fields],
            **{n: _name(getattr(files, n)) for n in READ},
            "magnitude": [path.name for path in files.magnitude],
            "params": _name(request.params),
            "quantity": scan.quantity,
            "units": request.reading.units or ("rad" if scan.quantity == "phase_rad" else "ppm"),
            "scale": scan.scale,
            "echo_time_s": scan.echo_time_s,
            **({"more_echo_times_s": list(more)} if (more := scan.more_echo_times_s) else {}),
            "field_strength_t": scan.field_strength_t,
            "mask_voxels": int(np.count_nonzero(measured.mask)),
            "notes": scan.notes,
        },
        "geometry": {
            **grid_facts(stored.geometry(measured.geometry)),
            "more_b0_directions": [list(stored.vector(b)) for b in measured.more_b0_directions],
            "outside_training": list(planned.prepared.departures),
            "allow_geometry": request.wants.allow_geometry,
        },
        **_way(scan),
        "grid": _grid(planned.prepared),
        "plan": planned.task.decision.facts(),
        **({"asked_for": {"data_consistency": step.name}} if step and step.name else {}),
        **planned.task.facts,
    }


def describe_field(request: Request, scan: Scan) -> dict[str, Any]:
    """Return everything that decided a field that no map is made of."""
    return {
        "made_by": made_by(),
        "input": {
            "fields": [path.name for path in request.files.fields],
            "mask": _name(request.files.mask),
            "quantity": scan.quantity,
            "field_strength_t": scan.field_strength_t,
            "notes": scan.notes,
        },
        "geometry": grid_facts(scan.axes.inverse.geometry(scan.geometry)),
        "maps": {name: path.name for name, path in request.outputs.maps.items()},
        **_way(scan),
    }


def _way(scan: Scan) -> dict[str, Any]:
    """Return how the field was made, if it was."""
    return {"local_field": scan.facts} if scan.facts else {}


def _grid(prepared: Prepared) -> dict[str, Any]:
    """Return how the scan was stored, who says where B0 was, and what became of its grid."""
    measured = prepared.measured
    axes = measured.axes
    return {
        "stored_axes": None if measured.affine is None else measured.stored_letters,
        "canonical_from_stored": [
            f"{'-' if flip else '+'}{'xyz'[axis]}"
            for axis, flip in zip(axes.order, axes.flipped, strict=True)
        ],
        "b0_from": measured.b0_from,
        "b0_off_third_axis_deg": round(measured.geometry.b0_angle_deg((0, 0, 1)), 3),
        "canonical": grid_facts(measured.geometry),
        "network": grid_facts(prepared.scan.geometry),
        **prepared.facts,
    }


def way_text(run: dict[str, Any]) -> str:
    """Return what was done to the field for the network, in a word or two."""
    return " and ".join(how for how in ("turned", "resampled") if how in run["grid"])


def resources(stages: Stages, scan: Scan, decision: Decision | None = None) -> dict[str, Any]:
    """Return versions, the time of every stage, and the measured peak beside the predicted."""
    predicted = [*scan.facts.get("predicted_stage_bytes", {}).values()]
    predicted += [] if decision is None else [decision.peak_bytes]
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "seconds": {name: round(s, 4) for name, s in stages.seconds.items()},
        "total_seconds": round(sum(stages.seconds.values()), 4),
        "memory": {
            "baseline_bytes": stages.baseline_bytes,
            "peak_above_baseline_bytes": max(stages.peak_bytes.values()),
            "predicted_peak_bytes": round(max(predicted, default=0)),
            "stage_peak_bytes": stages.peak_bytes,
        },
    }


def json_bytes(content: dict[str, Any]) -> bytes:
    """Return a JSON file for people and programs; a name that is no UTF-8 is escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return f"{text}\n".encode(errors="backslashreplace")


def json_line(content: dict[str, Any]) -> str:
    """Return one line of JSON for programs."""
    return json.dumps(content, ensure_ascii=False)


def dry_run_text(run: dict[str, Any], limit_bytes: float, outputs: str) -> str:
    """Return what a run would do, a fact per line."""
    geometry, plan, backend = run["geometry"], run["plan"], run["backend"]
    stages = ", ".join(f"{k} {memory_text(v)}" for k, v in plan["predicted_stage_bytes"].items())
    rows = _first_rows(run["first_part"]) if "first_part" in run else dict[str, str]()
    rows |= _maker_rows(run["model"]) | {
        "backend": f"{backend['name']} {backend['version']}: {backend['why']}",
        "field": f"{', '.join(run['input']['fields'])} in {run['input']['units']}",
        "volume": f"{_shape(geometry['shape'])}, {run['input']['mask_voxels']} voxels in the mask",
        **_volume_rows(geometry),
        **_network_rows(run["grid"]),
        "padded to": _shape(plan["padded_shape"]),
        "plan": f"{_plan(plan)}: {plan['why']}",
        "memory": f"{memory_text(plan['predicted_peak_bytes'])} predicted, "
        f"limit {memory_text(limit_bytes)}",
        **_field_memory(run),
        "by stage": stages,
        "would write": ", ".join(outputs.splitlines()),
    }
    return _table(rows)


def _field_memory(run: dict[str, Any]) -> dict[str, str]:
    """Return what the way to the local field takes, if there is one."""
    stages = run.get("local_field", {}).get("predicted_stage_bytes", {})
    text = ", ".join(f"{name} {memory_text(size)}" for name, size in stages.items())
    return {"to the field": text} if text else {}


def _network_rows(grid: dict[str, Any]) -> dict[str, str]:
    """Return what an inversion gets in place of the volume, if that is another grid."""
    if grid["network"] == grid["canonical"]:
        return {}
    shape, size, b0 = (grid["network"][n] for n in ("shape", "voxel_size_mm", "b0_direction"))
    size_text, b0_text = (vector_text(tuple(v)) for v in (size, b0))
    return {"network's grid": f"{_shape(shape)}, {size_text} mm, B0 {b0_text}"}


def _maker_rows(model: dict[str, Any]) -> dict[str, str]:
    if "method" in model:
        said = "".join(f", {name} {value}" for name, value in model["said"].items())
        return {"method": f"{model['method']} ({model['title']}){said}"}
    return {
        "model": f"{model['network']} {model['precision']} ({model['file']})",
        "network sees": _sight(model["receptive_field"]),
    }


def plan_line(run: dict[str, Any]) -> str:
    """Return in one line how a volume would be run."""
    plan = run["plan"]
    return (
        f"{', '.join(run['input']['fields'])} in {run['input']['units']}, "
        f"{_shape(run['geometry']['shape'])}, {_plan(plan)}, "
        f"{memory_text(plan['predicted_peak_bytes'])} predicted"
    )


def _first_rows(first: dict[str, Any]) -> dict[str, str]:
    geometry, plan = first["geometry"], first["plan"]
    maker = first["model"].get("file") or first["model"]["method"]
    if "first_part" in first:  # and there is one more before it
        rows = _first_rows(first["first_part"])
        return rows | {"then" + " " * sum(name.startswith("then") for name in rows): maker}
    return {
        "first model": maker,
        "on the grid": f"{_shape(geometry['shape'])}, "
        f"{vector_text(tuple(geometry['voxel_size_mm']))} mm",
        "in": f"{_plan(plan)}: {plan['why']}",
        "taking": f"{memory_text(plan['predicted_peak_bytes'])} predicted",
    }


def precision_text(precision: str, error: dict[str, float]) -> str:
    """Return the error of a lower precision in one line."""
    return (
        f"{precision} differs from fp32 by up to {error['max_abs_error_ppb']:.2f} ppb "
        f"({error['relative_error']:.1e} relative) in a sample of this volume"
    )


def result_text(full: dict[str, Any]) -> str:
    """Return what a run took and found, a fact per line."""
    return _table(result_rows(full))


def result_rows(full: dict[str, Any]) -> dict[str, str]:
    """Return what a run took and found, by fact."""
    peak = memory_text(full["memory"]["peak_above_baseline_bytes"])
    predicted = memory_text(full["memory"]["predicted_peak_bytes"])
    stage = "inversion" if "inversion" in full["seconds"] else "inference"
    rows = {
        "time": f"{full['total_seconds']:.2f} s, of which {stage} "
        f"{full['seconds'][stage]:.2f} s ({_plan(full['plan'])})",
        "peak memory": f"{peak} (predicted {predicted})",
    }
    if full["backend"]["device"] != CPU:
        rows["peak memory"] = f"{peak} of the host, {predicted} of the GPU"
    rows = field_rows(full.get("local_field", {})) | rows
    rows |= inversion_rows(full.get("inversion", {}))
    if "data_consistency" in full:
        step = full["data_consistency"]
        rows["data consistency"] = (
            f"lambda {step['lambda']:g}: field residual {step['field_residual_before']:.3f} -> "
            f"{step['field_residual_after']:.3f}"
        )
        if "fitted_residual" in step:
            rows["data consistency"] += (
                f", {step['fitted_residual']:.3f} with sources outside the mask"
            )
    elif "field_residual" in full:
        rows["field residual"] = f"{full['field_residual']:.3f}"
    for name, value in full.get("metrics", {}).items():
        rows[METRIC_TEXT.get(name, name)] = f"{value:.4g}"
    return rows


def page_rows(full: dict[str, Any], names: bool) -> dict[str, str]:
    """Return what a page tells of a run, by fact; of files only if ``names`` is true."""
    backend, given, grid = full["backend"], full["input"], full["grid"]
    quantity = given["quantity"].rpartition("_")[0].replace("_", " ")
    rows = _first_rows(full["first_part"]) if "first_part" in full else dict[str, str]()
    rows |= _maker_rows(full["model"])
    if "weights_sha256" in full["model"]:
        rows["weights"] = f"sha256 {full['model']['weights_sha256']}"
    rows["backend"] = f"{backend['name']} {backend['version']}"
    if names:
        files = [*given["fields"], *given["magnitude"], *(given[name] or "" for name in READ)]
        rows["files"] = ", ".join(filter(None, files))
    rows |= {
        "field": f"{quantity}, read in {given['units']}",
        "volume": _shape(full["geometry"]["shape"]),
        **_volume_rows(full["geometry"]),
        "mask": f"{given['mask_voxels']} voxels, {_mask_ml(full):.0f} ml",
        "stored axes": grid["stored_axes"] or "not known",
        **_network_rows(grid),
        "plan": _plan(full["plan"]),
        **result_rows(full),
        "versions": ", ".join(f"{name} {number}" for name, number in full["versions"].items()),
        "made by": full["made_by"],
    }
    return rows


def numbers(full: dict[str, Any], scan: Scan) -> dict[str, Any]:
    """Return what maps of many acquisitions are compared by."""
    is_local = scan.quantity == "local_field_ppm"
    return {
        "field_residual": full.get("field_residual"),
        "noise_ppb": PPB_PER_PPM * scan.spectrum_noise_ppm if is_local else None,
        "mask_ml": _mask_ml(full),
        "voxel_size_mm": full["geometry"]["voxel_size_mm"],
    }


def are_numbers(said: Mapping[str, Any]) -> bool:
    """Return whether what was read from a file is what :func:`numbers` gives, as far as it goes."""
    sizes = said.get("voxel_size_mm", [])
    return (
        all(said.get(name) is None or is_number(said[name]) for name in COMPARED)
        and isinstance(sizes, list)
        and all(map(is_number, sizes))
    )


def _mask_ml(full: dict[str, Any]) -> float:
    """Return the volume of a run's mask."""
    voxel_mm3 = float(np.prod(full["geometry"]["voxel_size_mm"]))
    return float(full["input"]["mask_voxels"]) * voxel_mm3 / MM3_PER_ML


def _volume_rows(geometry: dict[str, Any]) -> dict[str, str]:
    directions = (geometry["b0_direction"], *geometry["more_b0_directions"])
    return {
        "voxel size": f"{vector_text(tuple(geometry['voxel_size_mm']))} mm",
        "B0 direction": ", ".join(vector_text(tuple(b)) for b in directions) + " in voxel axes",
    }


def field_rows(made: dict[str, Any]) -> dict[str, str]:
    """Return how the local field was made, a fact per line."""
    rows = {}
    if "mask" in made:
        rows["brain mask"] = f"{made['mask']['origin']}, {made['mask']['voxels']} voxels"
    if "snr" in made:
        rows["echoes"] = f"signal-to-noise ratio {made['snr']:.0f} of the first"
    if "noise_median_ppb" in made:
        rows["noise"] = (
            f"{made['noise_median_ppb']:.2f} ppb in the median voxel, {made['noise_p95_ppb']:.2f} "
            f"at the 95th percentile; the echoes contradict each other in "
            f"{made['misfit_over_4_percent']:.2f} % of voxels"
        )
    if "mask_kept_percent" in made:
        method = made["steps"]["background"]["by"]
        rows["background"] = (
            f"{method}: {made['total_field_std_ppm']:.4f} -> {made['local_field_std_ppm']:.4f} "
            f"ppm (standard deviation), {made['mask_kept_percent']:.0f} % of the mask kept"
        )
    return rows


def field_text(run: dict[str, Any]) -> str:
    """Return what making a field took and found, a fact per line."""
    peak, predicted = (
        memory_text(run["memory"][name])
        for name in ("peak_above_baseline_bytes", "predicted_peak_bytes")
    )
    rows = {"time": f"{run['total_seconds']:.2f} s"}
    rows["peak memory"] = f"{peak} (predicted {predicted})"
    return _table(field_rows(run.get("local_field", {})) | rows)


def stages_text(steps: dict[str, dict[str, Any]]) -> str:
    """Return the steps on the way to a map and their parameters, one per line."""
    return _table(
        {
            f"{n}. {name}": ", ".join(f"{key} {value}" for key, value in said.items())
            for n, (name, said) in enumerate(steps.items(), 1)
        }
    )


def inversion_rows(found: dict[str, Any]) -> dict[str, str]:
    """Return what a method found, a fact per line."""
    rows = {}
    if "sigma_ppm" in found:
        rows["noise of the field"] = f"{found['sigma_ppm']:.4f} ppm, from the {found['sigma_from']}"
        rows["alpha"] = f"{found['alpha_ppm_mm']:.3g} ppm mm"
    if "last_change" in found:
        rows["iterations"] = f"{found['iterations']}, the last changed {found['last_change']:.1e}"
    if "fitted_residual" in found:
        rows["fitted residual"] = f"{found['fitted_residual']:.3f}, with sources outside the mask"
    return rows


def _sight(field: dict[str, Any]) -> str:
    if field["halo"] is None:
        return "the whole volume"
    return (
        f"{field['theoretical']} voxels to each side, {field['halo']} for "
        f"{field['energy_kept']:.4%} of the gradient's energy"
    )


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name


def _plan(plan: dict[str, Any]) -> str:
    if plan["whole_volume"]:
        return "whole volume"
    return (
        f"{plan['patches']} patches of {_shape(plan['patch_shape'])}, overlap {plan['overlap']}, "
        f"blend {plan['blend']}"
    )


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
