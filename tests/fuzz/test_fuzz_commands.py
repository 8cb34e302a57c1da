"""Damaged files through the commands: the exit code of their kind and a line, never a trace."""

import json
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qsm_deploy.export import cli as export_cli
from qsm_deploy.export import write_network
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet
from qsm_deploy.runtime import cli as run_cli
from qsm_deploy.runtime.card.card import METADATA_KEY, MemoryUse, ReceptiveField
from qsm_deploy.runtime.card.plan_file import FORM, PROMISE, plan_bytes
from qsm_deploy.runtime.cohort.pages import SUMMARY
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from tests.fuzz.damage import damaged, damaged_json

pytestmark = pytest.mark.slow

SHAPE = (16, 18, 14)
LONGEST_S = 60
Outcome = tuple[int, dict[str, bytes], str]
MAIN = {"qsm-run": run_cli.main, "qsm-export": export_cli.main}
JOBS = 'cores = 1\nmemory = "2G"\njobs_max = 2\nprologue = ["module load python"]\n'
TOML_VALUE = re.compile(r"(?<== ).*")
TOML_STRANGE = (
    *("0", "-1", "1e400", "nan", '""', '"x"', '"\\u0000"', "[]", "{}", "true", "1979-05-27"),
    *("9" * 400, "[" * 3000 + "]" * 3000, '["x", 1]', "{a = 1}", '"1e9G"', '"' + "9" * 400 + 'G"'),
)


@dataclass(frozen=True)
class Kind:
    """Files that a command reads.

    Attributes
    ----------
    damaged
        Their names, or patterns of them.
    words
        The command line.
    codes
        The exit codes that damage may come to.
    tries
        How many.
    may_differ
        Files whose content damage may change where it is not refused, as patterns of names: of
        all that is computed from what was damaged.
    """

    damaged: str
    words: str
    codes: frozenset[int]
    tries: int
    may_differ: str


def kind(
    damaged: str, words: str, *codes: int, tries: int, may_differ: str = "stdout out/*"
) -> Kind:
    return Kind(damaged, words, frozenset({0, *codes}), tries, may_differ)


RUN = "qsm-run -q --force -o out/chi.nii.gz"
COHORT = "qsm-run -q --method tkd --bids study"
KINDS = {
    "fields and masks": kind(
        "field.nii.gz mask.nii.gz",
        f"{RUN} --method tkd field.nii.gz -m mask.nii.gz",
        *(3, 6),
        tries=150,
        may_differ="out/chi.json",  # by the header; a checksum keeps the values
    ),
    "parameters": kind(
        "params.json",
        f"{RUN} --method tkd field_hz.nii.gz --units Hz --params params.json",
        *(2, 3),
        tries=400,
    ),
    "sidecars of echoes": kind(
        "phase*.json magnitude*.json",
        f"{RUN} --method tkd --phase phase1.nii.gz phase2.nii.gz "
        "--magnitude magnitude1.nii.gz magnitude2.nii.gz -m mask.nii.gz",
        *(2, 3),
        tries=100,
    ),
    "models": kind("model.onnx", f"{RUN} model.onnx field.nii.gz", 3, 4, 6, tries=100),
    "plans": kind("model.plan", f"{RUN} --device cpu model.plan field.nii.gz", 4, tries=300),
    "plans, described": kind("model.plan", "qsm-export --describe model.plan", 4, tries=100),
    "checkpoints, described": kind(
        "weights.pth", "qsm-export --describe weights.pth", 7, tries=100
    ),
    "card.toml": kind(
        "card.toml",
        "qsm-export -q --force --onnx bare.onnx --card card.toml -o out/own.onnx",
        *(2, 3, 4, 5),
        tries=60,
    ),
    "weights of an own network": kind(
        "net.pth",
        "qsm-export -q --force --module net.py:build --weights net.pth --card card.toml "
        "-o out/own.onnx",
        *(5, 7),
        tries=60,
    ),
    "outcomes of a cohort": kind(
        "study/derivatives/qsm-deploy/outcomes/*.jsonl",
        f"{COHORT} --status --table out/table.tsv",
        *(2, 3),
        tries=300,
        may_differ="out/table.tsv",
    ),
    "what --resume reads": kind(
        "study/*.json study/derivatives/qsm-deploy/*.* study/derivatives/qsm-deploy/.bidsignore "
        "study/derivatives/qsm-deploy/sub-*/anat/*.json "
        "study/derivatives/qsm-deploy/outcomes/*.jsonl pages/*.html",
        f"{COHORT} --resume --participant-label 01 02 --html pages",
        *(2, 3),
        tries=300,
        may_differ="",
    ),
    "--cluster-config": kind(
        "jobs.toml",
        "qsm-run --bids study --cluster slurm --cluster-config jobs.toml --dry-run",
        2,
        tries=300,
    ),
}


