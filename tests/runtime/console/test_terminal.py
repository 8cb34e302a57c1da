"""What is printed where: on a terminal, on a dumb one, into a file, and when it is to be quiet."""

import io
import sys

import pytest

from qsm_deploy.runtime.console.terminal import TerminalLog


@pytest.fixture
def shown(monkeypatch):
    """Return a function that gives what stderr gets, as a terminal of a kind or as none."""

    def write(*, term, quiet=False, terminal=True):
        stderr = io.StringIO()
        monkeypatch.setattr(stderr, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", stderr)
        if term is None:
            monkeypatch.delenv("TERM", raising=False)
        else:
            monkeypatch.setenv("TERM", term)
        log = TerminalLog(quiet=quiet)
        log.about("sub-01")
        log.stage("load")
        log.warn("no units given")
        with log.progress(3) as bar:
            bar.update()
        log.tell("1.0 s")
        return stderr.getvalue()

    return write


def test_a_terminal_shows_stages_and_a_bar(shown):
    text = shown(term="xterm")
    assert "\r\033[Ksub-01: load ..." in text
    assert "note: sub-01: no units given\n" in text
    assert "0/3" in text


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_dumb_terminal_gets_lines_only(shown, term):
    assert shown(term=term) == "note: sub-01: no units given\nsub-01: 1.0 s\n"


def test_a_file_gets_lines_only(shown):
    plain = shown(term="xterm", terminal=False)
    assert plain == "note: sub-01: no units given\nsub-01: 1.0 s\n"


@pytest.mark.parametrize("quiet", [True, False])
def test_a_line_stays_one_and_steers_no_terminal(shown, capsys, quiet):
    log = TerminalLog(quiet=quiet)
    log.about("sub-\u00e9\udcff")
    log.warn("a\nb\033[2Jc\rd\u202e")
    log.tell("a\nb")
    note, *told = capsys.readouterr().err.splitlines()
    assert note == "note: sub-\u00e9\\udcff: a\\nb\\x1b[2Jc\\rd\\u202e"
    assert told == ([] if quiet else ["sub-\u00e9\\udcff: a\\nb"])


def test_quiet_prints_notes_alone(shown):
    assert shown(term="xterm", quiet=True) == "note: sub-01: no units given\n"
