"""What a plan says of itself without the library that made it: the card is in its bytes."""

import ctypes.util
import json
from pathlib import Path

from qsm_deploy.kernels.errors import CardError, EngineError
from qsm_deploy.runtime.card.card import MAX_BYTES, ModelCard, parse_card

SUFFIX = ".plan"
FIRST_FIELD = b'{"constants":'  # of the canonical form


def read_plan_card(path: Path) -> ModelCard:
    """Return the card of a plan.

    Raises
    ------
    CardError
        If there is none, as where the file is cut off before it, or it is malformed.
    """
    return card_in_plan(path.read_bytes(), path)


def card_in_plan(data: bytes, path: Path) -> ModelCard:
    """Return the card in the bytes of a plan; ``path`` is for messages.

    Raises
    ------
    CardError
        As :func:`read_plan_card`.
    """
    start = data.find(FIRST_FIELD)
    text = data[start : start + MAX_BYTES].decode("latin-1") if start >= 0 else ""
    try:
        _, length = json.JSONDecoder().raw_decode(text)
    except ValueError:
        raise CardError(
            f"{path} has no whole model card: it is truncated, or not a plan of qsm-export; "
            "export it again"
        ) from None
    try:
        return parse_card(text[:length])
    except CardError as error:
        raise CardError(f"{path}: {error}") from None


def refuse_plan(path: Path) -> EngineError:
    """Return what to say of a plan: what it is, and what is missing to run it.

    Raises
    ------
    CardError
        If it has no card.
    """
    card = read_plan_card(path)
    engine = card.options.get("engine", "TensorRT")
    missing = "this version runs no plans"
    if ctypes.util.find_library("cuda") is None:
        missing = "this machine has no NVIDIA driver, which plans need"
    return EngineError(
        f"{path}: a plan of {card.network} in {card.precision} for {engine}; {missing}; export "
        f"an ONNX file with qsm-export --model {card.network} -o {path.stem}.onnx"
    )