def phantom(folder: Path) -> None:
    """Write a field, its mask, parameters, and two echoes with their sidecars."""
    rng = np.random.default_rng(5)
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:-2, 2:-3, 2:-2] = 1
    x, y, z = (np.linspace(-1, 1, size) for size in SHAPE)
    turn = np.add.outer(np.add.outer(x, y * y), z)
    files = {"field": (0.02 * mask * rng.normal(size=SHAPE)).astype(np.float32), "mask": mask}
    files["field_hz"] = 127.74 * files["field"]
    for echo, time_s in enumerate((0.006, 0.012), 1):
        files[f"phase{echo}"] = np.angle(np.exp(120j * time_s * turn)).astype(np.float32)
        files[f"magnitude{echo}"] = (1.0 + mask).astype(np.float32)
        for name in ("phase", "magnitude"):
            content = {"EchoTime": time_s, "MagneticFieldStrength": 3, "Units": "rad"}
            (folder / f"{name}{echo}.json").write_text(json.dumps(content))
    for name, values in files.items():
        (folder / f"{name}.nii.gz").write_bytes(nifti_bytes(values, np.eye(4)))
    params = {"EchoTime": 0.02, "MagneticFieldStrength": 3.0, "B0_dir": [0, 0, 1]}
    params |= {"voxel_size": [1.0, 1.0, 1.0], "ImagingFrequency": 127.74}
    (folder / "params.json").write_text(json.dumps(params))


def dataset(root: Path, field: bytes, mask: bytes) -> None:
    for subject in ("01", "02"):
        anat = root / f"sub-{subject}" / "anat"
        anat.mkdir(parents=True)
        stem = f"sub-{subject}_localfield"
        (anat / f"{stem}.nii.gz").write_bytes(field)
        (anat / f"{stem}.json").write_text('{"Units": "ppm"}')
        (anat / f"sub-{subject}_mask.nii.gz").write_bytes(mask)
    about = {"Name": "fuzz", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(about))


def bare_model() -> onnx.ModelProto:
    """Return a network of one convolution, as something else wrote it."""
    weights = np.zeros((1, 1, 3, 3, 3), np.float32)
    weights[0, 0, 1, 1, 1], weights[0, 0, 1, 1, 0] = 1, 0.1
    volumes = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, "x", "y", "z"])
        for name in ("field", "chi")
    ]
    node = helper.make_node("Conv", ["field", "w"], ["chi"], pads=[1] * 6)
    initial = [onnx.numpy_helper.from_array(weights, "w")]
    graph = helper.make_graph([node], "own", volumes[:1], volumes[1:], initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


NET = """import torch
def build():
    return torch.nn.Conv3d(1, 1, 3, padding=1)
"""
CARD = """network = "own"
licence = "MIT"
inputs = ["local_field_ppm"]
outputs = ["chi_ppm"]
axes = "RAS"
divisor = 1
normalisation = "none"
[geometry]
voxel_size_mm = [1, 1, 1.0]
voxel_tolerance = 0.1
b0_direction = [0, 0, 1]
b0_tolerance_deg = 2
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with whole files of all kinds."""
    folder = tmp_path_factory.mktemp("whole")
    phantom(folder)
    field, mask = (folder.joinpath(f"{name}.nii.gz").read_bytes() for name in ("field", "mask"))
    dataset(folder / "study", field, mask)
    model = bare_model()
    (folder / "bare.onnx").write_bytes(model.SerializeToString())
    (folder / "jobs.toml").write_text(JOBS)
    (folder / "card.toml").write_text(CARD)
    (folder / "net.py").write_text(NET)
    torch.manual_seed(0)
    state = torch.nn.Conv3d(1, 1, 3, padding=1).state_dict()
    torch.save(state, folder / "net.pth", _use_new_zipfile_serialization=False)  # no checksums
    torch.save(dict(XqsmUnet(base=2).state_dict()), folder / "weights.pth")
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch, card, kept_traces) -> Path:
    """Return a copy of these where they are read, with a model, a plan, and the study's maps."""
    for name in ("measure_memory", "cached_receptive_field"):  # which take seconds
        made = {
            "measure_memory": MemoryUse(1, 2),
            "cached_receptive_field": ReceptiveField(1, 1, 1),
        }
        monkeypatch.setattr(write_network, name, lambda *_, made=made[name]: made)
    monkeypatch.setattr("qsm_deploy.runtime.gpu.open.missing_gpu", lambda: "no NVIDIA driver")
    place = shutil.copytree(whole, tmp_path / "place")
    (place / "out").mkdir()
    monkeypatch.chdir(place)
    model = bare_model()
    model.graph.input[0].name = model.graph.node[0].input[0] = card.inputs[0].name
    model.graph.output[0].name = model.graph.node[0].output[0] = card.output.name
    helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    Path("model.onnx").write_bytes(model.SerializeToString())
    built = {"engine": "tensorrt 11.4.0.106", "gpu": "sm_90", PROMISE: f"{FORM}"}
    engine = b"engine" + replace(card, options=card.options | built).to_json().encode()
    Path("model.plan").write_bytes(plan_bytes(engine, model.SerializeToString()))
    return place


