"""Training of the bundled networks, as ``examples/train.py`` does it."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.common import Row
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.networks import ROOT, Networks
from benchmarks.gpu.pipeline import Rows

LONGEST_SECONDS = 150  # with the volumes, which are made first


def rows(machine: Machine, networks: Networks) -> Rows:
    """Yield a short training of each network, whose weights and log are kept."""
    for name in ("tkd-unet", "ir2qsm"):
        kept = networks.trained.with_name(f"{networks.trained.stem}-{name}.safetensors")
        yield name, partial(training_row, machine, name, kept)


def training_row(machine: Machine, name: str, weights: Path) -> Row:
    """Train one network; return where its loss and error began and ended."""
    script = [sys.executable, str(ROOT / "examples" / "train.py"), name, "-o", str(weights)]
    subprocess.run(
        [*script, *machine.scale.training],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=LONGEST_SECONDS,
    )
    made = json.loads(weights.with_suffix(".log.json").read_text())
    first, last = made["log"][0], made["log"][-1]
    facts = {key: made[key] for key in ("device", "bfloat16", "torch")}
    patches = last["step"] * made["recipe"]["batch"]
    return facts | {"first": first, "last": last, "patches": patches, "weights": weights.name}
