"""Networks of other tasks, one after the other and with methods, as Triton serves them."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qsm_deploy.runtime as qsm
from qsm_deploy.export.triton.repository import write_repository
from qsm_deploy.runtime.card.card import ModelCard, TensorInfo
from qsm_deploy.runtime.job.request import maker_from
from tests.export.triton.stand_in import Served
from tests.export.triton.test_repository import probe_tensors
from tests.runtime.conftest import card, write_model  # noqa: F401 - fixtures

VOLUME = ("n", 1, "x", "y", "z")
PHASE, TOTAL, LOCAL, CHI, R2_PRIME, POSITIVE, NEGATIVE = (
    TensorInfo(name, unit, VOLUME)
    for name, unit in (
        ("phase_rad", "rad"),
        ("total_field_ppm", "ppm"),
        ("local_field_ppm", "ppm"),
        ("chi_ppm", "ppm"),
        ("r2prime_hz", "Hz"),
        ("chi_positive_ppm", "ppm"),
        ("chi_negative_ppm", "ppm"),
    )
)
PARTING: dict[str, Any] = {
    "task": "local_field+chi+r2prime->chi_positive+chi_negative",
    "inputs": (LOCAL, R2_PRIME, CHI),
    "output": POSITIVE,
    "further_outputs": (NEGATIVE,),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "parting": PARTING,
    "removal": {"task": "total_field->local_field", "inputs": (TOTAL,), "output": LOCAL},
    "phase": {"task": "phase->local_field", "inputs": (PHASE,), "output": LOCAL},
}


@pytest.mark.parametrize(
    ("names", "method", "sent", "made"),
    [
        (["parting"], None, {"CHI_PPM", "R2PRIME_HZ"}, ["CHI_POSITIVE_PPM", "CHI_NEGATIVE_PPM"]),
        (["removal"], None, set(), ["LOCAL_FIELD_PPM"]),
        (["phase"], None, {"ECHO_TIME_S", "FIELD_STRENGTH_T"}, ["LOCAL_FIELD_PPM"]),
        (["removal", "phase"], "tv", None, None),
        (["removal"], "medi", {"MAGNITUDE"}, ["CHI_PPM"]),
        (["phase"], "tkd", {"ECHO_TIME_S", "FIELD_STRENGTH_T"}, ["CHI_PPM"]),
    ],
)
def test_what_is_sent_and_made_follows_from_all_parts(
    names: list[str],
    method: str | None,
    sent: set[str] | None,
    made: list[str] | None,
    card: ModelCard,  # noqa: F811
    write_model: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [
        write_model(replace(card, network=name, **NETWORKS[name]), f"{name}.onnx", 0.5)
        for name in names
    ]
    maker = maker_from(paths, method=method)
    if sent is None or made is None:
        with pytest.raises(qsm.UsageError, match="do not follow"):
            write_repository(tmp_path / "serve", maker, force=False)
        return
    written = write_repository(tmp_path / "serve", maker, force=False)
    assert written.name == "_".join(["qsm", *names, *([method] if method else [])])
    served = Served(tmp_path / "serve" / "models" / written.name, monkeypatch)
    tensors = probe_tensors(served)
    field = "PHASE_RAD" if "phase" in names else "FIELD_PPM"
    assert tensors.keys() == {field, "MASK", "VOXEL_SIZE_MM", "B0_DIRECTION"} | sent
    answer = served(**tensors)
    assert answer.error is None, answer.error
    volume, mask = np.array(tensors.pop(field), np.float32), np.array(tensors.pop("MASK"))
    said = {name.lower(): value[0] if len(value) == 1 else value for name, value in tensors.items()}
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        model = qsm.open_model(paths, method=method, device="cpu")
        expected = model.reconstruct(volume, mask, **said)
    maps = expected if isinstance(expected, dict) else {made[0].lower(): expected}
    assert [name.upper() for name in maps] == made
    for name, values in maps.items():
        np.testing.assert_array_equal(answer.get(name.upper()), values)
        assert np.any(values)
    assert answer.notes == "\n".join(str(note.message) for note in notes)


def test_two_networks_lie_beside_each_other(
    card: ModelCard,  # noqa: F811
    write_model: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    removal = replace(card, network="removal", **NETWORKS["removal"])
    paths = [write_model(removal, "a.onnx"), write_model(card, "b.onnx")]
    written = write_repository(tmp_path / "serve", maker_from(paths), force=False)
    assert [path.name for path in written.models] == ["1-removal.onnx", "2-twice.onnx"]
    assert [path.read_bytes() for path in written.models] == [p.read_bytes() for p in paths]
