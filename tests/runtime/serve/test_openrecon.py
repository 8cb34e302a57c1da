"""The inputs of an OpenRecon package, and a label that breaks the schema in every way."""

import base64
import copy
import json
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.serve.cli import main
from qsm_deploy.runtime.serve.openrecon.label import LABEL_NAME, encoded_label, openrecon_label
from qsm_deploy.runtime.serve.openrecon.schema import label_faults
from qsm_deploy.runtime.serve.parameters import parameters_from
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL

FILES = {
    "Dockerfile", "OpenReconLabel.json", "README.md", "label.base64", "package.sh", "start.sh",
}  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openrecon") / "package"
    assert main(["--openrecon", str(folder)]) == 0
    return folder


@pytest.fixture
def label():
    return openrecon_label("1.2.3", "tv-unet")


def test_all_files_and_their_names(package, capsys):
    assert {path.name for path in package.iterdir()} == FILES
    script = (package / "package.sh").read_text()
    assert "openrecon_qsmdeploy_qsm:v0.1.0" in script
    assert "OpenRecon_qsmdeploy_qsm_V0.1.0.zip" in script
    assert "manual is yours to write" in (package / "README.md").read_text()


@pytest.mark.parametrize("method", ["tv", "tv-unet"])
def test_the_image_runs_what_was_named(package, tmp_path, method):
    if method != "tv":
        package = tmp_path / "package"
        assert main(["--openrecon", str(package), "--method", method]) == 0
    there, started = {"model.onnx"} & {path.name for path in package.iterdir()}, "--method tv"
    if method == "tv-unet":
        assert there
        assert (package / "model.onnx").read_bytes() == BUNDLED_MODEL.read_bytes()
        started = "/opt/model.onnx"
    files = " ".join([*there, "start.sh"])
    assert f"COPY {files} /opt/" in (package / "Dockerfile").read_text()
    assert f"exec qsm-serve {started} --host" in (package / "start.sh").read_text()
    content = json.loads((package / "OpenReconLabel.json").read_text())
    named = next(p for p in content["parameters"] if p["id"] == "method")
    assert named["information"]["en"] == f"Makes the map; auto is {method}."
    assert named["default"] == "auto"


def test_a_plan_stays_one(tmp_path, card, write_plan):
    plan, package = write_plan(card), tmp_path / "package"
    assert main(["--openrecon", str(package), str(plan), "--device", "cpu"]) == 0
    assert (package / "model.plan").read_bytes() == plan.read_bytes()
    assert "COPY model.plan start.sh /opt/" in (package / "Dockerfile").read_text()
    assert "exec qsm-serve /opt/model.plan --host" in (package / "start.sh").read_text()


def test_the_label_is_the_json_everywhere(package):
    content = json.loads((package / "OpenReconLabel.json").read_text())
    encoded = (package / "label.base64").read_text()
    assert json.loads(base64.b64decode(encoded)) == content
    assert f'LABEL "{LABEL_NAME}"="{encoded}"' in (package / "Dockerfile").read_text()
    assert list(label_faults(content)) == []


