"""No patient on two sides, every class on every side, and the same split on every machine."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigamil.config.schema import Cohort
from gigamil.data.cohort import CohortTable, SlideRow
from gigamil.data.split import Splits, check_splits, load_splits, make_splits, save_splits, smoke_slides
from gigamil.errors import CohortError


def cohort(*slides: tuple[str, str, str] | tuple[str, str, str, str]) -> CohortTable:
    """Slides as (slide_id, patient_id, label[, split])."""
    rows = [SlideRow(s[0], Path(s[0]), s[1], s[2], None, None, s[3] if len(s) == 4 else None) for s in slides]
    return CohortTable(tuple(rows), tuple(sorted({s[2] for s in slides})))


def numbered(num_patients: int, slides_per_patient: int = 1) -> CohortTable:
    return cohort(
        *((f"s{p}-{n}", f"p{p}", "xy"[p % 2]) for p in range(num_patients) for n in range(slides_per_patient))
    )


def ids(table: CohortTable) -> list[str]:
    return [row.slide_id for row in table.rows]


def test_fractions_of_patients_stratified_by_label() -> None:
    table = numbered(40, 2)
    splits = make_splits(table, ids(table), Cohort(test_fraction=0.3, val_fraction=0.15))
    # 20 patients of each label, each with two slides: 6 test, 3 val, 11 train.
    for split, patients in [("test", 6), ("val", 3), ("train", 11)]:
        labels = [table.row(slide_id).label for slide_id in splits.of(split)]
        assert (labels.count("x"), labels.count("y")) == (2 * patients, 2 * patients)
    assert splits.method == "by patient, stratified by label, seed 0, test 0.3, val 0.15"
    assert splits.split_of()[splits.val[0]] == "val"


def test_order_of_the_table_is_nothing_and_the_seed_is_all() -> None:
    table = numbered(30)
    back = CohortTable(table.rows[::-1], table.classes)
    forward, backward = make_splits(table, ids(table), Cohort()), make_splits(back, ids(table), Cohort())
    assert set(forward.test) == set(backward.test)
    assert forward.cohort_sha256 == backward.cohort_sha256
    assert set(forward.test) != set(make_splits(table, ids(table), Cohort(split_seed=1)).test)


def test_the_split_of_today() -> None:
    """Pinned: splits of published runs must stay what they were."""
    table = numbered(12)
    assert make_splits(table, ids(table), Cohort()).test == ("s7-0", "s8-0", "s10-0", "s11-0")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("xyz")), min_size=1, max_size=60),
    st.floats(0, 0.6),
    st.floats(0, 0.39),
    st.integers(0, 5),
)
def test_whatever_is_made_holds_no_leak(
    slides: list[tuple[int, str]], test_fraction: float, val_fraction: float, seed: int
) -> None:
    table = cohort(*((f"s{n}", f"p{patient}", label) for n, (patient, label) in enumerate(slides)))
    cfg = Cohort(test_fraction=test_fraction, val_fraction=val_fraction, split_seed=seed)
    try:
        splits = make_splits(table, ids(table), cfg)
    except CohortError:
        return  # too few patients for the splits asked for; the tests below say when
    where = splits.split_of()
    assert sorted(where) == sorted(ids(table))
    for row in table.rows:
        assert len({where[other.slide_id] for other in table.rows if other.patient_id == row.patient_id}) == 1


def test_slides_without_tiles_are_named() -> None:
    table = numbered(20)
    splits = make_splits(table, [i for i in ids(table) if i != "s3-0"] + ["of-another-table"], Cohort())
    assert splits.without_tiles == ("s3-0",)
    assert "s3-0" not in splits.split_of()
    assert len(splits.split_of()) == 19


def test_zero_slides_with_tiles() -> None:
    with pytest.raises(CohortError, match="none of the 4 slides"):
        make_splits(numbered(4), [], Cohort())


def test_a_class_with_two_patients_does_not_reach_three_splits() -> None:
    table = numbered(4)
    with pytest.raises(CohortError, match="val has no slide"):
        make_splits(table, ids(table), Cohort())
    splits = make_splits(table, ids(table), Cohort(val_fraction=0))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (2, 0, 2)


def test_a_class_absent_from_a_split_is_named() -> None:
    table = cohort(*[(f"s{n}", f"p{n}", "x") for n in range(10)], ("rare", "q", "y"))
    with pytest.raises(CohortError) as caught:
        make_splits(table, ids(table), Cohort())
    assert "class 'y' is absent from val; the table has 1 patient(s) with it" in str(caught.value)
    assert "class 'y' is absent from test" in str(caught.value)


def test_fractions_that_leave_nothing() -> None:
    table = numbered(10)
    with pytest.raises(CohortError, match=r"test_fraction=0.6 and cohort.val_fraction=0.4 leave no patient"):
        make_splits(table, ids(table), Cohort(test_fraction=0.6, val_fraction=0.4))


def test_given_splits_are_taken_and_checked() -> None:
    good = cohort(("a", "p", "x", "train"), ("b", "q", "y", "train"), ("c", "r", "x", "test"), ("d", "s", "y", "test"))
    splits = make_splits(good, ids(good), Cohort())
    assert (splits.train, splits.val, splits.test) == (("a", "b"), (), ("c", "d"))
    assert splits.method == "split column of the slide table"
    leaking = cohort(*[(row.slide_id, "p", row.label or "", row.split or "") for row in good.rows])
    with pytest.raises(CohortError, match=r"patient 'p' is in train \(a, b\) and test \(c, d\)"):
        make_splits(leaking, ids(leaking), Cohort())


def test_check_says_everything_that_is_wrong() -> None:
    table = numbered(20)
    good = make_splits(table, ids(table), Cohort())
    check_splits(good, table)
    first = good.train[0]
    for change, words in [
        ({"test": (*good.test, first)}, f"slide '{first}' is listed 2 times (train, test)"),
        ({"test": (*good.test, "stranger")}, "slides that the table lacks: stranger"),
        ({"classes": ("y", "x")}, "made for the classes y, x, the table has x, y"),
        ({"train": ()}, "train has no slide"),
    ]:
        with pytest.raises(CohortError) as caught:
            check_splits(dataclasses.replace(good, **change), table)
        assert words in str(caught.value)


def test_file_round_trip_and_what_is_no_split(tmp_path: Path) -> None:
    table = numbered(20)
    splits = make_splits(table, ids(table), Cohort())
    path = tmp_path / "run" / "splits.json"
    save_splits(splits, path)
    assert load_splits(path, table) == splits
    assert [file.name for file in path.parent.iterdir()] == ["splits.json"]
    for text, words in [("{", "Expecting"), ("{}", "expected an object"), ("[]", "expected an object")]:
        path.write_text(text)
        with pytest.raises(CohortError, match=words):
            load_splits(path, table)
    with pytest.raises(ValueError, match="'train' has the wrong kind"):
        Splits.from_json(splits.to_json().replace('"train": [', '"train": [1, '))
    path.unlink()
    with pytest.raises(CohortError, match="Run `gigamil split` first"):
        load_splits(path, table)


def test_smoke_run_tiles_and_splits_the_same_slides() -> None:
    table = numbered(40, 2)
    smoke = smoke_slides(table, Cohort(), 2)
    assert len(smoke) == 12  # 2 of each of 3 splits and 2 classes
    tiled = [slide_id for slide_id in smoke if slide_id != next(iter(smoke))]
    splits = make_splits(table, tiled, Cohort(), limit=2)
    assert sorted(splits.split_of()) == sorted(tiled)
    assert splits.without_tiles == (next(iter(smoke)),)
    assert splits.method.endswith("smoke run of the first 2 of each split and class")


class TestFolds:
    CFG = Cohort(split_method="kfold", folds=4, val_fraction=0.15)

    def test_a_run_uses_one_fold_and_says_which(self) -> None:
        table = numbered(40, 2)
        runs = [make_splits(table, ids(table), self.CFG.model_copy(update={"fold": n})) for n in range(4)]
        assert sorted(slide_id for splits in runs for slide_id in splits.test) == sorted(ids(table))
        assert [(splits.fold, splits.seed, splits.inner_fold) for splits in runs] == [(n, 0, None) for n in range(4)]
        assert runs[2].method == "fold 2 of 4 folds by patient, stratified by label, seed 0, val 0.15"
        assert {row.slide_id for row in table.rows if row.slide_id in runs[0].val} == set(runs[0].val) != set()

    def test_nested(self) -> None:
        table = numbered(40)
        cfg = self.CFG.model_copy(update={"fold": 1})
        inner = [make_splits(table, ids(table), cfg.model_copy(update={"inner_fold": n})) for n in range(4)]
        outer = make_splits(table, ids(table), cfg)
        assert {splits.test for splits in inner} == {outer.test}
        assert sorted(slide_id for splits in inner for slide_id in splits.val) == sorted((*outer.train, *outer.val))
        assert inner[3].method.endswith(", inner fold 3")

    def test_slides_without_tiles_move_no_other_slide(self) -> None:
        table = numbered(40)
        whole = make_splits(table, ids(table), self.CFG)
        part = make_splits(table, [slide_id for slide_id in ids(table) if slide_id not in ("s3-0", "s8-0")], self.CFG)
        assert part.without_tiles == ("s3-0", "s8-0")
        assert part.split_of().items() <= whole.split_of().items()

    def test_smoke_run_of_a_fold(self) -> None:
        table = numbered(40)
        smoke = smoke_slides(table, self.CFG, 2)
        whole = make_splits(table, ids(table), self.CFG)
        assert len(smoke) == 12
        assert smoke.items() <= whole.split_of().items()

    def test_a_split_column_and_folds_contradict(self) -> None:
        table = cohort(("a", "p", "x", "train"), ("b", "q", "y", "train"))
        for cfg, key in [
            (self.CFG, "cohort.split_method"),
            (Cohort(preserve_sites=True), "cohort.preserve_sites"),
            (Cohort(splits=Path("x")), "cohort.splits"),
        ]:
            with pytest.raises(CohortError, match=f"has a split column, and {key} would split otherwise"):
                make_splits(table, ids(table), cfg)


def by_site(num: int = 60, num_sites: int = 12) -> CohortTable:
    rows = [SlideRow(f"s{n}", Path(), f"p{n}", "xy"[n % 2], None, f"h{n // 2 % num_sites}", None) for n in range(num)]
    return CohortTable(tuple(rows), ("x", "y"))


def test_sites_are_kept_apart_and_stay_so() -> None:
    table = by_site()
    splits = make_splits(table, ids(table), Cohort(preserve_sites=True))
    assert splits.sites_apart
    assert "no site on two sides" in splits.method
    where = splits.split_of()
    for site in {row.site for row in table.rows}:
        assert len({where[row.slide_id] for row in table.rows if row.site == site}) == 1
    moved = [dataclasses.replace(row, site="h0") if row.slide_id == splits.test[0] else row for row in table.rows]
    with pytest.raises(CohortError, match=r"site 'h\d+' is in .* which was to be kept apart"):
        check_splits(splits, CohortTable(tuple(moved), table.classes))


def test_another_table_than_the_one_that_was_split() -> None:
    table = numbered(20)
    splits = make_splits(table, ids(table), Cohort())
    more = CohortTable((*table.rows, dataclasses.replace(table.rows[0], slide_id="new")), table.classes)
    with pytest.raises(CohortError, match="slides, patients, labels or splits of the slide table are others"):
        check_splits(splits, more)


def test_a_file_of_an_earlier_version_is_read() -> None:
    table = numbered(20)
    splits = make_splits(table, ids(table), Cohort())
    facts = json.loads(splits.to_json())
    for name in ("unnamed", "sites_apart", "seed", "fold", "inner_fold", "sources_sha256"):
        del facts[name]
    earlier = Splits.from_json(json.dumps(facts))
    assert earlier == dataclasses.replace(splits, seed=None)
    for name, value in [("seed", "0"), ("fold", True), ("sites_apart", 1), ("unnamed", [1]), ("sources_sha256", None)]:
        with pytest.raises(ValueError, match=f"'{name}' has the wrong kind"):
            Splits.from_json(json.dumps(facts | {name: value}))
