"""Prior maps in the C library: those of the Python runtime, and how their making shows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from qsm_deploy.runtime.card.card import METADATA_KEY, Anchor, ModelCard, PriorMap
from qsm_deploy.runtime.console.peak_memory import (
    peak_rss_bytes,
    reset_peak,
    return_freed_memory,
    rss_bytes,
)
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.reconstruction.prior_maps import prior_maps, variation_steps
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from qsm_deploy.runtime.sessions.open import open_session
from tests.runtime.c.test_c_equality import AXIAL, OBLIQUE, TOLERANCE_PPM, each_grid, scan_of
from tests.runtime.c.test_c_methods import DATA, MEMORY, TOLERANCE, difference

HANN = 1


def made_by(engine: Any, scan: Scan, **params: Any) -> Any:
    grid = scan.geometry
    return engine.reconstruct(
        scan.measured[0], scan.mask, grid.voxel_size_mm, grid.b0_direction, **params
    )


@each_grid
def test_each_is_that_of_python(
    fake: Any, prior_card: ModelCard, tmp_path: Path, shape: tuple[int, int, int], grid: Any
) -> None:
    """In as many steps as the bundled network asks for; the made-up one doubles its last input."""
    scan = scan_of(shape, grid)
    path = tmp_path / "one.onnx"
    priors = open_session(BUNDLED_MODEL, "openvino").card.priors
    expected = prior_maps(priors, scan)
    for prior in priors:
        needed = tuple(p for p in priors if p.name in (prior.name, prior.of))
        inputs = tuple(t for t in prior_card.inputs if t.name in ("local_field_ppm", prior.name))
        path.write_text(replace(prior_card, inputs=inputs, priors=needed).to_json())
        engine = fake.open(path)
        chi = made_by(engine, scan)
        engine.close()
        assert difference(chi, 2 * expected[prior.name]) < TOLERANCE, prior


@each_grid
@pytest.mark.parametrize("anchor", [None, Anchor("tv_chi_ppm", 0.15)], ids=["", "anchored"])
def test_a_network_of_all_of_them(
    open_engine: Callable[..., Any],
    prior_model: Path,
    shape: tuple[int, int, int],
    grid: Any,
    anchor: Anchor | None,
    tmp_path: Path,
) -> None:
    model = onnx.load(prior_model)
    card = replace(open_session(prior_model, "openvino").card, anchor=anchor)
    helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    onnx.save(model, path := tmp_path / "model.onnx")
    session, engine = open_session(path, "openvino"), open_engine(path)
    scan = scan_of(shape, grid)
    plans = (
        (plan_whole(shape, 4), {}),
        (
            plan_patches(scan.mask, 4, 16, 4, "hann"),
            {"patch": 16, "overlap": 4, "blend": HANN},
        ),
    )
    for plan, params in plans:
        expected = reconstruct(session, scan, plan, Stages())
        assert np.abs(expected).max() > 0.01
        assert np.abs(made_by(engine, scan, **params) - expected).max() < TOLERANCE_PPM


def test_total_variation_counts_as_in_python(
    fake: Any, prior_card: ModelCard, tmp_path: Path, progress: Callable[..., Any]
) -> None:
    field, volume = prior_card.inputs[:2]
    priors = (
        PriorMap("first_ppm", "tv_residual", field.name, 7),
        PriorMap("second_ppm", "tv_field", field.name, 5),
        PriorMap("third_ppm", "tkd", "first_ppm", 3, threshold=0.1),
        PriorMap("last_ppm", "tv", field.name, 5),
    )
    inputs = (field, *(replace(volume, name=prior.name) for prior in priors))
    path = tmp_path / "several.onnx"
    path.write_text(replace(prior_card, inputs=inputs, priors=priors).to_json())
    assert variation_steps(priors) == 7 + 5
    scan, seen = scan_of((20, 18, 12), OBLIQUE), []
    engine = fake.open(path)
    shown = progress(lambda *at: seen.append(at))
    chi = made_by(engine, scan, patch=12, overlap=4, progress=shown)
    engine.close()
    total = 7 + 5 + plan_patches(scan.mask, 4, 12, 4, "crop").count
    assert seen == [(n, total) for n in range(1, total + 1)]
    assert difference(chi, 2 * prior_maps(priors, scan)["last_ppm"]) < TOLERANCE


def test_no_noise_can_be_told_from_a_field_that_is_the_same_everywhere(
    fake: Any, prior_card: ModelCard, tkd_card: ModelCard, tmp_path: Path, call_error: Any
) -> None:
    scan = scan_of((12, 10, 9), AXIAL)
    scan.measured[0][scan.mask] = 0.01
    noise = replace(tkd_card, inputs=(*tkd_card.inputs, prior_card.inputs[-1]))
    for n, (made, refused) in enumerate(((prior_card, True), (noise, True), (tkd_card, False))):
        path = tmp_path / f"{n}.onnx"
        path.write_text(made.to_json())
        engine = fake.open(path)
        if refused:
            with pytest.raises(call_error, match="the field is the same everywhere") as caught:
                made_by(engine, scan)
            assert caught.value.status == DATA
        else:
            assert made_by(engine, scan).any()
        engine.close()


@pytest.mark.parametrize("methods", [("tv", "tv_field", "tv_residual", "tkd"), ("tv",), ("tkd",)])
def test_memory_is_predicted(
    fake: Any,
    prior_card: ModelCard,
    tmp_path: Path,
    collect: Any,
    call_error: Any,
    methods: tuple[str, ...],
) -> None:
    scan = scan_of((90, 100, 80), AXIAL)
    field = "local_field_ppm"
    priors = tuple(replace(p, of=field) for p in prior_card.priors if p.method in methods)
    names = {field, *(prior.name for prior in priors)}
    inputs = tuple(tensor for tensor in prior_card.inputs if tensor.name in names)
    path = tmp_path / "made.onnx"
    path.write_text(replace(prior_card, inputs=inputs, priors=priors).to_json())
    engine, lines = fake.open(path), []
    given = scan.measured[0], scan.mask.astype(np.uint8)
    small = {"patch": 16, "overlap": 4}
    engine.reconstruct(*given, log=collect(lines), **small)
    predicted = 2**20 * int(lines[-1].split("predicted peak ")[1].split(" MiB")[0])
    with pytest.raises(call_error, match="MiB in the stage prepare, the limit") as caught:
        engine.reconstruct(*given, memory_limit_bytes=int(0.9 * predicted), **small)
    assert caught.value.status == MEMORY
    return_freed_memory()
    reset_peak()
    before = rss_bytes() + given[0].nbytes  # the map, which the caller holds
    engine.reconstruct(*given, **small)
    assert peak_rss_bytes() - before == pytest.approx(predicted, rel=0.15)
    engine.close()
