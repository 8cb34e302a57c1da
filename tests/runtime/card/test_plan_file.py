"""Plans where nothing runs them: one line says what the file is and what is missing."""

import ctypes.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

import qsm_deploy.runtime.card.card as card_module
from qsm_deploy.kernels.errors import CardError, EngineError
from qsm_deploy.runtime.card.card import parse_card
from qsm_deploy.runtime.card.plan_file import read_plan_card
from qsm_deploy.runtime.sessions.open import (
    open_session,
)

BUNDLED = parse_card(
    (Path(card_module.__file__).parents[1] / "models" / "tkd-unet.json").read_text()
)
CARD = replace(BUNDLED, precision="fp16", options={"engine": "tensorrt-rtx 1.7"})
BEFORE, AFTER = b"ftrt\x00{\xff" * 50, b"}\x00\xfe" * 500


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "x.plan"
    path.write_bytes(BEFORE + CARD.to_json().encode() + AFTER)
    return path


def test_the_card_is_read_out_of_the_bytes(plan: Path) -> None:
    assert read_plan_card(plan) == CARD


@pytest.mark.parametrize(
    ("driver", "missing"), [(None, "no NVIDIA driver"), ("libcuda.so.1", "runs no plans")]
)
def test_a_plan_is_refused_with_what_is_missing(plan, driver, missing, monkeypatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: driver)
    with pytest.raises(
        EngineError, match=rf"tkd-unet in fp16 for tensorrt-rtx 1.7; .*{missing}"
    ) as e:
        open_session(plan, "onnxruntime")
    assert e.value.exit_code == 4
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kept", [0, 10, len(BEFORE), len(BEFORE) + 300])
def test_a_plan_cut_off_before_its_card_ends_is_refused(plan: Path, kept: int) -> None:
    plan.write_bytes(plan.read_bytes()[:kept])
    with pytest.raises(CardError, match=r"no whole model card.*truncated") as caught:
        open_session(plan, "onnxruntime")
    assert caught.value.exit_code == 4


def test_a_card_of_another_schema_is_refused_with_the_file(plan: Path) -> None:
    fields = json.loads(CARD.to_json()) | {"schema": 9}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    plan.write_bytes(BEFORE + text.encode() + AFTER)
    with pytest.raises(CardError, match=r"x\.plan: the model's card has schema 9"):
        open_session(plan, "openvino")
