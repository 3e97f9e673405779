import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import yaml
from report_fixture import finetune_run, pretrain_run

from medssl.core.errors import DataError
from medssl.reporting import build_report, pretrain_report
from medssl.reporting.source import run_kind

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "\"><iframe src='http://example.org'></iframe>",
    "' onmouseover='alert(1)",
    "{{ 7*7 }}{% for x in y %}",
    "--><b>bold</b><!--",
    "]]></style><script>x</script>",
    "\u202egnp.exe\u2066",
    "$\\frac{1}{0}$",
    "x" * 10_000,
    "line\nbreak\x00\x1b[31m",
)
TAGS = {
    "bdi", "body", "clippath", "defs", "details", "div", "figcaption", "figure", "g", "h1", "h2", "h3",
    "head", "header", "html", "image", "img", "li", "main", "meta", "p", "path", "pre", "rect", "section", "span",
    "style", "summary", "svg", "table", "tbody", "td", "th", "thead", "title", "tr", "ul", "use",
}  # fmt: skip
LOADS = {"src", "href", "xlink:href", "data", "action", "poster", "srcset"}


class Audit(HTMLParser):
    """Collects every tag and attribute that a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.text = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.text.append(data)


def assert_harmless(text):
    audit = Audit(text)
    assert audit.tags <= TAGS, audit.tags - TAGS
    assert not [name for name, _ in audit.attributes if name.startswith("on")]
    for name, value in audit.attributes:
        if name in LOADS:
            assert value.startswith(("#", "data:image/png;base64,")), (name, value[:80])
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    assert text.index("Content-Security-Policy") < text.index("<title")
    assert not re.search(r"@import|url\((?!#)", text)
    return audit


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "hearts"
    finetune_run(folder, cases=5)
    build_report(folder)
    return folder


def test_report_is_one_harmless_file_with_every_section(built):
    text = (built / "report.html").read_text()
    audit = assert_harmless(text)
    assert len(audit.ids) == len(set(audit.ids))
    for key in (
        "results",
        "paired",
        "classes",
        "examples",
        "training",
        "data",
        "left-out",
        "cells",
        "settings",
        "versions",
    ):
        assert key in audit.ids
    assert "http" not in text.replace("http-equiv", "")
    words = " ".join(" ".join(audit.text).split())
    assert "2 train + 1 validation labels" in words
    assert "small hearts" in words
    assert "CC BY-SA 4.0" in words
    assert "Missing in this report" not in words
    assert text.count('role="img"') == 4
    assert text.count("<img src=") == 3
    assert not re.search(r'alt=""|aria-label=""', text)


def test_figures_are_also_files(built):
    names = {path.name for path in (built / "figures").iterdir()}
    charts = {"dice-by-labels.svg", "dice-by-class.svg", "paired-differences.svg", "training-curves.svg"}
    assert names == charts | {"overlay-best.png", "overlay-median.png", "overlay-worst.png"}


def test_folders_of_paths_do_not_reach_the_report(built):
    text = (built / "report.html").read_text()
    for secret in ("/home/someone", "someone", "~/cache", str(built.parent)):
        assert secret not in text
    assert "…/manifest.csv" in text


def test_rebuilding_gives_the_same_bytes(built):
    def content():
        return {path.name: path.read_bytes() for path in [built / "report.html", *(built / "figures").iterdir()]}

    before = content()
    build_report(built)
    assert content() == before


@pytest.mark.filterwarnings("error::UserWarning")
def test_hostile_texts_are_shown_and_never_run(tmp_path):
    folder = tmp_path / "run"
    summary = finetune_run(folder, counts=(1, 2), draws=2, cases=2)
    for name, payload in zip(("scratch", "gcl"), HOSTILE):
        for row in (*summary["table"], *summary["paired"]):
            row.update({key: payload for key in ("arm", "baseline") if row.get(key) == name})
    summary["notes"] = list(HOSTILE)
    summary["left_out"] = {payload: payload for payload in HOSTILE}
    summary["leak_check"] = {"found": {payload: 1 for payload in HOSTILE}}
    summary["verdict"] = HOSTILE[0]
    (folder / "eval/summary.json").write_text(json.dumps(summary))
    table = pd.read_csv(folder / "eval/per_case.csv")
    for column in ("arm", "case", "subject", "class"):
        values = {value: HOSTILE[i % len(HOSTILE)] for i, value in enumerate(table[column].unique())}
        table[column] = table[column].map(values)
    table.to_csv(folder / "eval/per_case.csv", index=False)
    cells = pd.read_csv(folder / "eval/cells.csv")
    cells["status"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(cells))]
    cells.to_csv(folder / "eval/cells.csv", index=False)
    (folder / "environment.json").write_text(
        json.dumps({payload: payload for payload in HOSTILE} | {"device": HOSTILE[0]})
    )
    (folder / "status.json").write_text(json.dumps({"state": HOSTILE[1], "error": HOSTILE[0], "started": HOSTILE[2]}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"items": list(HOSTILE), "plain": "</pre><script>"}))
    (folder / "manifest.meta.yaml").write_text(yaml.safe_dump({"name": HOSTILE[3], "citation": HOSTILE[10]}))
    manifest = pd.read_csv(folder / "manifest.csv")
    manifest["split"] = [HOSTILE[i % len(HOSTILE)].replace("\x00", "") for i in range(len(manifest))]
    manifest["sex"] = HOSTILE[0]
    manifest.to_csv(folder / "manifest.csv", index=False)
    overlay = dict(np.load(folder / "eval/overlays/worst.npz"))
    np.savez(folder / "eval/overlays/worst.npz", **(overlay | {"title": HOSTILE[0]}))
    text = build_report(folder).read_text()
    assert_harmless(text)
    assert html.escape("<script>alert(1)</script>") in text
    assert "{{ 7*7 }}" in text
    assert not {"\u202e", "\u2066", "\x00", "\x1b"} & set(text)
    assert "x" * 600 not in text


def test_hostile_run_name_is_escaped(tmp_path):
    folder = tmp_path / "<script>alert(1)<"
    pretrain_run(folder)
    text = build_report(folder).read_text()
    assert_harmless(text)
    assert "&lt;script&gt;" in text


PARTS = {
    "eval/summary.json": "scores and comparisons cannot be shown",
    "config.yaml": "the settings cannot be shown",
    "manifest.csv": "the data cannot be described",
    "eval/per_case.csv": "single draws and classes cannot be shown",
    "eval/cells.csv": "single fine-tunings cannot be listed",
    "environment.json": "versions and device are unknown",
}


@pytest.mark.parametrize("gone", [slice(0, 3), slice(3, 6)])
def test_missing_and_broken_files_are_named_and_the_rest_is_shown(tmp_path, gone):
    folder = tmp_path / "run"
    finetune_run(folder, counts=(1,), draws=2, cases=2)
    missing = list(PARTS)[gone]
    for name in PARTS:
        (folder / name).unlink() if name in missing else (folder / name).write_bytes(b'{"a": [\xff\x00')
    text = build_report(folder).read_text()
    for name, says in PARTS.items():
        assert (f"{name} is not there: {says}." if name in missing else f"{name} cannot be read") in text
    assert text.count("<img src=") == 3
    assert_harmless(text)


def test_broken_overlays_and_pickles_are_left_out(tmp_path):
    folder = tmp_path / "run"
    finetune_run(folder, counts=(1,), draws=2, cases=2)
    (folder / "eval/overlays/best.npz").write_bytes(b"PK\x03\x04 no archive")
    np.savez(folder / "eval/overlays/median.npz", image=np.array([object()]), label=0, prediction=0)
    text = build_report(folder).read_text()
    assert text.count("<img src=") == 1
    assert "eval/overlays/best.npz cannot be read" in text
    assert "eval/overlays/median.npz cannot be read" in text


def test_an_unfinished_run_with_one_draw_and_no_comparison_says_so(tmp_path):
    folder = tmp_path / "run"
    summary = finetune_run(folder, arms=("scratch",), counts=(2,), draws=1, cases=3)
    summary["paired"], summary["upper_bound"] = [], None
    (folder / "eval/summary.json").write_text(json.dumps(summary))
    (folder / "status.json").write_text(json.dumps({"state": "interrupted"}))
    text = build_report(folder).read_text()
    assert "No paired comparison is available, so no arm can be called better." in text
    assert "its state is `interrupted`" in text
    assert "rest on one draw" in text
    assert "all 40 labels" not in text


def test_the_upper_bound_is_a_line_and_no_arm(tmp_path):
    folder = tmp_path / "run"
    summary = finetune_run(folder, counts=(1,), draws=2, cases=2)
    table = pd.read_csv(folder / "eval/per_case.csv")
    everything = table[(table["arm"] == "gcl") & (table["draw"] == 0)].assign(arm="upper_bound", n_labelled=40)
    pd.concat([table, everything]).to_csv(folder / "eval/per_case.csv", index=False)
    summary["table"].append(summary["table"][0] | {"arm": "upper_bound", "n_labelled": 40})
    summary["leak_check"] = ["nobody is on both sides"]
    (folder / "eval/summary.json").write_text(json.dumps(summary))
    text = build_report(folder).read_text()
    assert "upper_bound:" not in text
    assert "The dashed line is training with all labels." in text
    assert "<td>upper_bound</td>" in text
    assert "nobody is on both sides" in text


def test_scores_without_a_summary_are_drawn_from_the_cases(tmp_path):
    folder = tmp_path / "run"
    finetune_run(folder, counts=(1, 2), draws=2, cases=2)
    (folder / "eval/summary.json").unlink()
    build_report(folder)
    assert (folder / "figures/dice-by-labels.svg").is_file()
    assert not (folder / "figures/paired-differences.svg").exists()


def test_collapse_monitors_are_shown_where_a_finetune_run_holds_them(tmp_path):
    folder = tmp_path / "run"
    pretrain_run(folder)
    finetune_run(folder, counts=(1,), draws=2, cases=2)
    assert "Collapse monitors of pretraining" in build_report(folder).read_text()


def test_pretrain_report_tells_of_collapse_and_never_of_quality(tmp_path):
    pretrain_run(tmp_path / "good")
    pretrain_run(tmp_path / "bad", collapse=["effective rank 1.2 after step 400"])
    good, bad = build_report(tmp_path / "good").read_text(), pretrain_report(tmp_path / "bad").read_text()
    assert_harmless(good)
    assert "gcl was trained for 1000 steps; no sign of collapse was seen." in good
    assert "decided by fine-tuning" in good
    assert "do not use these weights" in bad
    assert "effective rank 1.2 after step 400" in bad


def test_a_run_too_short_to_be_watched_does_not_claim_to_be_free_of_collapse(tmp_path):
    folder = tmp_path / "run"
    pretrain_run(folder)
    log = pd.read_csv(folder / "logs/metrics.csv")
    log.drop(columns=["spread", "effective_rank"]).to_csv(folder / "logs/metrics.csv", index=False)
    page = build_report(folder).read_text()
    assert "it was not watched for collapse" in page
    assert "no sign of collapse" not in page


@pytest.mark.parametrize("views", ["../secret.png", "figures/views.svg", "figures/fake.png", "figures/gone.png"])
def test_views_are_only_taken_from_a_png_inside_the_run(tmp_path, views):
    folder = tmp_path / "run"
    pretrain_run(folder)
    png = b"\x89PNG\r\n\x1a\n" + b"0" * 20
    (tmp_path / "secret.png").write_bytes(png)
    (folder / "figures").mkdir()
    (folder / "figures/fake.png").write_text("<svg onload=alert(1)>")
    (folder / "figures/views.png").write_bytes(png)
    content = json.loads((folder / "eval/pretrain.json").read_text())
    for name, pictures in ((views, 0), ("figures/views.png", 1)):
        (folder / "eval/pretrain.json").write_text(json.dumps(content | {"views": name}))
        text = build_report(folder).read_text()
        assert text.count("<img src=") == pictures
        assert ("Missing in this report" in text) == (pictures == 0)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing to report"):
        build_report(tmp_path)
    with pytest.raises(DataError, match="no such run folder"):
        run_kind(tmp_path / "missing")
