"""Plans built with a made-up TensorRT: what it is told, and what it refuses."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from tqdm import tqdm

from qsm_deploy.kernels import tensorrt_plugin
from qsm_deploy.kernels.errors import EngineError, ExportError, MissingDependencyError, UsageError
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.gpu.building.build_progress import build_monitor
from qsm_deploy.runtime.gpu.building.builder import build_plan
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.building.config import plan_target
from qsm_deploy.runtime.gpu.building.profile import profile_from
from qsm_deploy.runtime.gpu.building.timing_cache import timing_cache_file
from qsm_deploy.runtime.gpu.engines.plan_target import target_from_card
from qsm_deploy.runtime.gpu.engines.tensorrt_library import open_library


@pytest.fixture
def built(card, model, driver):
    """Return a function that builds a plan and gives it, and what was said."""

    def built(engine="tensorrt", graph: onnx.ModelProto = model, dipole_op="matmul", **chosen):
        choices, said = PlanChoices(engine, **chosen), []
        options = card.options | plan_target(choices).options() | {"dipole_op": dipole_op}
        profile = profile_from("16,32,64", 8, patchable=True)
        with_target, data = replace(card, options=options), graph.SerializeToString()
        return build_plan(data, with_target, profile, choices, said.append), said

    return built


def test_what_the_builder_is_told(install, built, levers) -> None:
    trt = install()
    built(workspace_mb=500)
    config = levers.configs[-1]
    assert trt.BuilderFlag.TF32 not in config.flags
    assert config.limits == {"WORKSPACE": 500_000_000}
    assert config.profiles[0].shapes == {
        "local_field_ppm": [[1, 1, 16, 16, 16], [1, 1, 32, 32, 32], [4, 1, 64, 64, 64]]
    }
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.NONE
    assert config.profiling_verbosity == trt.ProfilingVerbosity.LAYER_NAMES_ONLY


@pytest.mark.parametrize(
    ("engine", "chosen", "options"),
    [
        ("tensorrt", {}, {"gpu": "sm_90 NVIDIA Made-up 100"}),
        ("tensorrt", {"hardware_compatible": "same-capability"}, {"gpu": "sm_90"}),
        ("tensorrt", {"hardware_compatible": "ampere-plus"}, {"gpu": "sm_80+"}),
        (
            "tensorrt",
            {"version_compatible": True},
            {"gpu": "sm_90 NVIDIA Made-up 100", "versions": "newer"},
        ),
        ("tensorrt-rtx", {}, {"gpu": "sm_80,sm_86,sm_89,sm_120,sm_121+"}),
        ("tensorrt-rtx", {"compute_capability": ("8.9", "12.0")}, {"gpu": "sm_89,sm_120"}),
    ],
)
def test_the_card_says_what_it_was_built_for(
    install, build, levers, engine, chosen, options
) -> None:
    trt = install(engine.replace("-", "_"))
    card = load_card(build(engine, **chosen))
    expected = {"engine": f"{engine} {trt.__version__}", "residual": "input"} | options
    assert card.options == expected | {"shapes": "16x16x16,32x32x32,64x64x64"}
    assert target_from_card(card) == plan_target(PlanChoices(engine, **chosen))
    config = levers.configs[-1]
    assert (trt.BuilderFlag.VERSION_COMPATIBLE in config.flags) == ("versions" in options)
    if "compute_capability" in chosen:
        assert [kind.name for kind in config.capabilities.values()] == ["SM89", "SM120"]


@pytest.mark.parametrize(
    ("engine", "chosen", "message"),
    [
        ("tensorrt-rtx", {"hardware_compatible": "ampere-plus"}, "use --compute-capability"),
        ("tensorrt", {"compute_capability": ("8.9",)}, "use --hardware-compatible, or --engine"),
        (
            "tensorrt-rtx",
            {"compute_capability": ("9.0",)},
            "builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1",
        ),
        ("tensorrt-rtx", {"compute_capability": ("sm_89",)}, "expected one such as 8.9"),
        ("tensorrt-rtx", {"compute_capability": ("8.9", "8.9")}, "8.9,8.9: one twice"),
        ("tensorrt-rtx", {"version_compatible": True}, "needs --engine tensorrt"),
    ],
)
def test_what_a_flavour_has_not(install, built, engine, chosen, message, driver) -> None:
    install(engine.replace("-", "_"))
    with pytest.raises(UsageError, match=message) as caught:
        built(engine, **chosen)
    assert "\n" not in str(caught.value)


def test_a_level_that_an_older_version_lacks(install, built, levers) -> None:
    levers.fails.add("old")
    install(version="10.0.1")
    with pytest.raises(UsageError, match=r"same-capability: tensorrt 10\.0\.1 does not"):
        built(hardware_compatible="same-capability")
    built(hardware_compatible="ampere-plus")


def test_a_build_that_fails_says_why(install, built, levers) -> None:
    install()
    levers.fails.add("build")
    with pytest.raises(ExportError, match="cannot build this network: no implementation for"):
        built()
    levers.fails = {"start"}
    with pytest.raises(EngineError, match="cannot start here: CUDA initialization failure"):
        built()


def test_without_a_gpu_plain_tensorrt_is_not_asked(install, monkeypatch) -> None:
    install()
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="no cuda-bindings")
    no_driver = (cudart.cudaError_t.cudaErrorInsufficientDriver, None)
    monkeypatch.setattr(cudart, "cudaGetDeviceCount", lambda: no_driver)
    with pytest.raises(EngineError, match="no NVIDIA driver") as caught:
        plan_target(PlanChoices("tensorrt"))
    assert caught.value.exit_code == 4


def test_the_other_flavour_builds_without_cuda_s_bindings(
    install, card, model, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.delitem(sys.modules, "qsm_deploy.runtime.gpu.cuda_device", raising=False)
    install("tensorrt_rtx")
    choices = PlanChoices("tensorrt-rtx", layers=Path("layers.json"))
    with_target = replace(card, options=card.options | plan_target(choices).options())
    profile = profile_from("16,32,64", 8, patchable=True)
    plan = build_plan(model.SerializeToString(), with_target, profile, choices)
    assert plan.data
    assert "pip install '.[cuda]'" in json.loads(plan.layers)["why_no_engine"]
    install("tensorrt")
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[cuda\]'"):
        plan_target(PlanChoices("tensorrt"))


def kept_timings() -> Path:
    library = open_library("tensorrt", "a test")
    return timing_cache_file(library, "sm_90 NVIDIA Made-up 100")


def test_timings_are_reused_and_the_user_is_told(install, built, levers) -> None:
    install()
    file = kept_timings()
    assert file.name == "tensorrt-11.4.0.106-sm_90_NVIDIA_Made-up_100.cache"
    _, said = built()
    assert (levers.configs[-1].given_cache, said) == (b"", [])
    _, said = built(hardware_compatible="ampere-plus")
    assert levers.configs[-1].given_cache == b"sm_90 NVIDIA Made-up 100 measured"
    assert said == [f"reusing the kernel timings in {file}"]


@pytest.mark.parametrize("damage", ["cut", "elsewhere", "empty"])
def test_timings_of_no_use_are_replaced(install, built, levers, damage) -> None:
    install()
    built()
    file = kept_timings()
    whole = file.read_bytes()
    if damage == "elsewhere":
        levers.gpu = "another GPU"
    else:
        file.write_bytes(whole[:-1] if damage == "cut" else b"")
    _, said = built()
    assert levers.configs[-1].given_cache == b""
    assert said == [f"not reusing {file}: it is damaged or was measured elsewhere"]
    _, said = built()
    assert said == [f"reusing the kernel timings in {file}"]


def test_timings_that_cannot_be_kept_are_no_error(install, built, tmp_path) -> None:
    install()
    (tmp_path / "cache").write_text("a file where the folder should be")
    plan, said = built()
    assert plan.data
    assert len(said) == 1
    assert "not keeping the kernel timings" in said[0]


def test_layers_are_reported_as_they_went_in_and_as_they_run(install, built, levers) -> None:
    trt = install()
    plan, _ = built(layers=Path("layers.json"))
    report = json.loads(plan.layers)
    assert [layer["layer"] for layer in report["network"]] == ["layer 0", "layer 1"]
    assert report["engine"] == [
        {
            "layer": "conv + relu",
            "kind": "CaskConvolution",
            "tactic": "sm90_x",
            "formats": "Row major linear FP16",
        },
        {"layer": "a name alone"},
    ]
    assert levers.configs[-1].profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    levers.fails.add("deserialise")
    report = json.loads(built(layers=Path("layers.json"))[0].layers)
    assert report["engine"] is None
    assert "magic tag does not match" in report["why_no_engine"]
    assert built()[0].layers is None


class Bar:
    """Keeps what a bar is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def __getattr__(self, name: str):
        return lambda *args, **keywords: self.told.append((name, *args, *keywords.values()))


