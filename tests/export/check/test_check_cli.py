"""The gate as a command: what passes, broken engines that must not, and what is refused."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import helper, numpy_helper

from qsm_deploy.calibration.budgets import DEFAULTS, failures
from qsm_deploy.calibration.phantom.cli import main as draw
from qsm_deploy.export.check import evaluations as check_sessions
from qsm_deploy.export.check.cli import main, parser
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.card import (
    METADATA_KEY,
    TASKS,
    UNITS,
    GeometryLimits,
    ModelCard,
    Task,
    TensorInfo,
    parse_card,
)
from qsm_deploy.runtime.card.plan_file import PROMISE, plan_bytes
from qsm_deploy.runtime.gpu.engines.plan_target import PlanTarget
from qsm_deploy.runtime.scan.nifti import load_volume, nifti_bytes
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Session
from tests.runtime.storages import SPREAD

ONE = ("--backend", "onnxruntime", "--patch", "off")
SMALL = ("--shapes", "16,20,24", "--threads", "1", "-q")
Edit = Callable[[onnx.ModelProto], None]


def card_of(model: onnx.ModelProto) -> ModelCard:
    return parse_card(next(p.value for p in model.metadata_props if p.key == METADATA_KEY))


def save(model: onnx.ModelProto, path: Path, **changes) -> Path:
    helper.set_model_props(model, {METADATA_KEY: replace(card_of(model), **changes).to_json()})
    onnx.save(model, path)
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the bundled engine, its graph edited or its card changed."""

    def write(edit: Edit = lambda model: None, **changes) -> Path:
        model = onnx.load(BUNDLED_MODEL)
        edit(model)
        return save(model, tmp_path / "engine.onnx", **changes)

    return write