def test_the_server_takes_the_defaults_of_the_label(label):
    values = {p["id"]: str(p["default"]) for p in label["parameters"]}
    parameters = parameters_from(values)
    assert (parameters.config, parameters.unknown) == ("qsm", ())
    for parameter in label["parameters"]:
        for value in parameter.get("values", []):
            parameters_from({parameter["id"]: value["id"]})


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
def test_the_script_zips_the_image_with_its_manual(package, tmp_path):
    """With stand-ins for docker and pip: what is run on what, and what is in the archive."""
    folder = tmp_path / "copy"
    shutil.copytree(package, folder)
    tools = tmp_path / "tools"
    tools.mkdir()
    docker = '#!/bin/sh\necho "$@" >> ../calls\n[ "$1" = save ] && echo image > "$3"\nexit 0\n'
    python = '#!/bin/sh\n[ "$2" = pip ] && { echo "$@" >> ../calls; exit 0; }\nexec python "$@"\n'
    for name, text in (("docker", docker), ("python3", python)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    manual = tmp_path / "manual.pdf"
    manual.write_bytes(b"%PDF-1.7\n")
    source = Path(__file__).parents[3]

    def run(*arguments):
        from os import environ, pathsep

        path = f"{tools}{pathsep}{environ['PATH']}"
        command = ["sh", str(folder / "package.sh"), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env={**environ, "PATH": path}, cwd=tmp_path
        )

    assert run(source).returncode == 2
    assert run(source, __file__).returncode == 3  # no PDF
    done = run(source, manual)
    assert done.returncode == 0, done.stderr
    base = "OpenRecon_qsmdeploy_qsm_V0.1.0"
    assert done.stdout.splitlines()[-1] == f"{base}.zip"
    import zipfile

    with zipfile.ZipFile(folder / f"{base}.zip") as archive:
        assert {i.filename: i.compress_type for i in archive.infolist()} == {
            f"{base}.tar": zipfile.ZIP_DEFLATED,
            f"{base}.pdf": zipfile.ZIP_DEFLATED,
        }
    calls = (tmp_path / "calls").read_text()
    assert re.search(r"build --platform linux/amd64 --tag openrecon_qsmdeploy_qsm:v0.1.0 \.", calls)
    assert f"pip wheel --no-deps --wheel-dir wheels {source}" in calls


def test_existing_files_stay(package, capsys):
    assert main(["--openrecon", str(package)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert main(["--openrecon", str(package), "--force"]) == 0


def test_a_network_that_the_server_refuses(tmp_path, capsys):
    assert main([str(tmp_path / "no.onnx"), "--openrecon", str(tmp_path / "package")]) == 3
    assert not (tmp_path / "package").exists()


def a_parameter(**fields):
    return {"id": "a", "label": {"en": "a"}, **fields}


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("general",), None, "general is missing"),
        (("more",), 1, "more is unknown"),
        (("general", "version"), "1.2", "not major.minor.patch"),
        (("general", "version"), "01.2.3", "not major.minor.patch"),
        (("general", "name"), {"de": "x"}, "general.name.en is no text"),
        (("general", "vendor"), 3, "general.vendor is no text"),
        (("general", "regulatory_information", "gtin"), None, "regulatory_information"),
        (("general", "regulatory_information", "gtin"), 5, "not all text"),
        (("reconstruction", "transfer_protocol", "version"), "2.0", "transfer_protocol"),
        (("reconstruction", "emitter"), "images", "emitter is 'images', not one of raw, image"),
        (("reconstruction", "injector"), None, "reconstruction.injector is missing"),
        (("reconstruction", "min_count_required_cpu_cores"), 0, "not a whole number from 1"),
        (("reconstruction", "min_required_memory"), "8192", "not a whole number"),
        (("reconstruction", "port"), True, "not a whole number"),
        (("reconstruction", "can_use_gpu"), "no", "not true or false"),
        (("reconstruction", "gpus"), 1, "reconstruction.gpus is unknown"),
        (("parameters",), {}, "parameters is missing"),
        (("parameters", 0), 1, "a parameter is no object"),
        (("parameters", 0, "id"), "other", "one parameter config of type choice"),
        (("parameters", 1, "id"), "config", "two parameters of the same id"),
        (("parameters", 1, "id"), "send_original", "not of letters and digits"),
        (("parameters", 0, "default"), "dipole", "not among its values"),
        (("parameters", 0, "values"), [{"id": "qsm"}], "not among its values"),
        (("parameters", 1, "default"), "True", "sendoriginal.default 'True' is not true or false"),
        (("parameters", 1, "label"), "x", "sendoriginal.label.en"),
        (("parameters", 1, "type"), "bool", "sendoriginal.type is 'bool'"),
        (("parameters", 1, "minimum"), 1, "sendoriginal.minimum is unknown"),
        (("parameters", 1, "default"), None, "sendoriginal.default is missing"),
        (("parameters", 1), a_parameter(type="int", default=3, minimum=4, maximum=5), "4 to 5"),
        (("parameters", 1), a_parameter(type="int", default=3, minimum=1), "maximum is missing"),
        (("parameters", 1), a_parameter(type="int", default=3.5, minimum=1, maximum=5), "3.5"),
        (
            ("parameters", 1),
            a_parameter(type="double", default=0.25, minimum=0.0, maximum=1.0),
            "steps of 0.1",
        ),
        (
            ("parameters", 1),
            a_parameter(type="int", default=3, minimum=1, maximum=5, unit={"en": "seconds"}),
            "one to three letters",
        ),
        (("parameters", 1), a_parameter(type="string", default=1), "a.default 1 is no text"),
    ],
)
def test_labels_that_break_a_rule(label, path, value, match):
    broken = copy.deepcopy(label)
    where = broken
    for key in path[:-1]:
        where = where[key]
    if value is None:
        del where[path[-1]]
    else:
        where[path[-1]] = value
    with pytest.raises(UsageError, match=f"breaks the schema: .*{match}"):
        encoded_label(broken)


def test_too_many_parameters(label):
    more = [a_parameter(type="string", default="") | {"id": f"a{n}"} for n in range(12)]
    label["parameters"] += more[:9]
    assert list(label_faults(label)) == []
    label["parameters"] += more[9:]
    assert list(label_faults(label)) == ["17 parameters, at most 14 are allowed"]
