"""Splits of CLAM, Patho-Bench and `gigamil split` are taken over as they are, or refused with every wrong line."""

from dataclasses import replace
from pathlib import Path

import pytest

from gigamil.config.schema import Cohort
from gigamil.data.cohort import CohortTable, SlideRow
from gigamil.data.folds import freeze_folds, make_folds
from gigamil.data.split import check_splits, make_splits
from gigamil.data.split_import import import_split
from gigamil.errors import CohortError

IDS = [f"slide_{n}" for n in range(6)]

CLAM = """,train,val,test
0,slide_3,slide_0,slide_5
1,slide_1,,slide_4
2,slide_2,,
"""
CLAM_BOOL = """,train,val,test
slide_3,True,False,False
slide_1,True,False,False
slide_2,True,False,False
slide_0,False,True,False
slide_4,False,False,True
slide_5,False,False,True
"""
PATHO_BENCH = """case_id\tslide_id\tlabel\tfold_0\tfold_1
p0\tslide_0\tx\tval\ttest
p1\tslide_1\ty\ttrain\ttrain
p2\tslide_2\tx\ttrain\tval
p3\tslide_3\ty\ttrain\ttrain
p4\tslide_4\tx\ttest\ttrain
p5\tslide_5\ty\ttest\ttrain
"""
SIDES = dict(zip(IDS, ["val", "train", "train", "train", "test", "test"], strict=True))


def cohort(num: int = 6) -> CohortTable:
    rows = [SlideRow(f"slide_{n}", Path(), f"p{n}", "xy"[n % 2], None, None, None) for n in range(num)]
    return CohortTable(tuple(rows), ("x", "y"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(path: Path, fold: int = 0, inner_fold: int | None = None) -> str:
    with pytest.raises(CohortError) as caught:
        import_split(path, cohort(), fold, inner_fold)
    return str(caught.value)


def test_clam_lists_and_booleans_say_the_same(tmp_path: Path) -> None:
    assert import_split(write(tmp_path / "splits_0.csv", CLAM), cohort()) == SIDES
    assert import_split(write(tmp_path / "splits_0_bool.csv", CLAM_BOOL), cohort()) == SIDES


def test_a_folder_of_clam_holds_a_file_per_fold(tmp_path: Path) -> None:
    write(tmp_path / "splits_0.csv", "")
    write(tmp_path / "splits_3.csv", CLAM)
    assert import_split(tmp_path, cohort(), 3) == SIDES
    assert import_split(tmp_path / "splits_3.csv", cohort(), 3) == SIDES
    assert "no split file" in refusal(tmp_path, 4)
    assert "cohort.fold=2, but 'splits_3.csv' holds one other fold" in refusal(tmp_path / "splits_3.csv", 2)


def test_patho_bench_chooses_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "k=all.tsv", PATHO_BENCH)
    assert import_split(path, cohort()) == SIDES
    assert import_split(path, cohort(), 1)["slide_0"] == "test"
    assert "has no column 'fold_2' for cohort.fold=2: case_id, slide_id, label, fold_0, fold_1" in refusal(path, 2)


def test_patho_bench_by_case(tmp_path: Path) -> None:
    rows = [*cohort().rows, SlideRow("second_of_p4", Path(), "p4", "x", None, None, None)]
    lines = [line.split("\t") for line in PATHO_BENCH.splitlines()]
    path = write(tmp_path / "a.tsv", "\n".join("\t".join([cells[0], *cells[2:]]) for cells in lines) + "\n")
    assert import_split(path, CohortTable(tuple(rows), ("x", "y"))) == SIDES | {"second_of_p4": "test"}


def test_names_with_folder_and_suffix(tmp_path: Path) -> None:
    text = CLAM.replace("slide_3", "C:\\scans\\slide_3.svs").replace("slide_0", "a/slide_0.tiff")
    assert import_split(write(tmp_path / "splits_0.csv", text), cohort()) == SIDES


def test_folds_of_gigamil_and_their_inner_folds(tmp_path: Path) -> None:
    table = cohort(40)
    folds = make_folds(table, Cohort(split_method="kfold", folds=4))
    freeze_folds(folds, tmp_path, table)
    assert import_split(tmp_path / "folds.json", table, 2) == folds.sides(2)
    assert import_split(tmp_path / "folds.json", table, 2, 1) == folds.sides(2, 1)
    assert import_split(tmp_path / "folds.csv", table, 2) == folds.sides(2)
    with pytest.raises(CohortError, match="cohort.inner_fold=1: '.*folds.csv' holds no inner folds"):
        import_split(tmp_path / "folds.csv", table, 2, 1)
    with pytest.raises(CohortError, match=r"cohort.fold=4: there are 4 folds, 0\.\.3"):
        import_split(tmp_path / "folds.json", table, 4)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (CLAM.replace("slide_3", "stranger"), ["slide 'stranger' is not in the slide table"]),
        (
            CLAM.replace("slide_3", "slide_5"),
            ["slide 'slide_5' is named more than once: 1 times in train, 1 times in test"],
        ),
        (CLAM.replace("slide_3", "slide_1"), ["slide 'slide_1' is named more than once: 2 times in train"]),
        (CLAM_BOOL.replace("slide_3,True,False", "slide_3,True,True"), ["'slide_3' is named more than once"]),
        (
            CLAM.replace("slide_3", "=cmd()").replace("slide_0", "a\x1b[31m"),
            ["would run as a formula", r"'a\x1b[31m' holds"],
        ),
        (",train,val,test\n0,,,\n", ["it names no slide"]),
        ("a,b\n1,2\n", ["is of no known kind. It has the columns a, b"]),
        (
            PATHO_BENCH.replace("\t", ",").replace("val", "tuning").replace("slide_5", "x"),
            ["slide 'slide_0' is in 'tuning'; known: train, val, test", "slide 'x' is not in"],
        ),
    ],
)
def test_every_wrong_line_is_named(tmp_path: Path, text: str, problems: list[str]) -> None:
    found = refusal(write(tmp_path / "splits_0.csv", text))
    for problem in problems:
        assert problem in found
    assert "\x1b" not in found


