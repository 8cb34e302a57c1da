"""Train a narrow QSMnet by TensorFlow for no step, save it, and note what it returns.

Needs TensorFlow 2 in an environment of its own:
python tests/export/golden/make_qsmnet_tf1.py

``qsmnet_tf1_weights.npz`` is the checkpoint, converted as docs/qsmnet-weights.md says;
``qsmnet_tf1.npz`` has every 33rd voxel of the output for the input in ``ir2qsm.npz``, which is
taken as a field with standard deviation ``INPUT_STD``, for either activation.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

HERE = Path(__file__).parent
WIDTHS = (2, 2, 3, 3, 4)
KERNEL = 5
STRIDE = 33
INPUT_STD = 0.05

v1 = tf.compat.v1
Tensor = Any
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": tf.nn.relu,
    "leaky_relu": lambda x: tf.nn.leaky_relu(x, alpha=0.1),
}


def variable(name: str, shape: tuple[int, ...], scale: float, offset: float = 0.0) -> Tensor:
    """Return a variable whose values follow from its name."""
    random = np.random.default_rng(list(f"{v1.get_variable_scope().name}/{name}".encode()))
    value = offset + scale * random.uniform(-1, 1, shape)
    return v1.get_variable(name, initializer=value.astype(np.float32))


def conv(name: str, x: Tensor, channels: int, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Convolve, normalise by the moving statistics, activate; channels last."""
    before = x.shape[-1]
    with v1.variable_scope(name):
        shape = (KERNEL, KERNEL, KERNEL, before, channels)
        weights = variable("conv_weights", shape, np.sqrt(0.2 / (KERNEL**3 * before)))
        y = tf.nn.conv3d(x, weights, strides=[1] * 5, padding="SAME")
        y += variable("biases", (channels,), 0.1)
        with v1.variable_scope("bn"):
            beta, gamma = variable("beta", (channels,), 0.1), variable("gamma", (channels,), 0.2, 1)
            mean = variable("mean_sh", (channels,), 0.1)
            variance = variable("var_sh", (channels,), 0.02, 0.03)
        return activation(tf.nn.batch_normalization(y, mean, variance, beta, gamma, 1e-3))


def deconv(name: str, x: Tensor, channels: int) -> Tensor:
    """Double the resolution; nothing follows the bias."""
    n, *size, before = x.shape
    with v1.variable_scope(name):
        weights = variable("deconv_weights", (2, 2, 2, channels, before), np.sqrt(3 / before))
        target = [n, *(2 * side for side in size), channels]
        y = tf.nn.conv3d_transpose(x, weights, target, strides=[1, 2, 2, 2, 1], padding="SAME")
        return y + variable("biases", (channels,), 0.1)


def qsmnet(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the network's output in normalised units, (n, x, y, z, 1)."""
    with v1.variable_scope("qsmnet", reuse=v1.AUTO_REUSE):
        skips = []
        for level, c in enumerate(WIDTHS[:-1], start=1):
            x = conv(f"conv{level}2", conv(f"conv{level}1", x, c, activation), c, activation)
            skips.append(x)
            x = tf.nn.max_pool3d(x, ksize=2, strides=2, padding="SAME")
        x = conv("l_conv1", x, WIDTHS[-1], activation)
        x = conv("l_conv2", x, WIDTHS[-1], activation)
        for level, c in zip((4, 3, 2, 1), reversed(WIDTHS[:-1]), strict=True):
            x = tf.concat([skips[level - 1], deconv(f"deconv{level}", x, c)], axis=-1)
            for n in (1, 2):
                x = conv(f"conv{9 - level}{n}", x, c, activation)
        with v1.variable_scope("out"):
            weights = variable("weights", (1, 1, 1, WIDTHS[0], 1), np.sqrt(3 / WIDTHS[0]))
            return tf.nn.conv3d(x, weights, [1] * 5, "SAME") + variable("biases", (1,), 0.1)


def main() -> None:
    """Write both files beside this script."""
    v1.disable_eager_execution()
    field = np.load(HERE / "ir2qsm.npz")["input"] / np.float32(INPUT_STD)
    x = tf.constant(np.moveaxis(field, 1, -1))
    outputs = {name: qsmnet(x, activation) for name, activation in ACTIVATIONS.items()}
    first = v1.trainable_variables("qsmnet/conv11/conv_weights")  # the rest would but fill the file
    v1.train.AdamOptimizer().minimize(tf.reduce_mean(outputs["leaky_relu"]), var_list=first)
    with v1.Session() as session, tempfile.TemporaryDirectory() as folder:
        session.run(v1.global_variables_initializer())
        values = {
            name: v[0, ..., 0].reshape(-1)[::STRIDE] for name, v in session.run(outputs).items()
        }
        checkpoint = v1.train.Saver().save(session, f"{folder}/QSMnet_64", global_step=25)
        reader = tf.train.load_checkpoint(checkpoint)
        names = reader.get_variable_to_shape_map()
        weights = {name: reader.get_tensor(name) for name in sorted(names)}
    np.savez_compressed(HERE / "qsmnet_tf1_weights.npz", **weights)
    np.savez_compressed(HERE / "qsmnet_tf1.npz", stride=STRIDE, input_std=INPUT_STD, **values)


if __name__ == "__main__":
    main()
