"""Words and numbers of a report: cleaning foreign text, formatting values, and the verdict."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

MISSING: Final = "–"
MAX_LINES: Final = 6
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


def segmentation_verdict(summary: Mapping[str, Any]) -> Verdict:
    """The sober reading of a comparison: a difference only where its 95 % interval leaves out 0.

    A verdict that the summary brings with it is shown first; the numbers are always stated.
    """
    paired = list(summary.get("paired") or [])
    table = list(summary.get("table") or [])
    by_arm: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(paired, key=lambda row: row["n_labelled"]):
        by_arm.setdefault((clean(row["arm"], 60), clean(row["baseline"], 60)), []).append(row)
    by_pair = [_arm_headline(arm, baseline, rows) for (arm, baseline), rows in by_arm.items()]
    lines = [_paired_line(row, table) for rows in by_arm.values() for row in rows]
    lines += [] if paired else [_score_line(row) for row in table]
    headline = "No paired comparison is available, so no arm can be called better."
    if by_pair:
        headline = by_pair[0] if len(by_pair) == 1 else _counted(paired)
        if len(lines) > MAX_LINES:
            by_pair, lines = [_with_numbers(text, rows) for text, rows in zip(by_pair, by_arm.values())], []
        lines = (by_pair if len(by_pair) > 1 or not lines else []) + lines
    written = summary.get("verdict")
    if isinstance(written, str) and written.strip():
        headline, lines = clean(written, 600), [headline, *lines]
    return Verdict(headline, lines, _cautions(summary, paired, table))


def _counted(paired: Sequence[Mapping[str, Any]]) -> str:
    """Many comparisons in one sentence, those without a shown difference included."""
    higher = sum(excludes_zero(row) and row["difference"] > 0 for row in paired)
    lower = sum(excludes_zero(row) and row["difference"] < 0 for row in paired)
    if not higher and not lower:
        return f"None of {len(paired)} paired comparisons shows a difference in Dice."
    rest = len(paired) - higher - lower
    return (
        f"Of {len(paired)} paired comparisons with the baseline, {higher} show a higher Dice, {lower} a lower one "
        f"and {rest} no difference."
    )


def _arm_headline(arm: str, baseline: str, rows: Sequence[Mapping[str, Any]]) -> str:
    higher = [row["n_labelled"] for row in rows if excludes_zero(row) and row["difference"] > 0]
    lower = [row["n_labelled"] for row in rows if excludes_zero(row) and row["difference"] < 0]
    open_ = [row["n_labelled"] for row in rows if not excludes_zero(row)]
    if not higher and not lower:
        return f"No difference between {arm} and {baseline} was shown with {_volumes(open_)}."
    parts = [f"higher Dice than {baseline} with {_volumes(higher)}"] if higher else []
    parts += [f"lower Dice than {baseline} with {_volumes(lower)}"] if lower else []
    rest = f"; no difference was shown with {joined(open_)}" if open_ else ""
    return f"{arm} reached {' and '.join(parts)}{rest}."


def _with_numbers(headline: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The headline of one arm with its differences, for where the full lines would be too many."""
    differences = ", ".join(f"{signed(row['difference'])} (n = {row['n_labelled']})" for row in rows)
    return f"{headline} Differences: {differences}."


def _volumes(counts: Sequence[Any]) -> str:
    return f"{joined(counts)} labelled volume{'' if list(counts) == [1] else 's'}"


def _paired_line(row: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> str:
    n = row["n_labelled"]
    cells = {entry["arm"]: entry for entry in table if entry["n_labelled"] == n}
    arm, baseline = row["arm"], row["baseline"]
    validation = cells.get(arm, {}).get("n_validation")
    scores = ""
    if arm in cells and baseline in cells:
        scores = f"{number(cells[arm].get('mean'))} against {number(cells[baseline].get('mean'))}, "
    low, high = row.get("low"), row.get("high")
    draws = f"{clean(row.get('n_draws'))} draw{'' if row.get('n_draws') == 1 else 's'}"
    if finite(low) is None or finite(high) is None:
        interval, reading = "no interval", "so no difference is claimed"
    else:
        interval = f"95 % interval {signed(low)} to {signed(high)}"
        reading = "0 is outside" if excludes_zero(row) else "it includes 0: no difference shown"
    return (
        f"{labels_phrase(n, validation)}: {clean(arm, 60)} {scores}difference to {clean(baseline, 60)} "
        f"{signed(row.get('difference'))} Dice ({interval}, {reading}; "
        f"{clean(row.get('n_people'))} people, {draws})"
    )


def _score_line(row: Mapping[str, Any]) -> str:
    phrase = labels_phrase(row["n_labelled"], row.get("n_validation"))
    return f"{phrase}: {clean(row['arm'], 60)} mean Dice {number(row.get('mean'))}"


def _cautions(
    summary: Mapping[str, Any], paired: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]
) -> list[str]:
    cautions = []
    if any(row.get("n_draws") == 1 for row in (*paired, *table)):
        cautions.append(
            "Some results rest on one draw of labelled volumes: how much the choice of volumes matters is unknown."
        )
    people = [row["n_people"] for row in paired if finite(row.get("n_people")) is not None]
    if people and min(people) < 10:
        cautions.append(f"Only {min(people):.0f} people were tested; an interval from so few is rough.")
    if len(paired) > 1:
        cautions.append(f"{len(paired)} comparisons were made; the intervals are not widened for that.")
    if summary.get("transductive"):
        cautions.append("Transductive: images of tested people (without labels) were used in pretraining.")
    return cautions
