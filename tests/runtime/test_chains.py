"""Networks of other tasks than a local field to a map, alone and one after the other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.runtime import open_model, run
from qsm_deploy.runtime.card.card import GeometryLimits, ModelCard, TensorInfo, Tiles
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
        (
            ("direct",),
            ("--total-field", "--erode", "1"),
            "are for a local field, direct takes none",
        ),
    ],
)
def test_what_does_not_fit_is_refused(names, flags, message, models, total, capsys) -> None:
    files = {"--r2prime": [str(total)], "--total-field": [str(total)]}
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
