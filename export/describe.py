"""What ``qsm-export --describe`` says of a file: a checkpoint's keys, or a model's card."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from qsm_deploy.export.checkpoints.file_kind import stand_in
from qsm_deploy.export.checkpoints.state import load_state, state_sha256
from qsm_deploy.export.networks.registry import recognise
from qsm_deploy.kernels.errors import CardError, WeightsError
from qsm_deploy.runtime.card import plan_file
from qsm_deploy.runtime.card.card import ModelCard, parse_card
from qsm_deploy.runtime.sessions.session import installed_backends, open_session

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
        return {"file": path.name, "card": json.loads(card.to_json())}
    state = load_state(path)
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
        rows = {key: _plain(value) for key, value in found["card"].items()}
        return "\n".join(f"{key:<16} {value}" for key, value in rows.items())
    looks = " or ".join(found["networks"]) or "no network that is known here"
    keys = "\n".join(f"  {key} {tuple(shape)}" for key, shape in found["first_keys"].items())
    return (
        f"{found['file']}: looks like {looks}\n"
        f"{found['keys']} keys, {found['values']:,} values, channels {found['first_width']} at "
        f"first, {found['widest']} at most, sha256 {found['sha256'][:12]}\n{keys}\n  ..."
    )


def _card(path: Path) -> ModelCard | None:
    """Return the card of a model or a plan, or one in a file of its own; ``None`` of weights."""
    if path.suffix == ".onnx":
        return open_session(path, installed_backends()[-1]).card
    if path.suffix == plan_file.SUFFIX and path.is_file():
        return plan_file.read_plan_card(path)
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
