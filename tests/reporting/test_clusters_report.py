"""What a report says of clusters: the last ones in a table, all refreshes in a figure, signs of collapse by name."""

import json

import pandas as pd
import pytest
from report_fixture import pretrain_run

from medssl.reporting.clusters import cluster_curves, cluster_table, read_clusters
from medssl.reporting.report import build_report


def rows(step, column, ami, head=0, **changes):
    values = {"nmi": 0.5, "ami": ami, "ari": 0.25, "n": 30, "n_missing": 2, "balance": 0.9, "empty": 1}
    return {"step": step, "head": head, "column": column, **values, **changes}


def test_the_table_holds_the_last_clusters_and_spreads_over_heads():
    frame = read_clusters(
        pd.DataFrame([rows(0, "site", 0.9), rows(8, "site", 0.2), rows(8, "site", 0.4, head=1), rows(8, "age", None)])
    )
    table = cluster_table(frame)
    assert "after 8 steps" in table.caption
    assert "2 heads" in table.caption
    site, age = table.rows
    assert site == ["site", "0.500 ± 0.000", "0.300 ± 0.141", "0.250 ± 0.000", "30", "2", "0.900 ± 0.000", "1.0"]
    assert age[:3] == ["age", "0.500", "–"]


def test_clusters_without_columns_still_tell_how_evenly_they_are_filled():
    nothing = {name: None for name in ("nmi", "ari", "n", "n_missing")}
    frame = read_clusters(pd.DataFrame([rows(0, None, None, **nothing)]))
    assert cluster_table(frame).rows == [["none", "–", "–", "–", "", "", "0.900", "1"]]
    assert cluster_curves(frame) is None  # one refresh is no curve
    assert cluster_table(None) is None
    with pytest.raises(ValueError, match="balance"):
        read_clusters(pd.DataFrame([rows(0, "site", 0.1)]).drop(columns="balance"))


def test_a_report_shows_clusters_and_names_each_collapse(tmp_path):
    folder = tmp_path / "run"
    pretrain_run(folder, collapse=["dead prototypes: items prefer 1 % of the prototypes"])
    content = json.loads((folder / "eval/pretrain.json").read_text())
    (folder / "eval/pretrain.json").write_text(
        json.dumps({**content, "recovered": ["loss at chance: 3; gone"], "clusters": [rows(9, "site", 0.35, empty=4)]})
    )
    pd.DataFrame([rows(0, "<b>site", 0.1), rows(9, "<b>site", 0.35)]).to_csv(folder / "logs/clusters.csv", index=False)
    page = build_report(folder).read_text()
    assert "it ended with signs of collapse" in page
    assert "Sign of collapse: dead prototypes: items prefer 1 % of the prototypes" in page
    assert "Sign of collapse that went away: loss at chance: 3; gone" in page
    assert "At the end 4 clusters held no item" in page
    assert "<b>site" not in page
    assert 'id="clusters"' in page
    assert "AMI with" in page
    assert "0.350" in page
    assert (folder / "figures/clusters.svg").is_file()
    (folder / "logs/clusters.csv").write_text("step,head\n1,0\n")
    assert "clusters cannot be shown" in build_report(folder).read_text()
    (folder / "logs/clusters.csv").unlink()
    assert 'id="clusters"' not in build_report(folder).read_text()
