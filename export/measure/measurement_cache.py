"""Receptive fields already measured, by the digest of the weights they were measured with."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace

from qsm_deploy.kernels.errors import CardError
from qsm_deploy.runtime.card.card import ModelCard, ReceptiveField, parse_card
from qsm_deploy.runtime.console.atomic import write_atomically
from qsm_deploy.runtime.console.user_cache import cache_folder


def cached_receptive_field(
    card: ModelCard, measure: Callable[[], ReceptiveField]
) -> ReceptiveField:
    """Return what was measured before for a card's weights and options, else measure it now.

    Each is kept in a card, whose parser takes nothing damaged. A cache that cannot be read or
    written is as good as none.
    """
    # a network is folded for the direction in its geometry
    identity = [
        *(card.network, card.weights_sha256, card.options, card.normalisation, card.made_by),
        asdict(card.geometry),
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "receptive-field" / f"{digest}.json"
    with contextlib.suppress(OSError, ValueError, CardError):
        return parse_card(path.read_text()).receptive_field
    found = measure()
    with contextlib.suppress(OSError, CardError):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = replace(card, receptive_field=found)
        write_atomically(path, kept.to_json().encode(), force=True)
    return found
