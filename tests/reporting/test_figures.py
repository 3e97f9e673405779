import numpy as np
import pandas as pd
import pytest
from report_fixture import finetune_run

from medssl.reporting import curves, scores
from medssl.reporting.drawing import arm_looks
from medssl.reporting.source import Overlay
from medssl.reporting.text import clean, excludes_zero, joined
from medssl.reporting.verdict import finetune_verdict


def paired(low, high, difference=0.05, n=2, **extra):
    row = {"arm": "gcl", "baseline": "scratch", "n_labelled": n, "difference": difference, "low": low, "high": high}
    return row | {"n_people": 20, "n_draws": 3} | extra


def test_verdict_says_no_difference_when_the_interval_includes_zero():
    verdict = finetune_verdict({"paired": [paired(-0.01, 0.11)]})
    assert verdict.headline == "No difference between gcl and scratch was shown with 2 labelled volumes."
    assert "it includes 0: no difference shown" in verdict.lines[0]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (-0.1, 0.0), (None, 0.1), (0.01, None), (float("nan"), 0.2)])
def test_an_interval_that_touches_zero_or_is_missing_shows_nothing(low, high):
    assert not excludes_zero(paired(low, high))
    assert finetune_verdict({"paired": [paired(low, high)]}).headline.startswith("No difference")


def test_verdict_tells_gains_losses_and_open_cases_apart():
    rows = [paired(0.01, 0.1, n=1), paired(-0.02, 0.1, n=4), paired(-0.2, -0.1, difference=-0.15, n=8)]
    headline = finetune_verdict({"paired": rows}).headline
    assert headline == (
        "gcl reached higher Dice than scratch with 1 labelled volume and lower Dice than scratch with 8 labelled "
        "volumes; no difference was shown with 4."
    )


def test_many_arms_are_counted_in_the_headline_and_named_below():
    rows = [paired(0.01, 0.1), paired(-0.01, 0.1, n=4), paired(-0.3, -0.1, difference=-0.2, arm="lcl")]
    verdict = finetune_verdict({"paired": rows})
    assert verdict.headline.startswith(
        "Of 3 paired comparisons with the baseline, 1 show a higher Dice, 1 a lower one and 1 no"
    )
    assert any(line.startswith("lcl reached lower Dice") for line in verdict.lines)
    assert finetune_verdict({"paired": [paired(-1, 1), paired(-1, 1, arm="lcl")]}).headline.startswith("None of 2")


def test_long_verdicts_keep_their_numbers():
    rows = [paired(-0.01, 0.1, n=n, difference=0.04 + n / 1000) for n in range(1, 9)]
    verdict = finetune_verdict({"paired": rows})
    assert len(verdict.lines) == 1
    assert "+0.041 (n = 1)" in verdict.lines[0]
    assert "+0.048 (n = 8)" in verdict.lines[0]


def test_a_verdict_of_the_run_never_hides_the_computed_one():
    verdict = finetune_verdict({"paired": [paired(-0.01, 0.1)], "verdict": "gcl wins"})
    assert verdict.headline == "gcl wins"
    assert verdict.lines[0].startswith("No difference between gcl and scratch")


def test_verdict_warns_of_one_draw_few_people_and_transductive_pretraining():
    cautions = " ".join(
        finetune_verdict({"paired": [paired(0.1, 0.2, n_draws=1, n_people=4)], "transductive": True}).cautions
    )
    for word in ("one draw", "Only 4 people", "Transductive", "with their labels, where the method uses labels"):
        assert word in cautions
    assert finetune_verdict({"paired": [paired(0.1, 0.2)]}).cautions == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jane/data/a.nii.gz", "…/a.nii.gz"),
        ("read /home/jane/a.nii twice", "read …/a.nii twice"),
        ("/home/jane doe/scans/a.nii", "…/a.nii"),
        ("C:\\Users\\jane\\a.nii", "…/a.nii"),
        ("file:///srv/jane/a.nii", "…/a.nii"),
        ("~/jane/a.nii", "…/a.nii"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("0.5 mm/voxel and/or 1/2", "0.5 mm/voxel and/or 1/2"),
        ("a\u202eb\x00c\nd", "a\ufffdb\ufffdc d"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_clean_hides_folders_and_control_characters(text, shown):
    assert clean(text) == shown


def test_clean_cuts_long_texts():
    assert len(clean("y" * 10_000, 50)) == 50
    assert joined([1, 2, 4]) == "1, 2 and 4"


def test_every_arm_has_its_own_look_and_the_baseline_is_grey():
    arms = [f"arm{i}" for i in range(14)]
    looks = arm_looks(["scratch", *arms], ["scratch"])
    assert len(set(looks.values())) == 15
    assert looks["scratch"][0] == "#555555"


def test_draw_scores_average_classes_within_a_case_and_leave_out_missing():
    rows = [
        ("a", 1, 0, 0, "p1", 0.2),
        ("a", 1, 0, 0, "p1", 0.4),
        ("a", 1, 0, 0, "p2", 0.9),
        ("a", 1, 0, 0, "p2", np.nan),
    ]
    table = pd.DataFrame(rows, columns=["arm", "n_labelled", "draw", "seed", "case", "dice"])
    assert scores.draw_scores(table)["dice"].tolist() == [pytest.approx(0.6)]


def test_binned_means_leave_empty_spans_missing():
    x, y = curves.binned(np.array([0.0, 0.5, 59.0]), np.array([1.0, 3.0, np.nan]), 60)
    assert len(x) == 60
    assert y[0] == 2
    assert np.isnan(y[1:]).all()


def test_five_arms_keep_their_dots_and_names(tmp_path):
    arms = ("scratch", "simclr", "gcl", "lcl", "gcl+lcl")
    summary = finetune_run(tmp_path / "run", arms=arms, counts=(1, 4), draws=2, cases=2)
    frame = pd.read_csv(tmp_path / "run/eval/per_case.csv")
    picture = scores.score_by_labels(summary, frame)
    assert all(arm in picture.alt for arm in arms)
    assert picture.file.count(b"<use ") >= 5 * 2 * 2
    assert b"<text" not in picture.file  # glyphs are outlines: no font is needed
    assert b"<!--" not in picture.file
    assert "does not start at 0" in picture.caption


def test_charts_are_absent_when_there_is_nothing_to_draw():
    empty = pd.DataFrame(
        {"arm": ["a"], "n_labelled": [1], "draw": [0], "seed": [0], "case": ["p"], "class": ["x"], "dice": [np.nan]}
    )
    assert scores.score_by_labels({}, empty) is None
    assert scores.class_boxes({}, empty) is None
    assert scores.paired_differences({}) is None
    assert curves.training_curves([], {}) is None
    assert curves.pretraining_curves(None) is None
    assert curves.pretraining_curves(pd.DataFrame({"step": [1], "loss": [1.0]}), monitors_only=True) is None


def test_overlay_survives_constant_images_and_structures_that_touch_the_border():
    full = np.ones((6, 9), dtype=int)
    picture = scores.overlay_picture(Overlay("best", "t", np.full((6, 9), np.nan), full, np.zeros_like(full)))
    assert picture.file.startswith(b"\x89PNG")
    assert b"Software" not in picture.file
    assert picture.alt.endswith("label values in the picture: 1")
