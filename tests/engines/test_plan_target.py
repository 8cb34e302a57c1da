"""What a plan was built for, as text in a card, and the command that builds it again."""

from dataclasses import replace

import pytest

from qsm_deploy.export.by_name import OPTIONS
from qsm_deploy.export.cli import parser
from qsm_deploy.kernels.errors import CardError
from qsm_deploy.runtime.gpu.device import DeviceProperties
from qsm_deploy.runtime.gpu.engines.plan_target import (
    FLAGS,
    PlanTarget,
    rebuild_command,
    target_from_card,
)

H100 = DeviceProperties(0, "NVIDIA H100 80GB HBM3", (9, 0))


def target(gpu: str = "sm_90", version: str = "11.4.0.106", newer: bool = False) -> PlanTarget:
    return PlanTarget("tensorrt", version, newer, gpu)


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("gpu", ["sm_90", "sm_80+", "sm_89,sm_120+", "sm_75", f"{H100}"])
def test_the_card_gives_it_back(card, gpu: str, newer: bool) -> None:
    stated = target(gpu, newer=newer)
    assert target_from_card(replace(card, options=stated.options())) == stated


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"engine": "tensorrt 11", "gpu": ""},
        {"engine": "tensorrt 11", "gpu": "sm_9"},
        {"engine": "tensorrt 11", "gpu": "sm_90,"},
        {"engine": "tensorrt 11", "gpu": "sm_80+,sm_90"},
        {"engine": "tensorrt 11", "gpu": "sm_90 "},
        {"engine": "tensorrt", "gpu": "sm_90"},
        {"engine": "openvino 2026", "gpu": "sm_90"},
        {"engine": "tensorrt 11", "gpu": "sm_90", "versions": "all"},
    ],
)
def test_a_card_that_does_not_say_it(card, options: dict[str, str]) -> None:
    with pytest.raises(CardError, match=r"x\.plan: its card does not say"):
        target_from_card(replace(card, options=options), "x.plan")


@pytest.mark.parametrize(
    ("gpu", "serves"),
    [
        ("sm_90", True),
        ("sm_80+", True),
        ("sm_90+", True),
        ("sm_100+", False),
        ("sm_89,sm_120", False),
        ("sm_80,sm_86,sm_89,sm_120,sm_121+", False),
        ("sm_80,sm_90+", True),
        ("sm_75,sm_89+", True),
        ("sm_89,sm_90", True),
        (f"{H100}", True),
        ("sm_90 NVIDIA H200", False),
    ],
)
def test_gpus(gpu: str, serves: bool) -> None:
    assert (target(gpu).mismatch("11.4.0.106", H100) is None) == serves


@pytest.mark.parametrize(
    ("built", "newer", "here", "serves"),
    [
        ("11.4.0.106", False, "11.4.0.106", True),
        ("11.4.0.106", False, "11.4.0.107", False),
        ("11.4.0.106", True, "11.10.0.1", True),
        ("11.4.0.106", True, "11.3.9.200", False),
        ("10.14.1.48.post1", True, "11.0.0.114", False),
        ("10.14.1.48.post1", True, "10.16.1.11", True),
    ],
)
def test_versions(built: str, newer: bool, here: str, serves: bool) -> None:
    assert (target(version=built, newer=newer).mismatch(here, H100) is None) == serves


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_the_command_is_one(card, precision: str) -> None:
    options = {"residual": "iteration", "int8_share": "0.7", "collector": "entropy"}
    options |= target("sm_80+", newer=True).options() | {"shapes": "16x16x16,32x32x32,64x64x64"}
    if precision != "int8":
        del options["collector"]
    built = replace(card, options=options, precision=precision)
    words = rebuild_command(built, "x.plan", {"shapes": "8,16,24"}).split()
    assert words[0] == "qsm-export"
    arguments = parser().parse_args(words[1:])
    assert (arguments.model, arguments.precision) == ("ir2qsm", precision)
    assert (arguments.shapes, arguments.residual) == ("8,16,24", "iteration")
    assert arguments.version_compatible
    assert arguments.force
    assert [str(file) for file in arguments.weights] == ["FILE"]


def test_the_bundled_network_needs_no_weights(card) -> None:
    built = replace(card, network="tv-unet", options=target().options())
    assert "--weights" not in rebuild_command(built, "x.plan")


def test_every_choice_about_a_network_is_a_flag() -> None:
    assert set(OPTIONS) <= set(FLAGS)
