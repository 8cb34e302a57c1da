"""The index of a cohort's pages: a row for every recording, what looks wrong first."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple
from urllib.parse import quote

from qsm_deploy.kernels.inversion.field_noise import NORMAL_PER_MEDIAN
from qsm_deploy.runtime.job.looks import PURPOSE
from qsm_deploy.runtime.page.parts import (
    Cell,
    Html,
    cells,
    json_script,
    note,
    page,
    png_source,
    table,
)


class Compared(NamedTuple):
    """A number that is compared with the cohort's: which side of the median is odd."""

    title: str
    unit: str
    digits: int
    odd_sides: tuple[int, ...]

    def text(self, value: float) -> str:
        """Return it with its unit."""
        return f"{value:.{self.digits}f} {self.unit}".rstrip()


COMPARED = {
    "field_residual": Compared("field residual", "", 3, (1,)),
    "noise_ppb": Compared("noise", "ppb", 2, (1,)),
    "mask_ml": Compared("mask", "ml", 0, (-1, 1)),
}
FEWEST = 4  # recordings that have a usual value
ODD = 3.5  # robust standard deviations from the median
LEAST_SIGMA = 0.05  # of the median
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]\d+)?")
THUMBNAIL_PIXELS = 120  # its longer side
ABOUT = (
    "What failed comes first, then what has most to look at, then by field residual. A number in "
    f"red is odd: it lies more than {ODD:g} robust standard deviations ({NORMAL_PER_MEDIAN} times "
    f"the median distance from the median, at least {100 * LEAST_SIGMA:g} % of that) above the "
    "cohort's median or, a mask, to either side of it; or it is a voxel size that not most have; "
    f"from {FEWEST} recordings on. Noise is that of the field, by its spectrum. That nothing is "
    "odd does not make a map right."
)


@dataclass
class Seen:
    """A page, what it says of itself, and what is odd and what is usual about that."""

    file: str
    summary: dict[str, Any]
    odd: dict[str, str] = field(default_factory=dict)
    usual: frozenset[str] = frozenset()  # notes that most of the cohort have, but for their numbers

    @property
    def failed(self) -> str | None:
        """Why there is nothing to show."""
        return self.summary.get("failed")

    @property
    def notes(self) -> list[str]:
        """What its run noted."""
        return list(self.summary.get("notes", ()))

    @property
    def voxel(self) -> str:
        """Its voxel size."""
        sizes = (f"{size:.3g}" for size in self.summary.get("voxel_size_mm", ()))
        return " x ".join(sizes) or "-"

    @property
    def lines(self) -> list[str]:
        """What to look at."""
        first = [self.failed] if self.failed else []
        return [*first, *self.odd.values(), *(n for n in self.notes if _kind(n) not in self.usual)]

    def rank(self) -> tuple[bool, int, float, str]:
        """Return what sorts it: what looks wrong first."""
        residual = self.summary.get("field_residual") or 0.0
        return not self.failed, -len(self.lines), -residual, self.file


def index_page(seen: Sequence[Seen]) -> str:
    """Return the index of pages."""
    judge(seen)
    ordered = sorted(seen, key=Seen.rank)
    failed = [one.failed is not None for one in ordered]
    rest = sum(1 for one in seen if one.lines and not one.failed)
    count = f"{len(seen)} recordings, {sum(failed)} without pictures, {rest} with more to look at."
    head = ["", "recording", "what to look at"]
    head += [f"{c.title} [{c.unit}]" if c.unit else c.title for c in COMPARED.values()]
    usual = sorted({line for one in seen for line in one.usual})
    makers = Counter(one.summary["title"] for one in seen if not one.failed).most_common()
    made = "; ".join(f"{n} by {maker}" for maker, n in makers)
    parts = [
        "<h1>Susceptibility maps</h1>",
        note(f"{count} {PURPOSE}"),
        note(f"Made: {made}.") if made else "",
        note(ABOUT),
        *(note(f"Noted of most: {text}") for text in usual),
        table([*head, "voxel [mm]"], map(_row, ordered), text_columns=(1, 2), marked=failed),
    ]
    summary = json_script({"name": "index", "recordings": len(seen)}, "summary")
    return page("Susceptibility maps", parts, head=summary)


def judge(seen: Sequence[Seen]) -> None:
    """Note what is odd about each of a cohort's recordings, and what is usual."""
    for name, compared in COMPARED.items():
        having = [one for one in seen if one.summary.get(name) is not None]
        if len(having) < FEWEST:
            continue
        median = statistics.median(one.summary[name] for one in having)
        mad = statistics.median(abs(one.summary[name] - median) for one in having)
        sigma = max(NORMAL_PER_MEDIAN * mad, LEAST_SIGMA * abs(median))
        for one in having:
            value = one.summary[name]
            if any(side * (value - median) > ODD * sigma for side in compared.odd_sides):
                text = f"{compared.title} {compared.text(value)}"
                one.odd[name] = f"{text}, the cohort's median is {compared.text(median)}"
    finished = [one for one in seen if not one.failed]
    for size in _of_most([one.voxel for one in finished], len(finished)):
        for one in finished:
            if one.voxel != size:
                one.odd["voxel"] = f"voxel {one.voxel} mm, most have {size}"
    kinds = [kind for one in finished for kind in set(map(_kind, one.notes))]
    usual = _of_most(kinds, len(finished))
    for one in seen:
        one.usual = frozenset(usual.intersection(map(_kind, one.notes)))


def _kind(text: str) -> str:
    """Return a note without its numbers."""
    return NUMBER.sub("…", text)


def _of_most(said: Sequence[str], recordings: int) -> set[str]:
    """Return what more than half of the recordings say, and not too few."""
    return {text for text, n in Counter(said).items() if n > max(recordings / 2, FEWEST - 1)}


def _row(one: Seen) -> tuple[Cell, ...]:
    summary = one.summary
    lines = Html("<br>".join(map(escape, one.lines)))
    numbers = []
    for key, compared in COMPARED.items():
        value = summary.get(key)
        text = "-" if value is None else f"{value:.{compared.digits}f}"
        numbers.append((text, "over" if key in one.odd else ""))
    voxel = (one.voxel, "over" if "voxel" in one.odd else "")
    drawn = _thumbnail(one)
    linked = (_link(one, drawn) if drawn else "", _link(one, escape(summary["name"])), lines)
    return (*cells(*linked), *numbers, voxel)


def _link(one: Seen, content: str) -> Html:
    return Html(f'<a href="{quote(one.file)}">{content}</a>')


def _thumbnail(one: Seen) -> str:
    drawn = one.summary.get("thumbnail")
    if drawn is None:
        return ""
    longer = max(drawn["size_mm"])
    width, height = (math.ceil(THUMBNAIL_PIXELS * side / longer) for side in drawn["size_mm"])
    alt = f"axial plane of {escape(one.summary['name'])}"
    size = f'width="{width}" height="{height}" alt="{alt}"'
    return f'<img class="thumbnail" {size} src="{png_source(drawn["png"])}">'
