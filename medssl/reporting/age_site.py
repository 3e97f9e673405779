"""The report of an age-site evaluation: how well age is predicted, and what of the site can still be read off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medssl.reporting.age_site_figures import all_results
from medssl.reporting.age_site_maps import embedding_maps, site_confusion
from medssl.reporting.age_site_people import error_by_decade, predicted_ages
from medssl.reporting.age_site_tables import comparison_table, difference_table, left_out_tables
from medssl.reporting.age_site_tradeoff import trade_off
from medssl.reporting.age_site_verdict import age_site_verdict
from medssl.reporting.describe import Table, cell_table, pairs_table
from medssl.reporting.page import Section, data_section, notes, some, write_page
from medssl.reporting.source import RunFiles, read_run
from medssl.reporting.text import duration, finite


def age_site_report(run_dir: Path) -> Path:
    """Build the report of a comparison or of one evaluation of embeddings; see ``build_report``."""
    run = read_run(run_dir, "age_site")
    summary, people = run.summary, run.people
    no_people = "eval/per_person.csv holds nothing to draw."
    ages = some(predicted_ages(summary, people), error_by_decade(summary, people))
    left_out, each_site = left_out_tables(summary)
    sections = [
        Section(
            "results", "Results", "No scores are available.",
            some(all_results(summary)), some(comparison_table(summary)),
        ),
        Section("trade-off", "Age against site", "No scores are available.", some(trade_off(summary))),
        Section("paired", "Comparisons", "No paired comparison is available.", (), some(difference_table(summary))),
        Section("ages", "Predicted ages", no_people, ages),
        Section("maps", "Maps of the embedding", "No maps were kept.", embedding_maps(summary, run.maps)),
        Section("confusion", "Confusion of sites", "No confusion was recorded.", some(site_confusion(summary))),
        Section("left-out", "Sites left out", "No leave-site-out evaluation.", (), some(left_out)),
        data_section(run),
        Section("evaluation", "Evaluation", "Nothing was recorded.", (), some(_evaluation(run)), notes(summary)),
    ]  # fmt: skip
    cells = some(cell_table(run.cells, "Every training of this run."))
    if each_site is not None:
        sections.append(Section("each-site", "Each site left out", "", (), [each_site], folded=True))
    sections.append(Section("cells", "All trainings", "eval/cells.csv was not found.", (), cells, folded=True))
    return write_page(run, "Brain age and site", age_site_verdict(summary, people), sections)


def _evaluation(run: RunFiles) -> Table | None:
    """On whom, with which baseline, how long."""
    summary = run.summary
    names = {
        "evaluated_on": "evaluated on", "n_people": "people", "n_sites": "sites", "chance": "site accuracy by chance",
        "age_only": "site accuracy from true age alone", "baseline": "baseline",
    }  # fmt: skip
    facts: dict[str, Any] = {title: summary[name] for name, title in names.items() if summary.get(name) is not None}
    if "public_splits" in summary:
        facts["splits"] = "public, not the challenge's" if summary["public_splits"] else "own"
    if finite(summary.get("seconds")) is not None:
        facts["time"] = duration(summary["seconds"])
    return pairs_table("How the results were measured.", facts)
