"""A kept trace is one of the same network, and of nothing else."""

import onnx
import torch
from onnx import helper
from torch import nn

from qsm_deploy.export.networks import loopnet
from qsm_deploy.export.networks.loopnet import LoopNet
from qsm_deploy.export.networks.tv_unet import TvUnet
from tests.kept_traces import keep_traces


class Traced:
    """Counts the traces that are really made."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: nn.Module, *rest: object) -> onnx.ModelProto:
        self.count += 1
        graph = helper.make_graph([], f"{type(module).__name__} {self.count}", [], [])
        return helper.make_model(graph)


def tv_unet(seed: int = 0, quarter: int = 4) -> TvUnet:
    torch.manual_seed(seed)
    return TvUnet(2, quarter, 2).eval()


def test_the_same_network_is_traced_once_by_all_runs(tmp_path) -> None:
    made = Traced()
    first = keep_traces(tmp_path, made)(tv_unet(), [], ["x"])
    again = keep_traces(tmp_path, made)(tv_unet(), [], ["x"])
    assert (made.count, first) == (1, again)
    assert [path.is_file() for path in tmp_path.glob("*/*")] == [True]


def test_whatever_differs_is_traced_anew(tmp_path, monkeypatch) -> None:
    made = Traced()
    trace = keep_traces(tmp_path, made)
    changed = tv_unet()
    changed.scale = 2.0
    for network in (tv_unet(), tv_unet(seed=1), tv_unet(quarter=3), changed):
        trace(network, [], ["x"])
    trace(tv_unet(), [], ["y"])
    assert made.count == 5
    for levels in (1, 2):
        monkeypatch.setattr(loopnet, "LEVELS", levels)
        torch.manual_seed(0)
        trace(LoopNet(4, loops=1).eval(), [], ["x"])
    assert made.count == 7


def test_a_class_without_a_name_is_never_kept(tmp_path) -> None:
    class Local(nn.Module):
        pass

    made = Traced()
    trace = keep_traces(tmp_path, made)
    assert trace(Local(), []).graph.name != trace(Local(), []).graph.name


def test_traces_of_other_code_are_removed(tmp_path) -> None:
    (tmp_path / "old").mkdir()
    keep_traces(tmp_path, Traced())
    assert not (tmp_path / "old").exists()
