"""What TensorRT for RTX itself does without a GPU: it builds, and loads nothing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qsm_deploy.kernels.errors import EngineError, UsageError
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.gpu.building import config as engine_config
from qsm_deploy.runtime.gpu.building.build_progress import build_monitor
from qsm_deploy.runtime.gpu.building.builder import build_plan
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.building.profile import profile_from
from qsm_deploy.runtime.gpu.open import open_device_session

pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX")

OPEN = """
import sys
from pathlib import Path
from qsm_deploy.runtime.console.command import run_command
from qsm_deploy.runtime.gpu.open import open_device_session
sys.exit(run_command("open", lambda: str(open_device_session(Path(sys.argv[1])))))
"""


@pytest.fixture
def plan(build) -> Path:
    return build("tensorrt-rtx", compute_capability=("8.9", "12.0"))


def test_the_plan_holds_its_card(plan, tmp_path) -> None:
    card = load_card(plan)
    assert card.options["gpu"] == "sm_89,sm_120"
    assert card.options["engine"].startswith("tensorrt-rtx 1.")
    assert not (tmp_path / "cache").exists()  # it says itself that its timing cache does nothing


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"hardware_compatible": "ampere-plus"}, r"does not build for other GPUs that way; use"),
        ({"compute_capability": ("9.0",)}, r"builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"),
        ({"compute_capability": ("8.9", "1.0")}, r"--compute-capability 1\.0"),
    ],
)
def test_what_it_cannot_build_for_is_refused_before_anything_is_built(choices, message) -> None:
    with pytest.raises(UsageError, match=message):
        engine_config.plan_target(PlanChoices("tensorrt-rtx", **choices))


def test_it_reports_its_progress(build, monkeypatch) -> None:
    phases = []

    def watch(library, bar, stop):
        monitor = build_monitor(library, bar, stop)
        started = monitor.phase_start
        monitor.phase_start = lambda name, parent, steps: (
            phases.append((parent, steps)),
            started(name, parent, steps),
        )
        return monitor

    monkeypatch.setattr("qsm_deploy.runtime.gpu.building.build_progress.build_monitor", watch)
    build("tensorrt-rtx")
    roots = [steps for parent, steps in phases if not parent]
    assert len(roots) == 1
    assert roots[0] > 1
    assert len(phases) > 1


def test_ctrl_c_ends_the_build(card, model, monkeypatch, press_ctrl_c) -> None:
    def interrupted(library, bar, stop):
        press_ctrl_c()
        return build_monitor(library, bar, stop)

    monkeypatch.setattr("qsm_deploy.runtime.gpu.building.build_progress.build_monitor", interrupted)
    choices = PlanChoices("tensorrt-rtx")
    target = engine_config.plan_target(choices)
    profile = profile_from("16,32,64", 8, patchable=True)
    with pytest.raises(KeyboardInterrupt):
        build_plan(
            model.SerializeToString(), replace(card, options=target.options()), profile, choices
        )


def test_without_a_driver_opening_is_one_line_and_a_clean_end(plan) -> None:
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="no cuda-bindings")
    if cudart.cudaGetDeviceCount()[0] == cudart.cudaError_t.cudaSuccess:
        pytest.skip("no GPU is what this is about")
    run = subprocess.run([sys.executable, "-c", OPEN, plan], capture_output=True, text=True)
    assert run.returncode == 4
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert "no NVIDIA driver" in run.stderr


def test_a_plan_that_it_cannot_load_says_what_it_says(plan, driver) -> None:
    driver.gpus[0] = replace(driver.gpus[0], capability=(8, 9))
    plan.write_bytes(plan.read_bytes()[:-1000])
    with pytest.raises(EngineError, match=r"truncated or damaged \(.*\); rebuild it") as caught:
        open_device_session(plan)
    assert "it gives no reason" not in str(caught.value)
    assert "\n" not in str(caught.value)
