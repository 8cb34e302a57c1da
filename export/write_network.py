"""The whole export: trace, verify, measure, write; the file appears last, or not at all."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

import onnx

from qsm_deploy.calibration.budgets import budgets_for
from qsm_deploy.calibration.int8.calibration import Int8Choices, read_calibration
from qsm_deploy.calibration.int8.choice import Int8Result
from qsm_deploy.calibration.int8.table import row_dicts
from qsm_deploy.export.graph.dipole_lowering import DEFAULT, RUN_BY, DipoleOp
from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.int8.verification import find_int8, verify_int8
from qsm_deploy.export.measure.measurement_cache import cached_receptive_field
from qsm_deploy.export.measure.memory_use import measure_memory
from qsm_deploy.export.measure.receptive_field import measure_receptive_field
from qsm_deploy.export.measure.rounding import (
    Rounding,
    measure_rounding,
    require_accuracy,
    verification_from,
)
from qsm_deploy.export.measure.verification import Difference, measure_differences
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.runtime.card.card import (
    SCHEMA,
    TASKS,
    UNROLLED,
    GraphPrecision,
    MemoryUse,
    ModelCard,
    ReceptiveField,
    Task,
    Verification,
)
from qsm_deploy.runtime.card.plan_file import FORM, PROMISE, plan_bytes
from qsm_deploy.runtime.console.atomic import check_writable, write_together
from qsm_deploy.runtime.console.held import scratch_folder
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.gpu.building.builder import build_plan, prepare_plugin
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.building.config import plan_target
from qsm_deploy.runtime.gpu.building.profile import profile_from
from qsm_deploy.runtime.sessions.open import installed_backends
from qsm_deploy.runtime.sessions.session import BACKENDS, Backend


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    path: Path
    card_path: Path
    size_bytes: int
    card: ModelCard
    differences: tuple[Difference, ...]
    rounding: Rounding | None
    int8: Int8Result | None = None


def write_network(
    module: Network,
    card: ModelCard,
    output: Path,
    *,
    precision: GraphPrecision = "fp32",
    plan: PlanChoices | None = None,
    int8: Int8Choices | None = None,
    fp16_output: Path | None = None,
    gate_ppb: float | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Write a network as a verified file with its card, and the card beside it as JSON.

    A file for a TensorRT plugin runs nowhere here: the same network with its dipole operator in
    the default form is verified in its place, and the card says so.

    Parameters
    ----------
    module
        The network, in evaluation mode.
    card
        What is known of it, as :func:`provisional_card` says it.
    output
        The file to write; the card goes to ``.json`` beside it.
    precision
        What the graph computes in where it tolerates it.
    plan
        About the engine to build, if the file is to be a plan and not ONNX. The graph that goes in
        is verified, and goes into the file too; the engine itself is not run, since that takes a
        GPU.
    int8
        How to calibrate, for the precision ``int8``.
    fp16_output
        The file to write instead if a network is better left in FP16; by default the same.
    gate_ppb
        Largest in-mask difference from PyTorch that passes [ppb]; by default that of
        :data:`qsm_deploy.calibration.budgets.DEFAULTS`. In FP16 and BF16 99.9 % of the voxels may
        differ by a tenth.
    force
        Whether to overwrite.
    say
        Called with the name of each stage before it begins.

    Raises
    ------
    UsageError
        If an output exists and ``force`` is false, or the engine has not what was chosen.
    ExportError
        If it cannot be written as ONNX, or the engine refuses it.
    MissingDependencyError
        If the engine's library is not installed.
    AccuracyError
        If it differs from PyTorch by more than the gate; no file is left.
    """
    layers_path = plan.layers if plan else int8.layers if int8 else None
    check_outputs({output, fp16_output or output}, layers_path, force=force)
    if plan:
        profile = profile_from(plan.shapes, module.divisor, patchable=module.why_whole is None)
        built = plan_target(plan).options() | {"shapes": str(profile)}
        if card.options.get("dipole_op") == "plugin":
            prepare_plugin(plan.engine)
    maps = None if int8 is None else read_calibration(card, int8, say)
    say("tracing")
    dipole_op = cast(DipoleOp, card.options.get("dipole_op", DEFAULT))
    exact = _trace(module, dipole_op, precision)
    found = None
    if int8 is not None and maps is not None:
        found = find_int8(exact.standard, module, card, maps, int8, say)
        if found.why_not:
            say(found.why_not)
            precision, output = "fp16", fp16_output or output
        else:
            card = replace(card, options=card.options | found.card_options())
    graphs = _reduced(exact, precision, found)
    for line in _refusing(graphs, dipole_op, precision):
        say(line)
    card = replace(card, precision=precision)
    with scratch_folder() as folder:
        draft = folder / "draft.onnx"
        draft.write_bytes(with_card(graphs.written if graphs.running else graphs.standard, card))
        rounding, differences = None, list[Difference]()
        if found and precision == "int8":
            backends = graphs.running or graphs.running_standard
            verified, accurate = verify_int8(found, draft, backends, say)
            card = replace(card, options=card.options | accurate)
        else:
            verified, differences, rounding = _verify(graphs, draft, module, card, gate_ppb, say)
        if not graphs.running and dipole_op != DEFAULT:
            instead = f"in the {DEFAULT} lowering; the file itself was not run"
            verified = replace(verified, reference=f"{verified.reference} {instead}")
            say(f"verified the same network {instead}")
        say("measuring the receptive field")
        # where it was probed, code that may have changed decides it and not the weights alone
        receptive_field = (
            cached_receptive_field(card, lambda: measure_receptive_field(module, card))
            if module.reach is None
            else measure_receptive_field(module, card)
        )
        memory: dict[str, MemoryUse] = {}
        for backend in graphs.running:
            say(f"measuring the memory of {backend}")
            memory[backend] = measure_memory(draft, backend)
    card = replace(card, verified=verified, receptive_field=receptive_field, memory=memory)
    data, engine_layers = with_card(graphs.written, card), None
    if plan:
        say(f"building with {built['engine']} for {built['shapes']} and the GPU {built['gpu']}")
        card = replace(card, options=card.options | built | {PROMISE: f"{FORM}"})
        made = build_plan(data, card, profile, plan, say)
        data, engine_layers = plan_bytes(made.data, data), made.layers
    card_path = output.with_suffix(".json")
    files = {card_path: _for_people(card).encode(), output: data}
    if layers_path and (report := _layers_report(found, engine_layers)):
        files[layers_path] = report.encode()
    write_together(files, force=force)
    return Exported(output, card_path, len(data), card, tuple(differences), rounding, found)


