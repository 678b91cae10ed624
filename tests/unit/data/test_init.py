"""From a folder of slides and a label CSV to a YAML that loads, with everything left out named."""

import os
from pathlib import Path

import numpy as np
import pytest

from gigamil.config.load import load_config
from gigamil.data.cohort import SLIDE_ID, load_cohort
from gigamil.data.init import InitReport, init_config
from gigamil.data.scan import find_slides, read_labels, slide_id_of
from gigamil.errors import CohortError, ConfigError
from gigamil.testing.slides import write_pyramid_tiff


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two readable slides, one without mpp, one unreadable, one without a label."""
    image = np.full((64, 64, 3), 200, np.uint8)
    (tmp_path / "slides" / "sub").mkdir(parents=True)
    for name, mpp in [("a.1.tiff", 0.5), ("sub/b 2.tif", 0.5), ("c.tif", None), ("extra.tif", 0.5)]:
        write_pyramid_tiff(tmp_path / "slides" / name, image, mpp, levels=1)
    (tmp_path / "slides" / "d.svs").write_text("no slide")
    (tmp_path / "slides" / "notes.txt").touch()
    return tmp_path


LABELS = """Slide,Case,Subtype,Center
a.1,p1,luad,s1
some/where/b 2.tif,p2,lusc,s2
c,p3,luad,s1
d.svs,p4,lusc,s2
gone,p5,luad,s2
"""


def run(folder: Path, labels: str = LABELS, **options: object) -> InitReport:
    (folder / "labels.csv").write_text(labels)
    return init_config(folder / "slides", folder / "labels.csv", folder / "my.yaml", **options)


def test_writes_a_table_and_a_yaml_that_load(folder: Path) -> None:
    report = run(folder)
    config = load_config(folder / "my.yaml")
    cohort = load_cohort(config.cohort)
    assert config.cohort.classes == ("luad", "lusc")
    assert config.cohort.root == folder / "slides"
    assert config.bookkeeping.out == folder / "runs" / "my"
    assert (folder / "slides.csv").read_text() == (
        "slide_id,path,patient_id,label,site\n"
        "a.1,a.1.tiff,p1,luad,s1\n"
        "c,c.tif,p3,luad,s1\n"
        "d,d.svs,p4,lusc,s2\n"
        "b_2,sub/b 2.tif,p2,lusc,s2\n"
    )
    assert cohort.row("b_2").path == folder / "slides" / "sub" / "b 2.tif"
    text = (folder / "my.yaml").read_text()
    assert text.startswith("# Written by `gigamil init`. Look it over, then type: gigamil run my.yaml\n")
    assert "tile_px: 224  # tile side in pixels" in text
    assert report.slides_per_class == {"luad": 2, "lusc": 2}
    assert report.vendors == {"generic-tiff": 2}


def test_what_is_left_out_or_broken_is_named(folder: Path) -> None:
    report = run(folder)
    assert report.without_label == ("extra.tif",)
    assert report.without_file == ("gone",)
    no_mpp, no_slide = report.problems
    assert "c.tif': no mpp in the file" in no_mpp
    assert "d.svs': not a slide" in no_slide
    for line in (
        "4 slides with a label: 2 luad, 2 lusc",
        "opened 4 of them: 2 generic-tiff",
        "1 slide files without a label, left out: extra.tif",
        "1 labels without a slide file, left out: gone",
        f"next: gigamil run {folder / 'my.yaml'}",
    ):
        assert line in report.text().splitlines()


def test_nothing_is_overwritten_unasked(folder: Path) -> None:
    run(folder)
    with pytest.raises(ConfigError, match=r"my.yaml' is there already"):
        run(folder)
    assert run(folder, overwrite=True).slides_per_class == {"luad": 2, "lusc": 2}


@pytest.mark.parametrize(
    ("wrong", "right", "words"),
    [
        ("c,p3,luad", "c,,luad", "  - slide 'c': patient_id is empty"),
        ("c,p3,luad", "c,p3,", "  - slide 'c': slide 'c' has no label"),
        ("lusc", "luad", "at least two classes, found: luad"),
    ],
)
def test_a_refusal_leaves_nothing_and_does_not_block_the_second_try(
    folder: Path, wrong: str, right: str, words: str
) -> None:
    before = {*folder.rglob("*"), folder / "labels.csv"}
    with pytest.raises(CohortError) as caught:
        run(folder, LABELS.replace(wrong, right))
    assert words in str(caught.value)
    assert str(caught.value).startswith(
        f"nothing was written, since slide table '{folder / 'slides.csv'}' has 1 problem"
    )
    assert set(folder.rglob("*")) == before
    run(folder)
    table = (folder / "slides.csv").read_bytes()
    with pytest.raises(CohortError):
        run(folder, LABELS.replace(wrong, right), overwrite=True)
    assert (folder / "slides.csv").read_bytes() == table


def test_columns_are_named_or_the_message_says_how(folder: Path) -> None:
    odd = LABELS.replace("Slide,Case,Subtype", "scan,donor,finding")
    for option, words in [
        ({}, r"known to be the slide_id \(it has: scan, donor, finding, Center\); name it with slide_column"),
        ({"slide_column": "scan"}, "patient_column, or patient_is_slide if every slide is a patient of its own"),
        ({"slide_column": "scan", "patient_is_slide": True}, "known to be the label"),
        ({"slide_column": "nope"}, "has no column 'nope'"),
    ]:
        with pytest.raises(CohortError, match=words):
            run(folder, odd, **option)
    run(folder, odd, slide_column="scan", patient_is_slide=True, label_column="finding")
    config = load_config(folder / "my.yaml")
    assert config.cohort.patient_is_slide
    assert load_cohort(config.cohort).row("c").patient_id == "c"


def test_no_match_shows_both_kinds_of_names(folder: Path) -> None:
    with pytest.raises(CohortError, match=r"files are called 'a.1', 'c', 'd', rows 'x', 'y'"):
        run(folder, "slide,patient,label\nx,p,1\ny,q,2\n")


def test_two_rows_or_two_files_for_one_slide(folder: Path) -> None:
    assert run(folder, LABELS + "c,p3,luad,s1\n").slides_per_class["luad"] == 2  # said twice, the same
    with pytest.raises(CohortError, match="line 7: slide 'c' has another row that says otherwise"):
        run(folder, LABELS + "c,p3,lusc,s1\n", overwrite=True)
    (folder / "slides" / "sub" / "c.svs").touch()
    with pytest.raises(CohortError, match=r"1 slide ids stand for several files.*'c': c.tif, sub/c.svs"):
        run(folder, overwrite=True)


def test_empty_and_missing_folders(folder: Path) -> None:
    (folder / "labels.csv").write_text(LABELS)
    (folder / "empty").mkdir()
    for name, words in [("empty", "no slide in"), ("nowhere", "no folder")]:
        with pytest.raises(CohortError, match=words):
            init_config(folder / name, folder / "labels.csv", folder / "my.yaml")


def test_a_folder_of_dicom_files_is_one_slide(tmp_path: Path) -> None:
    for name in ("s1.dicom/level-0.dcm", "s1.dicom/level-1.dcm", "s2.SVS", ".hidden/x.svs", "s3.mrxs", "s3/Data0.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in find_slides(tmp_path)]
    assert found == ["s2.SVS", "s3.mrxs", "s1.dicom"]


def test_links_to_folders_are_followed_and_each_folder_is_searched_once(tmp_path: Path) -> None:
    for name in ("slides/a.svs", "elsewhere/b.svs"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    for name, target in [("disk2", "../elsewhere"), ("again", "../elsewhere"), ("loop", "."), ("gone", "nowhere")]:
        (tmp_path / "slides" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to("../slides")
    found = [str(path.relative_to(tmp_path / "slides")) for path in find_slides(tmp_path / "slides")]
    assert found == ["a.svs", "again/b.svs"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open", "secret", "lost+found"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.svs").touch()
    scandir = os.scandir

    def refusing(path: str) -> object:  # as the system does to all but root
        if Path(path).name in ("secret", "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(CohortError, match=r"folder '.*secret' cannot be read \(Permission denied\)"):
        list(find_slides(tmp_path))
    (tmp_path / "secret").rename(tmp_path / ".secret")
    assert [path.parent.name for path in find_slides(tmp_path)] == ["open"]


@pytest.mark.parametrize(
    ("name", "slide_id"),
    [
        ("a.svs", "a"),
        ("TCGA-83-5908-01Z-00-DX1.381c8f82.svs", "TCGA-83-5908-01Z-00-DX1.381c8f82"),
        ("TCGA-83-5908-01Z-00-DX1.381c8f82", "TCGA-83-5908-01Z-00-DX1.381c8f82"),
        ("/data/x/A b.NDPI", "A_b"),
        (r"C:\slides\ä.tif", "_"),
        ("..hidden.svs", "_hidden"),
    ],
)
def test_ids(name: str, slide_id: str) -> None:
    assert slide_id_of(name) == slide_id


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("table", "options", "num", "label"),
    [
        ("camelyon16_slide_labels.csv", {"patient_is_slide": True}, 399, "0"),
        ("tcga_lung_labels.csv", {}, 941, "adenocarcinoma"),
    ],
)
def test_label_tables_of_public_cohorts(
    real_data: Path, table: str, options: dict[str, bool], num: int, label: str
) -> None:
    chosen = {"slide_id": None, "patient_id": None, "label": None}
    labels = read_labels(real_data / "labels" / table, chosen, options.get("patient_is_slide", False))
    assert len(labels) == num
    assert next(iter(labels.values()))["label"] == label
    assert all(SLIDE_ID.fullmatch(slide_id) for slide_id in labels)


def test_images_are_slides_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.JPEG"):
        (tmp_path / name).touch()
    assert [path.name for path in find_slides(tmp_path)] == ["a.png", "b.JPEG"]
    (tmp_path / "sub" / "c.svs").touch()
    assert [path.name for path in find_slides(tmp_path)] == ["c.svs"]
