"""Tables of what there is: methods and encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medssl.methods import METHODS
from medssl.models import ENCODERS


@dataclass(frozen=True)
class Listing:
    """Rows of one table."""

    rows: list[dict[str, Any]]

    def text(self) -> str:
        """One paragraph a row."""
        paragraphs = []
        for row in self.rows:
            details = "\n".join(
                f"    {key + ':':<9}{value}" for key, value in row.items() if key not in ("name", "summary")
            )
            paragraphs.append(f"{row['name']}\n    {row['summary']}\n{details}".rstrip())
        return "\n".join(paragraphs)

    def to_json(self) -> list[dict[str, Any]]:
        """The rows."""
        return self.rows


def list_methods() -> Listing:
    """Every pretraining method with its source and what it asks of a run in its default configuration."""
    rows = []
    for name, entry in METHODS.items():
        needs = entry.config().needs()
        rows.append(
            {
                "name": name,
                "summary": entry.summary,
                "source": entry.source,
                "views": f"{needs.views}"
                + (", the first without augmentation" if needs.original else "")
                + (", intensities only" if needs.moves == "none" else ""),
                "sampler": " or ".join(sorted(needs.samplers)) or "any",
                "labels": ", ".join(needs.labels) or "none",
                "items": ", ".join(f"{dims}D" if dims else "tables" for dims in sorted(needs.spatial_dims)),
                "trains": ", ".join(needs.trains),
            }
        )
    return Listing(rows)


def list_encoders() -> Listing:
    """Every encoder with its defaults."""
    rows = []
    for name, entry in ENCODERS.items():
        defaults = entry.config().model_dump(mode="json", exclude={"name"})
        shown = ", ".join(f"{key}={value}" for key, value in defaults.items())
        rows.append({"name": name, "summary": entry.summary, "defaults": shown})
    return Listing(rows)