@pytest.fixture
def check(capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command and gives its code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        # what is asked for comes last and wins
        code = main([*SMALL, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "head"
    assert draw([str(folder), "--shape", "30", "34", "28", "--seed", "5", "-q"]) == 0
    return folder


@pytest.fixture
def field(head: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the head's field, its values or its affine changed."""

    def write(change=lambda values: values, voxel_size_mm: float = 1.0) -> Path:
        volume = load_volume(head / "field.nii.gz")
        affine = volume.affine @ np.diag([voxel_size_mm] * 3 + [1])
        path = tmp_path / "field.nii"
        path.write_bytes(nifti_bytes(change(volume.data), affine, compress=False))
        mask = load_volume(head / "mask.nii.gz").data
        (tmp_path / "mask.nii").write_bytes(nifti_bytes(mask, affine, compress=False))
        return path

    return write


def refused(result: tuple[int, str, str], code: int, message: str) -> None:
    """Check for one clear line and no result."""
    seen, out, err = result
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert (seen, out, len(errors)) == (code, "", 1), err
    assert errors[0].startswith("qsm-check: error: ")
    assert re.search(message, errors[0]), errors[0]


def document(out: str) -> dict:
    found = json.loads(out)
    assert found.pop("made_at")
    return found


def test_the_bundled_engine_passes_in_every_backend_whole_and_patched(check, engine) -> None:
    code, out, err = check(engine(), "--json")
    assert (code, err) == (
        0,
        "note: no FIELD was named: checking on drawn heads; name a real one too\n",
    )
    found = document(out)
    rows = found["comparisons"]
    shared = 2 * (card_of(onnx.load(BUNDLED_MODEL)).receptive_field.halo or 0)
    assert {row["by"] for row in rows} == {"onnxruntime", "openvino"}
    assert {(*row["shape"], row["run"]) for row in rows} == {
        (16, 16, 16, "whole"),
        (20, 20, 20, "whole"),
        (24, 24, 24, "whole"),
        (24, 24, 24, f"8 patches of 20x20x20, {shared} shared"),
    }
    assert found["verdict"] == "pass"
    assert all(0 < row["max_ppb"] < 0.01 for row in rows)
    assert all({"regions", "against_truth", "field_residual"} <= row.keys() for row in rows)
    assert any("calcification" in {r["region"] for r in row["regions"]} for row in rows)
    assert found["reference"]["files"][0]["file"] == "tv-unet.safetensors"
    assert len(found["engine"]["sha256"]) == 64


def test_the_same_inputs_give_the_same_json(check, engine) -> None:
    path = engine()
    one, two = (check(path, "--json", "--shapes", "16,16,20")[1] for _ in range(2))
    assert document(one) == document(two)


def test_a_head_has_the_same_numbers_in_any_storage(check, engine, head, tmp_path) -> None:
    path, found = engine(), []
    for storage in SPREAD[::3]:
        for name in ("field", "mask", "chi"):
            volume = load_volume(head / f"{name}.nii.gz")
            affine = storage.affine(volume.affine, volume.data.shape)
            stored = nifti_bytes(storage.of(volume.data), affine, compress=False)
            (tmp_path / f"{name}.nii").write_bytes(stored)
        field, mask, truth = (tmp_path / f"{name}.nii" for name in ("field", "mask", "chi"))
        code, out, _ = check(path, field, "-m", mask, "--truth", truth, "--json", *ONE)
        assert code == 0
        rows = document(out)["comparisons"]
        found.append([{k: v for k, v in row.items() if k != "worst_voxel"} for row in rows])
    assert any("against_truth" in row for row in found[0])
    assert found[0] == found[1] == found[2]


def outputs_of(model: onnx.ModelProto, rename: str) -> onnx.NodeProto:
    """Rename what makes the output, for nodes that are put behind it."""
    (last,) = (node for node in model.graph.node if "chi_ppm" in node.output)
    last.output[0] = rename
    return last


def constant(model: onnx.ModelProto, name: str, values) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return name


def broken_scale(model: onnx.ModelProto) -> None:
    outputs_of(model, "before")
    factor = constant(model, "factor", np.float32(1.05))
    model.graph.node.append(helper.make_node("Mul", ["before", factor], ["chi_ppm"]))


def swapped_channel(model: onnx.ModelProto) -> None:
    (first,) = (node for node in model.graph.node if node.output[0] == "cat")
    first.input[:] = first.input[::-1]


def wrong_normalisation(model: onnx.ModelProto) -> None:
    (first,) = (node for node in model.graph.node if node.output[0] == "div")
    first.input[1] = constant(model, "spread", np.float32(0.02))


def offset_output(model: onnx.ModelProto) -> None:
    outputs_of(model, "before")
    offset = constant(model, "offset", np.float32(0.003))
    model.graph.node.append(helper.make_node("Add", ["before", offset], ["chi_ppm"]))


def shifted_output(model: onnx.ModelProto) -> None:
    """Move the map by one voxel along the first axis, the last voxel to the front."""
    outputs_of(model, "before")
    numbers = {"zero": 0, "back": -1, "axis": 2, "end": 2**40}
    names = {key: constant(model, key, np.array([n])) for key, n in numbers.items()}
    model.graph.node.extend(
        [
            helper.make_node("Slice", ["before", names["back"], names["end"], "axis"], ["tail"]),
            helper.make_node("Slice", ["before", names["zero"], names["back"], "axis"], ["body"]),
            helper.make_node("Concat", ["tail", "body"], ["chi_ppm"], axis=2),
        ]
    )


CONTROLS = [broken_scale, swapped_channel, wrong_normalisation, offset_output, shifted_output]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_broken_engine_fails_the_gate(control: Edit, check, engine) -> None:
    """Its arithmetic is FP32, but the budgets of every precision must find the fault."""
    code, out, err = check(engine(control), "--json", *ONE, "--shapes", "16,16,64")
    assert code == 5
    found = document(out)
    assert found["verdict"] == "fail"
    first = found["failures"][0]
    value, budget = f"{first['value']:.3g} ppb", f"{first['budget']:g} ppb"
    assert err.splitlines()[-1].startswith(
        f"qsm-check: error: max_ppb is {value}, the budget is {budget} (head "
    )
    for precision, budgets in DEFAULTS.items():
        assert failures(found["comparisons"], budgets), precision


def test_a_card_that_misleads_the_runtime_fails_the_gate(check, engine) -> None:
    priors = card_of(onnx.load(BUNDLED_MODEL)).priors
    wrong = [replace(p, steps=p.steps + (p.threshold is None)) for p in priors]
    code, _, err = check(engine(priors=tuple(wrong)), *ONE)
    assert code == 5
    assert "max_ppb is" in err


def test_an_engine_that_returns_nan_fails_the_gate(check, engine) -> None:
    def poison(model: onnx.ModelProto) -> None:
        outputs_of(model, "before")
        name = constant(model, "nothing", np.float32(np.nan))
        model.graph.node.append(helper.make_node("Add", ["before", name], ["chi_ppm"]))

    code, out, err = check(engine(poison), *ONE)
    assert code == 5
    assert "FAIL: engine.onnx" in out
    assert re.search(r"error: the engine's map is NaN or Inf at \d+ voxels \(head", err)


def separating(path: Path, factor: float) -> Path:
    """Write a network of two maps, the second of them so much too large."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float[n, 1, x, y, z] local_field_ppm, float[n, 1, x, y, z] chi_ppm,
           float[n, 1, x, y, z] r2prime_hz)
          => (float[n, 1, x, y, z] chi_positive_ppm, float[n, 1, x, y, z] chi_negative_ppm) {
          sources = Mul(r2prime_hz, scale)
          both = Add(sources, chi_ppm)
          chi_positive_ppm = Add(both, local_field_ppm)
          negative = Sub(sources, chi_ppm)
          chi_negative_ppm = Mul(negative, factor)
        }"""
    )
    constant(model, "scale", np.float32(0.01))
    constant(model, "factor", np.float32(factor))
    task: Task = "local_field+chi+r2prime->chi_positive+chi_negative"
    first, besides, given = TASKS[task]
    volume = ("n", 1, "x", "y", "z")
    made = [TensorInfo(name, UNITS[name], volume) for name in (first, *besides, *given)]
    card = card_of(onnx.load(BUNDLED_MODEL))
    changes = {"network": "separates", "task": task, "priors": (), "anchor": None}
    changes |= {"inputs": tuple(made[:3]), "output": made[3], "further_outputs": (made[4],)}
    helper.set_model_props(model, {METADATA_KEY: replace(card, **changes).to_json()})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.0, None), (1.05, "max_ppb is"), (np.nan, "the engine's map is NaN or Inf")],
)
def test_every_output_is_compared(factor: float, said: str | None, check, tmp_path) -> None:
    reference = separating(tmp_path / "reference.onnx", 1.0)
    path = separating(tmp_path / "two.onnx", factor)
    code, out, err = check(path, "--reference", reference, *ONE, "--json")
    found = document(out)
    outputs = ["chi_positive_ppm", "chi_negative_ppm"]
    assert [row["output"] for row in found["comparisons"]] == 3 * outputs
    if said is None:
        assert code == 0
    else:
        assert code == 5
        assert all("chi_negative_ppm, onnxruntime" in one["where"] for one in found["failures"])
        assert re.search(f"{said}.*, chi_negative_ppm, onnxruntime", err)


