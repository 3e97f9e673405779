import os
import time

import numpy as np
import pandas as pd
import pytest

from medssl.core.errors import DataError, DiskError, MedsslError
from medssl.data.manifest import ManifestError, ManifestMeta, read_manifest, write_manifest


def write(folder, text, name="manifest.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(folder, text, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(write(folder, text), **options)
    return [(one.line, one.column, one.message) for one in caught.value.problems]


def test_reads_all_columns_keeps_others_and_leaves_missing_cells_missing(tmp_path):
    manifest = read_manifest(
        write(
            tmp_path, "subject,image,age,frame,site,field,code\ns1,a.nii.gz,33.5,0,,3,007\ns2,b.nii.gz,,,Paris,1.5,\n"
        )
    )
    table = manifest.table
    assert table["age"].tolist()[0] == 33.5
    assert np.isnan(table["age"][1])
    assert table["frame"].dtype == "Int64"
    assert table["frame"][0] == 0
    assert table["frame"][1] is pd.NA
    assert table["site"].tolist() == [None, "Paris"]
    assert table["label"].tolist() == [None, None]
    assert table["field"].tolist() == [3, 1.5]  # an extra column of numbers
    assert table["code"].tolist() == ["007", None]  # leading zeros are part of an id
    assert table["group"].tolist() == ["s1", "s2"]
    assert table["volume"].tolist() == [0, 1]
    assert table["case"].tolist() == ["s1_frame00", "s2"]


def test_paths_start_at_the_manifest_or_are_absolute_and_channels_are_joined(tmp_path):
    text = "subject,image,label,modality\ns1,x/a.nii; /data/b.nii,l.nii,T1;T2\ns2,c.nii,,T2;ADC\n"
    manifest = read_manifest(write(tmp_path, text))
    assert [str(path) for path in manifest.image_paths(0)] == [str(tmp_path / "x/a.nii"), "/data/b.nii"]
    assert manifest.label_path(0) == tmp_path / "l.nii"
    assert manifest.label_path(1) is None
    assert manifest.channels(0) is None
    assert manifest.channels(1) == 2  # one 4D file


@pytest.mark.parametrize(
    ("cells", "column", "part"),
    [
        (",a.nii,,,,", "subject", "required, but empty"),
        ("s1,,,,,", "image", "required, but empty"),
        ("../s1,a.nii,,,,", "subject", "not an id"),
        (".s1,a.nii,,,,", "subject", "not an id"),
        ("s 1,a.nii,,,,", "subject", "not an id"),
        ("s" * 129 + ",a.nii,,,,", "subject", "not an id"),
        ("s1,a.nii,a/b,,,", "session", "not an id"),
        ("s1,a.nii,,unknown,,", "age", "'unknown' is not an age"),
        ("s1,a.nii,,-1,,", "age", "'-1' is not an age"),
        ("s1,a.nii,,200,,", "age", "'200' is not an age"),
        ("s1,a.nii,,nan,,", "age", "'nan' is not an age"),
        ("s1,a.nii,,1_0,,", "age", "'1_0' is not an age"),
        ("s1,a.nii,,,1.5,", "frame", "'1.5' is not a whole number"),
        ("s1,a.nii,,,-2,", "frame", "'-2' is not a whole number"),
        ("s1,a.nii,,,inf,", "frame", "'inf' is not a whole number"),
        ("s1,a.nii,,,,=SUM(A1)", "note", "spreadsheet formula"),
        ("s1,a.nii,,,,@here", "note", "spreadsheet formula"),
        ("s1,+x.nii,,,,", "image", "spreadsheet formula"),
        ("s1,a.nii;,,,,", "image", "empty path"),
        ("s1,/dev/zero,,,,", "image", "device"),
        ("s1,a.nii;/proc/self/mem,,,,", "image", "device"),
        ("s1,a.nii,,,,a\tb\x07", "note", "control character"),
    ],
)
def test_every_bad_cell_is_named_by_line_and_column(tmp_path, cells, column, part):
    found = problems(tmp_path, f"subject,image,session,age,frame,note\nok,ok.nii,,30,1,-1.5\n{cells}\n")
    assert len(found) == 1
    assert found[0][:2] == (3, column)
    assert part in found[0][2]


def test_one_pass_reports_everything_with_lines_as_a_person_counts_them(tmp_path):
    text = (
        "subject,image,age,frame\r\n"
        "s1,a.nii,old,0\r\n"
        "\r\n"
        '"s2","b.nii",-5,x\r\n'
        "s3\r\n"
        "s4,d.nii,20,0\r\n"
        "s4,d.nii,20,0\r\n"
        ",e.nii,20,0,9\r\n"
    )
    found = problems(tmp_path, text)
    assert [(line, column) for line, column, _ in found] == [
        (2, "age"), (4, "age"), (4, "frame"), (5, ""), (7, ""), (8, "")
    ]  # fmt: skip
    assert "repeats line 6" in found[4][2]
    with pytest.raises(
        ManifestError, match=r"6 problems\n  - line 2, age: 'old' is not an age of 0 to 130 years"
    ) as caught:
        read_manifest(tmp_path / "manifest.csv")
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_blank_lines_do_not_shift_the_line_of_a_volume(tmp_path):
    manifest = read_manifest(write(tmp_path, 'subject,image\n\ns1,a.nii\n,\n"s2",b.nii\n'))
    assert manifest.table["volume"].tolist() == [0, 1]
    assert [manifest.line(volume) for volume in (0, 1)] == [3, 5]
    assert manifest.select(manifest.table["subject"] == "s2").line(1) == 5


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"subject;image\ns1;a.nii\n", "semicolons"),
        (b"subject\timage\ns1\ta.nii\n", "tabs"),
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"subject,image\n", "no row"),
        ("subject,image\ns1,a.nii\n".encode("utf-16"), "UTF-16"),
        (b"subject,image,site\ns1,a.nii,Orl\xe9ans\n", "not UTF-8"),
        (b"subject,image\ns\x001,a.nii\n", "NUL"),
        (b'subject,image\n"s1,a.nii\n', "cannot be read on"),
        (b"subject,image,image\ns1,a.nii,b.nii\n", "two columns"),
        (b"subject,image,\ns1,a.nii,x\n", "no name"),
        (b"subject,image,=cmd\ns1,a.nii,x\n", "formula"),
        (b"subject,image,case\ns1,a.nii,x\n", "kept for what is derived"),
        (b"Subject,image\ns1,a.nii\n", "Did you mean `Subject`?"),
        (b"subject,image,modality\ns1,a.nii;b.nii,T1;T2;T3\n", "one modality per image"),
        (b"subject,image,label\ns1,a.nii,l.nii;m.nii\n", "one label map"),
        (b"subject,image,group\ns1,a.nii,g1\ns1,b.nii,g2\n", "in group g2 here and in g1 on line 2"),
    ],
)
def test_files_that_are_no_manifest_say_why(tmp_path, raw, part):
    assert any(part in message for _, _, message in problems(tmp_path, raw))


