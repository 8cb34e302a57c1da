"""Cards of networks that take any grid, or an axial one of 1 mm."""

from dataclasses import replace

import pytest

from qsm_deploy.runtime.card.card import (
    SCHEMA,
    GeometryLimits,
    ModelCard,
    ReceptiveField,
    TensorInfo,
    Verification,
)

VOLUME = ("n", 1, "x", "y", "z")


@pytest.fixture(scope="session")
def any_card() -> ModelCard:
    return ModelCard(
        schema=SCHEMA,
        network="small",
        task="local_field->chi",
        pipeline="cnn",
        inputs=(TensorInfo("local_field_ppm", "ppm", VOLUME),),
        output=TensorInfo("chi_ppm", "ppm", VOLUME),
        divisor=2,
        patchable="yes",
        why_whole=None,
        receptive_field=ReceptiveField(1, 1, 1.0),
        geometry=GeometryLimits(None, None, None, None),
        normalisation={},
        constants={},
        options={},
        precision="fp32",
        memory={},
        verified=Verification("none", 0.0, ()),
        weights_sha256="0" * 64,
        licence="none",
        doi=None,
        made_by="test",
    )


@pytest.fixture(scope="session")
def axial_card(any_card: ModelCard) -> ModelCard:
    limits = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 5.0)
    return replace(any_card, geometry=limits)