def check_outputs(targets: set[Path], layers: Path | None, *, force: bool) -> None:
    """Refuse what could not be written in the end, the cards beside the files too.

    Raises
    ------
    UsageError
        If one exists and ``force`` is false.
    DataError
        If its folder is none.
    """
    reports = [layers] if layers else []
    for path in (*targets, *(target.with_suffix(".json") for target in targets), *reports):
        check_writable(path, force=force)


class Named(Protocol):
    """What a card says of a network besides what its module says."""

    @property
    def name(self) -> str:
        """Of the network."""

    @property
    def doi(self) -> str | None:
        """Of the paper that describes it."""


@dataclass(frozen=True)
class Origin:
    """The same, of a network that is none of those known."""

    name: str
    doi: str | None


@dataclass(frozen=True)
class _Graphs:
    """What is written, the same of standard operators, and the backends that run either."""

    written: onnx.ModelProto
    standard: onnx.ModelProto
    running: tuple[Backend, ...]
    running_standard: tuple[Backend, ...]


def _trace(module: Network, dipole_op: DipoleOp, precision: GraphPrecision) -> _Graphs:
    """Return the graphs in FP32, and the backends that run them in another precision."""
    able = installed_backends()
    standard = tuple(backend for backend in able if precision in BACKENDS[backend].graphs)
    running = tuple(backend for backend in standard if backend in RUN_BY[dipole_op])
    written = onnx_from_module(module, dipole_op)
    needs_standard = dipole_op != DEFAULT and (precision != "fp32" or not running)
    other = onnx_from_module(module, DEFAULT) if needs_standard else written
    return _Graphs(written, other, running, standard)


