"""The whole export: build, trace, verify, measure, write; the file appears last, or not at all."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from qsm_deploy.export.build_network import build_network
from qsm_deploy.export.checkpoints import StateDict, state_sha256
from qsm_deploy.export.dipole_lowering import DEFAULT, RUN_BY, DipoleOp
from qsm_deploy.export.measurement_cache import cached_receptive_field
from qsm_deploy.export.memory_use import measure_memory
from qsm_deploy.export.network_spec import NetworkSpec
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.receptive_field import measure_receptive_field
from qsm_deploy.export.verification import Difference, apply_gate, measure_differences
from qsm_deploy.runtime.atomic import check_writable, write_atomically
from qsm_deploy.runtime.card import (
    SCHEMA,
    UNROLLED,
    MemoryUse,
    ModelCard,
    ReceptiveField,
    Verification,
)
from qsm_deploy.runtime.provenance import made_by
from qsm_deploy.runtime.session import installed_backends

GATES_PPB = {"yes": 0.01, "no": 0.01, "split": 0.1}


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    path: Path
    card_path: Path
    size_bytes: int
    card: ModelCard
    differences: tuple[Difference, ...]


def export_network(
    spec: NetworkSpec,
    state: StateDict,
    output: Path,
    *,
    licence: str,
    choices: Choices,
    gate_ppb: float | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Write a network as a verified ONNX file with its card, and the card beside it as JSON.

    A file for a TensorRT plugin runs nowhere here: the same network with its dipole operator in
    the default form is verified in its place, and the card says so.

    Parameters
    ----------
    spec
        The network.
    state
        Its weights.
    output
        The file to write, ``.onnx``; the card goes to ``.json`` beside it.
    licence
        Of the weights.
    choices
        What the user chose of what the weights do not say.
    gate_ppb
        Largest in-mask difference from PyTorch that passes [ppb]; by default 0.01, and 0.1 where
        the rounding goes through the loop of an unrolled network.
    force
        Whether to overwrite.
    say
        Called with the name of each stage before it begins.

    Raises
    ------
    UsageError
        If an output exists and ``force`` is false.
    WeightsError
        If the weights are not this network's.
    ExportError
        If it cannot be written as ONNX.
    AccuracyError
        If it differs from PyTorch by more than the gate; no file is left.
    """
    card_path = output.with_suffix(".json")
    for path in (output, card_path):
        check_writable(path, force=force)
    module = build_network(spec, state, choices)
    say("tracing")
    dipole_op = cast(DipoleOp, choices.options.get("dipole_op", DEFAULT))
    model = onnx_from_module(module, dipole_op)
    backends = installed_backends()
    running = tuple(backend for backend in backends if backend in RUN_BY[dipole_op])
    if running != backends:
        refusing = " and ".join(backend for backend in backends if backend not in running)
        say(f"{refusing} cannot run a file with --dipole-op {dipole_op}")
    card = provisional_card(spec, module, choices, licence, state_sha256(state))
    with tempfile.TemporaryDirectory(prefix="qsm-export-") as folder:
        draft = Path(folder) / "draft.onnx"
        draft.write_bytes(with_card(model if running else onnx_from_module(module, DEFAULT), card))
        say(f"verifying against PyTorch in {' and '.join(running or backends)}")
        differences = measure_differences(draft, module, card, running or backends)
        verified = apply_gate(differences, gate_ppb or GATES_PPB[card.patchable])
        if not running:
            instead = f"in the {DEFAULT} lowering; the file itself was not run"
            verified = replace(verified, reference=f"{verified.reference} {instead}")
            say(f"verified the same network {instead}")
        say("measuring the receptive field")
        receptive_field = cached_receptive_field(
            card, lambda: measure_receptive_field(module, card)
        )
        memory: dict[str, MemoryUse] = {}
        for backend in running:
            say(f"measuring the memory of {backend}")
            memory[backend] = measure_memory(draft, card, backend)
    card = replace(card, verified=verified, receptive_field=receptive_field, memory=memory)
    data = with_card(model, card)
    write_atomically(output, data, force=force)
    write_atomically(card_path, _for_people(card).encode(), force=force)
    return Exported(output, card_path, len(data), card, tuple(differences))


def _for_people(card: ModelCard) -> str:
    return json.dumps(json.loads(card.to_json()), indent=2) + "\n"


def provisional_card(
    spec: NetworkSpec, module: Network, choices: Choices, licence: str, sha256: str
) -> ModelCard:
    """Return the card as far as it is known before anything is measured."""
    patchable: Literal["yes", "no", "split"] = "yes" if module.why_whole is None else "no"
    if module.pipeline in UNROLLED:
        patchable = "split"
    unknown = None if patchable == "no" else 0
    return ModelCard(
        schema=SCHEMA,
        network=spec.name,
        task="phase->chi" if module.inputs[0].name == "phase_rad" else "local_field->chi",
        pipeline=module.pipeline,
        inputs=module.inputs,
        output=module.output,
        divisor=module.divisor,
        patchable=patchable,
        why_whole=module.why_whole,
        receptive_field=ReceptiveField(unknown, unknown, 0.0),
        geometry=module.geometry,
        tkd=module.tkd,
        normalisation=dict(module.normalisation),
        constants=dict(module.constants),
        options=dict(choices.options),
        precision="fp32",
        memory={},
        verified=Verification("none", 0.0, ()),
        weights_sha256=sha256,
        licence=licence,
        doi=spec.doi,
        made_by=made_by(),
    )
