"""A wrong slide table is refused at once, with every problem and the line it stands on."""

from pathlib import Path

import pytest

from gigamil.config.schema import Cohort, Columns
from gigamil.data.cohort import load_cohort, load_labels
from gigamil.errors import CohortError

HEADER = "slide_id,path,patient_id,label,mpp,site,split"
GOOD = ["a,a.svs,p1,normal,0.25,s1,", "b,b.svs,p2,tumour,,,", "c,c.svs,p2,tumour,0.5,s2,"]


def table(folder: Path, rows: list[str], header: str = HEADER, files: str = "abcdef") -> Path:
    for name in files:
        (folder / f"{name}.svs").touch()
    path = folder / "slides.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def refusal(cfg: Cohort, **options: bool) -> str:
    with pytest.raises(CohortError) as caught:
        load_cohort(cfg, **options)
    return str(caught.value)


def test_a_good_table(tmp_path: Path) -> None:
    cohort = load_cohort(Cohort(table=table(tmp_path, GOOD)))
    assert cohort.classes == ("normal", "tumour")
    first, second, _ = cohort.rows
    assert (first.slide_id, first.patient_id, first.label, first.mpp, first.site) == ("a", "p1", "normal", 0.25, "s1")
    assert first.path == tmp_path / "a.svs"
    assert (second.mpp, second.site, second.split) == (None, None, None)
    assert cohort.row("c").patient_id == "p2"
    assert "c" in cohort
    assert "d" not in cohort
    assert cohort.class_number("c") == 1


def test_text_stays_text_and_a_byte_order_mark_is_nothing(tmp_path: Path) -> None:
    path = table(tmp_path, ["001,a.svs,NA,0", "002,b.svs,007,1"], "slide_id,path,patient_id,label")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    cohort = load_cohort(Cohort(table=path))
    assert [(row.slide_id, row.patient_id) for row in cohort.rows] == [("001", "NA"), ("002", "007")]


def test_numbers_as_classes_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [f"{name},{name}.svs,{name},{label}" for name, label in zip("abc", ["10", "9", "2"], strict=True)]
    cohort = load_cohort(Cohort(table=table(tmp_path, rows, "slide_id,path,patient_id,label")))
    assert cohort.classes == ("2", "9", "10")


def test_nan_is_a_word_among_numbers_as_classes(tmp_path: Path) -> None:
    labels = ["word", "11", "nan", "7", "3", "10", "NaN", "1", "9", "2", "8", "5", "4", "6"]
    names = "abcdefghijklmn"
    rows = [f"{name},{name}.svs,{name},{label}" for name, label in zip(names, labels, strict=True)]
    cohort = load_cohort(Cohort(table=table(tmp_path, rows, "slide_id,path,patient_id,label", files=names)))
    assert cohort.classes == (*map(str, range(1, 12)), "NaN", "nan", "word")


