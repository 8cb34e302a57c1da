"""What is installed from where: never by our name, which on an index is somebody else's."""

import re
import subprocess
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BY_NAME = re.compile(r"pip install[^\n]*(?:\\+\n[^\n]*)*[\s'\"]qsm-deploy(?!\[[a-z,-]+\] @)")


def test_nothing_installs_the_bare_name():
    assert BY_NAME.search("pip install 'qsm-deploy[serve]'")
    assert BY_NAME.search("pip install -U qsm-deploy")
    assert BY_NAME.search("RUN pip install --no-cache-dir \\\n    'qsm-deploy[serve]==1'")
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*Dockerfile*", "*.def", "*.sh", "*.yaml", "*.toml",
         "Makefile", "*.ipynb", ".ci/run"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout.split()  # fmt: skip
    found = [
        name
        for name in tracked
        if name != "tests/test_supply_chain.py" and BY_NAME.search((ROOT / name).read_text())
    ]
    assert found == []


def test_the_locked_versions_are_those_that_the_extras_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = project["project"]["dependencies"] + project["build-system"]["requires"]
    for extra in ("cluster", "dicom", "export", "figure", "mask", "openvino", "serve"):
        needed += extras[extra]
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    tested = {r.name: str(r.specifier).removeprefix("==") for r in map(Requirement, lines)}
    required = [r for r in map(Requirement, needed) if not r.marker or r.marker.evaluate()]
    for requirement in required:
        assert requirement.specifier.contains(tested[requirement.name]), requirement


def test_whatever_is_locked_has_hashes_and_nothing_names_an_index():
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", "")
    locked = [line for line in text.splitlines() if not line.startswith("#")]
    form = r"([a-z0-9.-]+==[0-9a-z.]+( ; [^#]+?)?)( +--hash=sha256:[0-9a-f]{64})+"
    versions = [match[1] for line in locked if (match := re.fullmatch(form, line))]
    assert len(versions) == len(locked) > 50
    torch, *lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert f"TORCH ?= {torch}" in (ROOT / "Makefile").read_text()
    assert lines == versions