def test_maps_besides_the_field_are_not_read(check, head, tmp_path) -> None:
    path = separating(tmp_path / "two.onnx", 1.0)
    given = (path, head / "field.nii.gz", "-m", head / "mask.nii.gz", "--reference", path)
    refused(check(*given), 2, "takes chi_ppm and r2prime_hz besides .*: check it on the phantom")


def test_a_budget_may_be_widened_and_narrowed(check, engine) -> None:
    path = engine(broken_scale)
    wide = ("--budget", "max_ppb=1000")
    assert check(path, *ONE, *wide)[0] == 0
    code, _, err = check(path, *ONE, *wide, "--budget", "nrmse_percent=4")
    assert code == 5
    # less than the 5 % that it is off by: next to the cone the map stays as it was
    assert re.search(r"nrmse_percent is 4\.\d+ %, the budget is 4 % \(head", err)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_reduced_precision_is_truly_rounded(precision: str, check, tmp_path) -> None:
    model = onnx.load(BUNDLED_MODEL)
    path = save(with_precision(model, precision), tmp_path / "low.onnx", precision=precision)
    code, out, _ = check(path, "--json", "--budget", "max_ppb=100", "--budget", "p999_ppb=10")
    rows = document(out)["comparisons"]
    assert code == 0
    rounded = [row["max_ppb"] for row in rows if row["by"] == "rounded"]
    assert min(rounded) > 0.01  # what ONNX Runtime and FP32 would not show
    assert ("openvino bf16" in {row["by"] for row in rows}) == (precision == "bf16")


