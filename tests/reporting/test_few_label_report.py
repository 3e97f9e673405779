"""The report of a few-label comparison: what it says of differences, and that nothing broken or hostile stops it."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from report_fixture import common

from medssl.reporting import build_report
from medssl.reporting.few_label import few_label_verdict, pretraining_table, with_encoders
from medssl.reporting.few_label_figures import draw_means, is_shown
from medssl.reporting.metric import METRICS
from medssl.reporting.source import run_kind

ARMS = ("scratch", "helps", "noise", "harms")
EFFECT = {"scratch": 0.0, "helps": 0.05, "noise": 0.004, "harms": -0.06}
P = {"helps": 0.003, "noise": 0.8, "harms": 0.004}


def few_label_run(folder, encoders=("unet3d",), counts=(2,), arms=ARMS):
    """A finished comparison whose arms differ as ``EFFECT`` says."""
    rng = np.random.default_rng(3)
    rows, table, paired, best = [], [], [], []
    for encoder in encoders:
        for n in counts:
            for arm in arms:
                effect = EFFECT.get(arm, 0.0)
                own = [
                    {"arm": arm, "encoder": encoder, "n_labelled": n, "draw": draw, "seed": 0, "case": f"c{case:02d}",
                     "subject": f"c{case:02d}", "group": f"g{case // 2}", "class": "left", "missed": 0,
                     "dice": float(np.clip(0.7 + effect + rng.normal(0, 0.02), 0, 1)), "hd95_mm": 4.0}
                    for draw in (1, 2, 3) for case in range(6)
                ]  # fmt: skip
                rows += own
                mean = float(np.mean([row["dice"] for row in own]))
                known = {"arm": arm, "encoder": encoder, "n_labelled": n}
                table.append({**known, "n_validation": 0, "n_draws": 3, "n_seeds": 1, "mean": mean, "sd": 0.02,
                              "min": mean - 0.02, "max": mean + 0.02, "hd95_mm": 4.0, "missed": 0})  # fmt: skip
                if arm != "scratch":
                    paired.append({**known, "baseline": "scratch", "difference": effect, "low": effect - 0.03,
                                   "high": effect + 0.03, "p_value": P.get(arm, 0.5), "p_holm": P.get(arm, 0.5),
                                   "n_people": 3, "n_draws": 3})  # fmt: skip
            best.append({"encoder": encoder, "n_labelled": n, "arm": arms[1], "mean": 0.75})
    against = [{**row, "baseline": arms[1]} for row in paired if row["arm"] != arms[1]]
    summary = {
        "kind": "few_label", "task": "segmentation", "metric": "dice", "baseline": "scratch", "evaluated_on": "test",
        "encoders": list(encoders), "budget": {"pretraining": {"seconds": 90.0}, "finetuning": {"steps": 500}},
        "table": table, "paired": paired, "best": best, "paired_best": against,
        "upper_bound": [{"encoder": encoder, "mean": 0.85, "n_labelled": 60} for encoder in encoders],
        "gap_closed": [{"arm": "helps", "encoder": one, "n_labelled": counts[0], "share": 0.3} for one in encoders],
        "pretraining": [
            {"arm": arm, "encoder": encoder, "seed": 0, "stage": 1, "folder": "1-x", "method": arm, "steps": 450,
             "seconds": 90.1, "loss": 1.25, "collapse": ["rank 1.2 of 64"] if arm == "harms" else [], "notes": []}
            for encoder in encoders for arm in arms[1:]
        ],
        "failed": {}, "left_out": {"both_empty": 0}, "transductive": False, "leak_check": {}, "notes": ["A note."],
        "verdict": "Of 3 comparisons with scratch, 2 show a difference.",
    }  # fmt: skip
    (folder / "eval").mkdir(parents=True)
    (folder / "eval/summary.json").write_text(json.dumps(summary))
    pd.DataFrame(rows).to_csv(folder / "eval/per_case.csv", index=False)
    common(folder, "compare")
    return summary


def text_of(page):
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_report_shows_differences_only_after_holm(tmp_path):
    summary = few_label_run(tmp_path / "run")
    assert run_kind(tmp_path / "run") == "few_label"
    page = text_of(build_report(tmp_path / "run").read_text())
    assert [is_shown(row) for row in summary["paired"]] == [True, False, True]
    readings = re.findall(r"<td>(\w+)</td><td>(better|worse|no difference shown)</td>", page)
    assert readings[:3] == [("helps", "better"), ("noise", "no difference shown"), ("harms", "worse")]
    assert "It was chosen on the people that it is compared on" in page
    assert "200" in page  # ms a step: 90.1 s over 450 steps
    assert "Pretraining showed signs of collapse in harms" in page
    assert {path.name for path in (tmp_path / "run/figures").iterdir()} == {
        "scores-unet3d-n2.svg", "differences-unet3d-n2.svg"
    }  # fmt: skip


def test_same_files_give_the_same_report(tmp_path):
    few_label_run(tmp_path / "run", encoders=("unet3d", "wide"), counts=(2, 8))
    path = build_report(tmp_path / "run")
    before = path.read_bytes()
    assert build_report(tmp_path / "run").read_bytes() == before
    page = text_of(before.decode())
    assert "helps on wide" in page
    assert "scratch on unet3d" in page
    assert len(list((tmp_path / "run/figures").iterdir())) == 8


def test_means_count_people_alike_however_many_scans_they_have():
    rows = [("a", "p", 0.2), ("a", "p", 0.4), ("b", "q", 0.9)]
    table = pd.DataFrame(
        [{"arm": "x", "encoder": "e", "n_labelled": 1, "draw": 1, "seed": 0, "case": f"{c}{i}", "group": g, "dice": d}
         for i, (c, g, d) in enumerate(rows)]
    )  # fmt: skip
    assert draw_means(table, METRICS["dice"])["dice"].tolist() == [pytest.approx(0.6)]


@pytest.mark.parametrize("missing", ["eval/summary.json", "eval/per_case.csv", "manifest.csv"])
def test_what_is_missing_is_named_and_the_rest_shown(tmp_path, missing):
    few_label_run(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("kind: compare\nprotocol: {name: few_label}\n")
    (tmp_path / "run" / missing).unlink()
    assert f"{missing} is not there" in build_report(tmp_path / "run").read_text()


@pytest.mark.parametrize("content", ["[]", '{"kind": "few_label", "table": [{"arm": "x"}]}', '{"kind": "few_label"}'])
def test_a_broken_summary_stops_nothing(tmp_path, content):
    few_label_run(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("kind: compare\nprotocol: {name: few_label}\n")
    (tmp_path / "run/eval/summary.json").write_text(content)
    assert "No scores are available" in build_report(tmp_path / "run").read_text()


def test_names_of_arms_and_encoders_are_text(tmp_path):
    name = "<script>alert(1)</script>"
    few_label_run(tmp_path / "run", encoders=("../../x",), arms=("scratch", name))
    page = build_report(tmp_path / "run").read_text()
    assert "<script>alert" not in page
    assert all(path.parent == tmp_path / "run/figures" for path in tmp_path.rglob("*.svg"))


def test_cautions_say_what_the_numbers_rest_on(tmp_path):
    summary = few_label_run(tmp_path / "run")
    cautions = " ".join(few_label_verdict(summary).cautions)
    for words in ("3 draws", "One seed", "Only 3 people"):
        assert words in cautions
    failed = few_label_verdict({**summary, "failed": {"moco@unet3d@seed0": "no memory"}}).cautions
    assert "1 cells failed and are missing: moco@unet3d@seed0" in failed[0]
    assert with_encoders(summary)["table"] == summary["table"]
    assert pretraining_table({}) is None
