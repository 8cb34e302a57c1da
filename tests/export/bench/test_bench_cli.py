"""qsm-bench as a user types it: rows that agree with themselves, one line for what is wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest

from qsm_deploy.export.bench import device_peak
from qsm_deploy.export.bench import job as bench_job
from qsm_deploy.export.bench.cli import main
from qsm_deploy.export.bench.rounds import difference, spread
from qsm_deploy.export.checkpoints.state import load_state, state_sha256
from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.runtime.card.card import MemoryUse, ReceptiveField
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL

SHAPE = "--shape 32 28 24"


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """Measure the device on less than a real run does."""
    monkeypatch.setattr(device_peak, "EDGE", {"cpu": 128})
    monkeypatch.setattr(device_peak, "COPIED_BYTES", 2**20)


@pytest.fixture
def bench(capsys):
    """Return a function that runs qsm-bench."""

    def run(model, line):
        try:
            code = main([str(model), *line.split()])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def tiny_model(tmp_path, tiny_ir2qsm, tiny_weights):
    """Return a model of a network whose weights are not bundled; 8 divides its sizes."""
    choices = Choices({"residual": "input"})
    digest = state_sha256(load_state(tiny_weights))
    card = provisional_card(REGISTRY["ir2qsm"], tiny_ir2qsm, choices, "test", digest)
    card = replace(
        card,
        divisor=8,
        receptive_field=ReceptiveField(9, 5, 0.999),
        memory={"onnxruntime": MemoryUse(0, 900), "openvino": MemoryUse(0, 900)},
    )
    path = tmp_path / "tiny.onnx"
    path.write_bytes(with_card(onnx_from_module(tiny_ir2qsm), card))
    return path


class TestRows:
    def test_everything_in_one_row(self, bench):
        line = f"{SHAPE} --against torch onnxruntime --backend openvino --repeats 3 --json"
        code, out, err = bench(BUNDLED_MODEL, line)
        assert (code, err) == (0, "")
        [text] = out.splitlines()
        result = json.loads(text)
        assert result["plan"]["padded_shape"] == [32, 28, 24]
        assert result["peaks"]["cpu"]["flop_per_second"]["fp32"] > 0
        assert result["machine"]["cores"] > 0
        libraries = [row["library"].split()[0] for row in result["rows"]]
        assert libraries == ["openvino", "torch", "onnxruntime"]
        first = result["rows"][0]["seconds"]["total"]["median"]
        for row in result["rows"]:
            total = row["seconds"]["total"]
            assert total["min"] <= total["median"] <= total["max"]
            assert set(row["seconds"]) == {"prepare", "inference", "anchor", "total"}
            assert row["speed"] == pytest.approx(first / total["median"], rel=0.05)
            voxels = row["voxels_per_second"] * total["median"]
            assert voxels == pytest.approx(32 * 28 * 24, rel=0.05)
            expected = 2 * REGISTRY["tv-unet"].gmac_64 * 32 * 28 * 24 / 64**3
            assert row["gflop"] == pytest.approx(expected, rel=5e-3)
            gflop = row["gflop_per_second"] * row["seconds"]["inference"]["median"]
            assert gflop == pytest.approx(row["gflop"], rel=0.05)
            share = row["share_of_peak_product"] * result["peaks"]["cpu"]["flop_per_second"]["fp32"]
            assert share == pytest.approx(1e9 * row["gflop_per_second"], rel=0.01)
            assert row["peak_bytes"] > 2**20
            assert row["accuracy"]["reference"].startswith("pytorch ")
            assert row["accuracy"]["p999_ppb"] <= row["accuracy"]["max_ppb"] < 0.01
        assert result["rows"][1]["accuracy"]["max_ppb"] == 0
        assert result["rows"][0]["accuracy"]["max_ppb"] > 0

    def test_a_table_for_people(self, bench):
        code, out, _ = bench(BUNDLED_MODEL, f"{SHAPE} --against onnxruntime --backend openvino -q")
        assert code == 0
        assert out.startswith("32x28x24, whole, 5 reconstructions each, in turns")
        assert "cpu: a product at " in out
        assert "errors of tv-unet in ppb against pytorch " in out
        assert out.count("tv-unet.onnx") == 4
        assert "median seconds" in out

    def test_patches_do_more_work(self, bench):
        line = f"{SHAPE} --repeats 1 --json"
        whole = json.loads(bench(BUNDLED_MODEL, line)[1])
        patched = json.loads(bench(BUNDLED_MODEL, f"{line} --patch 16")[1])
        assert patched["plan"]["patches"] > 1
        assert patched["rows"][0]["gflop"] > 1.5 * whole["rows"][0]["gflop"]

    def test_a_lower_precision_shows_in_its_accuracy(self, bench):
        from openvino import Core

        if "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            code, _, err = bench(BUNDLED_MODEL, f"{SHAPE} --precision bf16")
            assert code == 4
            assert "this CPU has no bf16 instructions" in err
            return
        line = f"{SHAPE} --precision bf16 --against openvino --repeats 1 --json"
        rows = json.loads(bench(BUNDLED_MODEL, line)[1])["rows"]
        assert [row["precision"] for row in rows] == ["bf16", "fp32"]
        assert rows[0]["accuracy"]["p999_ppb"] > 100 * rows[1]["accuracy"]["p999_ppb"]


class TestWeights:
    def test_without_weights_rows_are_compared_with_the_first(self, bench, tiny_model):
        line = f"{SHAPE} --against onnxruntime --backend openvino --repeats 1"
        rows = json.loads(bench(tiny_model, f"{line} --json")[1])["rows"]
        assert rows[0]["accuracy"] is None
        assert rows[1]["accuracy"]["reference"].startswith("tiny.onnx in openvino")
        code, out, _ = bench(tiny_model, f"{SHAPE} --repeats 1")
        assert code == 0
        assert "no errors: the weights for PyTorch are not at hand (--weights)" in out

    def test_with_its_weights(self, bench, tiny_model, tiny_weights):
        line = f"{SHAPE} --against torch --weights {tiny_weights} --repeats 1 --json"
        rows = json.loads(bench(tiny_model, line)[1])["rows"]
        assert rows[1]["library"].startswith("torch ")
        assert rows[0]["accuracy"]["reference"].startswith("pytorch ")

    def test_two_networks_have_a_reference_each(self, bench, tiny_model):
        line = f"--shape 32 32 24 --against {BUNDLED_MODEL} --repeats 1 --json"
        rows = json.loads(bench(tiny_model, line)[1])["rows"]
        assert [row["network"] for row in rows] == ["ir2qsm", "tv-unet"]
        assert rows[0]["accuracy"] is None
        assert rows[1]["accuracy"]["max_ppb"] < 0.01

    def test_torch_needs_the_weights(self, bench, tiny_model):
        code, out, err = bench(tiny_model, f"{SHAPE} --against torch")
        assert (code, out) == (7, "")
        assert "not the weights that the engine was made of" in err


class TestBadInput:
    @pytest.mark.parametrize(
        ("line", "code", "says"),
        [
            ("", 2, "the following arguments are required: --shape"),
            ("--shape 32 32", 2, "expected 3 arguments"),
            ("--shape 32 32 0", 2, "'0' is not a positive whole number"),
            (f"{SHAPE} --against openvino --backend openvino", 2, "compared with itself"),
            (f"{SHAPE} --against torch torch", 2, "compared with itself"),
            (f"{SHAPE} --against none.onnx", 3, "none.onnx: no such model file"),
            (f"{SHAPE} --weights none.pth", 7, "none.pth"),
            (f"{SHAPE} --precision bf16 --backend onnxruntime", 2, "needs --backend openvino"),
        ],
    )
    def test_one_line(self, bench, line, code, says):
        seen, out, err = bench(BUNDLED_MODEL, line)
        assert (seen, out) == (code, ""), err
        assert says in err.splitlines()[-1]

    def test_what_is_no_engine(self, bench, tmp_path):
        (tmp_path / "x.plan").write_bytes(b"no plan")
        code, out, err = bench(tmp_path / "x.plan", SHAPE)
        assert (code, out) == (4, "")
        assert len(err.splitlines()) == 1

    def test_where_pytorch_does_not_fit_the_memory(self, bench, monkeypatch):
        free = 85_000_000  # what the engine needs, but not three times as much
        monkeypatch.setattr(bench_job, "available_bytes", lambda: free)
        line = "--shape 48 48 48 --backend openvino --repeats 1"
        code, out, err = bench(BUNDLED_MODEL, f"{line} --json")
        assert code == 0
        assert "note: PyTorch does not fit the memory at this shape" in err
        assert json.loads(out)["rows"][0]["accuracy"] is None
        code, _, err = bench(BUNDLED_MODEL, f"{line} --against torch")
        assert code == 6
        assert "PyTorch would need about " in err

    def test_sizes_that_another_network_does_not_divide(self, bench, tiny_model):
        code, _, err = bench(BUNDLED_MODEL, f"--shape 28 28 28 --against {tiny_model}")
        assert code == 2
        assert "tiny.onnx takes multiples of 8, not 28x28x28" in err


def test_spread_is_of_the_values():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_errors_count_in_the_mask_only():
    reference = np.zeros((4, 4, 4), dtype=np.float32)
    chi = reference.copy()
    chi[0, 0, 0], chi[1, 1, 1] = 5.0, 0.002
    mask = np.ones(chi.shape, dtype=bool)
    mask[0, 0, 0] = False
    found = difference(chi, reference, mask)
    assert found["max_ppb"] == pytest.approx(2.0)
    assert found["p999_ppb"] < 2.0
