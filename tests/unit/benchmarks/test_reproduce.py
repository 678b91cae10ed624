"""The seeds' experiments, tiny: they run to their JSON, and what they claim to compare is compared."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from benchmarks.lung_mosaic import ADENO, NORMAL, SQUAMOUS, Tile, read_tiles
from benchmarks.reproduce import digits as digits_script
from benchmarks.reproduce import lung as lung_script
from benchmarks.reproduce import unit_tests as unit_tests_script
from gigamil.data.decode import decode_tiles
from gigamil.shards.read import ShardSet


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Digits that anyone can tell apart: a class is a row that is lit."""
    rng = np.random.default_rng(0)
    arrays = {}
    for side in ("train", "test"):
        labels = np.arange(300) % 10
        images = rng.integers(0, 40, (300, 28, 28), dtype=np.uint8)
        images[np.arange(300), 2 * labels + 4] = 255
        arrays |= {f"{side}_images": images, f"{side}_labels": labels}
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["acc", "ilse"])
def test_digits(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    words = ["--digits", str(digits), "--protocol", protocol, "--train", "20", "--test", "10", "--epochs", "11"]
    assert digits_script.main([*words, "--seeds", "1", "--bag", "8", "--out", str(tmp_path / "out")]) == 0
    found = last_json(capsys)
    assert found["max_curve_difference"] < 1e-9  # type: ignore[operator]
    whole = json.loads((tmp_path / "out" / "digits.json").read_text())
    full, replay = whole["runs"]["full"][0], whole["runs"]["replay"][0]
    assert replay["auc"] == pytest.approx(full["auc"])
    assert replay["forwards"] == 2 * full["forwards"]
    assert whole["runs"]["frozen"][0]["forwards"] < whole["runs"]["coupled"][0]["forwards"]
    assert len(whole["curves"]["full"]) == 20
    assert (tmp_path / "out" / "digits.png").is_file()


def test_bags_of_digits_have_the_key_where_they_say(digits: Path) -> None:
    module = digits_script
    for protocol, bag in (("acc", 50), ("ilse", 10)):
        bags = module.make_bags(module.Setting(str(digits), protocol, bag), "train", 40, 3)
        assert [bool(is_key.any()) for is_key in bags.is_key] == [bool(label) for label in bags.label_N]
        if protocol == "acc":
            assert sorted({int(is_key.sum()) for is_key in bags.is_key}) == [0, 3]
            assert set(bags.sizes) == {50}
        else:
            assert len(set(bags.sizes)) > 3
        shown = [int((image[:, :, 0].float().mean(1) > 200).nonzero()[0, 0] - 4) // 2 for image in bags.images[1]]
        assert [digit == 9 for digit in shown] == bags.is_key[1].tolist()


def test_without_digits_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no .*mnist.npz.*--digits, or GIGAMIL_TEST_DATA"):
        digits_script.main(["--digits", str(tmp_path)])


def test_unit_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = unit_tests_script
    names = ["attention", "noisy_or, one-sided"]
    assert module.main(["--aggregators", *names, "--out", str(tmp_path)]) == 0
    found = last_json(capsys)
    assert found["aggregators"] == 2
    violations = found["violations"]
    assert isinstance(violations, dict)
    assert "attention" in violations["absence"]
    assert "noisy_or, one-sided" not in violations["absence"] + violations["pair"]
    assert (tmp_path / "unit_tests.png").is_file()


@pytest.mark.parametrize("name", ["absence", "pair", "frequency"])
def test_the_rule_holds_on_both_sides_and_the_shortcut_is_turned(name: str) -> None:
    """Bags are drawn as the tests say: by the rule, and with a shortcut that says the opposite in the test."""
    module = unit_tests_script
    rng = np.random.default_rng(0)

    def shown(is_positive: bool, is_turned: bool) -> tuple[bool, bool]:
        bag = module.TESTS[name](rng, is_positive, is_turned)
        mean = bag.mean(axis=1)
        poisoned = bool((np.abs(mean + 10) < 1).any())
        both = bool((np.abs(mean - 2) < 0.3).any() and (np.abs(mean - 3) < 0.3).any())
        return (len(bag) > 30 if name == "frequency" else poisoned), both

    for is_turned in (False, True):
        for is_positive in (False, True):
            shortcut, both = shown(is_positive, is_turned)
            if name == "frequency":
                assert shortcut == (is_turned and not is_positive)
            else:
                assert shortcut == (is_positive == is_turned)
            if name != "absence":
                assert both == is_positive


GREY = {NORMAL: 200, ADENO: 120, SQUAMOUS: 60}


@pytest.fixture
def lung_tiles(tmp_path: Path) -> Path:
    """Flat tiles, two of each of 16 fields of a kind, as lung_tiles.tar and tiles.csv."""
    folder = tmp_path / "lung_tiles"
    folder.mkdir()
    rows = [["path", "label", "group_id"]]
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "lung_tiles.tar", "w") as tar:
        for label, grey in GREY.items():
            for number in range(32):
                pixels = (grey + rng.integers(-9, 9, (224, 224, 1))).astype(np.uint8).repeat(3, axis=2)
                jpeg, member = simplejpeg.encode_jpeg(pixels), tarfile.TarInfo(f"{label}/{number}.jpg")
                member.size = len(jpeg)
                tar.addfile(member, io.BytesIO(jpeg))
                rows.append([member.name, label, str(number // 2)])
    with (folder / "tiles.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder


def test_hands_are_disjoint(lung_tiles: Path) -> None:
    fields: dict[str, list[Tile]] = {}
    for tile in read_tiles(lung_tiles):
        fields.setdefault(tile.field, []).append(tile)
    hands = lung_script.deal(fields, 7, np.random.default_rng(0))
    owned = [{tile.field for tile in hand} for hand in hands]
    assert sum(len(names) for names in owned) == len(set().union(*owned)) == 48
    assert sum(len(hand) for hand in hands) == 96
    with pytest.raises(SystemExit, match="48 fields are too few for 50 patients"):
        lung_script.deal(fields, 50, np.random.default_rng(0))


def test_other_settings_need_another_folder(tmp_path: Path) -> None:
    lung_script.refuse_other_settings(tmp_path, {"epochs": 20, "lr": 1e-3})
    lung_script.refuse_other_settings(tmp_path, {"epochs": 20, "lr": 1e-3})
    with pytest.raises(SystemExit, match=r"has runs with epochs 20: choose another --out"):
        lung_script.refuse_other_settings(tmp_path, {"epochs": 40, "lr": 1e-3})


def test_mosaics_of_patients_are_stained_alike(lung_tiles: Path, tmp_path: Path) -> None:
    table = lung_script.write_cohort(tmp_path / "cohort", read_tiles(lung_tiles), 32, 32)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 32
    assert {(row["split"], row["label"]) for row in rows} == {
        (split, label) for split in ("train", "val", "test") for label in lung_script.CLASSES
    }
    sides = {row["patient_id"]: row["split"] for row in rows}
    assert len(sides) == 16
    shards = ShardSet(tmp_path / "cohort" / "shards")
    shown = [decode_tiles(shards.read_span(row["slide_id"], 0, 40), 32).mean(axis=(1, 2)) for row in rows[:4]]
    nests = [np.flatnonzero(np.abs(grey_N3 - grey_N3[0]).max(axis=1) > 25) for grey_N3 in shown]
    assert [len(nest) for nest in nests] == [lung_script.NUM_TUMOUR] * 4, (
        "all normal tiles of a slide are stained alike"
    )
    fields = json.loads((tmp_path / "cohort" / "fields.json").read_text())
    train = [row for row in rows if row["split"] == "train"]
    # Of 16 fields a class is dealt to 8 patients, normal ones to 16.
    num_patients = len({row["patient_id"] for row in train})
    assert len(fields) == num_patients + 2 * num_patients


@pytest.mark.slow
def test_lung(lung_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiles", str(lung_tiles), "--slides", "32", "--tile-px", "32", "--epochs", "1", "--pretrain", "1"]
    regimes = ["frozen", "sampled", "end_to_end", "streamed"]
    words += ["--out", str(tmp_path / "out"), "--regimes", *regimes]
    assert lung_script.main(words) == 0
    found = last_json(capsys)
    assert set(regimes) <= found.keys()
    ci, difference = found["ci"], found["minus_frozen"]
    assert isinstance(ci, dict)
    assert isinstance(difference, dict)
    assert list(ci) == regimes
    assert list(difference) == regimes[1:]
    whole = json.loads((tmp_path / "out" / "lung.json").read_text())
    spent = {run["name"]: run["spent"]["tile_forwards"] for run in whole["runs"]}
    assert spent["frozen"] == 16 * 40, "every training tile once"
    assert spent["sampled"] < spent["end_to_end"]
    assert (tmp_path / "out" / "comparison" / "comparison.html").is_file()
    before = (tmp_path / "out" / "frozen" / "seed0" / "run.json").stat().st_mtime_ns
    assert lung_script.main(words) == 0
    assert (tmp_path / "out" / "frozen" / "seed0" / "run.json").stat().st_mtime_ns == before, "not done again"
