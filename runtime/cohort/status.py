"""What is done of a cohort, what failed and why, and what nobody has tried: ``--status``."""

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.bids.output import SUFFIXES
from qsm_deploy.runtime.bids.resume import is_there
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.group_table import require_table, write_table
from qsm_deploy.runtime.cohort.index import NUMBER
from qsm_deploy.runtime.cohort.outcomes import Outcome, told_outcomes
from qsm_deploy.runtime.console.terminal import TerminalLog

FREQUENT = 10  # reasons that are told
NAMED = 10  # recordings that are named
OF_A_SUBJECT = re.compile(r"[^\s'\"]*\bsub-[^\s:;,'\"]+")


def status_of(cohort: Cohort, log: TerminalLog) -> dict[str, Any]:
    """Return how far a cohort is, by what is on disk and what was written down.

    Nothing is opened but folders and the files of outcomes. A map that is there counts, whatever a
    later attempt came to. If a table is asked for it is written.

    Parameters
    ----------
    cohort
        Which recordings; a shard's, if it has one.
    log
        Takes notes on what is in the dataset and not used.

    Returns
    -------
    dict
        ``recordings``, ``done``, ``failed``, ``missing`` (how many), ``failures`` (exit code,
        reason and recording of each), ``reasons`` (the most frequent, and how often),
        ``without_map`` (the names of those that are missing: nobody tried, or is at it).

    Raises
    ------
    DataError
        If it is no BIDS dataset, or holds nothing to reconstruct.
    """
    if cohort.table is not None:
        require_table(cohort.table)
    found = cohort.find()
    for note in found.notes():
        log.warn(note)
    cohort.derivative.require_ours()
    told = told_outcomes(cohort.outcomes_folder)
    done = {r.name for r in found.recordings if _has_map(cohort, r)}
    code = DataError.exit_code
    failures = [Outcome(n, "failed", exit_code=code, reason=r) for n, r in found.failures.items()]
    missing = []
    for name in (r.name for r in found.recordings if r.name not in done):
        outcome = told.last.get(name)
        if outcome is not None and outcome.state == "failed":
            failures.append(outcome)
        else:
            missing.append(name)
    if cohort.table is not None:
        rows = [told.made.get(name) or Outcome(name, "done") for name in done]
        write_table(cohort.table, [*rows, *failures, *(Outcome(n, "missing") for n in missing)])
    kinds: dict[tuple[int, str], list[str]] = defaultdict(list)
    for one in failures:
        kinds[one.exit_code, _kind(one.reason)].append(one.reason)
    frequent = sorted(kinds.items(), key=lambda kind: len(kind[1]), reverse=True)[:FREQUENT]
    return {
        "recordings": len(found.recordings) + len(found.failures),
        "done": len(done),
        "failed": len(failures),
        "missing": len(missing),
        "reasons": [
            {
                "exit_code": exit_code,
                "reason": kind if len(set(texts)) > 1 else texts[0],
                "count": len(texts),
            }
            for (exit_code, kind), texts in frequent
        ],
        "failures": [
            {"recording": f.recording, "exit_code": f.exit_code, "reason": f.reason}
            for f in failures
        ],
        "without_map": missing,
    }


def status_text(status: dict[str, Any]) -> str:
    """Return a status as lines."""
    lines = [
        f"{status['recordings']} recordings: {status['done']} done, {status['failed']} failed, "
        f"{status['missing']} missing"
    ]
    for one in status["reasons"]:
        lines.append(f"failed {one['count']} x, exit code {one['exit_code']}: {one['reason']}")
    for what, names in (
        ("failed", [failure["recording"] for failure in status["failures"]]),
        ("missing", status["without_map"]),
    ):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"{what}: {', '.join(names[:NAMED])}{more}")
    return "\n".join(lines)


def _has_map(cohort: Cohort, recording: Recording) -> bool:
    places = (replace(cohort.derivative, gives=gives) for gives in SUFFIXES)
    return any(is_there(place.chi(recording)) for place in places)


def _kind(reason: str) -> str:
    """Return a reason without the names and numbers that tell one recording from another."""
    return NUMBER.sub("…", OF_A_SUBJECT.sub("FILE", " ".join(reason.split())))
