"""What is said on the way through a cohort."""

import pytest

from qsm_deploy.runtime.cohort import progress
from qsm_deploy.runtime.cohort.outcomes import Outcome
from qsm_deploy.runtime.cohort.progress import Progress, duration_text
from qsm_deploy.runtime.console.terminal import TerminalLog


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Return a clock that is set by hand."""
    there = Clock()
    monkeypatch.setattr(progress.time, "monotonic", lambda: there.now)
    return there


def test_how_many_and_how_long(clock, capsys) -> None:
    told = Progress(1000, TerminalLog(quiet=False), lambda: 8)
    for _ in range(200):
        told.ended(Outcome("sub-kept", "done", again=True))
    for number in range(115):  # eight at a time, 41 s each
        clock.now = 1000 + 41 * (number + 1) / 8
        state = "failed" if number < 3 else "done"
        told.ended(Outcome(f"sub-{number}", state, seconds=41.0))
    assert told.text(clock.now, 8) == (
        "312/1000 done, 3 failed, 8 workers, 41 s per recording, about 59 min left"
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("31")
    assert len(lines) == 115  # each took longer than the pause between two lines


def test_a_line_in_five_seconds_at_most(clock, capsys) -> None:
    told = Progress(100, TerminalLog(quiet=False), lambda: 1)
    for number in range(99):
        clock.now += 0.5
        told.ended(Outcome(f"sub-{number}", "done", seconds=0.5))
    told.end()
    lines = capsys.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 12
    assert lines[-1] == "99/100 done, 0.5 s per recording, about 0.5 s left"


def test_nothing_where_it_is_to_be_quiet_or_there_is_one(clock, capsys) -> None:
    for total, quiet in ((100, True), (1, False)):
        told = Progress(total, TerminalLog(quiet=quiet), lambda: 1)
        clock.now += 50
        told.ended(Outcome("sub-01", "done", seconds=1.0))
        told.end()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (4.25, "4.2 s"),
        (41.4, "41 s"),
        (150, "2 min"),
        (7300, "2 h"),
        (2e5, "2 days"),
    ],
)
def test_durations(seconds, text) -> None:
    assert duration_text(seconds) == text