def test_the_bar_follows_the_outermost_phase(install, levers) -> None:
    import threading

    bar, stop = Bar(), threading.Event()
    monitor = build_monitor(install(), bar, stop)
    monitor.phase_start("Building", None, 2)
    monitor.phase_start("Timing", "Building", 9)
    assert monitor.step_complete("Timing", 0)
    assert monitor.step_complete("Building", 0)
    monitor.phase_finish("Timing")
    assert bar.told == [
        ("reset", 2),
        ("set_description", "Building"),
        ("set_postfix_str", "Timing"),
        ("update",),
    ]
    stop.set()
    assert not monitor.step_complete("Building", 1)


def test_ctrl_c_ends_the_build_at_its_next_step(install, built, levers, press_ctrl_c) -> None:
    install()
    steps = []

    def press() -> None:
        steps.append(1)
        if len(steps) == 2:
            press_ctrl_c()

    levers.during_build = press
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        built()
    assert len(steps) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_the_bar_is_drawn_only_if_asked(install, built, monkeypatch) -> None:
    install()
    drawn = []
    monkeypatch.setattr(tqdm, "display", lambda self, *args, **kwargs: drawn.append(1))
    built()
    assert not drawn
    built(progress=True)
    assert drawn


@pytest.fixture
def plugin_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.node[1].op_type, model.graph.node[1].domain = "DipoleConv", "qsm"
    model.graph.node[1].input.append("voxel_size_mm")
    return model


