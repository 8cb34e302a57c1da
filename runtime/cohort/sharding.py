"""Which part of a cohort a process takes, decided by nothing but the names of subjects.

A subject stays in its shard when others are added, all its recordings stay together, and whoever
runs a shard needs no list and asks nobody.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from qsm_deploy.kernels.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """One of several parts of a cohort.

    Attributes
    ----------
    number
        Which, from 1.
    count
        Of how many.
    """

    number: int
    count: int

    def has(self, label: str) -> bool:
        """Return whether a subject, by its label without ``sub-``, is in it."""
        digest = hashlib.sha256(label.encode(errors="surrogateescape")).hexdigest()
        return int(digest[:8], 16) % self.count == self.number - 1

    def __str__(self) -> str:
        """Say which it is."""
        return f"shard {self.number} of {self.count}"

    @property
    def stem(self) -> str:
        """What its files are called."""
        return f"shard-{self.number:03}-of-{self.count:03}"


@dataclass(frozen=True)
class Scheduler:
    """The variables by which one tells a task of an array which it is.

    Attributes
    ----------
    task
        The number of this one.
    first, last, step
        Of the numbers, where it says so.
    count
        How many there are, where it says so.
    begins
        The number that the first has unless told otherwise.
    """

    task: str
    first: str = ""
    last: str = ""
    step: str = ""
    count: str = ""
    begins: int = 1


SCHEDULERS = {
    "SLURM": Scheduler(
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_MAX",
        "SLURM_ARRAY_TASK_STEP",
        "SLURM_ARRAY_TASK_COUNT",
    ),
    "PBS": Scheduler("PBS_ARRAY_INDEX"),
    "SGE": Scheduler("SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    "LSF": Scheduler("LSB_JOBINDEX", "", "LSB_JOBINDEX_END", "LSB_JOBINDEX_STEP"),
    "Kubernetes": Scheduler("JOB_COMPLETION_INDEX", begins=0),
}
NO_ARRAY = ("", "undefined")  # what a task is numbered that is none of an array


def shard_from(text: str, environment: Mapping[str, str]) -> Shard:
    """Return the shard that a command line names.

    Parameters
    ----------
    text
        ``K/N``, K from 1; ``auto/N``, where the scheduler says which of N; ``auto``, where it says
        of how many, too.
    environment
        The variables that schedulers set.

    Raises
    ------
    UsageError
        If it is none of these, or no scheduler says which, or none of how many.
    """
    number, _, count = text.partition("/")
    if number != "auto":
        return _valid(number, count, f"--shard {text}")
    for name, scheduler in SCHEDULERS.items():
        task = environment.get(scheduler.task, "")
        # LSF numbers a job that is no array 0
        if task not in NO_ARRAY and not (name == "LSF" and task == "0"):
            break
    else:
        variables = ", ".join(scheduler.task for scheduler in SCHEDULERS.values())
        raise UsageError(
            f"--shard {text}: no scheduler says which; none of {variables} is set. Run it as a "
            "task of an array, or pass --shard K/N"
        )
    about = f"--shard {text}, {scheduler.task}={task}"
    if count:
        numbered = str(int(task) + 1 - scheduler.begins) if task.isdecimal() else task
        return _valid(numbered, count, f"{about} (number the tasks from {scheduler.begins})")
    return _of_range(scheduler, task, environment, about)


def _of_range(scheduler: Scheduler, task: str, environment: Mapping[str, str], about: str) -> Shard:
    """Return the shard of a task whose scheduler says which numbers there are."""
    if not scheduler.last:
        raise UsageError(f"{about}: of how many is said nowhere; pass --shard auto/N")

    def number(variable: str, default: int) -> int:
        said = environment.get(variable, "")
        return int(said) if said.isdecimal() else default

    begins, step = number(scheduler.first, scheduler.begins), number(scheduler.step, 1)
    last = number(scheduler.last, -1)
    count = (last - begins) // step + 1
    if count < 1 or number(scheduler.count, count) != count or not task.isdecimal():
        raise UsageError(
            f"{about}: the array's numbers are not one range, so of how many they are cannot be "
            "told; pass --shard auto/N"
        )
    return _valid(str((int(task) - begins) // step + 1), str(count), about)


def _valid(number: str, count: str, about: str) -> Shard:
    if not (number.isdecimal() and count.isdecimal()) or not 1 <= int(number) <= int(count):
        raise UsageError(f"{about}: expected K/N with K from 1 to N, such as 3/100, or auto")
    return Shard(int(number), int(count))
