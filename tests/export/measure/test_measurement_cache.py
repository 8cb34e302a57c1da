"""The receptive fields that were measured before: when they are taken, and when measured again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from qsm_deploy.export.measure import measurement_cache
from qsm_deploy.export.measure.measurement_cache import cached_receptive_field
from qsm_deploy.export.networks.network import AXIAL_1MM, Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.runtime.card.card import ModelCard, ReceptiveField, parse_card

MEASURED = ReceptiveField(9, 4, 0.999999)
Measure = Callable[[ModelCard], tuple[ReceptiveField, int]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qsm-deploy" / "receptive-field"


@pytest.fixture
def card(tiny_tv_unet) -> ModelCard:
    return provisional_card(REGISTRY["tv-unet"], tiny_tv_unet, Choices(), "none", "0" * 64)


@pytest.fixture
def take() -> Measure:
    """Return a function that takes a card's receptive field and counts the measurements so far."""
    measured: list[ModelCard] = []

    def of(card: ModelCard) -> tuple[ReceptiveField, int]:
        def measure() -> ReceptiveField:
            measured.append(card)
            return MEASURED

        return cached_receptive_field(card, measure), len(measured)

    return of


def test_what_was_measured_is_not_measured_again(card, take, folder) -> None:
    assert [take(card), take(card)] == [(MEASURED, 1), (MEASURED, 1)]
    (file,) = folder.iterdir()
    assert parse_card(file.read_text()).receptive_field == MEASURED


@pytest.mark.parametrize(
    "other",
    [
        {"weights_sha256": "1" + "0" * 63},
        {"options": {"residual": "input"}},
        {"normalisation": {"chi_std": 0.5}},
        {"geometry": AXIAL_1MM},  # the direction that a network is folded for is in it
        {"made_by": "qsm-deploy 99"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_it_holds_for_the_same_weights_and_options_only(card, take, other) -> None:
    take(card)
    assert take(dataclasses.replace(card, **other)) == (MEASURED, 2)
    assert take(card) == (MEASURED, 2)


def test_what_the_weights_do_not_depend_on_changes_nothing(card, take) -> None:
    take(card)
    assert take(dataclasses.replace(card, licence="MIT", doi="10.1/2"))[1] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: "\0" + text,
        lambda text: text.replace('"halo":4,', ""),
        lambda text: text.replace('"halo":4', '"halo":"4"'),
        lambda text: text.replace('"halo":4', '"halo":4.5'),
        lambda text: text.replace('"halo":4', '"halo":-4'),
        lambda text: text.replace('"halo":4', '"halo":null'),
    ],
)
def test_a_damaged_file_is_measured_again_and_mended(card, take, folder, damage) -> None:
    take(card)
    (file,) = folder.iterdir()
    whole = file.read_text()
    assert damage(whole) != whole
    file.write_text(damage(whole))
    assert [take(card), take(card)] == [(MEASURED, 2), (MEASURED, 2)]
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_written_is_as_good_as_none(card, take, folder) -> None:
    folder.parent.mkdir()
    folder.write_text("a file in the place of the folder")
    assert [take(card), take(card)] == [(MEASURED, 1), (MEASURED, 2)]


def test_it_lies_where_the_users_caches_do(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measurement_cache.cache_folder() == tmp_path / ".cache" / "qsm-deploy"
