"""Names of people that scanners write into slide files reach nothing that gigamil writes or prints."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

import gigamil
from gigamil.cli import main
from gigamil.testing.tiff import write_pyramid_tiff

NUM_PLANTED = 50
PLANTED = [f"Roe{number:02d}Jane" for number in range(NUM_PLANTED)]
PATTERN = re.compile(r"roe\d\djane", re.IGNORECASE)


def tissue(seed: int, size: int = 256) -> np.ndarray:
    image = np.full((size, size, 3), 245, np.uint8)
    noise = np.random.default_rng(seed).integers(0, 40, (size - 64, size - 64, 3))
    image[32:-32, 32:-32] = np.array([190, 90, 150]) + noise
    return image


def slides(folder: Path) -> Iterator[tuple[str, Path]]:
    """A slide of each kind that holds free text, with all of `PLANTED` in them."""
    names = iter(PLANTED)
    for number in range(2):  # SVS: the description's keys become properties
        keys = "".join(f"|{key} = {next(names)}" for key in ("User", "Title", "Filename", "Barcode", "ImageID", "Date"))
        text = f"Aperio Image Library {next(names)}\r\n256x256{keys}|MPP = 1.0|AppMag = 10"
        yield f"svs{number}", write(folder / f"svs{number}.svs", number, description=text)
    for number in range(2):  # generic TIFF, with what a vendor's software leaves
        text = f"{next(names)} <Patient name='{next(names)}'>{next(names)}</Patient>\n\x1b[31m=HYPERLINK(\"{next(names)}\")"
        yield f"tiff{number}", write(folder / f"tiff{number}.tiff", 10 + number, description=text)
    for number in range(2):
        info = PngImagePlugin.PngInfo()
        for key in ("Title", "Author", "Description", "Comment", "Source"):
            info.add_text(key, next(names), zip=key == "Comment")
        path = folder / f"png{number}.png"
        Image.fromarray(tissue(20 + number)).save(path, pnginfo=info)
        yield f"png{number}", path
    number = 0
    while rest := list(itertools.islice(names, 6)):
        exif = Image.Exif()
        for tag, name in zip(
            (0x010E, 0x013B, 0x8298, 0x0131), rest, strict=False
        ):  # description, artist, rights, software
            exif[tag] = name
        path = folder / f"jpeg{number}.jpg"
        comment = " ".join(rest[4:])
        Image.fromarray(tissue(30 + number)).save(path, exif=exif, comment=comment.encode(), quality=95)
        yield f"jpeg{number}", path
        number += 1


def write(path: Path, seed: int, description: str) -> Path:
    write_pyramid_tiff(path, tissue(seed), 1.0, tile=32, levels=1, description=description)
    return path


def texts(root: Path) -> Iterator[tuple[Path, str]]:
    """Everything that lies in files below a folder, parquet unpacked."""
    for path in sorted(root.rglob("*")):
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            yield path, f"{file.metadata} {file.schema_arrow.metadata} {file.read().to_pylist()}"
        if path.is_file():
            yield path, path.read_bytes().decode("latin-1")


def test_none_of_fifty_names_reaches_an_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    made = list(slides(tmp_path / "in"))
    planted = "".join(path.read_bytes().decode("latin-1") for _, path in made)
    assert sum(name in planted for name in PLANTED) >= NUM_PLANTED - 2  # two comments of PNGs are compressed
    table = tmp_path / "slides.csv"
    rows = [f"{name},{path},p{n},{'ab'[n % 2]},1.0" for n, (name, path) in enumerate(made)]
    # A slide that fails, whose message quotes what it could not use.
    broken = write(tmp_path / "in" / "broken.svs", 99, f"Aperio {PLANTED[0]}\r\n256x256|MPP = {PLANTED[1]}")
    rows.append(f"broken,{broken},p-broken,a,")
    table.write_text("\n".join(["slide_id,path,patient_id,label,mpp", *rows]) + "\n")
    keys = ["slides.tile_px=32", "slides.tile_mpp=1.0", "slides.min_tissue_area_um2=1000", f"cohort.table={table}"]
    (tmp_path / "run.yaml").write_text(f"bookkeeping: {{out: {tmp_path / 'out'}}}\n")
    config = str(tmp_path / "run.yaml")
    words = [word for key in keys for word in ("--" + key.partition("=")[0], key.partition("=")[2])]

    assert main(["tile", config, *words]) == 3  # the broken one
    assert main(["inspect", config, *words, "--html", str(tmp_path / "out" / "cohort.html")]) == 3
    assert main(["split", config, *words]) == 0
    assert main(["export-coords", config, "--layout", "trident", "--to", str(tmp_path / "out" / "coords"), *words]) == 0
    for _, path in made:
        assert main(["inspect", str(path), "--mpp", "1.0"]) == 0

    shards = gigamil.ShardSet(tmp_path / "out" / "shards")
    assert {shards.manifest(name).way for name, _ in made} == {"raw", "resampled"}
    out, err = capfd.readouterr()
    assert "broken" in out
    assert PATTERN.findall(out + err) == []
    found = {str(path.relative_to(tmp_path)): PATTERN.findall(text) for path, text in texts(tmp_path / "out")}
    assert len(found) > 6 * len(made)
    assert {name: names for name, names in found.items() if names} == {}


def test_labels_and_overviews_of_a_slide_are_never_opened() -> None:
    sources = Path(gigamil.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "associated_images" in path.read_text()] == []