def test_another_engine_may_be_the_reference(check, engine, tmp_path) -> None:
    model = onnx.load(BUNDLED_MODEL)
    low = save(with_precision(model, "fp16"), tmp_path / "low.onnx", precision="fp16")
    code, out, _ = check(low, "--reference", engine(), "--json", "--patch", "off")
    assert code == 0
    found = document(out)
    assert found["reference"]["files"][0]["file"] == "engine.onnx"
    assert "OpenVINO" in found["reference"]["how"]


def test_weights_may_be_the_reference(check, engine) -> None:
    weights = REGISTRY["tv-unet"].bundled_file()
    code, out, _ = check(engine(), "--reference", weights, *ONE)
    assert code == 0
    last = out.splitlines()[-1]
    assert last.startswith("PASS: engine.onnx: tv-unet in fp32 is within its budgets: max_ppb 0.0")


def test_a_real_file_is_run_whole_patched_and_around_its_strongest_field(
    check, engine, head
) -> None:
    files = [head / f"{name}.nii.gz" for name in ("field", "mask", "chi", "labels")]
    code, out, _ = check(
        engine(), files[0], "-m", files[1], "--truth", files[2], "--labels", files[3], "--json",
        "--backend", "onnxruntime",
    )  # fmt: skip
    assert code == 0
    found = document(out)
    rows = [(row["subject"], *row["shape"], row["run"]) for row in found["comparisons"]]
    assert rows[:-1] == [
        ("field.nii.gz, strongest field", 16, 16, 16, "whole"),
        ("field.nii.gz", 30, 34, 28, "whole"),
    ]
    assert rows[-1][:-1] == ("field.nii.gz", 30, 34, 28)
    assert "patches of" in rows[-1][-1]
    (given,) = found["inputs"]
    assert [given["fields"][0]["file"], given["truth"]["file"]] == ["field.nii.gz", "chi.nii.gz"]
    whole = found["comparisons"][1]
    assert {"regions", "xsim_drop", "bias_by_field"} <= whole.keys()


def test_labels_need_no_truth(check, engine, head) -> None:
    arguments = (head / "field.nii.gz", "-m", head / "mask.nii.gz", "--patch", "off")
    path = engine()
    labels = ("--labels", head / "labels.nii.gz", "--budget", "region_bias_ppb=0.001")
    assert check(path, *arguments, *labels)[0] == 0
    refused(
        check(path, *arguments, "--budget", "xsim_drop=0.001"),
        2,
        r"--budget xsim_drop cannot be judged .*--truth",
    )


