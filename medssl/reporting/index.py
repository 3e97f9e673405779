"""One page over several reports: what each of them says first, and the way to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from medssl.core.files import atomic_write
from medssl.reporting.page import templates
from medssl.reporting.text import Verdict


@dataclass(frozen=True)
class Part:
    """One report on the page.

    Attributes:
        title: What it is about.
        verdict: What to take away.
        report: Its page, or None where there is none yet; ``verdict`` then says why.
    """

    title: str
    verdict: Verdict
    report: Path | None


def write_index(path: Path, *, kind: str, title: str, notes: Sequence[str], parts: Sequence[Part]) -> Path:
    """Write a page that opens with the verdict of every part and links to its report, relative to the page.

    Args:
        path: The page.
        kind: The line above the title.
        title: Heading of the page.
        notes: What the reader must know before anything else, such as that the data are synthetic.
        parts: In the order of the page.

    Raises:
        DiskError: The page cannot be written.
    """
    folder = path.parent.resolve()
    links = [None if part.report is None else _link(part.report, folder) for part in parts]
    page = templates().get_template("index.html").render(kind=kind, title=title, notes=notes, parts=zip(parts, links))
    return atomic_write(path, page)


def _link(report: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(report.resolve(), folder)).as_posix())
