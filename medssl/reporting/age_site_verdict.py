"""An age-site evaluation in words: the verdict, which differences are inside the noise, and reasons for caution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from medssl.reporting.age_site_results import METRICS, SITE_DIGITS, Result, lowest, paired_reading, results_of
from medssl.reporting.text import Verdict, clean, finite, joined, number, signed

FEW_PEOPLE: Final = 50
FEW_AT_SITE: Final = 10


def age_site_verdict(summary: Mapping[str, Any], people: pd.DataFrame | None) -> Verdict:
    """The sober reading: who predicts age best, what is left of the site, and which differences are inside the noise.

    A verdict that the summary brings with it is shown first; the numbers are always stated.
    """
    results = results_of(summary)
    best = lowest(results, lambda r: r.value("mae_internal"))
    if best is None:
        return Verdict("No age errors are available, so no arm can be called better.", [], _cautions(summary, people))
    begin = "has the lowest age error at seen sites:" if len(results) > 1 else "predicts age at seen sites with"
    years = f"MAE {number(best.value('mae_internal'), 2)} years{_bracket(best, 'mae_internal_ci', 2)}"
    headline = f"{best.name} {begin} {years}; {_site_phrase(best)}."
    lines = [_noise_line(best, results)] if len(results) > 1 else []
    lines += _other_bests(results, best)
    lines += _paired_lines(summary)
    written = summary.get("verdict")
    if isinstance(written, str) and written.strip():
        headline, lines = clean(written, 600), [headline, *lines]
    return Verdict(headline, lines, _cautions(summary, people))


def _bracket(result: Result, name: str, digits: int) -> str:
    ends = result.interval(name)
    return f" (95 % interval {number(ends[0], digits)} to {number(ends[1], digits)})" if ends else ""


def _site_phrase(result: Result) -> str:
    """What the site probe reached, beside chance and what true age alone gives."""
    bacc, chance, floor = (result.value(name) for name in ("bacc", "bacc_chance", "bacc_age_only"))
    if bacc is None:
        return "how well the site can be predicted from it is not known"
    beside = [f"chance is {number(chance, SITE_DIGITS)}"] if chance is not None else []
    beside += [f"true age alone gives {number(floor, SITE_DIGITS)}"] if floor is not None else []
    text = f"the site can be predicted from it with balanced accuracy {number(bacc, SITE_DIGITS)}"
    text += _bracket(result, "bacc_ci", SITE_DIGITS)
    text += f", where {joined(beside)}" if beside else ""
    band, ends = result.interval("bacc_permutation"), result.interval("bacc_ci")
    if result.values.get("below_chance"):
        return text + " (below chance: an artefact of the split, not a success)"
    if band is not None and bacc <= band[1]:
        return text + " (inside what shuffled sites give: nothing is shown beyond chance)"
    if floor is not None and ends is not None and ends[0] <= floor:
        return text + " (not told apart from age alone)"
    return text


def _noise_line(best: Result, results: Sequence[Result]) -> str:
    """Which other results the interval of the best one does not leave behind."""
    ends, others = best.interval("mae_internal_ci"), [r for r in results if r is not best]
    if ends is None:
        return "The age errors have no interval: no difference between arms is claimed."
    near = [r for r in others if (value := r.value("mae_internal")) is not None and value <= ends[1]]
    if not near:
        return "No other result lies inside its 95 % interval."
    names = joined([r.name for r in near[:3]] + ([f"{len(near) - 3} more"] if len(near) > 3 else []))
    share = f"{len(near)} of the {len(others)} other results" if len(others) > 1 else "The other result"
    verb = "lies" if len(near) == 1 else "lie"
    return f"{share} {verb} inside its 95 % interval and so inside the noise: {names}."


def _other_bests(results: Sequence[Result], best: Result) -> list[str]:
    lines = []
    outside = lowest(results, lambda r: r.value("mae_external"))
    if outside is not None:
        lines.append(
            f"Lowest age error at unseen sites: {outside.name}, MAE {number(outside.value('mae_external'), 2)} years"
            f"{_bracket(outside, 'mae_external_ci', 2)}."
        )
    encoded = [r for r in results if not r.values.get("below_chance")]
    hidden = lowest(encoded, lambda r: r.value("bacc"))
    if hidden is not None and hidden is not best:
        mae = number(hidden.value("mae_internal"), 2)
        lines.append(
            f"Least of the site is left in {hidden.name}: {_site_phrase(hidden)}; its age error is {mae} years."
        )
    scored = lowest(results, lambda r: r.value("score"))
    if scored is not None:
        lines.append(
            f"Lowest score (age error at unseen sites x site accuracy to the power 0.3): {scored.name}, "
            f"{number(scored.value('score'), 2)}{_bracket(scored, 'score_ci', 2)}."
        )
    return lines


def _paired_lines(summary: Mapping[str, Any]) -> list[str]:
    """One line per measure: how many paired comparisons with the baseline show what."""
    by_metric: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary.get("paired") or []:
        by_metric.setdefault(str(row["metric"]), []).append(row)
    lines = []
    for metric, rows in by_metric.items():
        title = METRICS.get(metric, clean(metric, 40))
        against = joined(sorted({clean(row["baseline"], 40) for row in rows}))
        if len(rows) == 1:
            text = f"{clean(rows[0]['arm'], 40)} ({clean(rows[0]['layer'], 16)}) {signed(rows[0]['difference'])}: "
            lines.append(f"{title[0].upper()}{title[1:]} against {against}: {text}{paired_reading(rows[0])}.")
            continue
        readings = [paired_reading(row) for row in rows]
        counts = [f"{readings.count(word)} {word}" for word in ("lower", "higher") if word in readings]
        rest = readings.count("no difference shown")
        counts += [f"{rest} without a difference that could be shown"] if rest else []
        lines.append(
            f"{title[0].upper()}{title[1:]} against {against}, {len(rows)} paired comparisons: {joined(counts)}."
        )
    return lines


def _cautions(summary: Mapping[str, Any], people: pd.DataFrame | None) -> list[str]:
    results = results_of(summary)
    scored = any(r.value("score") is not None for r in results)
    cautions = []
    if summary.get("public_splits"):
        cautions.append(
            "Evaluated on the public splits. The test set of the OpenBHB challenge is private: these are not results "
            "of the challenge, and its published numbers are no direct comparison."
        )
    elif scored:
        cautions.append(
            "The score is the formula of the OpenBHB challenge on other people: no result of the challenge."
        )
    if summary.get("evaluated_on") == "validation":
        cautions.append("Evaluated on validation people, on whom settings may have been chosen: not a final result.")
    if summary.get("transductive"):
        cautions.append(
            "Transductive: images of evaluated people (with their labels, where the method uses labels) were used in "
            "pretraining."
        )
    below = [r.name for r in results if r.values.get("below_chance")]
    if below:
        names = joined(below[:4] + ([f"{len(below) - 4} more"] if len(below) > 4 else []))
        cautions.append(f"Site accuracy below chance is an artefact and no sign of a clean embedding: {names}.")
    seeds = [value for r in results if (value := r.value("n_seeds")) is not None]
    if seeds and min(seeds) < 2:
        cautions.append("Some results rest on one seed: how much the start of the training matters is unknown.")
    n_people = finite(summary.get("n_people"))
    if n_people is not None and n_people < FEW_PEOPLE:
        cautions.append(f"Only {n_people:.0f} people were evaluated; an interval from so few is rough.")
    cautions += _site_cautions(summary, people)
    if len(results) > 2:
        cautions.append(
            f"The best of {len(results)} results was picked on the same people that measure it, which flatters it."
        )
    layers = list(dict.fromkeys(clean(r.layer, 16) for r in results))
    if len(layers) > 1:
        cautions.append(f"Layers {joined(layers)} were probed: what one of them hides another may still give away.")
    return cautions


def _site_cautions(summary: Mapping[str, Any], people: pd.DataFrame | None) -> list[str]:
    cautions = []
    chance, floor = finite(summary.get("chance")), finite(summary.get("age_only"))
    if chance is not None and floor is not None and floor > chance + 0.02:
        cautions.append(
            f"Age and site are confounded: true age alone gives the site away with balanced accuracy "
            f"{number(floor, SITE_DIGITS)} (chance {number(chance, SITE_DIGITS)}). What keeps age cannot be expected "
            "below that."
        )
    if people is not None and len(people):
        seen = people[people["set"] != "external"].drop_duplicates(["site", "subject"])["site"].value_counts()
        few = int((seen < FEW_AT_SITE).sum())
        if few:
            verb = "has" if few == 1 else "have"
            cautions.append(
                f"{few} of {len(seen)} sites {verb} fewer than {FEW_AT_SITE} evaluated people: such a site counts as "
                "much in the balanced accuracy as the largest one."
            )
    return cautions