def test_another_network_is_no_reference(check, engine, tmp_path) -> None:
    other = save(onnx.load(BUNDLED_MODEL), tmp_path / "other.onnx", network="loopnet")
    refused(check(engine(), "--reference", other), 4, "network loopnet, the engine has tv-unet")
    other = save(onnx.load(BUNDLED_MODEL), tmp_path / "other.onnx", weights_sha256="1" * 64)
    digest = card_of(onnx.load(BUNDLED_MODEL)).weights_sha256[:12]
    told = f"weights_sha256 1{{12}}, the engine has {digest}"
    refused(check(engine(), "--reference", other), 4, told)


def test_weights_of_another_network_are_no_reference(check, engine, tiny_weights) -> None:
    refused(
        check(engine(), "--reference", tiny_weights),
        7,
        r"tiny.pth: not the weights that the engine was made of: .*keys like ir2qsm; its card says "
        "tv-unet",
    )


def test_a_network_without_bundled_weights_needs_a_reference(check, engine) -> None:
    refused(check(engine(network="xqsm")), 2, "no weights of xqsm are bundled: pass --reference")


def test_a_geometry_that_the_network_was_not_trained_for(check, engine, field, tmp_path) -> None:
    path = engine(geometry=GeometryLimits((1.0, 1.0, 1.0), 0.1, None, None))
    given = (path, field(voxel_size_mm=2.0), "-m", tmp_path / "mask.nii", "--patch", "off")
    given += ("--backend", "onnxruntime")
    assert check(*given, "--allow-geometry")[0] == 0
    code, out, err = check(*given, "--json")
    assert (code, "resampled to 1 mm for" in err) == (0, True), err
    assert document(out)["comparisons"][-1]["shape"] == [30, 34, 28]


def test_hertz_given_as_ppm(check, engine, field, tmp_path) -> None:
    given = (engine(), field(lambda values: values * 128), "-m", tmp_path / "mask.nii")
    refused(check(*given), 3, "0.045 if it is in hz")
    units = ("--units", "hz", "--field-strength", "3", "--patch", "off", "--backend", "onnxruntime")
    assert check(*given, *units)[0] == 0


def test_a_mask_that_is_missing_or_empty(check, engine, field, tmp_path) -> None:
    path, volume = engine(), field()
    refused(check(path, volume), 2, "maps are compared inside a mask: pass it with -m MASK")
    refused(check(path, volume, "-m", tmp_path / "no.nii"), 3, "no.nii: no such file")
    empty = tmp_path / "empty.nii"
    data = load_volume(volume)
    empty.write_bytes(nifti_bytes(0 * data.data, data.affine, compress=False))
    refused(check(path, volume, "-m", empty), 3, "the mask is empty")


