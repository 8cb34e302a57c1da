"""From ``path/net.py:build`` or ``package.module:build`` to the module that ``build()`` returns."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn

from qsm_deploy.kernels.errors import UsageError

INSTALLED = "site-packages"  # in the name of a file that is not the user's
EXAMPLE = "--module path/to/net.py:build"


def built_module(given: str) -> tuple[nn.Module, str]:
    """Return what a user's function builds, and the name of its file.

    The file runs as it would by ``python net.py``: its folder, or for a dotted name the current
    one, is where its imports are looked for first.

    Parameters
    ----------
    given
        A file or a dotted name, a colon, and the name of a function without arguments.

    Raises
    ------
    UsageError
        If it is not found, raises something, or returns no module.
    """
    place, colon, name = given.rpartition(":")
    if not (colon and place and name.isidentifier()):
        raise UsageError(f"--module {given}: name file and function, as in {EXAMPLE}")
    is_file = place.endswith(".py") or "/" in place
    path = Path(place)
    if is_file and not path.is_file():
        raise UsageError(f"--module {given}: there is no file {place}")
    with _first_on_path(path.resolve().parent if is_file else Path.cwd()):
        with _one_line(given, "cannot be imported"):
            file = _file_module(path) if is_file else importlib.import_module(place)
        build = getattr(file, name, None)
        if not callable(build):
            raise UsageError(f"--module {given}: {place} has no function {name}")
        needed = [p.name for p in _parameters(build) if p.default is p.empty]
        if needed:
            raise UsageError(
                f"--module {given}: {name}() needs {', '.join(needed)}; name a function without "
                "arguments that builds the module"
            )
        with _one_line(given, f"{name}() fails"):
            module: object = build()
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"--module {given}: {name}() returned a {type(module).__name__}, not a torch.nn.Module"
        )
    return module, path.stem if is_file else place.rpartition(".")[2]


def _parameters(build: Callable[..., object]) -> list[inspect.Parameter]:
    """Return what must be passed, as far as Python knows."""
    try:
        found = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):  # of what is not written in Python
        return []
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _file_module(path: Path) -> ModuleType:
    name = f"_qsm_deploy_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses in it need
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _one_line(given: str, what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into a line that says where."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if f.filename != __file__ and INSTALLED not in f.filename]
        last = (theirs or frames)[-1]
        raise UsageError(
            f"--module {given}: {what}: {type(error).__name__}: {_said(error)} "
            f"({Path(last.filename).name}, line {last.lineno})"
        ) from error


def _said(error: BaseException) -> str:
    """Return the first line of what an error says, which runs code of the user's too."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        lines = []
    return lines[0] if lines else ""