def test_the_plugin_is_there_before_the_graph_is_parsed(
    install, built, levers, plugin_graph, tmp_path, monkeypatch
) -> None:
    install()
    library = tmp_path / "libqsm_tensorrt.so"
    monkeypatch.setenv("QSM_TENSORRT_PLUGIN", str(library))
    with pytest.raises(EngineError, match=r"\$QSM_TENSORRT_PLUGIN names .* no file"):
        built(graph=plugin_graph, dipole_op="plugin")
    library.touch()
    levers.fails.add("plugin")
    with pytest.raises(EngineError, match="cannot load the plugin DipoleConv from"):
        built(graph=plugin_graph, dipole_op="plugin")
    levers.fails.clear()
    built(graph=plugin_graph, dipole_op="plugin")
    assert len(levers.plugins) == 1
    assert not levers.parsed_without_plugin
    built(graph=plugin_graph, dipole_op="plugin")
    assert len(levers.plugins) == 1


def test_without_a_library_it_says_how_to_build_one(
    install, built, plugin_graph, tmp_path, monkeypatch
) -> None:
    install()
    monkeypatch.delenv("QSM_TENSORRT_PLUGIN", raising=False)
    monkeypatch.setattr(tensorrt_plugin, "BUILD_FOLDER", tmp_path)
    message = r"no TensorRT plugin at .*libqsm_tensorrt.so; build it with: python -m qsm_deploy\."
    with pytest.raises(EngineError, match=message) as caught:
        built(graph=plugin_graph, dipole_op="plugin")
    assert "\n" not in str(caught.value)


def test_the_other_flavour_takes_no_plugin(install, built, plugin_graph, levers) -> None:
    install("tensorrt_rtx")
    with pytest.raises(ExportError, match=r"takes no plugins.*--dipole-op matmul") as caught:
        built("tensorrt-rtx", graph=plugin_graph, dipole_op="plugin")
    assert "\n" not in str(caught.value)


def test_a_function_needs_no_plugin(install, built, levers, plugin_graph) -> None:
    install()
    imports = [onnx.helper.make_opsetid("", 20)]
    inputs = ["x", "voxel_size_mm"]
    body = [onnx.helper.make_node("Identity", ["x"], ["y"])]
    plugin_graph.functions.append(
        onnx.helper.make_function("qsm", "DipoleConv", inputs, ["y"], body, imports)
    )
    built(graph=plugin_graph, dipole_op="function")
    assert not levers.plugins


def test_a_plan_with_the_plugin_needs_it_to_run(
    install, levers, build, card, tmp_path, monkeypatch
) -> None:
    from qsm_deploy.runtime.gpu.open import open_device_session

    install()
    with_plugin = replace(card, options=card.options | {"dipole_op": "plugin"})
    library = tmp_path / "libqsm_tensorrt.so"
    library.touch()
    monkeypatch.setenv("QSM_TENSORRT_PLUGIN", str(library))
    path = build(card=with_plugin)
    library.unlink()
    levers.plugins.clear()
    with pytest.raises(EngineError, match="no file") as caught:
        open_device_session(path)
    assert caught.value.exit_code == 4
    library.touch()
    open_device_session(path)
    assert len(levers.plugins) == 1
