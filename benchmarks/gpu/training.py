"""Training of the bundled networks, as ``examples/train.py`` does it."""

import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.common import Row
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.networks import ROOT, Networks
from benchmarks.gpu.pipeline import Rows

LONGEST_SECONDS = 150  # with the cases, which are made first


def rows(machine: Machine, networks: Networks) -> Rows:
    """Yield a short training of each network, whose weights and log are kept."""
    for name in ("tv-unet", "ir2qsm"):
        kept = networks.trained.with_name(f"{networks.trained.stem}-{name}.safetensors")
        yield name, partial(training_row, machine, name, kept)


def training_row(machine: Machine, name: str, kept: Path) -> Row:
    """Train one network; return where its loss and error began and ended."""
    with tempfile.TemporaryDirectory() as folder:  # for hundreds of megabytes of cases
        weights = Path(folder) / kept.name
        script = [sys.executable, str(ROOT / "examples" / "train.py"), name, "-o", str(weights)]
        subprocess.run(
            [*script, *machine.scale.training],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=LONGEST_SECONDS,
        )
        for file in (weights, weights.with_suffix(".log.json")):
            shutil.copy(file, kept.parent)
        made = json.loads(weights.with_suffix(".log.json").read_text())
    first, last = made["log"][0], made["log"][-1]
    facts = {key: made[key] for key in ("device", "bfloat16", "torch")}
    patches = last["step"] * made["recipe"]["batch"]
    return facts | {"first": first, "last": last, "patches": patches, "weights": kept.name}
