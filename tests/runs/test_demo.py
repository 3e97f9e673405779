import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_runs import contents

from medssl.config import CompareConfig, FinetuneConfig, PretrainConfig, load_config
from medssl.core.errors import ConfigError
from medssl.runs import demo_brain, demo_cardiac
from medssl.runs.demo import QUICK, Settings, demo, run_demo
from medssl.runs.demo_brain import brain_verdict
from medssl.runs.demo_parts import MARKER, SMOKE, SYNTHETIC

CARDIAC = dataclasses.replace(
    demo_cardiac.QUICK, n_subjects=7, n_test=2, gcl_steps=2, lcl_steps=2, finetune_steps=2, n_labelled=(1,)
)
TINY = Settings(CARDIAC, demo_brain.QUICK, smoke=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished demo, and what it said; run half by half, as someone might."""
    out = tmp_path_factory.mktemp("demo") / "out"
    threads = torch.get_num_threads()
    first = run_demo(out, TINY, "cardiac")
    assert "medssl demo --half brain" in (out / "report.html").read_text()
    second = run_demo(out, TINY, "brain")
    assert torch.get_num_threads() == threads
    return out, first, second


def test_ends_with_both_reports_and_plain_verdicts(done):
    out, first, second = done
    cardiac, brain = (outcome.to_json()["halves"] for outcome in (first, second))
    assert (list(cardiac), list(brain)) == (["cardiac"], ["brain"])
    for outcome, half in ((first, cardiac["cardiac"]), (second, brain["brain"])):
        lines = outcome.text().splitlines()
        assert lines[0] == f"report: {out / 'report.html'}"
        assert lines.count(half["verdict"]) == 1
        assert half["verdict"] in lines[-2]
        assert {SYNTHETIC, SMOKE} < set(lines)
        assert Path(half["report"]).stat().st_size > 10_000
    assert {row["arm"] for row in cardiac["cardiac"]["summary"]["table"]} == {"scratch", "pretrained"}
    arms = {row["arm"] for row in brain["brain"]["summary"]["rows"]}
    assert arms == {"one_step", "l1", "y_aware", "l_exp", "l_exp_fair_kl"}


def test_page_opens_with_both_verdicts_and_leads_to_the_reports(done):
    out, first, second = done
    page = (out / "report.html").read_text()
    places = [page.index(SYNTHETIC)]
    for outcome, name in ((first, "cardiac"), (second, "brain")):
        half = outcome.to_json()["halves"][name]
        places += [page.index(half["verdict"]), page.index(f'href="{Path(half["report"]).relative_to(out)}"')]
    assert places == sorted(places)


def test_every_report_says_that_the_data_are_synthetic(done):
    for name in ("report.html", "cardiac/finetune/report.html", "brain/compare/report.html"):
        page = (done[0] / name).read_text()
        assert SYNTHETIC in page
        assert SMOKE in page
        assert "not finished" not in page


def test_training_never_saw_test_people(done):
    out = done[0]
    test = set(pd.read_csv(out / "cardiac" / "manifest.csv").query("split == 'test'")["subject"])
    assert len(test) == 2
    for run in ("gcl", "lcl"):
        assert not test & set(pd.read_csv(out / "cardiac" / run / "manifest.csv")["subject"])
    evaluated = pd.read_csv(out / "brain" / "compare" / "eval" / "per_person.csv", dtype={"subject": str})
    people = pd.read_csv(out / "brain" / "data" / "manifest.csv", dtype={"subject": str}).set_index("subject")["split"]
    for name, rows in evaluated.groupby("set"):
        assert set(people.loc[rows["subject"]]) == {f"{name}_test"}


def test_running_again_repeats_nothing(done):
    out, *outcomes = done
    kept = ("cardiac/finetune/cells", "cardiac/data", "cardiac/lcl/weights", "brain/data", "brain/compare/cells")
    before = [contents(out / name) for name in kept]
    again = run_demo(out, TINY)
    for outcome in outcomes:
        for name, half in outcome.to_json()["halves"].items():
            assert again.to_json()["halves"][name]["verdict"] == half["verdict"]
    assert [contents(out / name) for name in kept] == before


def test_folder_of_something_else_is_refused_and_left_alone(done, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="something else"):
        demo(tmp_path, smoke=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    before = contents(done[0])
    for other in (dataclasses.replace(TINY, version=1), dataclasses.replace(TINY, brain=demo_brain.FULL), QUICK):
        with pytest.raises(ConfigError, match="other settings"):
            run_demo(done[0], other, "cardiac")
    assert contents(done[0]) == before


@pytest.mark.parametrize("half", ["cardiac", "brain"])
def test_interrupted_generation_is_begun_again(half, tmp_path, monkeypatch):
    from medssl.data.cohorts import synthetic

    generate = synthetic.generate

    def stopped(root, *arguments, **settings):
        (root / "images").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path, TINY, half)
    assert (tmp_path / MARKER).is_file()
    begun = []

    def seen(*arguments, **settings):
        begun.append(generate(*arguments, **settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "generate", seen)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, TINY, half)
    assert begun[0].is_file()


def test_written_configurations_are_complete_runs(tmp_path):
    out = tmp_path / "a folder: with 'odd' # characters"
    files = demo_cardiac.write_configs(out, demo_cardiac.FULL, smoke=False)
    gcl, lcl = (load_config(PretrainConfig, files[name]) for name in ("gcl", "lcl"))
    tuned = load_config(FinetuneConfig, files["finetune"])
    assert gcl.data.manifest == out / "manifest.csv"
    assert lcl.weights == out / "gcl"
    assert [arm.weights for arm in tuned.grid.arms] == [None, out / "lcl"]
    assert gcl.model.encoder == lcl.model.encoder == tuned.model.encoder
    assert (tuned.grid.draws, tuned.grid.n_labelled) == (3, (1, 2))
    plan = load_config(CompareConfig, demo_brain.write_plan(out, demo_brain.FULL, smoke=False))
    assert plan.data.manifest == out / "data" / "manifest.csv"
    assert (plan.protocol.folds, plan.protocol.seeds, plan.baseline) == (None, (0, 1, 2), "l_exp")
    with_term, without = plan.arm("l_exp_fair_kl"), plan.arm("l_exp")
    assert with_term.model_copy(update={"name": "l_exp", "debias": None}) == without


def found(site, age):
    """A summary in which FairKL changes site and age by so much, and whether that is shown."""
    rows = [
        {"arm": arm, "layer": "z", "n_seeds": 3, "mae_internal": 5.0, "mae_external": 6.0, "bacc": 0.5}
        | {f"{name}_sd": 0.1 for name in ("mae_internal", "mae_external", "bacc")}
        for arm in ("l1", "l_exp", "l_exp_fair_kl")
    ]
    values = {"bacc": site, "mae_internal": age, "mae_external": (0.1, False)}
    paired = [
        {"arm": arm, "baseline": "l_exp", "layer": "z", "metric": metric, "difference": difference}
        | {"ci": [difference - 1, difference + 1], "p": 0.5, "p_holm": 0.01 if shown else 0.5}
        for arm in ("l1", "l_exp_fair_kl")
        for metric, (difference, shown) in values.items()
    ]
    return {"rows": rows, "paired": paired, "chance": 0.1, "age_only": 0.2, "n_people": 60}


@pytest.mark.parametrize(
    ("site", "age", "begin"),
    [
        ((-0.2, True), (0.1, False), "FairKL takes some of the site out of the embedding:"),
        ((-0.2, True), (2.0, True), "FairKL takes some of the site out of the embedding, and some of the age with it:"),
        ((-0.2, False), (0.1, False), "Whether FairKL hides the site cannot be told from noise:"),
        ((0.2, True), (0.1, False), "FairKL makes the site easier to read off the embedding:"),
    ],
)
def test_verdict_claims_what_the_paired_comparison_shows(site, age, begin):
    headline, lines = brain_verdict(found(site, age))
    assert headline.startswith(begin)
    assert ("no difference shown" in headline.split(". ")[0]) is not site[1]
    assert "0.20" in lines[0]
    assert [line.partition(":")[0] for line in lines[1:4]] == ["l1 (supervised)", "l_exp", "l_exp_fair_kl"]
