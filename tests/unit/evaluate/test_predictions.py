"""predictions.csv: what is written is read, and everything wrong in it is listed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gigamil.errors import CohortError
from gigamil.evaluate.predictions import Predictions, read_predictions, write_predictions

HEADER = "slide_id,patient_id,label,split,prob_normal,prob_tumour,pred\n"


def test_round_trip_keeps_every_digit_and_every_name(tmp_path: Path) -> None:
    """Names that spreadsheets and pandas read as missing, as numbers or as several columns stay names."""
    names = ("NA", "001", 'a "quoted", name', "ünï\ncode")
    classes = ("None", "1.0", "nan")
    probs = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    written = Predictions(names, names, ("nan", None, "None", "1.0"), ("test",) * 4, classes, probs)
    write_predictions(tmp_path / "p.csv", written)
    found = read_predictions(tmp_path / "p.csv")
    assert (found.slide_ids, found.patient_ids, found.labels, found.classes) == (names, names, written.labels, classes)
    np.testing.assert_array_equal(found.probs_NK, probs)
    assert found.predicted == written.predicted
    write_predictions(tmp_path / "again.csv", found)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "p.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "p.csv"]


def test_selection_and_headline(predictions: Predictions) -> None:
    test = predictions.labelled("test")
    assert test.slide_ids == ("s02", "s05", "s08", "s11")
    assert test.label_numbers.tolist() == [0, 1, 0, 1]
    unlabelled = replace(predictions, labels=(None, *predictions.labels[1:]))
    assert unlabelled.labelled("train").slide_ids == ("s03", "s06", "s09")
    assert predictions.headline_split == "test"
    assert predictions.take([0, 1]).headline_split == "val"
    assert replace(predictions, splits=("z", "b") * 6).headline_split == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "no row"),
        ("slide_id,label,split,prob_a,prob_b,pred\n", "needs the columns.*patient_id.*it has slide_id"),
        ("slide_id,patient_id,label,split,prob_a,pred\n", "at least two prob_"),
        ("", "it has none"),
        (HEADER + "a,p,normal,test,0.5,0.5,normal\na,p,normal,test,0.5,0.5,normal\n", "slide 'a' appears twice"),
        (HEADER + "a,p,benign,test,0.6,0.4,normal\n", "slide 'a': label 'benign' is none of normal, tumour"),
        (HEADER + "a,p,normal,test,high,0.4,normal\n", "slide 'a': prob_normal is 'high', no number"),
        (HEADER + "a,p,normal,test,0.6\n", "slide 'a': prob_tumour is None"),
        (HEADER + "a,p,normal,test,nan,0.4,normal\n", "slide 'a': probabilities .* are not between 0 and 1"),
        (
            HEADER + "a,p,normal,test,0.2,0.8,normal\n",
            "slide 'a': pred 'normal' is not the most probable class 'tumour'",
        ),
        (HEADER + "a,p,normal,test,0.2,0.8,other\n", "slide 'a': pred 'other'"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(CohortError, match=message):
        read_predictions(tmp_path / "p.csv")


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(HEADER + "a,p,x,test,0.6,0.4,normal\nb,p,y,test,0.6,0.4,tumour\n")
    with pytest.raises(CohortError, match="has 3 problems(.|\n)*label 'x'(.|\n)*label 'y'(.|\n)*slide 'b': pred"):
        read_predictions(tmp_path / "p.csv")


def test_a_missing_file_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"'.*p\.csv' does not exist; `gigamil evaluate`"):
        read_predictions(tmp_path / "p.csv")


def test_what_a_spreadsheet_saves_is_read_or_refused(tmp_path: Path) -> None:
    text = HEADER + "a,Müller,normal,test,0.6,0.4,normal\n"
    (tmp_path / "p.csv").write_bytes(text.encode("utf-8-sig"))
    assert read_predictions(tmp_path / "p.csv").patient_ids == ("Müller",)
    for content in (text.encode("cp1252"), text.replace("Müller", "m" * (1 << 18)).encode()):
        (tmp_path / "p.csv").write_bytes(content)
        with pytest.raises(CohortError, match=r"p\.csv' cannot be read as UTF-8 CSV: .* run `gigamil evaluate` again"):
            read_predictions(tmp_path / "p.csv")
