"""What takes too long is an error, and what cannot be ended is left behind."""

import time
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
    while is_left_behind():
        time.sleep(0.01)
    assert limit.within("opening", lambda: "open") == "open"
