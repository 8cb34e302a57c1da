"""The variables of a TensorFlow 1 checkpoint of QSMnet, by the names of its PyTorch version.

TensorFlow keeps the channels of a kernel last: (x, y, z, in, out) for a convolution and
(x, y, z, out, in) for a transposed one, both of which PyTorch wants as the same permutation.
"""

from collections.abc import Mapping

from torch import Tensor

from qsm_deploy.export.checkpoints.state import require_keys
from qsm_deploy.kernels.errors import WeightsError

SCOPE = "qsmnet/"
CONVS = (
    *(f"conv{stage}{n}" for stage in (1, 2, 3, 4, 5, 6, 7, 8) for n in (1, 2)),
    *("l_conv1", "l_conv2"),
)
DECONVS = ("deconv4", "deconv3", "deconv2", "deconv1")
# what the training keeps beside the network's own variables: last parts of their names
TRAINING_ONLY = frozenset(
    {
        *("Adam", "Adam_1", "beta1_power", "beta2_power"),  # the authors' optimiser
        *("ExponentialMovingAverage", "global_step"),
    }
)


def is_tf1(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of TensorFlow variables."""
    return any(key.startswith(SCOPE) for key in state)


def torch_keys() -> dict[str, str]:
    """Return the PyTorch key of each of the network's variables."""
    keys = {"out/weights": "out.conv.weight", "out/biases": "out.conv.bias"}
    for layer in CONVS:
        keys |= {
            f"{layer}/conv_weights": f"{layer}.conv.weight",
            f"{layer}/biases": f"{layer}.conv.bias",
            f"{layer}/bn/gamma": f"{layer}.bn.weight",
            f"{layer}/bn/beta": f"{layer}.bn.bias",
            f"{layer}/bn/mean_sh": f"{layer}.bn.running_mean",
            f"{layer}/bn/var_sh": f"{layer}.bn.running_var",
        }
    for layer in DECONVS:
        keys |= {
            f"{layer}/deconv_weights": f"{layer}.deconv.weight",
            f"{layer}/biases": f"{layer}.deconv.bias",
        }
    return {SCOPE + name: key for name, key in keys.items()}


def state_from_tf1(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the PyTorch version, its kernels as views.

    Parameters
    ----------
    variables
        By name, as the checkpoint has them. What only the training needs is left out, what is
        unknown keeps its name.

    Raises
    ------
    WeightsError
        If a variable is missing, or is a kernel without five axes.
    """
    keys = torch_keys()
    require_keys(variables, list(keys), "qsmnet")
    state: dict[str, Tensor] = {}
    for name, value in variables.items():
        if name.rpartition("/")[2] in TRAINING_ONLY:
            continue
        if name.endswith("weights"):
            if value.ndim != 5:
                raise WeightsError(
                    f"{name} has shape {tuple(value.shape)} in the weights, expected five axes"
                )
            value = value.permute(4, 3, 0, 1, 2)
        state[keys.get(name, name)] = value
    return state
