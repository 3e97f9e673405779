import html
import json
import re

import numpy as np
import pandas as pd
import pytest
from age_site_fixture import age_site_run
from test_report import HOSTILE, assert_harmless

from medssl.reporting import build_report
from medssl.reporting.age_site_maps import site_confusion
from medssl.reporting.age_site_results import before_after, chosen, paired_reading, results_of, short
from medssl.reporting.age_site_tradeoff import trade_off
from medssl.reporting.age_site_verdict import age_site_verdict
from medssl.reporting.source import run_kind

FEW = ("raw features", "supervised", "l_exp", "l_exp + fair_kl 10")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "brains"
    summary = age_site_run(folder, people=90, external=30, seeds=2, arms=FEW)
    build_report(folder)
    return folder, summary


def words_of(folder):
    audit = assert_harmless((folder / "report.html").read_text())
    return audit, " ".join(" ".join(audit.text).split())


def test_report_is_one_harmless_file_with_every_section(built):
    folder, _ = built
    audit, words = words_of(folder)
    assert len(audit.ids) == len(set(audit.ids))
    sections = {
        "results",
        "trade-off",
        "paired",
        "ages",
        "maps",
        "confusion",
        "left-out",
        "each-site",
        "data",
        "evaluation",
        "cells",
    }
    assert sections | {"settings", "versions"} <= set(audit.ids)
    assert "Missing in this report" not in words
    assert "Every training of this run." in words
    assert "CC BY-SA 4.0" in words
    figures = {"all-results", "trade-off", "predicted-age", "error-by-decade", "map-pca", "map-tsne", "site-confusion"}
    assert {path.name for path in (folder / "figures").iterdir()} == {f"{name}.svg" for name in figures}
    assert not re.search(r'alt=""|aria-label=""', (folder / "report.html").read_text())
    assert "true age (years)" not in words  # axes are drawn, words of figures are in their descriptions
    labels = [value for name, value in audit.attributes if name == "aria-label"]
    assert any("l_exp (z), unseen sites: MAE" in label for label in labels)


def test_public_splits_are_never_called_the_challenges(built):
    folder, summary = built
    assert summary["public_splits"]
    words = words_of(folder)[1]
    assert "these are not results of the challenge" in words
    assert "public, not the challenge's" in words


def test_rebuilding_gives_the_same_bytes(built):
    folder, _ = built
    files = [folder / "report.html", *sorted((folder / "figures").iterdir())]
    before = [path.read_bytes() for path in files]
    build_report(folder)
    assert [path.read_bytes() for path in files] == before


@pytest.mark.filterwarnings("error::UserWarning")
def test_hostile_texts_are_shown_and_never_run(tmp_path):
    folder = tmp_path / "run"
    summary = age_site_run(folder, people=40, seeds=1, arms=FEW, layers=("z",))
    names = dict(zip(FEW, HOSTILE))
    for row in (*summary["rows"], *summary["paired"], *summary["leave_site_out"]["rows"]):
        row["arm"] = names[row["arm"]]
        row.update({"family": HOSTILE[4]} if "family" in row else {})
        row.update({"baseline": names["supervised"]} if "baseline" in row else {})
        row.update({"site": HOSTILE[5]} if "site" in row else {})
        if row.get("debias"):
            row["debias"] = {"name": HOSTILE[0], "weight": HOSTILE[1], "on": HOSTILE[2]}
        if row.get("confusion"):
            row["confusion"]["sites"] = [HOSTILE[int(site)] for site in row["confusion"]["sites"]]
    summary["leave_site_out"]["rows"][0][HOSTILE[6]] = HOSTILE[7]
    summary |= {
        "notes": list(HOSTILE),
        "evaluated_on": HOSTILE[1],
        "baseline": names["supervised"],
        "verdict": HOSTILE[0],
    }
    (folder / "eval/age_site.json").write_text(json.dumps(summary))
    for name in ("per_person", "embedding_maps"):
        table = pd.read_csv(folder / f"eval/{name}.csv", dtype={"site": str})
        table["arm"] = table["arm"].map(names)
        table["site"] = [HOSTILE[int(site)] for site in table["site"]]
        table["subject"] = table["subject"] + HOSTILE[0]
        table.to_csv(folder / f"eval/{name}.csv", index=False)
    text = build_report(folder).read_text()
    assert_harmless(text)
    assert "Missing in this report" not in text
    assert html.escape(HOSTILE[0]) in text
    assert not {"\u202e", "\u2066", "\x00", "\x1b"} & set(text)
    assert "x" * 700 not in text


