"""From a state dict to the module that it belongs to, or to the name of the one it looks like."""

import importlib
from collections.abc import Callable, Mapping

from torch import Tensor

from qsm_deploy.export.networks.network import Choices, Network, require_network
from qsm_deploy.export.networks.network_spec import NetworkSpec
from qsm_deploy.export.networks.registry import REGISTRY, recognise
from qsm_deploy.kernels.errors import UsageError, WeightsError


def build_network(spec: NetworkSpec, state: Mapping[str, Tensor], choices: Choices) -> Network:
    """Make a module, in evaluation mode, from a state dict and the user's choices.

    Parameters
    ----------
    spec
        The network that the state is said to belong to.
    state
        Tensors by the names in the authors' file.
    choices
        What the weights do not say.

    Raises
    ------
    WeightsError
        If a key is missing, left over, of another shape, or not finite, or the keys are those of
        another network; the message names the key and that network.
    UsageError
        If its file cannot be imported, a choice that the network needs was not made, or its class
        lacks what the export asks.
    """
    likely = recognise(state)
    if likely and spec not in likely:
        lacking = [mark for mark in spec.marks if mark not in state]
        strange = [mark for mark in likely[0].marks if mark not in spec.marks]
        what = f"{lacking[0]} is missing" if lacking else f"{strange[0]} is there"
        names = " or ".join(other.name for other in likely)
        raise WeightsError(
            f"these are not the weights of {spec.name}: {what}; these keys look like {names}: "
            f"pass --model {names}"
        )
    return require_network(_builder(spec)(state, choices), spec.name)


def _builder(spec: NetworkSpec) -> Callable[[Mapping[str, Tensor], Choices], object]:
    """Return the function of the network's file, which may be another package's."""
    if spec.name in REGISTRY:
        module = importlib.import_module(f"qsm_deploy.export.networks.{spec.module}")
    else:
        try:
            module = importlib.import_module(spec.module)
        except Exception as error:  # whatever somebody's file raises
            raise UsageError(
                f"--model {spec.name}: {spec.module} cannot be imported ({error}); mend or "
                "uninstall that package"
            ) from error
    build: Callable[[Mapping[str, Tensor], Choices], object] | None = getattr(
        module, "network_from_state", None
    )
    if build is None:
        raise UsageError(f"--model {spec.name}: {spec.module} has no network_from_state")
    return build