def test_mapped_columns_root_and_given_order_of_classes(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    table(tmp_path / "files", [])
    path = table(tmp_path, ["a,a.svs,p,x", "b,b.svs,q,y"], "slide,path,case,subtype")
    columns = Columns(slide_id="slide", patient_id="case", label="subtype")
    cohort = load_cohort(Cohort(table=path, root=tmp_path / "files", columns=columns, classes=("y", "x")))
    assert cohort.class_number("a") == 1
    assert cohort.row("a").path == tmp_path / "files" / "a.svs"


def test_dotted_ids_are_fine(tmp_path: Path) -> None:
    slide_id = "TCGA-83-5908-01Z-00-DX1.381c8f82-61a0-4e9d-982d-1ad0af7bead9"
    cohort = load_cohort(Cohort(table=table(tmp_path, [f"{slide_id},a.svs,p,x,,,", "b,b.svs,q,y,,,"])))
    assert cohort.rows[0].slide_id == slide_id


def test_all_problems_in_one_message(tmp_path: Path) -> None:
    rows = [
        "a,a.svs,p1,normal,0.25,,",
        "a,b.svs,p1,tumour,,,",
        "A,c.svs,p1,tumour,,,",
        "../x,d.svs,p1,tumour,,,",
        "e,e.svs,,,,,",
        "f,f.svs,p2,tumour,'0,25',,".replace("'", '"'),
        "g,gone.svs,p2,tumour,500,,",
        "h,a.svs,p2,tumour,nan,,",
    ]
    text = refusal(Cohort(table=table(tmp_path, rows)))
    for line in (
        "has 10 problem(s)",
        "line 3: slide_id 'a' is that of line 2",
        "line 4: slide_id 'A' is that of line 2 ('a')",
        "line 5: slide_id '../x' must be 1 to 128 of A-Z a-z 0-9 . _ - and not begin with a dot",
        "line 6: patient_id is empty",
        "line 6: slide 'e' has no label",
        "line 7: mpp '0,25' is not a number (write a point, not a comma)",
        "line 8: mpp '500' cannot be true (plausible: 0.05 to 60 micron per pixel)",
        "line 9: mpp 'nan' cannot be true",
        "line 9: path",
        f"line 8: path '{tmp_path / 'gone.svs'}' does not exist",
    ):
        assert line in text


@pytest.mark.parametrize("slide_id", ["..", ".hidden", "a b", "a/b", "a" * 129, "é", "=cmd()", ""])
def test_ids_that_are_no_plain_names(tmp_path: Path, slide_id: str) -> None:
    path = table(tmp_path, [f"{slide_id},a.svs,p1,x,,,", "b,b.svs,p2,y,,,"])
    assert "line 2: slide_id" in refusal(Cohort(table=path))


def test_missing_columns_name_the_key_to_set(tmp_path: Path) -> None:
    path = table(tmp_path, ["a,a.svs"], "slide_id,path")
    text = refusal(Cohort(table=path))
    assert "no column 'patient_id': set cohort.columns.patient_id to one of: slide_id, path" in text
    assert "cohort.patient_is_slide=true" in text
    assert "no column 'label'" in text


def test_without_patients_only_if_said_so(tmp_path: Path) -> None:
    path = table(tmp_path, ["a,a.svs,x", "b,b.svs,y"], "slide_id,path,label")
    cohort = load_cohort(Cohort(table=path, patient_is_slide=True))
    assert [row.patient_id for row in cohort.rows] == ["a", "b"]


def test_labels(tmp_path: Path) -> None:
    path = table(tmp_path, ["a,a.svs,p,x,,,", "b,b.svs,q,z,,,"])
    text = refusal(Cohort(table=path, classes=("x", "y")))
    assert "line 3: label 'z' is not in cohort.classes (x, y)" in text
    assert "class 'y' of cohort.classes has no slide" in text


def test_one_class_only(tmp_path: Path) -> None:
    path = table(tmp_path, ["a,a.svs,p,x,,,", "b,b.svs,q,x,,,"])
    assert "a classifier needs at least two classes, found: x" in refusal(Cohort(table=path))


def test_labels_are_not_needed_to_tile(tmp_path: Path) -> None:
    path = table(tmp_path, ["a,a.svs,p", "b,b.svs,q"], "slide_id,path,patient_id")
    cohort = load_cohort(Cohort(table=path), need_labels=False)
    assert [row.label for row in cohort.rows] == [None, None]


def test_files_are_not_needed_to_train(tmp_path: Path) -> None:
    path = table(tmp_path, GOOD, files="")
    assert len(load_cohort(Cohort(table=path), need_files=False).rows) == 3
    assert "has 3 problem(s)" in refusal(Cohort(table=path))


def test_split_column(tmp_path: Path) -> None:
    path = table(tmp_path, ["a,a.svs,p,x,,,Training", "b,b.svs,q,y,,,validation", "c,c.svs,r,y,,,TEST"])
    assert [row.split for row in load_cohort(Cohort(table=path)).rows] == ["train", "val", "test"]
    path = table(tmp_path, ["a,a.svs,p,x,,,train", "b,b.svs,q,y,,,", "c,c.svs,r,y,,,holdout"])
    text = refusal(Cohort(table=path))
    assert "line 3: split is empty, as in 1 rows altogether; fill all rows or none" in text
    assert "line 4: split 'holdout' is not one of train, val, test" in text


def test_a_cell_too_many(tmp_path: Path) -> None:
    path = table(tmp_path, ["a,my,slides/a.svs,p,x"], "slide_id,path,patient_id,label")
    assert "line 2 has 5 cells and the header 4; put cells that hold a comma in quotes" in refusal(Cohort(table=path))


@pytest.mark.parametrize(("line", "header"), [(3, HEADER), (1, HEADER.replace("slide_id", '"slide_id'))])
def test_a_quote_that_is_not_closed_swallows_no_slides(tmp_path: Path, line: int, header: str) -> None:
    rows = ["a,a.svs,p1,normal,,,", 'b,b.svs,p2,"tumour,,,', "c,c.svs,p3,tumour,,,", "d,d.svs,p4,normal,,,"]
    text = refusal(Cohort(table=table(tmp_path, rows, header)))
    assert f"cannot be read as UTF-8 CSV: line {line}: " in text
    assert "; a quote that is opened must be closed" in text


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    rows = ["a,a.svs,p,x,y,,", "b,b.svs,q,y,x,,"]
    text = refusal(Cohort(table=table(tmp_path, rows, "slide_id,path,patient_id,label, label,,")))
    assert "has several columns of one name: 'label'. Rename or delete all but one." in text
    path = table(tmp_path, rows, "slide_id,path,patient_id,label,,,")  # what spreadsheets leave
    assert load_cohort(Cohort(table=path)).row("a").label == "x"


def test_no_table_and_empty_table(tmp_path: Path) -> None:
    assert "no slide table" in refusal(Cohort(table=tmp_path / "none.csv"))
    assert "no rows" in refusal(Cohort(table=table(tmp_path, [])))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read as UTF-8 CSV" in refusal(Cohort(table=tmp_path / "binary.csv"))


def test_a_long_list_is_cut_and_says_so(tmp_path: Path) -> None:
    path = table(tmp_path, [f"s{n},gone{n}.svs,p,{'xy'[n % 2]},,," for n in range(130)])
    text = refusal(Cohort(table=path))
    assert text.count("\n") == 101
    assert text.endswith("and 30 more")


def test_digest_follows_labels_not_paths(tmp_path: Path) -> None:
    def digest(rows: list[str]) -> str:
        return load_cohort(Cohort(table=table(tmp_path, rows))).sha256

    assert digest(GOOD) == digest(GOOD[::-1])
    assert digest(GOOD) == digest([GOOD[0].replace("a.svs", "f.svs"), *GOOD[1:]])
    assert digest(GOOD) != digest([GOOD[0].replace("p1", "p3"), *GOOD[1:]])


class TestHostileCells:
    """A table is somebody else's: nothing in it reaches a log, a spreadsheet, a shell or a folder raw."""

    HEADER = "slide_id,path,patient_id,label,mpp,site,split"

    def text(self, folder: Path, *rows: bytes) -> str:
        path = table(folder, [])
        path.write_bytes(b"\n".join([self.HEADER.encode(), *rows, b""]))
        return refusal(Cohort(table=path))

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            (b'a,a.svs,"p\n1",x,,,', r"line 3: patient_id 'p\n1' holds a line break or another control character"),
            (b"a,a.svs,p\x1b[31m1,x,,,", r"line 2: patient_id 'p\x1b[31m1' holds"),
            (b"a,a.svs,p\x001,x,,,", r"line 2: patient_id 'p\x001' holds"),
            ("a,a.svs,p\u202e1,x,,,".encode(), r"line 2: patient_id 'p\u202e1' holds"),
            (b"a,a.svs,=cmd(),x,,,", "line 2: patient_id '=cmd()' would run as a formula in a spreadsheet"),
            (b"a,a.svs,p,@SUM(1),,,", "line 2: label '@SUM(1)' would run"),
            (b"a,a.svs,p,x,,-2+cmd|' /C calc'!A0,", "line 2: site \"-2+cmd|' /C calc'!A0\" would run"),
            (b"a,a.svs,p\xff1,x,,,", r"line 2: patient_id 'p\udcff1' is not UTF-8"),
            (b"a,a.svs," + b"p" * 5000 + b",x,,,", "has 5000 characters; the longest allowed is 4096"),
            (b"a,pipe:cat /etc/passwd,p,x,,,", "line 2: path 'pipe:cat /etc/passwd' names a command or an address"),
            (b"a,s3://bucket/a.svs,p,x,,,", "line 2: path 's3://bucket/a.svs' names a command or an address"),
            (b"a,x{0..9999999999}.svs,p,x,,,", "line 2: path 'x{0..9999999999}.svs' holds braces"),
            (b'a,"x{a,b}.svs",p,x,,,', "line 2: path 'x{a,b}.svs' holds braces"),
            (b"a,~nobody-of-that-name/a.svs,p,x,,,", "does not exist"),
            (b"a," + b"d/" * 2040 + b"a.svs,p,x,,,", "does not exist"),
        ],
        ids=range(15),
    )
    def test_one_cell_is_refused_with_its_line(self, tmp_path: Path, row: bytes, problem: str) -> None:
        text = self.text(tmp_path, row, b"b,b.svs,q,y,,,")
        assert problem in text
        assert "1 problem(s)" in text
        assert all(char.isprintable() or char == "\n" for char in text)
        assert len(text) < 2000

    def test_all_at_once_and_nothing_raw(self, tmp_path: Path) -> None:
        text = self.text(
            tmp_path,
            b"a,pipe:x,p\x1b1,x,,,",
            b"b,b.svs,=cmd(),y\xff,0.25,,",
            b"c,a{1..9}.svs,r," + b"z" * 5000 + b",,\x07,",
        )
        assert "has 7 problem(s)" in text
        assert "\x1b" not in text
        assert "\x07" not in text

    def test_a_megabyte_in_a_cell(self, tmp_path: Path) -> None:
        text = self.text(tmp_path, b"a,a.svs," + b"p" * (1 << 20) + b",x,,,", b"b,b.svs,q,y,,,")
        assert "cannot be read as UTF-8 CSV: line 2: field larger than field limit" in text
        assert len(text) < 500

    def test_what_looks_odd_and_is_harmless(self, tmp_path: Path) -> None:
        rows = ["a,a.svs,Müller-Łukasz,+,,Zürich (Süd),", "b,./b.svs,-1,-,,@home".replace("@home", "at home") + ","]
        cohort = load_cohort(Cohort(table=table(tmp_path, rows)))
        assert cohort.classes == ("+", "-")
        assert cohort.row("a").patient_id == "Müller-Łukasz"

    def test_columns_that_are_not_used_may_hold_anything(self, tmp_path: Path) -> None:
        path = table(tmp_path, ["a,a.svs,p,x,=note()", "b,b.svs,q,y,"], "slide_id,path,patient_id,label,note")
        assert len(load_cohort(Cohort(table=path)).rows) == 2

    def test_a_link_to_a_slide_is_that_slide(self, tmp_path: Path) -> None:
        path = table(tmp_path, ["a,a.svs,p,x,,,", "b,link.svs,q,y,,,"])
        (tmp_path / "link.svs").symlink_to(tmp_path / "a.svs")
        assert f"line 3: path '{tmp_path / 'link.svs'}' is that of line 2 ('{tmp_path / 'a.svs'}')" in refusal(
            Cohort(table=path)
        )


class TestBareLabels:
    def test_usual_names_of_columns_and_slides_with_suffix(self, tmp_path: Path) -> None:
        path = tmp_path / "labels.csv"
        path.write_text("Case,Slide,Subtype,Center\np1,scans/a.svs,x,s1\np2,b,y,\n")
        found = load_labels(path, {})
        assert [(row.slide_id, row.patient_id, row.label, row.site) for row in found.rows] == [
            ("a", "p1", "x", "s1"),
            ("b", "p2", "y", None),
        ]
        with pytest.raises(CohortError, match="has no column 'nope'"):
            load_labels(path, {"label": "nope"})

    def test_everything_wrong_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "labels.csv"
        path.write_text("slide,patient,label\na.svs,p1,x\nA.tif,p2,y\n=x(),,z\nc,p,\n")
        with pytest.raises(CohortError) as caught:
            load_labels(path, {}, classes=("x", "y"))
        for line in (
            "has 4 problem(s)",
            "line 3: slide_id 'A' is that of line 2 ('a')",
            "line 4: patient_id is empty",
            "line 4: label 'z' is not in cohort.classes (x, y)",
            "line 5: slide 'c' has no label",
        ):
            assert line in str(caught.value)
