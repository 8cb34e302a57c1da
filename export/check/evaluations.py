"""How an engine of each precision is evaluated, and how its reference is.

A CPU's inference library is no witness for every precision: ONNX Runtime computes FP16 graphs in
FP32 and fuses quantised operators into kernels that may saturate. So each precision is run in the
way that shows what an accelerator would do, and the way is a part of the result.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsm_deploy.export.networks.registry import SPECS, known_networks, recognise
from qsm_deploy.kernels.errors import CardError, EngineError, UsageError, WeightsError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.card.graph import require_bounded_graph
from qsm_deploy.runtime.card.read import ONNX, PLAN, graph_in, load_card
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.gpu.open import open_gpu_sessions
from qsm_deploy.runtime.reconstructor import gpu_number
from qsm_deploy.runtime.sessions.open import installed_backends, open_session, require_backend
from qsm_deploy.runtime.sessions.session import AUTO, BACKENDS, Backend, Session

Choice = str  # auto, a backend of the CPU, or pytorch
BUNDLED = "pytorch"  # as a reference: the bundled weights
# options of a network that change where its operators are and not what it computes
FORMS = frozenset({"dipole_op", "form"})

HOW = {
    **{name: f"by {row.label} {{{name}}} on the CPU, in FP32" for name, row in BACKENDS.items()},
    "openvino bf16": "by OpenVINO {openvino} on the CPU, which decides by itself where operators "
    "that the graph has in BF16 round",
    "rounded": "operator by operator in PyTorch {torch}, sums in FP32 and the output of every "
    "operator of reduced type truly rounded to it: an engine that fuses operators rounds less "
    "often",
    "unoptimised": "by ONNX Runtime {onnxruntime} on the CPU with graph optimisation disabled, so "
    "that every Q/DQ pair rounds where it stands: no fused integer kernels that may saturate",
    "gpu": "by the engine that the file is for, on the GPU",
    "pytorch": "by the PyTorch {torch} module, eager, in FP32",
}


@dataclass(frozen=True)
class Evaluation:
    """One way to run a network.

    Attributes
    ----------
    name
        Of the way, a key of :data:`HOW`.
    card
        Of what it runs.
    open
        Loads it; what it returns holds the memory.
    """

    name: str
    card: ModelCard
    open: Callable[[], Session]

    @property
    def how(self) -> str:
        """The way in words, with the versions of what is involved."""
        return HOW[self.name].format_map(library_versions())


def load_valid_card(path: Path) -> ModelCard:
    """Return the card of an ONNX file, whose graph is checked, or a plan; neither is run.

    Raises
    ------
    DataError
        If the file is missing.
    EngineError
        If it is neither, or damaged.
    CardError
        If it has no card.
    """
    card = load_card(path)
    if path.suffix == ONNX:
        from onnx.checker import ValidationError, check_model

        try:
            check_model(path)
        except ValidationError as error:
            reason = str(error).strip().splitlines()[0]
            raise EngineError(f"{path}: not a valid .onnx model ({reason})") from None
    return card


def engine_evaluations(
    path: Path,
    card: ModelCard,
    choice: Choice = "auto",
    threads: int = 0,
    device: str = AUTO,
    plan_cache: str = AUTO,
    log: TerminalLog | None = None,
) -> list[Evaluation]:
    """Return the ways to run a file that tell its accuracy, the most telling first.

    Parameters
    ----------
    path
        The file.
    card
        Its card.
    choice
        One way only, if it is one for this precision.
    threads
        CPU threads of a backend; 0 takes all cores.
    device
        Where: ``auto`` takes the first GPU for a plan, where there is one, else the CPU.
    plan_cache, log
        As for :class:`qsm_deploy.runtime.gpu.rebuilding.Rebuilding`.

    Raises
    ------
    UsageError
        If the chosen way says nothing of this precision's accuracy.
    """
    number = gpu_number(device, [path])
    if number is None:
        require_bounded_graph(path)
    elif choice != "auto":
        raise UsageError(f"--backend {choice} is for the CPU; on a GPU the file says what runs it")

    def backend(name: Backend) -> Callable[[], Session]:
        return lambda: open_session(path, name, threads=threads)

    def on_gpu() -> Session:
        return open_gpu_sessions([path], number or 0, plan_cache=plan_cache, log=log)[0]

    precision: str = card.precision
    ways: dict[str, tuple[Choice, Callable[[], Session]]]
    if number is not None:
        ways = {"gpu": ("auto", on_gpu)}
    elif precision == "fp16":
        ways = {"rounded": ("pytorch", lambda: _rounded(path, card))}
    elif precision == "bf16":
        ways = {"rounded": ("pytorch", lambda: _rounded(path, card))}
        if "openvino" in installed_backends():
            ways["openvino bf16"] = ("openvino", backend("openvino"))
    elif precision == "int8":
        ways = {
            "unoptimised": ("onnxruntime", lambda: _unoptimised(path, threads)),
            "rounded": ("pytorch", lambda: _rounded(path, card)),
        }
    else:
        ways = {name: (name, backend(name)) for name in installed_backends()}
    chosen = [Evaluation(n, card, way) for n, (c, way) in ways.items() if choice in ("auto", c)]
    if not chosen:
        able = " or ".join(dict.fromkeys(c for c, _ in ways.values()))
        raise UsageError(
            f"--backend {choice} does not show what {precision} costs; drop it, or pass {able}"
        )
    return chosen


def reference_evaluation(
    card: ModelCard,
    given: Sequence[str],
    normalisation: Sequence[Path],
    threads: int = 0,
) -> tuple[Evaluation, list[Path]]:
    """Return the way to run the reference of an engine, and the files that it is read from.

    Parameters
    ----------
    card
        The engine's.
    given
        An ONNX file or a plan; or weights, of one network in one file or several; or ``pytorch``
        for the bundled weights, which is also what none means.
    normalisation
        The authors' files that the network needs besides its weights.
    threads
        CPU threads of a backend.

    Raises
    ------
    UsageError
        If nothing was given and no weights are bundled, or several files that are not weights.
    WeightsError
        If the weights are not those that the engine was made of.
    CardError
        If the reference is another network, or has other weights or options.
    """
    paths = [Path(name) for name in given if name != BUNDLED]
    if any(path.suffix in (ONNX, PLAN) for path in paths):
        if len(given) > 1:
            raise UsageError(f"--reference {given[0]} is a whole reference; pass one")
        other = load_valid_card(paths[0])
        _require_same_network(card, other, paths[0])
        return engine_evaluations(paths[0], other, threads=threads)[0], paths
    if paths and len(paths) < len(given):
        raise UsageError("--reference pytorch means the bundled weights; pass it or files")
    weights = paths or [_bundled(card)]
    _require_same_weights(card, weights)
    return Evaluation("pytorch", card, lambda: _module(card, weights, normalisation)), weights


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that networks run in, those that are installed."""
    found = {name: importlib.util.find_spec(name) for name in ("torch", *BACKENDS)}
    return {
        name: importlib.metadata.version(name) if name != "onnxruntime" else _onnxruntime_version()
        for name, spec in found.items()
        if spec is not None
    }