def _reduced(exact: _Graphs, precision: GraphPrecision, found: Int8Result | None) -> _Graphs:
    """Return the graphs in a precision."""

    def reduced(model: onnx.ModelProto) -> onnx.ModelProto:
        if precision == "int8":
            assert found is not None  # or there would be nothing to be in INT8
            return found.quantised(with_precision(model, "fp16"))
        return model if precision == "fp32" else with_precision(model, precision)

    written = reduced(exact.written)
    standard = written if exact.standard is exact.written else reduced(exact.standard)
    return replace(exact, written=written, standard=standard)


def _refusing(graphs: _Graphs, dipole_op: DipoleOp, precision: GraphPrecision) -> Iterator[str]:
    """Tell which of the installed backends cannot run a file, and why."""
    able, standard, running = installed_backends(), graphs.running_standard, graphs.running
    for runs, refusing, why in (
        (standard, able, f"in {precision}"),
        (running, standard, f"with --dipole-op {dipole_op}"),
    ):
        if runs != refusing:
            names = " and ".join(backend for backend in refusing if backend not in runs)
            yield f"{names} cannot run a file {why}"


def _layers_report(found: Int8Result | None, engine_layers: str | None) -> str | None:
    """Return the layers in INT8, if any were looked for, and those of the engine, as JSON."""
    if found is None:
        return engine_layers
    report = {"int8": row_dicts(found.rows)}
    if engine_layers:
        report["engine"] = json.loads(engine_layers)
    return json.dumps(report, indent=2) + "\n"


def _verify(
    graphs: _Graphs,
    draft: Path,
    module: Network,
    card: ModelCard,
    gate_ppb: float | None,
    say: Callable[[str], None],
) -> tuple[Verification, list[Difference], Rounding | None]:
    """Return what the card says, and what that was taken from."""
    rounding = None
    gate = gate_ppb or budgets_for(card, ())["max_ppb"]
    if card.precision != "fp32":
        say(f"measuring what rounding to {card.precision} costs")
        rounding = measure_rounding(graphs.standard, module, card)
        require_accuracy(rounding, gate)
    backends = graphs.running or graphs.running_standard
    if backends:
        say(f"verifying against PyTorch in {' and '.join(backends)}")
    differences = measure_differences(draft, module, card, backends)
    return verification_from(differences, rounding, gate), differences, rounding


def _for_people(card: ModelCard) -> str:
    return json.dumps(json.loads(card.to_json()), indent=2) + "\n"


def provisional_card(
    spec: Named, module: Network, choices: Choices, licence: str, sha256: str
) -> ModelCard:
    """Return the card as far as it is known before anything is measured."""
    patchable: Literal["yes", "no", "split"] = "yes" if module.why_whole is None else "no"
    if module.pipeline in UNROLLED and patchable == "yes":
        patchable = "split"
    unknown = None if patchable == "no" else 0
    return ModelCard(
        schema=SCHEMA,
        network=spec.name,
        task=task_of(module),
        pipeline=module.pipeline,
        inputs=module.inputs,
        output=module.output,
        divisor=module.divisor,
        patchable=patchable,
        why_whole=module.why_whole,
        receptive_field=ReceptiveField(unknown, unknown, 0.0),
        geometry=module.geometry,
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
        axes=module.axes,
        priors=module.priors,
        anchor=module.anchor,
        further_outputs=module.further_outputs,
        pad_front=module.pad_front,
        tiles=module.tiles,
    )


def task_of(module: Network) -> Task:
    """Return what a network does, by what it takes first and gives; the loops give a map.

    Raises
    ------
    ExportError
        If that is nothing that is known.
    """
    if module.pipeline != "cnn":
        return "local_field->chi"
    first, gives = module.inputs[0].name, (module.output, *module.further_outputs)
    names = tuple(tensor.name for tensor in gives)
    for task, (taken, _, given) in TASKS.items():
        if (first, names) == (taken, given):
            return task
    raise ExportError(
        f"no task takes {first} and gives {', '.join(names)}; there are {', '.join(TASKS)}"
    )
