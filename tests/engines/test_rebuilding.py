"""Plans that do not fit the GPU or the library are built again, and what was built is kept."""

import os
import pwd
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import helper

from qsm_deploy.kernels.errors import CardError, DataError, EngineError, UnservedShapeError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.card.plan_file import plan_bytes, read_plan
from qsm_deploy.runtime.card.read import card_in_plan
from qsm_deploy.runtime.console.held import held
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.gpu import rebuilding
from qsm_deploy.runtime.gpu.open import open_device_session
from qsm_deploy.runtime.gpu.pipeline import Gpu
from qsm_deploy.runtime.gpu.session import GpuSession

LATER = "12.0.0.1"
ONE = {"local_field_ppm": (1, 1, 32, 32, 32), "voxel_size_mm": (3,)}
LARGE = ONE | {"local_field_ppm": (1, 1, 128, 32, 32)}
LARGER = ONE | {"local_field_ppm": (1, 1, 128, 256, 32)}


class Log(TerminalLog):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warned, self.told = [], []
        self.warn, self.tell = self.warned.append, self.told.append


@pytest.fixture
def builds(monkeypatch) -> list[ModelCard]:
    """Return the cards of the engines that are built again."""
    cards, build = [], rebuilding.build_plan

    def noted(graph, card, *rest):
        cards.append(card)
        return build(graph, card, *rest)

    monkeypatch.setattr(rebuilding, "build_plan", noted)
    return cards


@pytest.fixture
def outdated(install, build, builds) -> Path:
    """Return a plan of a version that is not the one installed."""
    install()
    path = build(whole=True)
    install(version=LATER)
    return path


@pytest.fixture
def kept(tmp_path: Path, outdated: Path) -> Path:
    """Return the file of what was built again for the plan."""
    open_device_session(outdated)
    (file,) = (tmp_path / "cache" / "qsm-deploy" / "plans").glob("*.plan")
    return file


