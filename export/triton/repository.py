"""The folder that Triton serves a reconstruction from."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

from qsm_deploy.export.triton.configuration import (
    inputs_of,
    model_name,
    outputs_of,
    parameters_text,
    tensors_table,
    tensors_text,
)
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.card.read import PLAN, load_card
from qsm_deploy.runtime.console.atomic import check_writable, write_together
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.reconstructor import Host, Maker, models_of, open_reconstructor

SERVED = Path(__file__).with_name("served")
README = "README.md"


@dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes
    ----------
    name
        Of the model, by which clients call it.
    files
        All of them.
    models
        Those that are networks.
    """

    name: str
    files: tuple[Path, ...]
    models: tuple[Path, ...]


def check_repository(folder: Path, *, force: bool) -> None:
    """Refuse a folder that could not be written, before anything takes long.

    Raises
    ------
    UsageError
        If it holds a repository and ``force`` is false.
    DataError
        If it cannot be created or written to.
    """
    check_writable(folder / README if folder.is_dir() else folder, force=force)


def write_repository(folder: Path, maker: Maker, *, force: bool) -> Repository:
    """Write a model repository whose one model is a whole reconstruction.

    Parameters
    ----------
    folder
        Created if need be; its parent must exist. Further models may be added with ``force``.
    maker
        Models, which are copied, a method, or both.
    force
        Whether existing files are replaced.

    Returns
    -------
    Repository
        What was written: all of it, or an error was raised.

    Raises
    ------
    UsageError
        If a file exists and is not to be replaced, or models do not follow each other.
    DataError
        If a folder cannot be created.
    EngineError
        If a model cannot be opened on the CPU, a plan by its graph.
    """
    check_repository(folder, force=force)
    opened = open_reconstructor(maker, Host(device="cpu"))  # or it would fail in the server
    # of a chain the last is what may be a method and need a magnitude
    needs = replace(opened.needs, magnitude=opened.inversion.needs.magnitude)
    paths = models_of(maker)
    parts = [maker] if isinstance(maker, Method) else maker
    methods = [part for part in parts if isinstance(part, Method)]
    networks = [load_card(path).network for path in paths]
    content = {
        f"{n}-{network}{path.suffix}" if paths[1:] else f"{network}{path.suffix}": path.read_bytes()
        for n, (network, path) in enumerate(zip(networks, paths, strict=True), start=1)
    }
    names = [*dict.fromkeys([*networks, *(method.name for method in methods)])]
    name = model_name(names)
    inputs, outputs = inputs_of(needs, methods), outputs_of(needs)
    words = {
        "about": ", ".join(names),
        "field": inputs[0].name,
        "gives": outputs[0].name,
        "inputs": tensors_text(inputs),
        "kind": "KIND_GPU" if any(path.suffix == PLAN for path in paths) else "KIND_CPU",
        "made_by": made_by(),
        "name": name,
        "outputs": tensors_text(outputs),
        "parameters": parameters_text(
            {model: hashlib.sha256(data).hexdigest() for model, data in content.items()}, methods
        ),
        "table": tensors_table(inputs, outputs),
    }
    model = folder / "models" / name
    version = model / "1"
    files = {version / file: data for file, data in content.items()}
    files[version / "model.py"] = (SERVED / "model.py").read_bytes()
    files[folder / "probe.py"] = (SERVED / "probe.py").read_bytes()
    files[folder / "start.sh"] = (SERVED / "start.sh").read_bytes()
    for target in (folder / README, model / "config.pbtxt"):
        template = Template((SERVED / target.name).read_text())
        files[target] = template.substitute(words).encode()
    try:
        folder.mkdir(exist_ok=True)
        version.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {version}: {error.strerror}") from error
    write_together(files, force=force)
    return Repository(name, tuple(files), tuple(version / file for file in content))