@pytest.mark.parametrize("text", ["{}", "[", '{"format": "gigamil folds 1"}', "\udcff"])
def test_what_is_no_folds_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "folds.json").write_text(text, errors="surrogateescape")
    assert "is no folds.json of `gigamil split`" in refusal(tmp_path / "folds.json")


def test_a_run_takes_the_split_and_says_what_it_does_not_name(tmp_path: Path) -> None:
    table = cohort(8)
    path = write(tmp_path / "splits_0.csv", CLAM.replace(",slide_0,", ",,"))
    ids = [row.slide_id for row in table.rows]
    splits = make_splits(table, [slide_id for slide_id in ids if slide_id != "slide_1"], Cohort(splits=path))
    assert (splits.train, splits.val, splits.test) == (("slide_2", "slide_3"), (), ("slide_4", "slide_5"))
    assert splits.without_tiles == ("slide_1",)
    assert splits.unnamed == ("slide_0", "slide_6", "slide_7")
    assert splits.method.startswith("'splits_0.csv', sha256 ")
    assert splits.seed is None


def test_a_leak_in_an_imported_split_is_refused(tmp_path: Path) -> None:
    rows = [SlideRow(s, Path(), "p0" if n in (0, 4) else s, "xy"[n % 2], None, None, None) for n, s in enumerate(IDS)]
    path = write(tmp_path / "splits_0.csv", CLAM)
    with pytest.raises(CohortError, match=r"patient 'p0' is in val \(slide_0\) and test \(slide_4\)"):
        make_splits(CohortTable(tuple(rows), ("x", "y")), IDS, Cohort(splits=path))


def test_another_content_of_the_file_is_another_split(tmp_path: Path) -> None:
    cfg = Cohort(splits=write(tmp_path / "splits_0.csv", CLAM.replace(",slide_0,", ",,")))
    one = make_splits(cohort(), IDS, cfg)
    check_splits(one, cohort())
    write(tmp_path / "splits_0.csv", CLAM.replace(",slide_0,", ",,").replace("slide_3", "slide_0"))
    assert make_splits(cohort(), IDS, cfg).method != one.method


def test_sites_are_kept_apart_in_an_imported_split_too(tmp_path: Path) -> None:
    def of_sites(*sites: str | None) -> CohortTable:
        rows = zip(cohort().rows, sites, strict=False)
        return CohortTable(tuple(replace(row, site=site) for row, site in rows), ("x", "y"))

    cfg = Cohort(splits=write(tmp_path / "splits_0.csv", CLAM.replace(",slide_0,", ",,")), preserve_sites=True)
    apart = of_sites(None, "s1", "s1", "s2", "s3", "s4")  # slide_0 is on no side
    splits = make_splits(apart, IDS, cfg)
    assert splits.sites_apart
    assert splits.method.endswith("fold 0, no site on two sides")
    with pytest.raises(CohortError, match=r"site 's1' is in train \(2 slides\) and test \(1 slides\), which was to be"):
        make_splits(of_sites("s0", "s1", "s1", "s2", "S1 ", "s4"), IDS, cfg)
    with pytest.raises(CohortError, match=r"needs a site for every slide; 1 have none, for example 'slide_3'"):
        make_splits(of_sites("s0", "s1", "s1", None, "s3", "s4"), IDS, cfg)
    # A split that was frozen without looking at sites is not taken for one that has.
    assert make_splits(apart, IDS, cfg.model_copy(update={"preserve_sites": False})).method != splits.method
