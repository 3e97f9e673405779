"""How figures are drawn and turned into bytes: one style, no dates, no fonts, no scripts."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours that stay apart for all common kinds of colour blindness; the baseline is grey.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#56B4E9", "#882255")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
BASELINE_COLOUR: Final = "#555555"
INK: Final = "#222222"  # lines and words beside the data
WIDTH: Final = 5.6  # inches; narrow, so that the text stays readable on a phone

_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "medssl",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "text.parse_math": False,  # a subject id with a dollar sign is text, not a formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A finished figure: its file, how it is embedded, what it says and how to read it."""

    name: str
    file: bytes
    suffix: str
    alt: str
    caption: str
    title: str

    @property
    def embedded(self) -> Markup:
        """Inline SVG, or an image with its bytes inside; the only place where markup is not written by a template."""
        if self.suffix == "svg":
            return Markup(_inline_svg(self.file.decode(), self.name, self.alt))  # matplotlib escaped its text
        data = base64.b64encode(self.file).decode()
        return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, self.alt)


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures; a glyph that the font lacks is drawn as a box and is no reason to warn."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg_bytes(figure: Figure) -> bytes:
    """The figure as SVG whose bytes depend on its content only; call within ``style``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<!--.*?-->\s*", "", buffer.getvalue().decode(), flags=re.DOTALL)
    return re.sub(r"<!DOCTYPE.*?>\s*", "", text, flags=re.DOTALL).encode()


def png_bytes(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG without the name and version of the program; call within ``style``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _inline_svg(text: str, name: str, alt: str) -> str:
    """An SVG for a page with others: own ids, size from the page's CSS, no declarations, a description."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace('"#', f'"#{prefix}-').replace("url(#", f"url(#{prefix}-")
    view = re.search(r'viewBox="([0-9. -]+)"', text)
    opening = f'<svg viewBox="{view[1] if view else ""}" role="img" aria-label="{html.escape(alt)}">'
    return re.sub(r"<svg\b[^>]*>", lambda _: opening, text, count=1)


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure that belongs to no window system; sizes in inches."""
    return Figure(figsize=(width, height))


def arm_looks(arms: Sequence[str], baselines: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each arm, in the order of ``arms``; baselines are grey."""
    others = [arm for arm in arms if arm not in baselines]
    looks = {
        arm: (COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])
        for i, arm in enumerate(others)
    }
    looks |= {arm: (BASELINE_COLOUR, MARKERS[-1 - i % 2]) for i, arm in enumerate(a for a in arms if a in baselines)}
    return looks


def end_labels(axes: Axes, x: float, labels: Sequence[tuple[float, str, str]], gap: float) -> None:
    """Direct labels (y, text, colour) to the right of ``x``, moved apart to at least ``gap`` data units."""
    placed: list[float] = []
    ordered = sorted(labels)
    for y, _, _ in ordered:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    shift = sum(y - p for (y, _, _), p in zip(ordered, placed)) / max(len(placed), 1)
    for (_, text, colour), y in zip(ordered, placed):
        axes.annotate(
            text,
            (x, y + shift),
            xytext=(10, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )
