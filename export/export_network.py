"""The whole export: build, trace, verify, measure, write; the file appears last, or not at all."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qsm_deploy.export.checkpoints import StateDict, state_sha256
from qsm_deploy.export.memory_use import measure_memory
from qsm_deploy.export.onnx_export import OUTPUT, onnx_from_module, with_card
from qsm_deploy.export.receptive_field import measure_receptive_field
from qsm_deploy.export.registry import NetworkSpec
from qsm_deploy.export.verification import Difference, apply_gate, measure_differences
from qsm_deploy.runtime.atomic import check_writable, write_atomically
from qsm_deploy.runtime.card import (
    SCHEMA,
    MemoryUse,
    ModelCard,
    ReceptiveField,
    TensorInfo,
    Verification,
)
from qsm_deploy.runtime.provenance import made_by
from qsm_deploy.runtime.session import installed_backends

VOLUME = ("n", 1, "x", "y", "z")


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
    options: Mapping[str, str],
    gate_ppb: float,
    force: bool = False,
    say: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Write a network as a verified ONNX file with its card, and the card beside it as JSON.

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
    options
        A value for each of the network's options.
    gate_ppb
        Largest in-mask difference from PyTorch that passes [ppb].
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
    module = spec.build(state, options)
    backends = installed_backends()
    say("tracing")
    model = onnx_from_module(module, spec.inputs)
    card = _provisional_card(spec, module.divisor, options, licence, state_sha256(state))
    with tempfile.TemporaryDirectory(prefix="qsm-export-") as folder:
        draft = Path(folder) / "draft.onnx"
        draft.write_bytes(with_card(model, card))
        say(f"verifying against PyTorch in {' and '.join(backends)}")
        differences = measure_differences(draft, module, spec, backends)
        verified = apply_gate(differences, gate_ppb)
        say("measuring the receptive field")
        receptive_field = measure_receptive_field(module, spec)
        memory: dict[str, MemoryUse] = {}
        for backend in backends:
            say(f"measuring the memory of {backend}")
            memory[backend] = measure_memory(draft, backend)
    card = replace(card, verified=verified, receptive_field=receptive_field, memory=memory)
    data = with_card(model, card)
    write_atomically(output, data, force=force)
    write_atomically(card_path, _for_people(card).encode(), force=force)
    return Exported(output, card_path, len(data), card, tuple(differences))


def _for_people(card: ModelCard) -> str:
    return json.dumps(json.loads(card.to_json()), indent=2) + "\n"


def _provisional_card(
    spec: NetworkSpec, divisor: int, options: Mapping[str, str], licence: str, sha256: str
) -> ModelCard:
    """Return the card as far as it is known before anything is measured."""
    return ModelCard(
        schema=SCHEMA,
        network=spec.name,
        task="local_field->chi",
        pipeline=spec.pipeline,
        inputs=tuple(TensorInfo(name, "ppm", VOLUME) for name in spec.inputs),
        output=TensorInfo(OUTPUT, "ppm", VOLUME),
        divisor=divisor,
        patchable="yes",
        receptive_field=ReceptiveField(0, 0, 0.0),
        geometry=spec.geometry,
        tkd=spec.tkd,
        options=dict(options),
        precision="fp32",
        memory={},
        verified=Verification("none", 0.0, ()),
        weights_sha256=sha256,
        licence=licence,
        doi=spec.doi,
        made_by=made_by(),
    )
