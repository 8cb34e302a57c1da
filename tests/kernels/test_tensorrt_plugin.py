"""How the TensorRT plugin is found; what it does is tested with its library."""

import sys
from types import ModuleType

import pytest

from qsm_deploy.export.graph import dipole_node as node
from qsm_deploy.kernels.errors import EngineError, MissingDependencyError
from qsm_deploy.kernels.tensorrt_plugin import NAME, ONNX_DOMAIN, load_dipole_plugin


def test_it_is_looked_for_under_the_name_that_files_give_the_node():
    assert (ONNX_DOMAIN, NAME) == (node.DOMAIN, node.NODE)


def test_without_tensorrt_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[tensorrt\]'"):
        load_dipole_plugin()


def test_an_older_tensorrt_is_refused(monkeypatch):
    old = ModuleType("tensorrt")
    old.__version__ = "8.6.1"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(EngineError, match=r"TensorRT 10 or later, this is 8\.6\.1"):
        load_dipole_plugin()
