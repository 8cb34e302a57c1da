"""Networks of other tasks than a local field to a map, alone and one after the other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx
import pytest

from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.runtime import open_model, run
from qsm_deploy.runtime.card.card import METADATA_KEY, GeometryLimits, ModelCard, TensorInfo, Tiles
from qsm_deploy.runtime.cli import main

VOLUME = ("n", 1, "x", "y", "z")
TOTAL = TensorInfo("total_field_ppm", "ppm", VOLUME)
LOCAL = TensorInfo("local_field_ppm", "ppm", VOLUME)
CHI = TensorInfo("chi_ppm", "ppm", VOLUME)
R2_PRIME = TensorInfo("r2prime_hz", "Hz", VOLUME)
POSITIVE, NEGATIVE = (
    TensorInfo(f"chi_{sign}_ppm", "ppm", VOLUME) for sign in ("positive", "negative")
)


@pytest.fixture
def models(card: ModelCard, write_model: Callable[..., Path]) -> dict[str, Path]:
    """Return a network of each task, which gives a factor times its last input."""
    removal = replace(
        card, network="removal", task="total_field->local_field", inputs=(TOTAL,), output=LOCAL
    )
    parting = replace(
        card,
        network="parting",
        task="local_field+chi+r2prime->chi_positive+chi_negative",
        inputs=(LOCAL, R2_PRIME, CHI),
        output=POSITIVE,
        further_outputs=(NEGATIVE,),
    )
    direct = replace(card, network="direct", task="total_field->chi", inputs=(TOTAL,))
    axial = replace(
        card, network="axial", geometry=GeometryLimits((2.0, 2.0, 2.0), 0.1, (0.0, 0.0, 1.0), 2.0)
    )
    cards = {
        "removal": removal,
        "parting": parting,
        "direct": direct,
        "axial": axial,
        "inversion": card,
    }
    factors = {"removal": 0.5}
    return {n: write_model(c, f"{n}.onnx", factors.get(n, 2.0)) for n, c in cards.items()}


@pytest.fixture
def total(write_volume: Callable[..., Path], field: np.ndarray) -> Path:
    return write_volume(field, "total.nii.gz")


def stored(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).get_fdata(), dtype=np.float32)


def test_a_network_of_the_total_field_writes_a_local_field(models, total, field, capsys) -> None:
    assert main([str(models["removal"]), str(total), "-q"]) == 0
    path = total.with_name("total_localfield.nii.gz")
    assert capsys.readouterr().out.split() == [str(path)]
    np.testing.assert_allclose(stored(path), 0.5 * field, atol=1e-6)
    assert path.with_name("total_localfield.json").exists()


@pytest.mark.parametrize("order", [("removal", "inversion"), ("inversion", "removal")])
def test_each_takes_what_the_one_before_gives(order, models, total, field, tmp_path) -> None:
    local = tmp_path / "local.nii.gz"
    chain = [str(models[name]) for name in order]
    command = [*chain, "--total-field", str(total), "--local-field", str(local), "-q"]
    assert main(command) == 0
    np.testing.assert_allclose(stored(local), 0.5 * field, atol=1e-6)
    np.testing.assert_allclose(stored(total.with_name("total_chi.nii.gz")), field, atol=1e-6)


def test_a_chain_of_three_parts_the_map_of_the_second(
    models, total, field, write_volume, tmp_path
) -> None:
    r2prime = write_volume(np.abs(field), "r2prime.nii.gz")
    output = tmp_path / "parted.nii.gz"
    chain = [str(models[name]) for name in ("removal", "inversion", "parting")]
    command = [*chain, str(total), "--r2prime", str(r2prime), "-o", str(output), "-q"]
    assert main(command) == 0
    positive, negative = (
        tmp_path / f"parted_chi-{sign}.nii.gz" for sign in ("positive", "negative")
    )
    np.testing.assert_allclose(stored(positive), 2 * field, atol=1e-6)  # of chi = field
    np.testing.assert_allclose(stored(negative), 4 * field, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_the_second_is_brought_to_its_own_grid(models, total, field) -> None:
    made = run(total, model=[models["removal"], models["axial"]])
    assert made.report["grid"]["resampled"]
    assert made.chi_ppm.shape == field.shape
    assert made.report["first_part"]["model"]["network"] == "removal"
    stages = made.report["plan"]["predicted_stage_bytes"]
    assert stages["inference of the part before"] > 0


def test_arrays_of_several_maps(models, field) -> None:
    grid = {"voxel_size_mm": (1, 1, 1), "b0_direction": (0, 0, 1)}
    besides = {"chi_ppm": field, "r2prime_hz": np.abs(field)}
    made = open_model(models["parting"]).reconstruct(field, **grid, **besides)
    assert list(made) == ["chi_positive_ppm", "chi_negative_ppm"]
    np.testing.assert_allclose(made["chi_negative_ppm"], 4 * field, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        (("direct", "inversion"), (), "direct gives chi_ppm, twice takes local_field_ppm"),
        (("inversion", "inversion"), (), "they do not follow each other"),
        (("removal", "parting"), ("--r2prime",), "pass --chi FILE"),
        (("removal", "inversion", "parting"), (), "pass --r2prime FILE"),
        (("inversion",), ("--r2prime",), "--r2prime is for networks that take it, twice does not"),
        (("direct",), ("--data-consistency", "0.1"), "needs a local field"),
        (("removal",), ("--truth",), "--truth is a susceptibility, local_field_ppm is made"),
        (("direct",), ("--total-field", "--local-field"), "is handed no local field that --local"),
        (("removal",), ("--total-field", "--local-field"), "is handed no local field that --local"),
        (
            ("direct",),
            ("--total-field", "--erode", "1"),
            "are for a local field, direct takes none",
        ),
    ],
)
def test_what_does_not_fit_is_refused(names, flags, message, models, total, capsys) -> None:
    files = {flag: [str(total)] for flag in ("--r2prime", "--total-field", "--truth")}
    files["--local-field"] = [str(total.with_name("kept.nii.gz"))]
    said = [part for flag in flags for part in (flag, *files.get(flag, ()))]
    begins = [] if "--total-field" in flags else [str(total)]
    assert main([*(str(models[n]) for n in names), *begins, *said, "-q"]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_tiles_of_a_card_are_the_plan(card, write_model, total, field, capsys) -> None:
    tiles = Tiles((12, 12, 12), (8, 8, 8), (8, 8, 8), "zero", "none")
    model = write_model(replace(card, patchable="no", why_whole="it has tiles", tiles=tiles))
    made = run(total, model=model)
    np.testing.assert_allclose(made.chi_ppm, 2 * field, atol=1e-6)
    assert made.report["plan"]["patch_shape"] == [12, 12, 12]
    assert main([str(model), str(total), "--patch", "16", "-q"]) == 2
    assert "has tiles of its own" in capsys.readouterr().err


def test_a_method_comes_before_what_parts_its_map(models, total, field, write_volume) -> None:
    r2prime = write_volume(np.abs(field), "r2prime.nii.gz")
    weights = ["--magnitude", str(write_volume(1 + np.abs(field), "magnitude.nii.gz"))]
    command = [str(models["parting"]), "--method", "tv", str(total), "--r2prime", str(r2prime)]
    assert main([*command, *weights, "-q"]) == 0
    positive, negative = (
        stored(total.with_name(f"total_chi-{sign}.nii.gz")) for sign in ("positive", "negative")
    )
    assert np.abs(positive).max() > 0
    np.testing.assert_allclose(negative, 2 * positive, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_magnitude_is_for_the_method_at_the_end(models, total, field, write_volume) -> None:
    magnitude = write_volume(1 + np.abs(field), "magnitude.nii.gz")
    made = run(total, model=models["removal"], method="medi", magnitude=magnitude)
    assert made.report["first_part"]["model"]["network"] == "removal"
    assert "inversion" in made.report


@pytest.fixture
def head(card, write_model) -> Path:
    """Return a network of the whole head, which gives the mean of three neighbours along x."""
    shape = ("n", 1, "x", "y", "z")
    of_head = replace(
        card,
        network="head",
        task="total_field->chi",
        inputs=(TOTAL,),
        constants={"unmasked": 1.0},
        receptive_field=replace(card.receptive_field, theoretical=1, halo=1),
        geometry=GeometryLimits(None, None, (0.0, 0.0, 1.0), 2.0),
    )
    path = write_model(of_head, "head.onnx")
    kernel = onnx.numpy_helper.from_array(np.ones((1, 1, 3, 1, 1), dtype=np.float32) / 3, "w")
    values = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape)
        for n in ("total_field_ppm", "chi_ppm")
    ]
    node = onnx.helper.make_node("Conv", ["total_field_ppm", "w"], ["chi_ppm"], pads=[1, 0, 0] * 2)
    graph = onnx.helper.make_graph([node], "mean", values[:1], values[1:], [kernel])
    opset = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.helper.set_model_props(model, {METADATA_KEY: of_head.to_json()})
    onnx.save(model, path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_field_of_the_whole_head_counts_outside_the_mask(head, write_volume) -> None:
    field = np.random.default_rng(0).normal(0, 0.2, (20, 16, 16)).astype(np.float32)
    mask = np.zeros(field.shape, dtype=np.uint8)
    mask[6:14, 4:12, 4:12] = 1
    whole, brain = write_volume(field, "head.nii.gz"), write_volume(mask, "mask.nii.gz")
    expected = mask * (np.roll(field, 1, 0) + field + np.roll(field, -1, 0)) / 3
    np.testing.assert_allclose(run(whole, mask=brain, model=head).chi_ppm, expected, atol=1e-6)
    grid = {"voxel_size_mm": (1, 1, 1), "b0_direction": (0, 0, 1)}
    made = open_model(head).reconstruct(field, mask, **grid)
    np.testing.assert_allclose(made, expected, atol=1e-6)
    with pytest.raises(GeometryError, match="whole head is neither resampled nor turned"):
        run(whole, mask=brain, model=head, b0_direction=(0, 0.3, 1))


@pytest.mark.parametrize("method", ["tkd", "tv"])
def test_a_method_takes_the_field_that_a_network_gives(
    method, models, total, field, write_volume, tmp_path
) -> None:
    local = tmp_path / "local.nii.gz"
    mask = ["-m", str(write_volume((field != 0).astype(np.uint8), "mask.nii.gz")), "-q"]
    removal = [str(models["removal"]), str(total), *mask, "-o", str(local)]
    chained, apart = tmp_path / "chained.nii.gz", tmp_path / "apart.nii.gz"
    assert main(removal) == 0
    assert main([str(local), *mask, "--method", method, "-o", str(apart)]) == 0
    command = [str(models["removal"]), str(total), *mask, "--method", method]
    assert main([*command, "-o", str(chained)]) == 0
    np.testing.assert_allclose(stored(chained), stored(apart), atol=1e-7)
    assert np.abs(stored(chained)).max() > 0


@pytest.mark.parametrize(
    ("stage", "chain", "made"),
    [
        ("bfr", ("removal",), "localfield"),
        ("bfr+dipole", ("removal", "inversion"), "chimap"),
    ],
)
def test_stages_of_qsm_ci(stage, chain, made, models, field, write_volume, tmp_path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    write_volume(field, "in/totalfield.nii.gz")
    write_volume((field != 0).astype(np.uint8), "in/mask.nii.gz")
    (source / "params.json").write_text('{"B0_dir": [0, 0, 1], "voxel_size": [1, 1, 1]}')
    command = [*(str(models[name]) for name in chain), "--qsm-ci-stage", stage, "-q"]
    assert main([*command, "--qsm-ci-folders", str(source), str(target)]) == 0
    expected = field * (0.5 if made == "localfield" else 1)
    np.testing.assert_allclose(stored(target / f"{made}.nii.gz"), expected, atol=1e-6)


def test_each_echo_has_its_time(card, write_model, write_volume, field, capsys) -> None:
    phase = TensorInfo("phase_rad", "rad", VOLUME)
    model = write_model(replace(card, task="phase->chi", inputs=(phase,)), factor=1.0)
    echoes = [np.angle(np.exp(1j * n * 20 * field)).astype(np.float32) for n in (1, 2)]
    files = [str(write_volume(echo, f"phase{n}.nii.gz")) for n, echo in enumerate(echoes)]
    scanner = ["--field-strength", "3", "-q", "--force", "--echo-times"]
    assert main([str(model), *files, *scanner, "0.01", "0.02"]) == 0
    made = stored(Path(files[0].replace(".nii.gz", "_chi.nii.gz")))
    np.testing.assert_allclose(made, (echoes[0] + 4 * echoes[1]) / 5, atol=1e-6)
    for given, times in ((files, ["0.01"]), (files[:1], ["0.01", "0.02"]), (files, [])):
        stated = [*scanner, *times] if times else scanner[:-1]
        assert main([str(model), *given, *stated]) == 3
        assert "echo times: state one for each" in capsys.readouterr().err or not times


def test_a_dry_run_names_every_part(models, total, field, write_volume, capsys) -> None:
    r2prime = write_volume(np.abs(field), "r2prime.nii.gz")
    chain = [str(models["removal"]), str(models["parting"]), str(total)]
    said = ["--method", "tkd", "--r2prime", str(r2prime), "--dry-run", "-q"]
    assert main([*chain, *said]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["first", "model", "removal.onnx"]
    assert ["then", "tkd"] in [line.split() for line in lines]
    assert any("parting.onnx" in line for line in lines)
