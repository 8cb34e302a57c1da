"""The files of containers, Kubernetes and SLURM: what they name exists, and they agree."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from qsm_deploy.runtime.cohort.sharding import Shard, shard_from
from qsm_deploy.runtime.job.arguments import parser

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CONTAINERS = EXAMPLES / "containers"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGED = [*PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]]
# the first keeps what was built in the checkout out of the package
OF_THE_BUILD = [".gitignore", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"]
DOCKERFILES = ("Dockerfile", "Dockerfile.gpu")


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, each with what it says."""
    lines = (CONTAINERS / name).read_text().replace("\\\n", " ").splitlines()
    split = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    return [(word, " ".join(rest.split())) for word, rest in split]


def sections(name: str) -> dict[str, list[str]]:
    """Return the lines of each section of an Apptainer definition; "" is its head."""
    found: dict[str, list[str]] = {"": []}
    for line in (CONTAINERS / name).read_text().splitlines():
        if line.startswith("%"):
            found[section := line[1:]] = []
        elif line and not line.startswith("#"):
            found[section if len(found) > 1 else ""].append(line.strip())
    return found


def extras_of(command: str) -> set[str]:
    """Return the extras with which a command line installs this package."""
    [named] = re.findall(r'-c (?:/src/)?constraints\.txt "/src\[([^\]]+)\]"', command)
    return {*named.split(",")}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_has_the_checkout_and_its_extras_and_no_root(name: str) -> None:
    said = instructions(name)
    copied = [shlex.split(rest)[:-1] for word, rest in said if word == "COPY"]
    sources = [path for paths in copied if "--from=build" not in paths for path in paths]
    assert sorted(sources) == sorted(OF_THE_BUILD + PACKAGED)
    assert all((ROOT / path).exists() for path in sources)
    arguments = dict(rest.split("=") for word, rest in said if word == "ARG")
    [command] = [rest for word, rest in said if word == "RUN" and "constraints.txt" in rest]
    for argument, value in arguments.items():
        command = command.replace(f"${argument}", value)
    known = PROJECT["project"]["optional-dependencies"]
    assert extras_of(command) <= known.keys()
    groups = re.findall(r"--group (\w+)", command)
    assert {*groups} <= PROJECT["dependency-groups"].keys()
    last = said[[n for n, (word, _) in enumerate(said) if word == "FROM"][-1] :]
    user, entry = (dict(last)[word] for word in ("USER", "ENTRYPOINT"))
    assert [int(number) > 0 for number in user.split(":")] == [True, True]
    assert yaml.safe_load(entry)[0] in PROJECT["project"]["scripts"]


def test_both_forms_of_the_image_for_cpus_are_one() -> None:
    said, definition = instructions("Dockerfile"), sections("qsm-deploy.def")
    [base] = {rest.removesuffix(" AS build") for word, rest in said if word == "FROM"}
    assert definition[""] == ["Bootstrap: docker", f"From: {base}"]
    assert base.startswith("python:3.11")  # whose versions constraints.txt has
    copied = dict(line.split() for line in definition["files"])
    assert copied == {name: f"/src/{name}" for name in OF_THE_BUILD + PACKAGED}
    [extras] = [rest.removeprefix("EXTRAS=") for word, rest in said if word == "ARG"]
    assert extras_of("\n".join(definition["post"])) == {*extras.split(",")}


def test_every_pod_has_a_shard_and_every_shard_a_pod() -> None:
    job: dict[str, Any] = yaml.safe_load((EXAMPLES / "kubernetes/job.yaml").read_text())
    [container] = job["spec"]["template"]["spec"]["containers"]
    given = parser().parse_args(container["args"])
    count = job["spec"]["completions"]
    shards = [
        shard_from(given.shard, {"JOB_COMPLETION_INDEX": str(index)}) for index in range(count)
    ]
    assert shards == [Shard(number, count) for number in range(1, count + 1)]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {str(given.bids), "/tmp"}
    environment = dict(rest.split("=", 1) for w, rest in instructions("Dockerfile") if w == "ENV")
    assert environment["PATH"].endswith("HOME=/tmp")  # what else is written lies in a volume


def test_the_example_of_a_cluster_is_toml() -> None:
    said = tomllib.loads((EXAMPLES / "slurm/cluster.toml").read_text())
    assert said.keys() == {
        *("queue", "account", "walltime", "cores", "memory", "gpus", "jobs_min", "jobs_max"),
        *("interface", "prologue", "directives_extra"),
    }
