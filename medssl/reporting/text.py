"""Words and numbers of a report: cleaning foreign text, and formatting values."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MISSING: Final = "–"
_PATH: Final = re.compile(
    r"(https?://\S+)|(?<![\w.])(?:file:/+|~?/|[A-Za-z]:[\\/])(?:[^\s'\",;<>|/\\]+[/\\])+([^\s'\",;<>|/\\]*)"
)
_WHOLE_PATH: Final = re.compile(r"(?:file:/+|~?/|[A-Za-z]:[\\/])[^\n;]*[/\\]([^\n;/\\]*)[/\\]?")


def clean(value: Any, limit: int = 120) -> str:
    """Text from a file as it may be shown: no control or direction characters, no folders of a path, not too long.

    Escaping for HTML is the template's job, always.
    """
    if missing(value):
        return MISSING
    text = number(value) if isinstance(value, float) else str(value)[: 20 * limit]
    text = "".join(" " if c in "\n\t" else "\ufffd" if _unprintable(c) else c for c in text)
    whole = _WHOLE_PATH.fullmatch(text)
    text = f"…/{whole[1]}" if whole else _PATH.sub(lambda match: match[1] or f"…/{match[2]}", text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _unprintable(character: str) -> bool:
    """Control, direction-changing, private, surrogate and line-separating characters."""
    return unicodedata.category(character) in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}


def clean_tree(value: Any) -> Any:
    """``clean`` for every text of nested settings; the order is kept."""
    if isinstance(value, Mapping):
        return {clean(key): clean_tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean_tree(item) for item in value]
    return clean(value, 300) if isinstance(value, str) else value


def missing(value: Any) -> bool:
    """None and NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def finite(value: Any) -> float | None:
    """The value as a finite float, None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 3) -> str:
    """A number with a fixed count of decimals and a true minus sign; a dash when missing."""
    known = finite(value)
    if known is None:
        return MISSING
    return f"{known:.{digits}f}".replace("-", "\u2212")


def signed(value: Any, digits: int = 3) -> str:
    """A difference with its sign."""
    known = finite(value)
    if known is None:
        return MISSING
    return f"{known:+.{digits}f}".replace("-", "\u2212")


def spread(mean: Any, sd: Any, digits: int = 3) -> str:
    """A mean with its standard deviation, without it where it is not known (one seed, one draw)."""
    known = finite(sd) is not None and finite(mean) is not None
    return f"{number(mean, digits)} ± {number(sd, digits)}" if known else number(mean, digits)


def duration(seconds: Any) -> str:
    """Seconds in the unit that fits."""
    known = finite(seconds)
    if known is None:
        return MISSING
    if known < 120:
        return f"{known:.0f} s"
    return f"{known / 60:.0f} min" if known < 7200 else f"{known / 3600:.1f} h"


def joined(items: Iterable[Any]) -> str:
    """``1, 2 and 4``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def labels_phrase(n_labelled: Any, n_validation: Any) -> str:
    """``2 train + 1 validation labels``: every label that was used, also those that chose the checkpoint."""
    shown = "? " if missing(n_validation) else f"{int(n_validation)} "
    return f"{int(n_labelled)} train + {shown}validation labels"


@dataclass
class Verdict:
    """What a reader should take away: a headline, the numbers behind it, and reasons for caution."""

    headline: str
    lines: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)


def excludes_zero(row: Mapping[str, Any]) -> bool:
    """True when a paired difference has an interval and 0 is outside it."""
    low, high = finite(row.get("low")), finite(row.get("high"))
    return low is not None and high is not None and (low > 0 or high < 0)