def harmed(path: Path, content: bytes, dice: random.Random) -> bytes:
    """Return a file with damage: of its bytes, or of a value in what it holds."""
    if dice.random() < 0.5 and content:
        return damaged(content, dice)
    text = content.decode(errors="replace")
    if path.suffix == ".json":
        text = damaged_json(json.loads(text), dice)
    elif path.suffix == ".jsonl":
        lines = text.splitlines()
        at = dice.randrange(len(lines))
        lines[at] = damaged_json(json.loads(lines[at]), dice)
        text = "\n".join(lines) + "\n" * dice.randrange(2)
    elif found := SUMMARY.search(text):
        other = damaged_json(json.loads(found[1]), dice)
        text = text[: found.start(1)] + other + text[found.end(1) :]
    elif path.suffix == ".toml":
        found = dice.choice([*TOML_VALUE.finditer(text)])
        text = text[: found.start()] + dice.choice(TOML_STRANGE) + text[found.end() :]
    else:
        return damaged(content or b"x", dice)
    return text.encode(errors="replace")


@contextmanager
def watched() -> Iterator[None]:
    """End what hangs by an interrupt, which is exit code 130."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(capsys) -> Callable[[str], Outcome]:
    """Return what runs a command line: the exit code, what it prints and makes, and its errors."""

    def run_line(words: str) -> Outcome:
        name, *arguments = words.split()
        shutil.rmtree("out")
        Path("out").mkdir()
        with watched():
            code = MAIN[name](arguments)
        out, err = capsys.readouterr()
        paths = [path for path in Path("out").rglob("*") if path.is_file()]
        paths += Path("study/derivatives").rglob("*.nii.gz")
        return code, {"stdout": out.encode()} | {str(p): p.read_bytes() for p in paths}, err

    return run_line


def require_rows(table: bytes, right: bytes, whole: bytes, harmed: bytes) -> None:
    """Check that a table has lost nothing of the recordings whose outcomes are unharmed."""
    for outcome, row in zip(whole.splitlines(), right.splitlines()[1:], strict=True):
        if outcome in harmed.splitlines():
            assert row in table.splitlines(), (table, harmed)


@pytest.mark.parametrize("what", list(KINDS))
@pytest.mark.filterwarnings("ignore::UserWarning")  # what a damaged card makes it say of a scan
def test_a_command_ends_with_the_code_of_its_kind_and_a_line(
    place: Path,
    run: Callable[[str], Outcome],
    note_counts: Callable[..., None],
    what: str,
) -> None:
    kind, dice, counts = KINDS[what], random.Random(what), Counter[str]()
    if "study" in kind.words:
        assert run(f"{COHORT} --html pages")[0] == 0
    code, right, _ = run(kind.words)
    assert code == 0
    name, table = kind.words.split()[0], "out/table.tsv"
    for _ in range(kind.tries):
        paths = sorted(p for pattern in kind.damaged.split() for p in Path().glob(pattern))
        path = dice.choice(paths)
        content = path.read_bytes()
        path.write_bytes(harmed(path, content, dice))
        code, found, err = run(kind.words)
        lines = [line for line in err.splitlines() if line.startswith(f"{name}: error: ")]
        assert code in kind.codes, (path, err)
        assert "Traceback" not in err, err
        if code:
            assert lines or "--status" in kind.words, err
            assert len(lines) <= 1 or "--bids" in kind.words, err
        differ = {p for p in found.keys() | right.keys() if found.get(p) != right.get(p)}
        if not code:
            may = kind.may_differ.split()
            assert all(any(fnmatch(p, pattern) for pattern in may) for p in differ), (path, differ)
        if table in found and path.suffix == ".jsonl":
            require_rows(found[table], right[table], content, path.read_bytes())
        counts["refused" if code else "other" if differ else "same"] += 1
        path.write_bytes(content)
    assert counts["refused"] > kind.tries // 10 or "cohort" in what, counts
    note_counts(f"{name}: {what}", inputs=kind.tries, **counts)
