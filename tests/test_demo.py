"""`make demo`, on a small head: what a new user sees first must work."""

import re
import runpy
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.mark.slow
def test_it_runs_and_compares(tmp_path, monkeypatch, capfd) -> None:
    if not DEMO.exists():
        pytest.skip("the examples are not part of the source distribution")
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path), "--shape", "48", "56", "48"])
    runpy.run_path(str(DEMO), run_name="__main__")
    out = capfd.readouterr().out
    assert re.search(r"TKD +TV \(default\) +ir2qsm \(demo\) +tv-unet \(bundled\)", out)
    scores = next(line for line in out.splitlines() if line.startswith("NRMSE [%]"))
    tkd, variation, demo, bundled = map(float, scores.removeprefix("NRMSE [%]").split())
    assert max(variation, bundled) < min(tkd, demo)
    for name in ("tkd", "tv", "ir2qsm", "tv-unet"):
        assert (tmp_path / f"{name}_chi.nii.gz").exists()
        assert (tmp_path / f"{name}_chi.png").exists()