def test_missing_and_broken_files_are_named_and_the_rest_is_shown(tmp_path):
    folder = tmp_path / "run"
    age_site_run(folder, people=40, seeds=1, arms=FEW[2:], layers=("z",))
    files = {
        "eval/per_person.csv": "predicted ages and errors by decade cannot be shown",
        "eval/embedding_maps.csv": "embedding maps cannot be shown",
        "eval/age_site.json": "scores and comparisons cannot be shown",
    }
    for name, says in files.items():
        (folder / name).unlink()
        if name == "eval/age_site.json":
            (folder / "eval/per_person.csv").write_text("arm,layer\na,z\n")
        text = build_report(folder).read_text()
        assert f"{name} is not there: {says}." in text
    assert "columns missing: age, age_pred" in text
    assert "No age errors are available" in text
    (folder / "eval/age_site.json").write_text('{"rows": [{"arm": "a"}]}')
    assert "a row of `rows` without layer" in build_report(folder).read_text()
    (folder / "eval/age_site.json").write_text('{"rows": 3}')
    assert "`rows` is no list of rows" in build_report(folder).read_text()


def test_one_arm_with_one_seed_and_no_unseen_sites_says_what_is_not_known(tmp_path):
    folder = tmp_path / "run"
    summary = age_site_run(folder, people=40, seeds=1, arms=("l_exp",), layers=("z",)) | {"leave_site_out": None}
    (folder / "eval/age_site.json").write_text(json.dumps(summary))
    assert run_kind(folder) == "age_site"
    build_report(folder)
    words = words_of(folder)[1]
    assert "l_exp (z) predicts age at seen sites with MAE" in words
    assert "rest on one seed" in words
    assert "No paired comparison is available." in words
    assert "No leave-site-out evaluation." in words
    assert "Only 40 people" in words
    for absent in ("unseen sites", "±  –", "nan", "of the 0 other", "score ="):
        assert absent not in words
    assert not (folder / "figures/all-results.svg").exists()


def row(arm, mae=5.0, ci=(4.5, 5.5), bacc=0.5, **more):
    values = {"arm": arm, "layer": "z", "method": "l_exp", "family": arm, "mae_internal": mae, "mae_internal_ci": ci}
    floors = {"bacc": bacc, "bacc_ci": (bacc - 0.05, bacc + 0.05), "bacc_chance": 0.1, "bacc_age_only": 0.3}
    return values | floors | {"bacc_permutation": (0.05, 0.15), "below_chance": False, "n_seeds": 3} | more


def headline(*rows, **more):
    return age_site_verdict({"rows": list(rows), **more}, None)


def test_verdict_names_the_best_and_what_is_inside_the_noise():
    verdict = headline(row("a"), row("b", mae=5.4), row("c", mae=7.0))
    assert verdict.headline == (
        "a (z) has the lowest age error at seen sites: MAE 5.00 years (95 % interval 4.50 to 5.50); the site can be "
        "predicted from it with balanced accuracy 0.500 (95 % interval 0.450 to 0.550), where chance is 0.100 and true "
        "age alone gives 0.300."
    )
    assert verdict.lines[0] == "1 of the 2 other results lies inside its 95 % interval and so inside the noise: b (z)."
    assert headline(row("a", ci=None), row("b")).lines[0].endswith("no difference between arms is claimed.")


@pytest.mark.parametrize(
    ("bacc", "more", "says"),
    [
        (0.12, {}, "nothing is shown beyond chance"),
        (0.32, {}, "(not told apart from age alone)"),
        (0.02, {"below_chance": True}, "(below chance: an artefact of the split, not a success)"),
    ],
)
def test_site_accuracy_is_read_against_chance_and_the_floor(bacc, more, says):
    assert says in headline(row("a", bacc=bacc, **more)).headline