def _onnxruntime_version() -> str:
    import onnxruntime  # of several distributions, by its own word

    return str(onnxruntime.__version__)


def _rounded(path: Path, card: ModelCard) -> Session:
    import onnx
    from onnx import inliner

    from qsm_deploy.export.graph.rounded_run import RoundedRun
    from qsm_deploy.export.measure.rounding import rounded_session

    graph = inliner.inline_local_functions(onnx.load_model_from_string(graph_in(path)))
    if any(node.domain not in ("", "ai.onnx") for node in graph.graph.node):
        raise EngineError(
            f"{path}: its operators of other domains run in TensorRT with the plugin only; check "
            "the same network exported with --dipole-op matmul"
        )
    return rounded_session(RoundedRun(graph), card)


def _unoptimised(path: Path, threads: int) -> Session:
    require_backend("onnxruntime")
    from qsm_deploy.runtime.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(path, threads=threads, optimised=False)


def _bundled(card: ModelCard) -> Path:
    spec = known_networks().get(card.network)
    if spec is None or spec.bundled is None:
        raise UsageError(
            f"no weights of {card.network} are bundled: pass --reference WEIGHTS, or another "
            "engine of it"
        )
    return spec.bundled_file()


def _module(card: ModelCard, weights: Sequence[Path], normalisation: Sequence[Path]) -> Session:
    """Return the PyTorch network with a card of its own: nothing of the engine's is trusted."""
    from qsm_deploy.export.checkpoints.normalisation import load_normalisation
    from qsm_deploy.export.checkpoints.state import load_state, state_sha256
    from qsm_deploy.export.measure.verification import ModuleSession
    from qsm_deploy.export.networks.build_network import build_network
    from qsm_deploy.export.networks.network import Choices
    from qsm_deploy.export.write_network import provisional_card

    spec = known_networks().get(card.network)
    if spec is None:
        raise UsageError(
            f"{card.network} is none of the networks of qsm-export --list: pass another engine of "
            "it with --reference, such as its .onnx in fp32"
        )
    options = {name: value for name, value in card.options.items() if name in spec.options}
    choices = Choices(options, load_normalisation(normalisation), card.geometry.b0_direction)
    state = load_state(*weights, fits=recognise)
    module = build_network(spec, state, choices)
    own = provisional_card(spec, module, choices, card.licence, state_sha256(state))
    return ModuleSession(module, own)


def _require_same_weights(card: ModelCard, weights: Sequence[Path]) -> None:
    from qsm_deploy.export.checkpoints.state import load_state, state_sha256

    state = load_state(*weights, fits=recognise)
    found = state_sha256(state)
    if found == card.weights_sha256:
        return
    names = " or ".join(spec.name for spec in recognise(state)) or "no network that is known here"
    raise WeightsError(
        f"{', '.join(map(str, weights))}: not the weights that the engine was made of: sha256 "
        f"{found[:12]}, keys like {names}; its card says {card.network}, sha256 "
        f"{card.weights_sha256[:12]}: pass these with --reference"
    )


def _require_same_network(card: ModelCard, other: ModelCard, path: Path) -> None:
    facts: Mapping[str, tuple[str, str]] = {
        "network": (card.network, other.network),
        "weights_sha256": (card.weights_sha256[:12], other.weights_sha256[:12]),
    } | {
        f"option {name}": (card.options.get(name, "-"), other.options.get(name, "-"))
        for name in sorted({name for spec in SPECS for name in spec.options} - FORMS)
    }
    for what, (ours, theirs) in facts.items():
        if ours != theirs:
            raise CardError(
                f"{path}: not a reference for this engine: {what} {theirs}, the engine has "
                f"{ours}; pass the same network"
            )
