"""Networks of users: what is stated, what is read and measured, and what is refused."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qsm_deploy.export as export
from qsm_deploy.export import write_network
from qsm_deploy.export.cli import main
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.own.assembly import network_from_module
from qsm_deploy.export.own.card_file import Stated, stated_in
from qsm_deploy.export.own.probing import NO_END, NOT_ALIKE
from qsm_deploy.kernels.errors import DataError, ExportError, QsmDeployError, UsageError
from qsm_deploy.runtime.card.card import ReceptiveField, Tiles, parse_card
from qsm_deploy.runtime.sessions.open import open_session

CARD = {
    "network": "mine",
    "outputs": ["chi_ppm"],
    "geometry": {"voxel_size_mm": "any", "b0_direction": "any"},
    "normalisation": {
        "local_field_ppm": {"mean": 0.01, "std": 0.02, "masked": True},
        "chi_ppm": {"mean": -0.03, "std": 0.05},
    },
}
FILE = """
import torch
from torch import nn
import beside

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3, padding=beside.PADDING)
        self.last = nn.Conv3d(4, 1, 1)
        self.drop = nn.Dropout(0.5)
    def forward(self, local_field_ppm):
        return self.last(torch.relu(self.drop(self.conv(local_field_ppm))))

def build():
    torch.manual_seed(0)
    return Net()

def needs(width): return Net()
def number(): return 3
def fails(): raise RuntimeError("no such luck\\nand more")
class Ends(BaseException): pass
class Mute(Exception):
    def __str__(self): raise ValueError("no words")
def ends(): raise Ends("at the end")
def mute(): raise Mute
def stops(): raise KeyboardInterrupt
"""


class Pooled(nn.Module):
    """Pools and unpools by a factor, and looks one voxel farther."""

    def __init__(self, factor: int = 2, inputs: int = 1, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv3d(inputs, 4, 3, padding=1)
        self.pool = nn.MaxPool3d(factor)
        self.up = nn.ConvTranspose3d(4, 4, factor, stride=factor)
        self.last = nn.Conv3d(8, outputs, 1)

    def forward(self, local_field_ppm: Tensor) -> Tensor:
        v = torch.relu(self.first(local_field_ppm))
        out: Tensor = self.last(torch.cat([v, self.up(self.pool(v))], dim=1))
        return out


class Function(nn.Module):
    """Whatever a function makes of the volume."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, local_field_ppm: Tensor) -> Tensor:
        return self.function(local_field_ppm)


