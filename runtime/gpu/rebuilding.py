"""A plan that does not fit the GPU or the library: its engine is built again from its graph.

What was built stays in a folder of the user's, for the next run. Engines are code for the GPU:
nothing is loaded from a folder or a file that somebody else could have written.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import (
    CardError,
    EngineError,
    MissingDependencyError,
    QsmDeployError,
    UsageError,
)
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.card.graph import require_bounded_graph
from qsm_deploy.runtime.card.plan_file import plan_bytes
from qsm_deploy.runtime.card.read import open_plan
from qsm_deploy.runtime.console.atomic import write_atomically
from qsm_deploy.runtime.console.held import held
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.console.user_cache import cache_folder
from qsm_deploy.runtime.gpu.building.builder import build_plan
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.building.config import plan_target
from qsm_deploy.runtime.gpu.building.profile import profile_from
from qsm_deploy.runtime.gpu.engines.plan_target import OPTIONS, PlanTarget
from qsm_deploy.runtime.gpu.engines.tensorrt import TensorRtSession
from qsm_deploy.runtime.gpu.engines.tensorrt_library import (
    RUNS,
    compute_capabilities,
    installed_engines,
    open_library,
)
from qsm_deploy.runtime.sessions.session import AUTO

if TYPE_CHECKING:
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice

OFF = "off"
MOST_BYTES = 4 * 2**30  # of all plans in the cache
DIGITS = 32  # of a key in a name
OURS = re.compile(rf".+-[0-9a-f]{{{DIGITS}}}\.plan")
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Rebuilding:
    """What builds the engine of a plan again.

    Attributes
    ----------
    path, graph, card
        The plan, the ONNX file in it, and the card of its engine.
    gpu
        What is to run it, this thread's current one.
    cache
        The folder of what was built: ``auto`` for the user's, ``off`` for none.
    log
        Takes what the user must see, and progress.
    """

    path: Path
    graph: bytes
    card: ModelCard
    gpu: "CudaDevice"
    cache: str | os.PathLike[str]
    log: TerminalLog

    def session(self, why: Exception, shapes: str | None = None) -> TensorRtSession:
        """Return an engine for the GPU and the library that are there, built now or before.

        Parameters
        ----------
        why
            What is wrong with the engine of the plan.
        shapes
            ``MIN,OPT,MAX`` that it is to serve, if not those of the plan.

        Raises
        ------
        EngineError
            If it cannot be built or loaded.
        MissingDependencyError
            If no flavour of TensorRT is installed that serves the GPU.
        """
        reason = str(why).partition("; ")[0]
        try:
            require_bounded_graph(self.path)
            session = self._session(reason, shapes)
        except MissingDependencyError:
            raise
        except EngineError as error:
            raise EngineError(f"{reason}, and building it again failed: {error}") from why
        session.rebuild = self.session
        return session

    def _session(self, why: str, shapes: str | None) -> TensorRtSession:
        choices = self._choices(shapes)
        patchable = self.card.patchable != "no"
        try:
            profile = profile_from(choices.shapes, self.card.divisor, patchable=patchable)
        except UsageError as error:
            raise CardError(f"{self.path}: its card has {error}") from error
        target = plan_target(choices)
        asked = {name: v for name, v in self.card.options.items() if name not in OPTIONS}
        card = replace(self.card, options=asked | target.options() | {"shapes": str(profile)})
        with self._alone(self._file(target, str(profile))) as file:
            if file and (found := self._kept(file, card, target)):
                return found
            self.log.warn(f"{why}; building it for {self.gpu.properties} with {target.engine}")
            say = self.log.tell
            data = build_plan(self.graph, card, profile, choices, say).data
            session = TensorRtSession(self.path, data, card, target, self.gpu)
            if file:
                self._keep(file, plan_bytes(data, self.graph))
        return session

    def _choices(self, shapes: str | None) -> PlanChoices:
        """Return what is built for the GPU: in the plan's flavour, if that serves it."""
        gpu = self.gpu.properties
        first = self.card.options["engine"].partition(" ")[0]
        for engine in sorted(installed_engines(), key=lambda flavour: flavour != first):
            try:
                library = open_library(engine, f"{self.path}", RUNS)
            except MissingDependencyError:  # stubs, or what cannot be loaded
                continue
            known = compute_capabilities(library)
            named = ("{}.{}".format(*gpu.capability),) if gpu.capability in known else ()
            if named or not known or gpu.capability > max(known):
                return PlanChoices(
                    engine,
                    shapes or self.card.options.get("shapes"),
                    compute_capability=named,
                    progress=self.log.live,
                    gpu=gpu.number,
                )
        raise MissingDependencyError("TensorRT", "tensorrt", f"{self.path}, to be built for {gpu},")

    def _file(self, target: PlanTarget, shapes: str) -> Path | None:
        """Return where the engine is kept, by everything that it depends on."""
        if self.cache == OFF:
            return None
        gpu = self.gpu.properties
        plan = sha256(self.graph).hexdigest(), self.card.to_json(), shapes
        key = *plan, target.options(), gpu.name, gpu.capability, gpu.driver
        name = sha256(json.dumps(key).encode()).hexdigest()
        folder = cache_folder() / "plans" if self.cache == AUTO else Path(self.cache).expanduser()
        return folder / f"{self.card.network}-{name[:DIGITS]}.plan"

    @contextmanager
    def _alone(self, file: Path | None) -> Iterator[Path | None]:
        """Let one process at a time build a file; ``None`` where none can be kept there."""
        with ExitStack() as stack:
            if file is not None:
                try:
                    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    _require_private(file.parent)
                    lock = file.with_suffix(".lock")
                    if stack.enter_context(held(lock)) is None:
                        self.log.warn(f"{self.path}: another process builds its engine; waiting")
                        stack.enter_context(held(lock, wait=True))
                except PermissionError as error:
                    self.log.warn(f"not using the plan cache {file.parent}: {error}")
                    file = None
                except OSError:  # read-only: what is there may serve
                    pass
            yield file

    def _kept(self, file: Path, card: ModelCard, target: PlanTarget) -> TensorRtSession | None:
        """Return the engine that was built before, if it is there, whole, and this one."""
        if not os.path.lexists(file):
            return None
        try:
            _require_private(file)
            plan, kept = open_plan(file)
            if plan.graph != self.graph or kept != card:
                raise EngineError("it is of another network")
            session = TensorRtSession(self.path, plan.engine, card, target, self.gpu)
        except (OSError, QsmDeployError) as error:
            self.log.warn(f"not using {file}: {error}")
            return None
        with suppress(OSError):
            os.utime(file)  # the oldest goes first
        self.log.tell(f"{self.path}: using {file}, built here before")
        return session

    def _keep(self, file: Path, data: bytes) -> None:
        """Keep what was built, and let the oldest go for it; no room is no error."""
        try:
            _make_room(file.parent, len(data), keep=self.path)
            write_atomically(file, data, force=True)
            file.chmod(0o600)
        except (OSError, QsmDeployError) as error:
            self.log.warn(f"the engine that was built is not kept: {error}")
        else:
            self.log.tell(f"{self.path}: kept as {file}")


def _make_room(folder: Path, size: int, *, keep: Path) -> None:
    """Remove what was built here and used least recently, but one, until another fits.

    Raises
    ------
    OSError
        If it is larger than all may be.
    """
    if size > MOST_BYTES:
        raise OSError(f"it has {memory_text(size)}, the cache at most {memory_text(MOST_BYTES)}")
    ours = [path for path in folder.iterdir() if OURS.fullmatch(path.name)]
    found = sorted((p.lstat().st_mtime, p.lstat().st_size, p) for p in ours)
    held_bytes = sum(size for _, size, _ in found)
    for _, freed, path in found:
        if held_bytes + size <= MOST_BYTES:
            return
        if path.name != keep.name:
            path.unlink(missing_ok=True)
            held_bytes -= freed


def _require_private(path: Path) -> None:
    """Refuse what somebody else may have written.

    Raises
    ------
    PermissionError
        If it is another user's but the administrator's, a link, or others may write to it.
    """
    seen = path.lstat()
    if seen.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} is another user's")
    if stat.S_ISLNK(seen.st_mode):
        raise PermissionError(f"{path} is a link")
    if seen.st_mode & WRITABLE_BY_OTHERS:
        raise PermissionError(f"others may write to {path}: chmod go-w it")
