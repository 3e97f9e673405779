import csv

import pandas as pd
import pytest

from medssl.reporting import write_csv
from medssl.reporting.tables import neutral

FORMULAS = [
    "=1+1", "=HYPERLINK(\"http://x\")", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "--1",
    "+-1", "-", "=\r1", "=", "\uff1d1+1", "-1e", "+1 2", "-0x10", "@", "-infinity()", "+nan()", "-1,5",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_become_text_in_cells_and_headers(tmp_path, text):
    path = write_csv(pd.DataFrame({text: [text, "fine"], "dice": [0.5, -0.25]}), tmp_path / "table.csv")
    with path.open(newline="", encoding="utf-8") as file:
        header, first, second = csv.reader(file)
    shown = "'" + text.replace("\r", "\n")
    assert header == [shown, "dice"]
    assert first == [shown, "0.5"]
    assert second == ["fine", "-0.25"]


@pytest.mark.parametrize("text", ["-1", "+2.5", "-1e-3", "-.5", "plain", "a=b", "", "'=1", "-inf"])
def test_numbers_and_plain_texts_stay(text):
    assert neutral(text) == text


def test_missing_values_are_empty_cells_and_types_survive(tmp_path):
    table = [{"case": None, "n": 1, "dice": float("nan"), "ok": True}, {"case": "=a", "n": 2, "dice": 1.5, "ok": False}]
    assert write_csv(table, tmp_path / "deep/table.csv").read_text() == "case,n,dice,ok\n,1,,True\n'=a,2,1.5,False\n"


def test_repeated_headers_and_the_given_table_are_left_alone(tmp_path):
    table = pd.DataFrame([["=a", "=b"]], columns=["x", "x"])
    assert write_csv(table, tmp_path / "t.csv").read_text() == "x,x\n'=a,'=b\n"
    assert table.iloc[0, 0] == "=a"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = write_csv([{"a": 1}], tmp_path / "t.csv")

    def fail(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("medssl.core.files.os.fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_csv([{"a": 2}], path)
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]