def test_below_chance_is_flagged_and_never_the_least_site():
    verdict = headline(row("a"), row("b", mae=6.0, bacc=0.4), row("c", mae=6.0, bacc=0.02, below_chance=True))
    assert any("artefact and no sign of a clean embedding: c (z)." in text for text in verdict.cautions)
    assert any(line.startswith("Least of the site is left in b (z)") for line in verdict.lines)


def test_cautions_name_the_set_and_the_way_it_was_used():
    verdict = headline(row("a"), evaluated_on="validation", transductive=True, chance=0.1, age_only=0.3, n_people=12)
    text = " ".join(verdict.cautions)
    for word in ("validation people", "Transductive", "confounded", "Only 12 people"):
        assert word in text
    assert "without labels" not in text  # y_aware and its kin learn from the ages of whom they see
    assert "with their labels, where the method uses labels" in text
    assert "on other people: no result of the challenge" in " ".join(headline(row("a", score=2.0)).cautions)
    assert headline(row("a")).cautions == []


@pytest.mark.parametrize(
    ("difference", "ci", "p", "reading"),
    [
        (-1.0, (-2, -0.5), 0.01, "lower"),
        (-1.0, (-2, -0.5), 0.2, "no difference shown"),
        (1.0, (0.5, 2), None, "higher"),
        (1.0, (-0.5, 2), None, "no difference shown"),
        (1.0, None, None, "no difference shown"),
    ],
)
def test_a_paired_difference_is_read_by_holm_or_else_by_its_interval(difference, ci, p, reading):
    assert paired_reading({"difference": difference, "ci": ci, "p_holm": p}) == reading


def test_the_pictures_show_baseline_best_and_balance_and_the_same_family_before_and_after():
    term = {"name": "fair_kl", "weight": 10, "on": "z"}
    rows = [
        row("raw", mae=9, bacc=0.9, method=None), row("supervised", mae=6), row("y", mae=5), row("l", mae=5.1),
        row("l + fair", mae=5.2, bacc=0.1, debias=term, family="l"),
        row("y + fair", mae=7, bacc=0.4, debias=term, family="y"),
    ]  # fmt: skip
    summary = {"rows": rows, "baseline": "supervised"}
    assert [r.arm for r in chosen(summary)] == ["supervised", "y", "l + fair"]
    assert [r.arm for r in before_after(results_of(summary))] == ["l", "l + fair"]
    assert [r.arm for r in before_after(results_of({"rows": rows[1:4]}))] == ["y"]
    picture = trade_off({**summary, "chance": 0.1, "age_only": 0.3})
    assert all(f"{r['arm']} (z)" in picture.alt for r in rows)
    assert "Small numbers are its weights." in picture.caption


def test_sixty_sites_stay_apart_in_the_confusion_and_broken_tables_are_left_out():
    sites = [f"site{i}" for i in range(60)]
    counts = (np.eye(60, dtype=int) * 3 + 1).tolist()
    picture = site_confusion({"rows": [row("a", confusion={"sites": sites, "counts": counts})]})
    assert "Every third site is named." in picture.caption
    assert "mean of the diagonal 0.06" in picture.alt
    for broken in ({"sites": sites, "counts": [[1]]}, {"sites": ["a"], "counts": "x"}, {"sites": ["a", "a"]}, [], None):
        assert site_confusion({"rows": [row("a", confusion=broken)]}) is None


def test_a_crowded_trade_off_has_a_panel_for_each_family():
    def weights(family, count):
        term = {"name": "fair_kl", "on": "z"}
        rows = [row(f"{family} {w}", debias=term | {"weight": w}, family=family) for w in range(1, count)]
        return [row(family), *rows]

    few = trade_off({"rows": [*weights("a", 7), *weights("b", 7)]})
    many = trade_off({"rows": [*weights("a", 8), *weights("b", 8), row("untreated")]})
    assert "Grey dots are the results of the other families." in many.caption
    assert "Grey dots" not in few.caption
    axes = re.compile(rb'id="axes_\d+"')
    assert len(set(axes.findall(few.file))) == 1
    assert len(set(axes.findall(many.file))) == 2


def test_long_names_of_arms_keep_their_ends():
    result = results_of({"rows": [row("decoupled_uniformity + fair_kl 100 on z")]})[0]
    assert short(result) == "decoupled_uni…_kl 100 on z (z)"
