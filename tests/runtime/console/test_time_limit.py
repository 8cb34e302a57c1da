"""What takes too long is an error, and what cannot be ended is left behind."""

import gc
import weakref
from contextlib import suppress
from threading import Event

import pytest

from qsm_deploy.kernels.errors import DataError, EngineError
from qsm_deploy.runtime.console.time_limit import LONGEST_S, TimeLimit, is_left_behind


def test_what_is_in_time_is_returned_or_raised() -> None:
    def wrong() -> None:
        raise DataError("no field")

    limit = TimeLimit(LONGEST_S)
    assert limit.within("adding", lambda: 1 + 1) == 2
    with pytest.raises(DataError, match="no field"):
        limit.within("reading", wrong)
    assert not is_left_behind()


def test_what_is_told_to_end_is_an_error_though_it_ends() -> None:
    told, limit = Event(), TimeLimit(0.05)
    with pytest.raises(EngineError, match=r"one run takes longer than 0.05 s.*--time-limit"):
        limit.within("one run", told.wait, told.set)
    assert not is_left_behind()
    assert limit.within("another", lambda: "map") == "map"


def test_what_does_not_end_is_left_behind() -> None:
    ends, limit = Event(), TimeLimit(0.05)
    with pytest.raises(EngineError, match="opening takes longer"):
        limit.within("opening", ends.wait)
    assert is_left_behind()
    with pytest.raises(EngineError, match="running: what did not end in time still goes on"):
        limit.within("running", lambda: None)
    ends.set()
    assert limit.within("opening", lambda: "open") == "open"
    assert not is_left_behind()


def test_what_cannot_be_stopped_is_left_behind_though_stopping_it_fails() -> None:
    ends, limit = Event(), TimeLimit(0.05)

    def fails() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        limit.within("one run", ends.wait, fails)
    assert is_left_behind()
    ends.set()


def test_what_failed_is_not_kept() -> None:
    class Tensor:
        pass

    def wrong() -> None:
        raise DataError("no field")

    held = Tensor()
    seen = weakref.ref(held)
    gc.disable()
    try:
        with suppress(DataError):
            TimeLimit(LONGEST_S).within("one run", lambda held=held: wrong())
        del held
        assert seen() is None
    finally:
        gc.enable()