class Separating(nn.Module):
    """Three channels in an order of their own, and the mask, to two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled(2, 3, 2)

    def forward(self, stacked: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(stacked) * mask
        return y[:, :1], y[:, 1:]


def test_a_pipe_is_no_card(tmp_path) -> None:
    os.mkfifo(tmp_path / "card.toml")
    with pytest.raises(DataError, match="no regular file"):
        stated_in(tmp_path / "card.toml")


def stated(**fields) -> Stated:
    return stated_in(CARD | fields)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, quick) -> None:
    monkeypatch.setattr("qsm_deploy.export.measure.verification.SHAPES", ((24, 20, 22),))
    monkeypatch.setattr("qsm_deploy.export.measure.rounding.HEAD", (48, 48, 48))
    monkeypatch.setattr("qsm_deploy.export.measure.rounding.CORNER", (8, 8, 8))
    monkeypatch.setattr("qsm_deploy.export.measure.rounding.SHAPE", (32, 32, 32))
    monkeypatch.setattr(
        write_network, "measure_receptive_field", lambda m, c: ReceptiveField(m.reach, 1, 0.999)
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("PADDING = 1\n")
    (tmp_path / "card.toml").write_text(
        'network = "mine"\noutputs = ["chi_ppm"]\n[geometry]\nvoxel_size_mm = [1, 1, 1]\n'
        'voxel_tolerance = 0.1\nb0_direction = "any"\n[normalisation]\n'
        "local_field_ppm = {mean = 0.0, std = 0.02, masked = true}\n"
        "chi_ppm = {mean = 0.0, std = 0.05}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestWhatIsReadAndMeasured:
    @pytest.mark.parametrize("factor", [1, 2, 3, 4, 6, 16])
    def test_the_divisor_is_the_smallest(self, factor: int) -> None:
        network = network_from_module(Pooled(factor), stated(why_whole="a test"))
        assert network.divisor == factor

    def test_padding_by_reflection_is_none_of_the_divisor(self) -> None:
        module = Pooled(16)
        module.up = nn.Sequential(
            nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Upsample(scale_factor=16)
        )
        network = network_from_module(module, stated())
        assert (network.divisor, network.why_whole) == (16, None)

    def test_inputs_and_reach(self) -> None:
        network = network_from_module(Pooled(4), stated())
        assert [tensor.name for tensor in network.inputs] == ["local_field_ppm", "mask"]
        assert (network.why_whole, network.reach) == (None, 4)

    def test_no_end_of_the_receptive_field_means_the_whole_volume(self) -> None:
        module = Function(lambda v: v - v.mean(dim=(2, 3, 4), keepdim=True))
        network = network_from_module(module, stated())
        assert (network.why_whole, network.reach, network.divisor) == (NO_END, None, 1)

    def test_a_reach_along_one_axis_alone_counts(self) -> None:
        torch.manual_seed(0)
        along_z = nn.Conv3d(1, 1, (1, 1, 9), padding=(0, 0, 4))
        assert network_from_module(Function(along_z), stated()).reach == 4

    def test_one_that_depends_on_the_place_means_the_whole_volume(self) -> None:
        def resized(v: Tensor) -> Tensor:
            half = functional.avg_pool3d(v, 2, ceil_mode=True)
            return functional.interpolate(
                half, size=v.shape[2:], mode="trilinear", align_corners=True
            )

        assert network_from_module(Function(resized), stated()).why_whole == NOT_ALIKE

    def test_patches_keep_to_the_pooling_grid_of_what_runs_at_every_size(self) -> None:
        def pooled(v: Tensor) -> Tensor:
            return functional.interpolate(
                functional.max_pool3d(v, 4, ceil_mode=True), scale_factor=4
            )[:, :, : v.shape[2], : v.shape[3], : v.shape[4]]

        said: list[str] = []
        network = network_from_module(Function(pooled), stated(), said.append)
        assert (network.divisor, network.why_whole) == (4, None)
        assert "multiples of 4, though 1 would run" in " ".join(said)

    def test_training_mode_ends_and_is_told(self) -> None:
        said: list[str] = []
        network = network_from_module(Pooled().train(), stated(), said.append)
        assert not any(part.training for part in network.modules())
        assert "evaluation mode" in said[0]

    def test_everything_of_a_network_is_read_from_it(self) -> None:
        module = IR2QSM((2, 4), iterations=2).train()
        assert network_from_module(module, stated_in({"network": "a"})) is module
        assert not module.training
        with pytest.raises(UsageError, match="outputs is read off the Network"):
            network_from_module(module, stated_in({"outputs": ["chi_ppm"]}))


def test_the_normalisation_is_in_the_graph() -> None:
    network = network_from_module(Pooled(2), stated(why_whole="a test"))
    field, mask = torch.randn(1, 1, 4, 6, 8) * 0.02, torch.rand(1, 1, 4, 6, 8).round()
    expected = -0.03 + 0.05 * Pooled(2)((field - 0.01) / 0.02 * mask)
    assert torch.allclose(network(field, mask), expected, atol=1e-7)


def test_stacked_channels_and_several_outputs() -> None:
    names = ["chi_ppm", "local_field_ppm", "r2prime_hz"]
    scales = {name: {"mean": 0.1 * i, "std": 1.0 + i} for i, name in enumerate(names)}
    gives = {"chi_positive_ppm": {"mean": 0.5, "std": 2, "at_least": 0}, "chi_negative_ppm": "none"}
    card = stated(
        inputs=[names, "mask"], outputs=list(gives), normalisation=scales | gives, why_whole="so"
    )
    network = network_from_module(Separating(), card)
    taken = [tensor.name for tensor in network.inputs]
    assert taken == ["local_field_ppm", "chi_ppm", "r2prime_hz", "mask"]
    maps = {name: torch.randn(1, 1, 4, 6, 8) for name in taken}
    z = [(maps[name] - 0.1 * i) / (1 + i) for i, name in enumerate(names)]
    y = Separating()(torch.cat(z, dim=1), maps["mask"])
    positive, negative = network(*(maps[name] for name in taken))
    assert torch.allclose(positive, (y[0] * 2 + 0.5).clamp(min=0), atol=1e-6)
    assert torch.allclose(negative, y[1], atol=1e-6)
    assert [t.name for t in (network.output, *network.further_outputs)] == list(gives)


class TestWhatIsRefused:
    def test_all_that_is_missing_is_one_message(self) -> None:
        class Unnamed(Pooled):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)

        with pytest.raises(UsageError) as caught:
            network_from_module(Unnamed(), stated_in(None))
        message = str(caught.value)
        assert "\n" not in message
        for part in ("inputs = [", "outputs = [", "voxel_size_mm = [", 'normalisation = "none"'):
            assert part in message
        with pytest.raises(UsageError) as caught:
            network_from_module(Pooled(), stated_in(None))
        assert "inputs = [" not in str(caught.value)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"colour": 1}, "unknown field colour"),
            ({"network": "ir2qsm"}, "called ir2qsm already"),
            ({"network": "a/b"}, "as files get it"),
            ({"inputs": "local_field_ppm"}, "a list of names"),
            ({"inputs": ["magnitude"]}, "'magnitude', expected names out of local_field_ppm"),
            ({"inputs": ["mask", "mask"]}, "each name once"),
            ({"outputs": "chi_ppm"}, "a list of names"),
            ({"outputs": []}, "a list of names"),
            ({"geometry": {"voxel_size_mm": "any"}}, "geometry has no b0_direction"),
            ({"geometry": {"voxel_size_mm": [1, 1], "b0_direction": "any"}}, "three numbers"),
            ({"geometry": {"voxel_size_mm": [1, 1, 1], "b0_direction": "any"}}, "voxel_tolerance"),
            ({"normalisation": "z"}, '"none", or a table'),
            ({"normalisation": {"chi_ppm": {"mean": 0}}}, "std is None, expected a number"),
            ({"normalisation": {"chi_ppm": {"mean": 0, "std": 0}}}, "a positive number"),
            ({"normalisation": {"chi_ppm": {"mean": 0, "sd": 1}}}, "unknown field"),
            ({"divisor": 2.5}, "a whole number"),
            ({"axes": "XYZ"}, "axes"),
            ({"pad_front": "left"}, '"ceil" or "floor" or "none"'),
            ({"constants": {"phase_sign": 2}}, "1 or -1"),
            ({"constants": {"echo": 2}}, "unknown field constants.echo"),
            ({"tiles": {"size": [8, 8, 8]}}, "tiles.beyond"),
        ],
    )
    def test_a_card_that_says_nonsense(self, fields, message: str) -> None:
        with pytest.raises(UsageError) as caught:
            stated(**fields)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("module", "fields", "message"),
        [
            (Pooled(), {"inputs": ["local_field_ppm", "mask"]}, "forward takes 1"),
            (Pooled(), {"outputs": ["chi_positive_ppm"]}, "chi_positive_ppm"),
            (Pooled(), {"inputs": ["mask"]}, "nothing runs a network"),
            (Pooled(1, 1, 2), {}, r"returns \(1, 2, .*expected \(n, 1"),
            (Pooled(), {"divisor": 3}, "divisor 3"),
            (Pooled(), {"normalisation": {"chi_ppm": "none"}}, "says nothing of local_field_ppm"),
            (
                Function(lambda v: v[:, :, 1:-1]),
                {},
                "48x80x112 .* output of 46x80x112",
            ),
            (Function(lambda v: 1 / 0), {}, "division by zero"),
            (
                Pooled(4),
                {
                    "tiles": {
                        "size": [6, 8, 8],
                        "kept": [6, 8, 8],
                        "stride": [6, 8, 8],
                        "beyond": "zero",
                        "blend": "none",
                    }
                },
                "no multiples of the divisor 4",
            ),
        ],
    )
    def test_a_module_that_is_not_what_is_stated(self, module, fields, message: str) -> None:
        with pytest.raises((UsageError, ExportError), match=message):
            network_from_module(module, stated(**fields))

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--module", "net.py"], 2, "net.py:build"),
            (["--module", "none.py:build"], 2, "there is no file none.py"),
            (["--module", "no.such:build"], 2, "ModuleNotFoundError"),
            (["--module", "net.py:other"], 2, "has no function other"),
            (
                ["--module", "net.py:needs"],
                2,
                "needs() needs width; name a function without arguments",
            ),
            (["--module", "net.py:number"], 2, "returned a int"),
            (["--module", "net.py:fails"], 2, "no such luck (net.py, line"),
            (["--module", "net.py:ends"], 2, "ends() fails: Ends: at the end (net.py, line"),
            (["--module", "net.py:mute"], 2, "mute() fails: Mute: (net.py, line"),
            (["--module", "net.py:stops"], 130, "interrupted"),
            (["--module", "broken.py:build"], 2, "cannot be imported: SyntaxError"),
            (["--module", "net.py:build", "--card", "none.toml"], 2, "cannot be read"),
            (["--module", "net.py:build", "--card", "net.py"], 2, "no TOML"),
            (["--module", "net.py:build"], 2, "geometry"),
            (["--module", "ir2qsm.py:build"], 2, 'network = "my-ir2qsm"'),
            (["--module", "net.py:build", "--weights", "none.pth"], 7, "no such file"),
            (["--module", "net.py:build", "--weights", "other.pth"], 7, "lack"),
            (["--module", "net.py:build", "--form", "split"], 2, "--form is for"),
            (["--model", "ir2qsm", "--card", "card.toml"], 2, "--card is for"),
            (["--card", "card.toml"], 2, "--module"),
        ],
    )
    def test_one_line_each(self, folder: Path, capsys, arguments, code, message) -> None:
        (folder / "ir2qsm.py").write_text(FILE)
        (folder / "broken.py").write_text("def build(:\n")
        torch.save(Pooled().state_dict(), folder / "other.pth")
        before = sorted(folder.rglob("*.onnx"))
        card = [] if "--card" in arguments or len(arguments) == 2 else ["--card", "card.toml"]
        assert main([*arguments, *(card if "--module" in arguments else []), "-q"]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert message in err
        assert sorted(folder.rglob("*.onnx")) == before

    def test_two_of_them(self, capsys) -> None:
        with pytest.raises(SystemExit):
            main(["--module", "net.py:build", "--model", "ir2qsm"])
        assert "not allowed with" in capsys.readouterr().err


@pytest.mark.usefixtures("fast")
class TestWhole:
    def test_from_file_to_file(self, folder: Path, capsys) -> None:
        from qsm_deploy.export.own.user_module import built_module

        module, _ = built_module("net.py:build")
        weights = {key: value + 0.1 for key, value in module.state_dict().items()}
        torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, "w.pth")
        arguments = ["--module", "net.py:build", "--card", "card.toml", "--weights", "w.pth"]
        assert main([*arguments, "--json"]) == 0
        out, err = capsys.readouterr()
        assert "divisor 1" in err
        result = json.loads(out)
        assert result["file"] == "mine-fp32.onnx"
        card = parse_card(Path("mine-fp32.json").read_text())
        assert (card.network, card.patchable, card.licence) == ("mine", "yes", "not stated")
        assert card.geometry.voxel_size_mm == (1, 1, 1)
        assert card.geometry.b0_direction is None
        assert card.normalisation["local_field_ppm_std"] == 0.02
        assert card.receptive_field.theoretical == 1
        module.load_state_dict(weights)
        field = np.random.default_rng(0).standard_normal((1, 1, 7, 8, 9)).astype(np.float32)
        ones = np.ones_like(field)
        got = open_session(Path("mine-fp32.onnx"), "onnxruntime").run(
            {"local_field_ppm": field, "mask": ones}
        )
        with torch.inference_mode():
            expected = 0.05 * module.eval()(torch.from_numpy(field / np.float32(0.02))).numpy()
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()

    def test_from_python_in_half_precision(self, tmp_path: Path) -> None:
        exported = export.export_module(
            Pooled(2), CARD, output=tmp_path / "a.onnx", precision="fp16", gate_ppb=1000
        )
        assert (exported.card.precision, exported.card.divisor) == ("fp16", 2)
        with pytest.raises(UsageError, match="no option form"):
            export.export_module(Pooled(2), CARD, form="split")

    def test_a_dotted_name_and_the_weights_it_was_built_with(
        self, folder: Path, monkeypatch, capsys
    ) -> None:
        monkeypatch.delitem(sys.modules, "net", raising=False)
        assert main(["--module", "net:build", "--card", "card.toml", "-o", "a.onnx"]) == 0
        assert "no --weights: taking those" in capsys.readouterr().err
        monkeypatch.delitem(sys.modules, "net")

    def test_the_module_itself_is_left_as_it_is(self, tmp_path: Path) -> None:
        module = Pooled(2).train()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        state = {key: value + 1 for key, value in before.items()}
        torch.save(state, tmp_path / "w.pth")
        export.export_module(
            module, CARD, weights=tmp_path / "w.pth", output=tmp_path / "a.onnx", gate_ppb=1000
        )
        assert module.training
        assert all(p.requires_grad for p in module.parameters())
        assert all(torch.equal(value, before[k]) for k, value in module.state_dict().items())

    def test_a_module_that_half_of_the_world_cannot_load_stays_unwritten(self, tmp_path) -> None:
        with pytest.raises(QsmDeployError):
            export.export_module(
                Function(lambda v: v if v.sum() > 0 else -v),
                CARD | {"why_whole": "a test"},
                output=tmp_path / "a.onnx",
            )
        assert list(tmp_path.iterdir()) == []


def test_tiles_are_kept() -> None:
    tile = {"size": [8, 8, 8], "kept": [8, 8, 8], "stride": [6, 6, 6]}
    card = stated(tiles=tile | {"beyond": "edge", "blend": "mean"})
    network = network_from_module(Pooled(2), card)
    assert network.tiles == Tiles((8, 8, 8), (8, 8, 8), (6, 6, 6), "edge", "mean")
    assert (network.only_tiles, network.divisor) == (False, 2)
    assert "blocks of 8x8x8" in str(network.why_whole)
    assert replace(card, tiles=None) != card
