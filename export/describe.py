"""What ``qsm-export`` says of files, keys or a card, and what it lists of known networks."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from qsm_deploy.export.checkpoints.file_kind import stand_in
from qsm_deploy.export.networks.network_spec import NetworkSpec, flag
from qsm_deploy.export.networks.registry import additions, known_networks, recognise
from qsm_deploy.kernels.errors import CardError, UsageError, WeightsError
from qsm_deploy.runtime.card.card import TASKS, UNITS, ModelCard, Task, parse_card
from qsm_deploy.runtime.card.plan_file import PlanFile, read_plan
from qsm_deploy.runtime.card.read import ONNX, PLAN, graph_in, load_card
from qsm_deploy.runtime.console.atomic import write_atomically

ENGINE = ".engine"
KEYS_SHOWN = 5
CHANNELS_LAST = (":0", "weights")  # kernels of Keras and TensorFlow, (x, y, z, in, out)
SWAPPED = "deconv_weights"  # but these are (x, y, z, out, in)


def describe(path: Path) -> dict[str, Any]:
    """Return what a checkpoint, an exported model, a plan or a card is.

    Raises
    ------
    WeightsError
        If it is a checkpoint that cannot be read, or a file of another kind; the message says
        which.
    EngineError, CardError
        If it is a model that cannot be opened, or has no card.
    """
    if path.is_file() and (left := stand_in(path)):
        raise WeightsError(f"{path}: {left}")
    if (card := _card(path)) is not None:
        parts = {} if path.suffix != PLAN else {"parts": _parts(read_plan(path))}
        return {"file": path.name, **parts, "card": json.loads(card.to_json())}
    from qsm_deploy.export.checkpoints.state import load_state, state_sha256

    state = load_state(path, fits=recognise)
    widths = [
        tensor.shape[_channels_axis(key)] for key, tensor in state.items() if tensor.ndim == 5
    ]
    return {
        "file": path.name,
        "networks": [spec.name for spec in recognise(state)],
        "keys": len(state),
        "values": sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point()),
        "first_width": widths[0] if widths else None,
        "widest": max(widths, default=None),
        "first_keys": {key: list(state[key].shape) for key in list(state)[:KEYS_SHOWN]},
        "sha256": state_sha256(state),
    }


def describe_text(found: dict[str, Any]) -> str:
    """Return the facts as people read them."""
    if "card" in found:
        facts = found["card"]
        rows = {key: _plain(value) for key, value in facts.items()}
        if parts := found.get("parts"):
            options = facts["options"]
            built = (options.get(name, "?") for name in ("engine", "gpu", "shapes"))
            rows |= {"plan for": "{}, GPU {}, shapes {}".format(*built)} | {
                f"{name} inside": f"{size / 1e6:.1f} MB" if size else "no, of the former form"
                for name, size in parts.items()
            }
        return "\n".join(f"{key:<16} {value}" for key, value in rows.items())
    looks = " or ".join(found["networks"]) or "no network that is known here"
    keys = "\n".join(f"  {key} {tuple(shape)}" for key, shape in found["first_keys"].items())
    return (
        f"{found['file']}: looks like {looks}\n"
        f"{found['keys']} keys, {found['values']:,} values, channels {found['first_width']} at "
        f"first, {found['widest']} at most, sha256 {found['sha256'][:12]}\n{keys}\n  ..."
    )


def extract(path: Path, output: Path, *, force: bool = False) -> None:
    """Write a part of a plan out: its graph as ``.onnx``, or its engine alone as ``.engine``.

    Raises
    ------
    UsageError
        If the output has another ending, or exists without ``force``.
    EngineError
        If it is no whole plan, or has no graph.
    """
    if path.suffix != PLAN or output.suffix not in (ONNX, ENGINE):
        raise UsageError(
            f"--extract {output}: writes {ONNX} or {ENGINE} of the {PLAN} at --describe"
        )
    part = graph_in(path) if output.suffix == ONNX else read_plan(path).engine
    write_atomically(output, part, force=force)


def _parts(plan: PlanFile) -> dict[str, int]:
    """Return the sizes of what is in a plan [bytes]."""
    return {"engine": len(plan.engine), "graph": len(plan.graph or b"")}


def _card(path: Path) -> ModelCard | None:
    """Return the card of a model or a plan, or one in a file of its own; ``None`` of weights."""
    if path.suffix in (ONNX, PLAN):
        return load_card(path)
    if path.suffix == ".json" and path.is_file():
        with suppress(CardError, UnicodeDecodeError):
            return parse_card(path.read_text())
    return None


def _channels_axis(key: str) -> int:
    if SWAPPED in key:
        return -2
    return -1 if any(part in key for part in CHANNELS_LAST) else 0


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def list_rows() -> list[dict[str, Any]]:
    """Return the known networks, a row of facts for each."""
    return [
        {
            "network": spec.name,
            "task": _task(spec),
            "parameters": spec.parameters,
            "divisor": spec.divisor,
            "gmac_64": spec.gmac_64,
            # a name that is none of these is a prior map's
            "inputs": {name: UNITS.get(name, "ppm") for name in spec.inputs},
            "output": {name: UNITS[name] for name in (spec.output, *spec.further_outputs)},
            "options": {name: list(values) for name, values in spec.options.items()},
            "bundled_weights": spec.bundled[1].source if spec.bundled else None,
            "published_weights": spec.published.source,
            "licence": spec.published.licence,
            "doi": spec.doi,
        }
        for spec in known_networks().values()
    ]


def list_text(rows: list[dict[str, Any]]) -> str:
    """Return the rows as people read them, then what was refused of other packages."""
    refused = (f"refused: {name}, {why}" for name, why in additions().refused.items())
    return "\n".join([*(line for row in rows for line in _lines(row)), *refused])


def _lines(row: dict[str, Any]) -> list[str]:
    options = (f"{flag(name)} {'|'.join(values)}" for name, values in row["options"].items())
    return [
        row["network"],
        f"  task               {row['task']}",
        f"  size               {row['parameters']:,} parameters, {row['gmac_64']:g} GMAC for 64^3",
        f"  grid               multiples of {row['divisor']}",
        f"  inputs             {_with_units(row['inputs'])}",
        f"  output             {_with_units(row['output'])}",
        f"  options            {', '.join(options) or 'none'}",
        f"  bundled weights    {row['bundled_weights'] or 'none'}",
        f"  published weights  {row['published_weights']}",
        f"  licence            {row['licence']}",
        f"  doi                {row['doi'] or 'none'}",
    ]


def _task(spec: NetworkSpec) -> Task:
    """Return what a network does, by the names of what it takes first and gives.

    What it is to a loop or a chain around it is a part of making a map.
    """
    ends = spec.inputs[0], (spec.output, *spec.further_outputs)
    found = (task for task, (first, _, gives) in TASKS.items() if (first, gives) == ends)
    return next(found, "local_field->chi")


def _with_units(tensors: dict[str, str]) -> str:
    return ", ".join(f"{name} [{unit}]" for name, unit in tensors.items())