def reason(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 4
    return text


def test_what_fits_runs_as_it_is(install, build, builds) -> None:
    install()
    path = build(whole=True)
    session = open_device_session(path)
    assert session.output_shape(ONE) == (1, 1, 32, 32, 32)
    assert session.weights_bytes == len(read_plan(path).engine)
    assert not builds


def test_another_version_is_built_once(outdated, builds, driver) -> None:
    first, second = Log(), Log()
    session = open_device_session(outdated, log=first)
    assert session.version == LATER
    assert session.output_shape(ONE) == (1, 1, 32, 32, 32)
    (line,) = first.warned
    assert f"{outdated}: it was built for tensorrt 11.4.0.106, this is {LATER}; building" in line
    assert str(driver.gpus[0]) in line
    assert "kept as" in first.told[-1]
    assert open_device_session(outdated, log=second).card == session.card
    assert not second.warned
    assert "built here before" in second.told[-1]
    (card,) = builds
    assert card.options["engine"] == f"tensorrt {LATER}"
    assert card.options["shapes"] == "16x16x16,32x32x32,64x64x64"


def test_what_is_kept_is_a_whole_plan_of_the_user_alone(kept: Path, outdated: Path) -> None:
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(p.suffix for p in kept.parent.iterdir()) == [".plan"]
    assert read_plan(kept).graph == read_plan(outdated).graph
    assert open_device_session(kept).version == LATER


@pytest.mark.parametrize(
    "change",
    [
        {"capability": (8, 9), "name": "NVIDIA Made-up 4090"},
        {"name": "NVIDIA Made-up 200"},
    ],
)
def test_another_gpu(install, build, builds, driver, change) -> None:
    install()
    path = build(whole=True)
    driver.gpus[0] = replace(driver.gpus[0], **change)
    assert open_device_session(path).card.options["gpu"] == str(driver.gpus[0])
    assert len(builds) == 1


def test_the_gpu_of_a_number_is_the_one_built_for(install, build, builds, driver) -> None:
    install()
    path = build(whole=True)
    session = open_device_session(path, 1)
    assert session.device == 1
    assert session.card.options["gpu"] == str(driver.gpus[1])


def test_another_driver_is_another_engine(outdated, builds, driver) -> None:
    open_device_session(outdated)
    driver.gpus[0] = replace(driver.gpus[0], driver=14000)
    open_device_session(outdated)
    assert len(builds) == 2


def test_another_flavour(install, build, builds, driver, monkeypatch) -> None:
    install()
    path = build(whole=True)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    install("tensorrt_rtx")
    driver.gpus[0] = replace(driver.gpus[0], capability=(8, 9))
    assert open_device_session(path).backend == "tensorrt-rtx"
    assert builds[0].options["gpu"] == "sm_89"
    driver.gpus[0] = replace(driver.gpus[0], capability=(9, 0))  # which that flavour never serves
    with pytest.raises(EngineError, match="not installed") as caught:
        open_device_session(path)
    assert "to be built for sm_90 NVIDIA Made-up 100" in reason(caught)


def test_a_flavour_that_never_serves_the_gpu(install, build, builds) -> None:
    install("tensorrt_rtx")
    path = build("tensorrt-rtx", whole=True)
    install()
    assert open_device_session(path).backend == "tensorrt"
    assert builds[0].options["gpu"] == "sm_90 NVIDIA Made-up 100"


def test_an_engine_that_is_refused(install, build, builds) -> None:
    install()
    path = build(whole=True)
    plan = read_plan(path)
    path.write_bytes(plan_bytes(plan.engine + b"?", plan.graph))
    log = Log()
    assert open_device_session(path, log=log).output_shape(ONE)
    assert "cannot load it" in log.warned[0]
    assert len(builds) == 1


def test_an_engine_that_contradicts_its_card_is_no_misfit(
    install, build, builds, stand_in_module
) -> None:
    install()
    path = build(whole=True)
    plan = read_plan(path)
    header, card = stand_in_module.from_bytes(plan.engine)
    other = stand_in_module.as_bytes(header | {"output": "map"}, card)
    path.write_bytes(plan_bytes(other, plan.graph))
    with pytest.raises(CardError, match="contradicts the graph"):
        open_device_session(path)
    assert not builds


def test_building_fails(outdated, levers) -> None:
    levers.fails.add("build")
    with pytest.raises(EngineError, match="it was built for tensorrt 11") as caught:
        open_device_session(outdated)
    text = reason(caught)
    assert "building it again failed: tensorrt cannot build this network: no implement" in text


def test_plans_of_the_former_form_are_not_built_again(install, build, builds) -> None:
    install()
    path = build()
    assert open_device_session(path)
    install(version=LATER)
    with pytest.raises(EngineError, match="rebuild it here with: qsm-export"):
        open_device_session(path)
    assert not builds


def test_other_shapes(install, build, builds, tmp_path) -> None:
    install()
    engine = open_device_session(build(whole=True))
    gpu = Gpu(SimpleNamespace(number=0, name="made up"), SimpleNamespace(), engine)
    session = GpuSession(gpu)
    with pytest.raises(UnservedShapeError) as caught:
        engine.output_shape(LARGE)
    assert session.serve(caught.value)
    assert session.gpu.session.output_shape(LARGE) == (1, 1, 128, 32, 32)
    assert builds[0].options["shapes"] == "16x16x16,32x32x32,128x64x64"
    assert len(list((tmp_path / "cache" / "qsm-deploy" / "plans").glob("*.plan"))) == 1
    with pytest.raises(EngineError, match="was closed"):
        engine.scratch_bytes(ONE)
    assert not session.serve(UnservedShapeError("of no use"))
    with pytest.raises(UnservedShapeError) as caught:
        session.gpu.session.output_shape(LARGER)
    assert session.serve(caught.value)
    assert session.gpu.session.output_shape(LARGER) == (1, 1, 128, 256, 32)


def test_no_cache(outdated, builds, tmp_path) -> None:
    for _ in range(2):
        assert open_device_session(outdated, plan_cache="off").version == LATER
    assert len(builds) == 2
    assert not (tmp_path / "cache" / "qsm-deploy" / "plans").exists()


def test_a_folder_of_the_user_s(outdated, builds, tmp_path) -> None:
    for _ in range(2):
        open_device_session(outdated, plan_cache=tmp_path / "mine" / "plans")
    assert len(builds) == 1
    assert len(list((tmp_path / "mine" / "plans").glob("ir2qsm-*.plan"))) == 1


def test_the_oldest_goes_first(outdated, kept, monkeypatch) -> None:
    others = [kept.with_name(f"xqsm-{n}{'0' * 31}.plan") for n in range(3)]
    users = kept.with_name("precious.plan")
    for age, file in enumerate((*others, users)):
        file.write_bytes(bytes(1000))
        os.utime(file, (1000 - age,) * 2)
    kept.with_name("left.plan").symlink_to("nowhere")
    size = kept.stat().st_size
    kept.unlink()
    monkeypatch.setattr(rebuilding, "MOST_BYTES", size + 1500)
    open_device_session(outdated)
    assert kept.exists()
    assert [other.exists() for other in others] == [True, False, False]
    assert users.exists()
    os.utime(kept, (0, 0))
    open_device_session(outdated)  # used, and so the newest
    assert kept.stat().st_mtime > 1000


def test_what_is_built_again_itself_stays(outdated, kept, install, monkeypatch) -> None:
    install(version="13.0")
    monkeypatch.setattr(rebuilding, "MOST_BYTES", kept.stat().st_size + 100)
    assert open_device_session(kept).version == "13.0"
    assert kept.exists()


def test_what_is_too_large_for_the_cache(outdated, monkeypatch) -> None:
    monkeypatch.setattr(rebuilding, "MOST_BYTES", 100)
    log = Log()
    assert open_device_session(outdated, log=log).version == LATER
    assert "not kept: it has" in log.warned[-1]


def test_a_full_disk(outdated, builds, monkeypatch) -> None:
    def full(path, data, *, force):
        raise DataError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(rebuilding, "write_atomically", full)
    log = Log()
    assert open_device_session(outdated, log=log).version == LATER
    assert "not kept: cannot write" in log.warned[-1]


def test_a_cache_that_can_only_be_read(outdated, kept, builds, monkeypatch) -> None:
    def read_only(path, *rest, **how):
        raise OSError(30, "Read-only file system")

    for name in ("held", "write_atomically"):
        monkeypatch.setattr(rebuilding, name, read_only)
    assert open_device_session(outdated).version == LATER
    assert len(builds) == 1
    kept.unlink()
    log = Log()
    assert open_device_session(outdated, log=log).version == LATER
    assert "Read-only" in log.warned[-1]


def test_a_cache_that_cannot_be_made(outdated, builds, tmp_path) -> None:
    (tmp_path / "file").touch()
    log = Log()
    assert open_device_session(outdated, plan_cache=tmp_path / "file" / "x", log=log)
    assert len(log.warned) == 2
    assert "not kept" in log.warned[-1]


def damaged(kept: Path) -> None:
    data = bytearray(kept.read_bytes())
    data[100] ^= 1
    kept.write_bytes(data)


def truncated(kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[:-1])


def of_another_graph(kept: Path) -> None:
    plan = read_plan(kept)
    kept.write_bytes(plan_bytes(plan.engine, plan.graph + b"?"))


def of_another_network(kept: Path) -> None:
    plan = read_plan(kept)
    card = card_in_plan(plan.engine, kept).to_json().encode()
    other = card.replace(b'"network":"ir2qsm"', b'"network":"loopnt"')
    kept.write_bytes(plan_bytes(plan.engine.replace(card, other), plan.graph))


def writable_by_others(kept: Path) -> None:
    kept.chmod(0o622)


def a_link(kept: Path) -> None:
    kept.rename(kept.with_name("elsewhere"))
    kept.symlink_to(kept.with_name("elsewhere"))


def a_folder(kept: Path) -> None:
    kept.unlink()
    kept.mkdir()


def another_user_s(kept: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(kept, 4242, -1)


@pytest.mark.parametrize(
    "poison",
    [
        *(damaged, truncated, of_another_graph, of_another_network),
        *(writable_by_others, a_link, a_folder, another_user_s),
    ],
)
def test_a_poisoned_file_is_not_used(outdated, kept, builds, poison) -> None:
    poison(kept)
    log = Log()
    assert open_device_session(outdated, log=log).version == LATER
    assert f"not using {kept}: " in log.warned[0]
    assert len(builds) == 2
    if poison is a_folder:
        assert "not kept" in log.warned[-1]
    else:
        assert not kept.is_symlink()
        assert open_device_session(outdated).version == LATER
        assert len(builds) == 2


def test_a_folder_that_others_may_write_to_is_not_used(outdated, kept, builds) -> None:
    kept.parent.chmod(0o777)
    log = Log()
    assert open_device_session(outdated, log=log).version == LATER
    assert "not using the plan cache" in log.warned[0]
    assert len(builds) == 2


def test_two_at_once_build_once(outdated, builds, levers) -> None:
    both = threading.Barrier(2)

    log = Log()

    def opened() -> str:
        both.wait()
        return open_device_session(outdated, log=log).version

    with ThreadPoolExecutor(2) as pool:
        found = [task.result() for task in [pool.submit(opened) for _ in range(2)]]
    assert found == [LATER] * 2
    assert len(builds) == 1
    assert sum("another process builds its engine" in line for line in log.warned) <= 1


def test_who_waits_is_told(outdated, kept, builds) -> None:
    kept.unlink()
    log, told = Log(), threading.Event()
    log.warn = lambda line: told.set() if "waiting" in line else None
    with ThreadPoolExecutor(1) as pool:
        with held(kept.with_suffix(".lock")) as lock:
            assert lock is not None
            waiting = pool.submit(open_device_session, outdated, log=log)
            assert told.wait(30)
            assert not waiting.done()
        assert waiting.result().version == LATER


def test_a_user_without_a_home_keeps_nothing(outdated, tmp_path, monkeypatch) -> None:
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.chdir(tmp_path)
    log = Log()
    assert open_device_session(outdated, log=log).version == LATER
    assert "not kept" in log.warned[-1]
    assert not (tmp_path / "relative").exists()


def test_a_graph_that_may_not_run_is_not_built(install, build, builds) -> None:
    install()
    path = build(whole=True)
    plan = read_plan(path)
    model = onnx.load_model_from_string(plan.graph)
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "b", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))
    path.write_bytes(plan_bytes(plan.engine, model.SerializeToString()))
    assert open_device_session(path)
    install(version=LATER)
    with pytest.raises(EngineError, match="'Loop', which repeats a graph"):
        open_device_session(path)
    assert not builds


def test_a_card_with_wrong_shapes(install, build, builds) -> None:
    install()
    path = build(whole=True)
    plan = read_plan(path)
    engine = plan.engine.replace(b"16x16x16,32x32x32,64x64x64", b"a,b,c")
    path.write_bytes(plan_bytes(engine, plan.graph))
    with pytest.raises(EngineError, match=r"its card has --shapes a,b,c: expected") as caught:
        open_device_session(path)
    reason(caught)


def test_a_flavour_that_cannot_be_used_is_passed_over(install, build, builds, driver) -> None:
    install()
    path = build(whole=True)
    del install(version=LATER).Runtime
    install("tensorrt_rtx")
    driver.gpus[0] = replace(driver.gpus[0], capability=(8, 9))
    assert open_device_session(path).backend == "tensorrt-rtx"
