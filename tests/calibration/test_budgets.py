"""Budgets: defaults by precision, what is given instead, and what exceeds them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from qsm_deploy.calibration.budgets import (
    DEFAULTS,
    METRICS,
    budgets_for,
    failures,
    judged,
    parse_budget,
    unmeasured,
)
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from qsm_deploy.runtime.sessions.open import open_session


@pytest.fixture(scope="module")
def card():
    return open_session(BUNDLED_MODEL, "onnxruntime").card


def test_every_default_is_a_metric_that_can_be_given() -> None:
    assert {metric for budgets in DEFAULTS.values() for metric in budgets} <= set(METRICS)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_a_precision_has_its_defaults_and_what_is_given_wins(precision, card) -> None:
    card = replace(card, precision=precision)
    assert budgets_for(card, []) == DEFAULTS[precision]
    given = budgets_for(card, [("max_ppb", 7.0), ("bias_ppb", 1.0)])
    assert given == {**DEFAULTS[precision], "max_ppb": 7.0, "bias_ppb": 1.0}


def test_a_loop_outside_the_graph_may_differ_by_more(card) -> None:
    split = SimpleNamespace(pipeline="modl", precision=card.precision)
    assert budgets_for(split, []) == DEFAULTS["split"]
    assert DEFAULTS["split"]["max_ppb"] > DEFAULTS["fp32"]["max_ppb"]


def test_a_precision_without_defaults_asks_for_a_budget(card) -> None:
    strange = replace(card, precision="fp8")
    with pytest.raises(UsageError, match="no default budgets for fp8; pass --budget"):
        budgets_for(strange, [])
    assert budgets_for(strange, [("max_ppb", 1.0)]) == {"max_ppb": 1.0}


@pytest.mark.parametrize("text", ["max_ppb=0.5", "max_ppb=.5", "max_ppb=5e-1"])
def test_a_budget_is_read(text: str) -> None:
    assert parse_budget(text) == ("max_ppb", 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worst=1", "the metrics are mean_ppb, median_ppb"),
        ("max_ppb", "write METRIC=VALUE"),
        ("max_ppb=", "write METRIC=VALUE"),
        ("max_ppb=-1", "0 or more"),
        ("max_ppb=nan", "0 or more"),
        ("max_ppb=inf", "0 or more"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_budget(text)


def test_failures_name_metric_value_and_budget_the_worst_first() -> None:
    rows = [
        {"where": "a", "max_ppb": 0.02, "bias_ppb": -3.0},
        {"where": "b", "max_ppb": 0.5, "bias_ppb": 1.0},
        {"where": "c", "max_ppb": 0.01, "bias_ppb": 0.0},
    ]
    found = failures(rows, {"max_ppb": 0.01, "bias_ppb": 2.0})
    assert [f.where for f in found] == ["b", "a", "a"]
    assert str(found[0]) == "max_ppb is 0.5 ppb, the budget is 0.01 ppb (b)"
    assert found[2].value == 3.0


def test_an_improvement_is_no_failure_however_large() -> None:
    row = {"where": "a", "xsim_drop": -0.5, "bias_ppb": -0.5}
    assert failures([row], {"xsim_drop": 0.01}) == []
    assert judged("xsim_drop", row) == -0.5
    assert judged("bias_ppb", row) == 0.5


def test_nan_voxels_fail_whatever_the_budgets() -> None:
    rows = [{"where": "a", "nonfinite_voxels": 3}, {"where": "b", "nonfinite_voxels": 0}]
    (found,) = failures(rows, {"max_ppb": 100.0})
    assert (found.metric, found.value, found.where) == ("nonfinite_voxels", 3, "a")


def test_a_value_that_is_not_a_number_fails() -> None:
    assert failures([{"where": "a", "max_ppb": float("nan")}], {"max_ppb": 1.0})


def test_what_no_comparison_has_is_unmeasured() -> None:
    rows = [{"where": "a", "max_ppb": 1.0}]
    assert unmeasured(rows, {"max_ppb": 1.0, "xsim_drop": 0.01}) == ["xsim_drop"]
