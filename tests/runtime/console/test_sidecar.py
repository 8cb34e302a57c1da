"""A sidecar replaces a sidecar and nothing else."""

import json

import pytest

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.console.sidecar import require_replaceable
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL

CARD = BUNDLED_MODEL.with_suffix(".json").read_bytes()


def test_what_qsm_run_wrote_is_replaced(write_volume, tmp_path, field):
    path = write_volume(field, "field.nii.gz")
    assert main([str(path), "-q"]) == 0
    require_replaceable(tmp_path / "field_chi.json")
    labelled = {"Sources": [], **json.loads((tmp_path / "field_chi.json").read_text())}
    (tmp_path / "labelled.json").write_text(json.dumps(labelled))
    require_replaceable(tmp_path / "labelled.json")
    require_replaceable(tmp_path / "none.json")


@pytest.mark.parametrize(
    "content",
    [
        CARD,
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"made_by": made_by()}).encode(),
        json.dumps({"units": "ppm", "model": {}}).encode(),
        json.dumps({"units": "ppm", "model": {}, "made_by": "someone"}).encode(),
    ],
)
def test_what_is_no_sidecar_stays(tmp_path, content):
    path = tmp_path / "mynet.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"mynet\.json is no sidecar.*choose another --output"):
        require_replaceable(path)