def test_bom_and_windows_line_ends_and_quotes_are_read(tmp_path):
    manifest = read_manifest(write(tmp_path, b'\xef\xbb\xbfsubject,image,site\r\ns1,"a, b.nii", Orl\xc3\xa9ans \r\n'))
    assert manifest.table["image"][0] == "a, b.nii"
    assert manifest.table["site"][0] == "Orléans"


def test_mapping_reads_a_column_of_another_name_and_names_the_nearest(tmp_path):
    text = "subject,image,person\ns1,a.nii,p1\ns2,b.nii,p1\n"
    manifest = read_manifest(write(tmp_path, text), mapping={"group": "person"})
    assert manifest.table["group"].tolist() == ["p1", "p1"]
    assert manifest.table["person"].tolist() == ["p1", "p1"]
    assert "Did you mean `person`?" in problems(tmp_path, text, mapping={"group": "persn"})[0][2]
    assert "Did you mean `group`?" in problems(tmp_path, text, mapping={"gruop": "person"})[0][2]


def test_a_derived_name_can_be_mapped(tmp_path):
    manifest = read_manifest(write(tmp_path, "case,image\nc7,a.nii\n"), mapping={"subject": "case"})
    assert manifest.table[["subject", "case"]].to_numpy().tolist() == [["c7", "c7"]]


def test_a_near_miss_of_an_optional_column_is_warned_about(tmp_path, caplog):
    read_manifest(write(tmp_path, "subject,image,lable\ns1,a.nii,b.nii\n"))
    assert "did you mean `label`?" in caplog.text


def test_cases_are_unique_even_on_disks_that_ignore_capitals(tmp_path):
    text = (
        "subject,image,session,frame,modality\n"
        "p1,a,,,T1\np1,b,,,T2\n"  # told apart by modality
        "p2,c,,,\nP2,d,,,\n"  # only capitals differ
        "p3,e,x,,\np3_x,f,,,\n"  # made of other parts
        "p4,g,s1,7,\n"
    )
    cases = read_manifest(write(tmp_path, text)).table["case"]
    assert cases.str.lower().is_unique
    assert cases.tolist() == ["p1_T1", "p1_T2", "p2_1", "P2_2", "p3_x_1", "p3_x_2", "p4_s1_frame07"]


def test_a_case_too_long_for_a_file_name_is_refused(tmp_path):
    found = problems(tmp_path, f"subject,image,session\n{'a' * 100},x.nii,{'b' * 60}\n")
    assert "more than 128 characters" in found[0][2]


def test_selection_keeps_volume_numbers_and_refuses_other_masks(tmp_path):
    manifest = read_manifest(write(tmp_path, "subject,image\ns1,a\ns2,b\ns3,c\n"))
    part = manifest.select(manifest.table["subject"] != "s1")
    assert part.table["volume"].tolist() == [1, 2]
    assert part.row(2)["subject"] == "s3"
    assert part.image_paths(1) == [tmp_path / "b"]
    with pytest.raises(DataError, match="volume 0 is not in this manifest"):
        part.row(0)
    with pytest.raises(DataError, match="one true or false for each row"):
        manifest.select([0, 1])


