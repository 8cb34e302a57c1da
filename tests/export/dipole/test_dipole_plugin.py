"""What TensorRT's ONNX parser makes of a file with ``--dipole-op plugin``.

TensorRT-RTX has that parser and no way to put a plugin into a network: it asks for the plugin, and
may end the process. So each test is a process of its own.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.network import Network

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

PARSE = """
import sys
import numpy as np
import tensorrt_rtx as trt

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        super().__init__()
        self.name, self.plugin_version, self.plugin_namespace = "DipoleConv", "1", ""
        kinds = trt.PluginFieldType
        self.field_names = trt.PluginFieldCollection([
            trt.PluginField("multiplier", np.zeros(0, np.int8), kinds.CHAR),
            trt.PluginField("threshold", np.zeros(1, np.float32), kinds.FLOAT32),
            trt.PluginField("lambda", np.zeros(1, np.float32), kinds.FLOAT32),
        ])

    def create_plugin(self, name, fields, phase):
        given = {field.name: field.data for field in fields}
        text = given["multiplier"].tobytes().rstrip(b"\\0").decode()
        print(phase.name, text, float(given["threshold"][0]), float(given["lambda"][0]), flush=True)

creator = Creator()
trt.get_plugin_registry().register_creator(creator, "")
logger = trt.Logger(trt.Logger.INFO)
builder = trt.Builder(logger)
network = builder.create_network(0)
trt.OnnxParser(network, logger).parse_from_file(sys.argv[1])
"""


@pytest.mark.parametrize("multiplier", ["tkd", "tikhonov"])
def test_the_parser_asks_for_the_plugin_of_the_node(
    tmp_path: Path, dipole_network: Callable[..., Network], multiplier: str
) -> None:
    model = onnx_from_module(dipole_network(multiplier), "plugin")
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    (node,) = (n for n in model.graph.node if n.op_type == "DipoleConv")
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    run = subprocess.run(
        [sys.executable, "-c", PARSE, str(file)], capture_output=True, text=True, cwd=tmp_path
    )
    expected = f"BUILD {given['multiplier'].decode()} {given['threshold']} {given['lambda']}\n"
    assert expected in run.stdout, run.stdout + run.stderr