def test_a_constant_volume(check, engine, field, tmp_path) -> None:
    path = engine()
    given = ("-m", tmp_path / "mask.nii")
    flat = field(lambda values: np.full_like(values, 0.02))
    refused(check(path, flat, *given), 3, r"field.nii: constant in the mask \(0.02")
    zero = field(lambda values: 0 * values)
    refused(check(path, zero, *given), 3, "the field is zero in the whole mask")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Return a plan, whose engine is bytes with a card in them."""
    card = card_of(onnx.load(BUNDLED_MODEL))
    target = PlanTarget("tensorrt-rtx", "1.7.1.116", False, "sm_89").options()
    options = card.options | target | {"shapes": "16x16x16,24x24x24,32x32x32", PROMISE: "1"}
    engine = b"ftrt" + replace(card, options=options).to_json().encode()
    path = tmp_path / "engine.plan"
    path.write_bytes(plan_bytes(engine, BUNDLED_MODEL.read_bytes()))
    return path


def test_a_plan_without_a_gpu(check, plan, monkeypatch, capsys) -> None:
    def no_driver(number: int) -> None:
        raise EngineError("this machine has no NVIDIA driver")

    cuda_device = SimpleNamespace(CudaDevice=no_driver, device_properties=no_driver)
    monkeypatch.setitem(sys.modules, "qsm_deploy.runtime.gpu.cuda_device", cuda_device)
    refused(check(plan, "--device", "cuda:0"), 4, "this machine has no NVIDIA driver")
    wrong = check(plan, "--device", "cuda:0", "--backend", "openvino")
    refused(wrong, 2, "--backend openvino is for the CPU")
    assert main([str(plan), "--json", "--backend", "onnxruntime"]) == 0
    out, err = capsys.readouterr()
    assert f"{plan}: this machine has no NVIDIA driver; its graph is checked instead" in err
    assert {row["by"] for row in document(out)["comparisons"]} == {"onnxruntime"}


def test_a_plan_is_checked_at_its_own_shapes(plan, engine, capsys, monkeypatch) -> None:
    """The engine on a GPU is played by ONNX Runtime."""
    opened = []

    def open_in_its_place(models: list[Path], number: int, **how: object) -> list[Session]:
        opened.append((models, number))
        return [open_session(engine(), "onnxruntime")]

    monkeypatch.setattr(check_sessions, "open_gpu_sessions", open_in_its_place)
    assert main([str(plan), "--device", "cuda:1", "--json", "-q"]) == 0
    assert opened == [([plan], 1)]
    rows = document(capsys.readouterr().out)["comparisons"]
    assert {row["by"] for row in rows} == {"gpu"}
    assert [row["shape"][0] for row in rows if row["run"] == "whole"] == [16, 24, 32]


def test_shapes_that_a_plan_does_not_serve(check, plan, field, tmp_path) -> None:
    message = "the plan does not serve {}: it was built for 16x16x16,24x24x24,32x32x32"
    served = ("--shapes", "16,24,32")
    refused(check(plan, "--shapes", "16,24,48"), 4, message.format("48x48x48"))
    with_mask = (field(), "-m", tmp_path / "mask.nii", *served)
    refused(check(plan, *with_mask, "--patch", "off"), 4, message.format("a volume of 32x36x28"))
    refused(check(plan, *with_mask, "--patch", "8"), 4, message.format("patches of 8x8x8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--reference", "pytorch", "--reference", "a.pth"),
            "--reference pytorch means the bundled",
        ),
        (("--backend", "pytorch"), "--backend pytorch does not show what fp32 costs; .* pass open"),
        (("no.nii",), "maps are compared inside a mask"),
    ],
)
def test_flags_that_contradict_each_other(arguments, message, check, engine) -> None:
    refused(check(engine(), *arguments), 2, message)


@pytest.mark.parametrize("wrong", [["--budget", "best=1"], ["--shapes"], ["--backend", "cuda"], []])
def test_flags_that_cannot_be(wrong: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*wrong] if not wrong else ["engine.onnx", *wrong])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_files_that_are_no_engine(check, tmp_path, engine) -> None:
    refused(check(tmp_path / "no.onnx"), 3, "no.onnx: no such model file")
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"\x08\x01 nothing of this is a model")
    refused(check(garbage), 4, "garbage.onnx: not a valid .onnx model")
    whole = engine().read_bytes()
    garbage.write_bytes(whole[: len(whole) // 2])
    refused(check(garbage), 4, "garbage.onnx: not a valid .onnx model")
    bare = tmp_path / "bare.onnx"
    model = onnx.load(BUNDLED_MODEL)
    del model.metadata_props[:]
    onnx.save(model, bare)
    refused(check(bare), 4, "bare.onnx has no model card; export it with qsm-export")
    strange = tmp_path / "engine.pth"
    torch.save({}, strange)
    refused(check(strange), 4, "neither an .onnx model nor a .plan")


def test_a_field_need_not_be_named(capsys) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "required: ENGINE\n" in capsys.readouterr().err
    assert parser().parse_intermixed_args(["engine.onnx"]).fields == []


def test_the_help_names_metrics_and_defaults(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "xsim_drop" in text
    assert "fp16   p999_ppb=0.3, max_ppb=3" in text