def test_hash_follows_content_only(tmp_path):
    text = "subject,image,age,site\ns1,a,30,x\n"
    one = read_manifest(write(tmp_path, text))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert read_manifest(write(moved, "site,subject,image,age\nx,s1,a,30.0\n")).hash() == one.hash()
    assert read_manifest(write(moved, "subject,image,age,site\ns1,a,31,x\n")).hash() != one.hash()
    write(moved, text)
    write(moved, "label_names: {1: liver}\n", "manifest.meta.yaml")
    assert read_manifest(moved).hash() != one.hash()


def test_written_manifest_reads_back_equal(tmp_path):
    text = "subject,image,label,frame,age,person,code\ns1,a;b,l,3,30.25,p,007\ns2,c,,,,q,\n"
    one = read_manifest(write(tmp_path, text), mapping={"group": "person"})
    meta = ManifestMeta(name="x", cohort="y", label_names={1: "Myokard é", 2: "rv"}, licence="CC0")
    write_manifest(one.table, meta, tmp_path / "new" / "m.csv")
    again = read_manifest(tmp_path / "new" / "m.csv")
    pd.testing.assert_frame_equal(again.table, one.table, check_like=True)
    assert again.meta == meta
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["m.csv", "m.meta.yaml"]


def test_relocated_paths_still_lead_to_the_same_files(tmp_path):
    one = read_manifest(write(tmp_path, "subject,image,label\ns1,sub/a.nii;/data/b.nii,../l.nii\n"))
    for target in (tmp_path / "sub" / "m.csv", tmp_path / "m.csv"):
        write_manifest(one.relocated(target), one.meta, target)
        again = read_manifest(target)
        for first, second in zip(
            [*one.image_paths(0), one.label_path(0)], [*again.image_paths(0), again.label_path(0)]
        ):
            assert os.path.normpath(first) == os.path.normpath(second)
    assert read_manifest(tmp_path / "sub" / "m.csv").table["image"][0] == "a.nii;/data/b.nii"


def test_what_reading_would_refuse_is_not_written(tmp_path):
    path = write(tmp_path, "subject,image\ns1,a\n")
    before = path.read_bytes()
    for bad in (
        pd.DataFrame({"subject": ["s1"], "image": ["=cmd"]}),
        pd.DataFrame({"subject": ["a/b"], "image": ["x"]}),
        pd.DataFrame({"subject": ["s1"]}),
    ):
        with pytest.raises(ManifestError):
            write_manifest(bad, ManifestMeta(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.csv"]


def test_failure_while_writing_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch):
    path = write(tmp_path, "subject,image\ns1,a\n")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="space"):
        write_manifest(pd.DataFrame({"subject": ["s2"], "image": ["b"]}), ManifestMeta(), path)
    assert path.read_text() == "subject,image\ns1,a\n"
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.csv"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("labels: {1: x}\n", "Did you mean `label_names`"),
        ("label_names: {one: x}\n", "label_names"),
        ("label_names: {1: a, 1: b}\n", "duplicate key"),
        ("label_names: {1: a, 2: a}\n", "same name"),
        ("label_names: {1: ' '}\n", "empty name"),
        ("label_names: {-1: a}\n", "negative"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("name: [", "not valid YAML"),
        ("- 1\n", "whole file"),
    ],
)
def test_meta_file_is_read_strictly(tmp_path, text, part):
    path = write(tmp_path, "subject,image\ns1,a\n")
    write(tmp_path, text, "manifest.meta.yaml")
    with pytest.raises(DataError, match=part.replace("`", ".")) as caught:
        read_manifest(path)
    assert "manifest.meta.yaml" in str(caught.value)


def test_missing_manifest_and_pipe_are_refused_without_hanging(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "none.csv", tmp_path, tmp_path / "pipe.csv"):
        with pytest.raises(DataError, match="no manifest here"):
            read_manifest(path)


def test_thousands_of_problems_are_all_kept_and_the_message_stays_short(tmp_path):
    text = "subject,image,age\n" + "".join(f"s{i},a{i},x\n" for i in range(5000))
    with pytest.raises(MedsslError) as caught:
        read_manifest(write(tmp_path, text))
    assert len(caught.value.problems) == 5000
    assert len(str(caught.value)) < 30_000
    assert "and 4800 more" in str(caught.value)


def test_a_hundred_thousand_rows_are_read_quickly(tmp_path):
    rows = (f"sub-{i // 2:05d},i/{i}.nii.gz,s{i % 2},l/{i}.nii.gz,{i % 30},site{i % 7},{20 + i % 60}.5,F,g{i // 2}\n"
            for i in range(100_000))  # fmt: skip
    path = write(tmp_path, "subject,image,session,label,frame,site,age,sex,group\n" + "".join(rows))
    taken = []
    for _ in range(2):  # the better of two, and time of this process alone: other work on the machine does not count
        start = time.process_time()
        manifest = read_manifest(path)
        taken.append(time.process_time() - start)
    assert min(taken) < 3.0
    assert len(manifest) == 100_000
    assert manifest.table["case"].is_unique
