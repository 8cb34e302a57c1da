"""What TensorRT's ONNX parser makes of a file with ``--dipole-op plugin``.

TensorRT-RTX has that parser and no way to put a plugin into a network: it makes the plugin, then
ends the process. So each test is a process of its own; without a GPU one gets no further.
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
import tensorrt_rtx as trt
from qsm_deploy.kernels import tensorrt_plugin

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        super().__init__()
        own = tensorrt_plugin.plugin_creator(trt, None)
        self.own, self.field_names = own, own.field_names
        self.name, self.plugin_version, self.plugin_namespace = own.name, own.plugin_version, ""

    def create_plugin(self, name, fields, phase):
        plugin = self.own.create_plugin(name, fields, phase)
        print(phase.name, plugin.node, flush=True)
        return plugin

creator = Creator()
trt.get_plugin_registry().register_creator(creator, "")
logger = trt.Logger(trt.Logger.INFO)
builder = trt.Builder(logger)
network = builder.create_network(0)
trt.OnnxParser(network, logger).parse_from_file(sys.argv[1])
"""


@pytest.mark.parametrize("multiplier", ["tkd", "tikhonov"])
def test_the_parser_makes_the_plugin_of_the_node(
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
    expected = (
        f"BUILD DipoleNode(multiplier={given['multiplier'].decode()!r}, "
        f"threshold={given['threshold']}, lam={given['lambda']})"
    )
    assert expected in run.stdout, run.stdout + run.stderr
    assert "Successfully created plugin: DipoleConv" in run.stdout
