"""The pages of a cohort: one of every recording in a folder, and the index that is made of them.

The folder is all the state there is: a page says in its head what the index tells of it, so that
runs that were interrupted, resumed or shared by several processes have a whole index too.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.bids.output import make_folder
from qsm_deploy.runtime.cohort.index import Seen, index_page
from qsm_deploy.runtime.console.atomic import write_atomically
from qsm_deploy.runtime.console.held import held
from qsm_deploy.runtime.console.journal import PREFIX
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.job.looks import PURPOSE, TO_INDEX
from qsm_deploy.runtime.job.report import are_numbers
from qsm_deploy.runtime.page.parts import json_script, note, page
from qsm_deploy.runtime.page.thumbnail import is_thumbnail

INDEX = "index.html"
SUMMARY = re.compile(r'<script type="application/json" class="summary">(.*?)</script>', re.S)
HEAD_BYTES = 1 << 18  # of a page, that its summary is in
EARLIER = "there is a map and no page of it; --force makes both again"


@dataclass(frozen=True)
class Pages:
    """The folder of a cohort's pages.

    Attributes
    ----------
    folder
        Where they lie; made where there is none.
    dataset
        What they are of, left out where reasons name files in it.
    """

    folder: Path
    dataset: Path

    def begin(self, names: Iterable[str]) -> None:
        """Make the folder, and refuse to write over what is no page of a cohort.

        What was wrong with a subject whose recordings are found now, or with a derivative that is
        read now, is no longer there.

        Raises
        ------
        UsageError
            If there is such a file.
        DataError
            If the folder cannot be made.
        """
        make_folder(self.folder, "--html")
        names = set(names)
        for path in (self.folder / INDEX, *(page_of(self.folder, name) for name in sorted(names))):
            if path.exists() and _summary_of(path) is None:
                raise UsageError(f"{path} is no page of qsm-run --bids; choose another --html")
        for one in self._seen():
            name = one.summary["name"]
            found = any(other.startswith(f"{name}_") for other in names)
            if one.failed and name not in names and (found or not name.startswith("sub-")):
                (self.folder / one.file).unlink(missing_ok=True)

    def failed(self, name: str, reason: str) -> None:
        """Write the page of a recording that has nothing to show."""
        reason = reason.replace(f"{self.dataset}/", "")
        summary = {"made_by": made_by(), "name": name, "failed": reason}
        text = f'<p class="warning">{escape(reason)}</p>'
        parts = [f"<h1>{escape(name)}</h1>", note(PURPOSE) + TO_INDEX, text]
        content = page(name, parts, head=json_script(summary, "summary"))
        encoded = content.encode(errors="backslashreplace")
        write_atomically(page_of(self.folder, name), encoded, force=True)

    def kept(self, name: str) -> None:
        """Say of a recording whose map was there that it has no page, unless it has one."""
        summary = _summary_of(page_of(self.folder, name))
        if summary is None or summary.get("failed", EARLIER) != EARLIER:
            self.failed(name, EARLIER)

    def index(self) -> None:
        """Make the index of the pages that there are."""
        try:
            with held(self.folder / f"{PREFIX}{INDEX}", wait=True):
                index = index_page(self._seen()).encode(errors="backslashreplace")
                write_atomically(self.folder / INDEX, index, force=True)
        except OSError as error:
            raise DataError(f"cannot write to {self.folder}: {error.strerror}") from error

    def _seen(self) -> list[Seen]:
        """Return what all pages say of themselves."""
        paths = sorted(path for path in self.folder.glob("*.html") if path.name != INDEX)
        summaries = ((path.name, _summary_of(path)) for path in paths)
        return [
            Seen(name, summary)
            for name, summary in summaries
            if summary is not None and "recordings" not in summary  # which a copy of an index says
        ]


def page_of(folder: Path, name: str) -> Path:
    """Return where the page of a recording goes."""
    return folder / f"{name}.html"


def _summary_of(path: Path) -> dict[str, Any] | None:
    """Return what a page says of itself, if it is one of ours."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES).decode(errors="replace")
        found = SUMMARY.search(head)
        summary = json.loads(found[1]) if found else None
    except (OSError, ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) and _is_whole(summary) else None


def _is_whole(summary: dict[str, Any]) -> bool:
    """Return whether a summary has what an index tells of it."""
    notes, drawn = summary.get("notes", []), summary.get("thumbnail")
    texts = [summary.get("name"), summary.get("failed", summary.get("title", INDEX))]
    return (
        isinstance(notes, list)
        and all(isinstance(text, str) and text for text in (*texts, *notes))
        and are_numbers(summary)
        and (drawn is None or is_thumbnail(drawn))
    )
