"""An export of a network of one's own, as a user asks for it: a module, or an ONNX file."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsm_deploy.export.order import ABOUT_INT8, ABOUT_PLANS, COMMON, Order, given_options
from qsm_deploy.export.own.card_file import require_name, stated_in
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.command import needs_extra
from qsm_deploy.runtime.job.request import PathLike, paths_of

if TYPE_CHECKING:
    from torch import nn

    from qsm_deploy.export.write_network import Exported

NAME = "qsm-export"


def export_module(
    module: "nn.Module | str",
    card: PathLike | Mapping[str, Any] | None = None,
    *,
    weights: PathLike | Sequence[PathLike] | None = None,
    **asked: Any,
) -> "Exported":
    """Write a module of one's own as a verified ONNX file or as a TensorRT plan.

    Parameters
    ----------
    module
        A ``torch.nn.Module`` with its weights in it, or where one is built: ``net.py:build`` or
        ``package.module:build``. It is left as it is: a copy of it is exported.
    card
        A file of TOML or a dict that says what the module does not: docs/own-network.md has the
        fields. A ``Network`` needs none.
    weights
        A file or files with the state dict, every key of which must fit; by default the module's
        weights are what they are.
    **asked
        As of :func:`qsm_deploy.export.export_network`: output, precision, calibration, engine,
        gate_ppb, force, say, bar, and what is chosen of plans and INT8.

    Returns
    -------
    Exported
        The file, its card, and how far it is from PyTorch.

    Raises
    ------
    QsmDeployError
        As the command line does, one subclass for each cause.
    """
    stated, say = stated_in(card), asked.get("say") or (lambda line: None)
    with needs_extra("export", NAME):
        from torch import nn

        from qsm_deploy.export.checkpoints.state import (
            BATCH_COUNTER,
            load_state,
            load_strictly,
            state_sha256,
        )
        from qsm_deploy.export.model_files import refuse_models, refuse_quantised
        from qsm_deploy.export.networks.network import Choices
        from qsm_deploy.export.own.assembly import network_from_module
        from qsm_deploy.export.own.user_module import built_module
        from qsm_deploy.export.write_network import Origin, provisional_card
    default = type(module).__name__
    if isinstance(module, str):
        module, default = built_module(module)
    if not isinstance(module, nn.Module):
        raise UsageError(f"a {default} is no torch.nn.Module, nor the name of what builds one")
    module = copy.deepcopy(module).float()
    name = stated.network or require_name(default.strip("_").lower(), stated.where)
    order = _order(name, asked)
    order.check_outputs()
    if weights is None:
        say("no --weights: taking those that the module was built with")
        state = dict(module.state_dict())
    else:
        files = list(paths_of(weights))
        refuse_models(files, name)
        own = {key for key in module.state_dict() if not key.endswith(BATCH_COUNTER)}
        state = load_state(*files, fits=lambda keys: own <= set(keys), say=say)
        refuse_quantised(state)
        load_strictly(module, state)
    network = network_from_module(module, stated, say)
    about = (Origin(name, stated.doi), network, Choices(), stated.licence, state_sha256(state))
    return order.write(network, provisional_card(*about))


def export_onnx(
    path: PathLike, card: PathLike | Mapping[str, Any] | None = None, **asked: Any
) -> "Exported":
    """Adopt an ONNX file that something else made, as a network like any other.

    Its graph becomes a module, which is compared with the file itself in the backends that are
    installed, and is then exported as :func:`export_module` does.

    Parameters
    ----------
    path
        The file.
    card
        As of :func:`export_module`; each input of the graph is one argument.
    **asked
        As there.

    Raises
    ------
    QsmDeployError
        As the command line does, one subclass for each cause.
    """
    stated, say = stated_in(card), asked.get("say") or (lambda line: None)
    with needs_extra("export", NAME):
        from qsm_deploy.export.checkpoints.state import state_sha256
        from qsm_deploy.export.graph.torch_graph import TorchGraph
        from qsm_deploy.export.networks.network import Choices
        from qsm_deploy.export.own.assembly import network_from_module
        from qsm_deploy.export.own.foreign_onnx import (
            foreign_graph,
            require_channels,
            require_same,
            size_of,
        )
        from qsm_deploy.export.write_network import Origin, provisional_card
    path = Path(path)
    name = stated.network or require_name(path.stem.lower(), stated.where)
    order = _order(name, asked)
    order.check_outputs()
    model = foreign_graph(path)
    require_channels(model, stated, path)
    module = TorchGraph(model, str(path)).eval()
    size = size_of(model)
    network = network_from_module(module, stated, say, size=size)
    require_same(model, module, size, network.divisor, say)
    digest = state_sha256(module.state_dict())
    about = (Origin(name, stated.doi), network, Choices(), stated.licence, digest)
    return order.write(network, provisional_card(*about))


def _order(name: str, asked: Mapping[str, Any]) -> Order:
    known = {*COMMON, "say", "bar"} - {*ABOUT_PLANS, *ABOUT_INT8}
    if unknown := asked.keys() - known - {*ABOUT_PLANS, *ABOUT_INT8}:
        raise UsageError(f"there is no option {min(unknown)} of a network of one's own")
    chosen = {n: v for n, v in asked.items() if n in (*ABOUT_PLANS, *ABOUT_INT8)}
    about = {n: v for n, v in asked.items() if n in known}
    return Order(name, **about, chosen=given_options(chosen))
