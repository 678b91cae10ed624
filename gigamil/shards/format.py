"""Names and constants of the shard format.

A change here, or in how pixels are read, masked or encoded, is a new FORMAT_VERSION: then every slide is tiled anew.

    <root>/cohort.parquet, cohort.csv          one row per slide: what it is, and what `gigamil tile` did to it
    <root>/contact-sheet/                      the overviews of all slides, to look over
    <root>/.gigamil-jobs/                      what each job of an array found (see cohort_table.py)
    <root>/slides/<slide_id>/manifest.json     what the slide is, how it was tiled, digests of the files beside it
                             index.parquet     one row per tile, in stored order (see index.py)
                             tiles-00000.tar   members <slide_id>/<number>.jpg, webdataset keys <slide_id>/<number>
                             thumbnail.jpg, mask.png, tissue.geojson, overview.jpg
    <root>/.gigamil-staging/<slide_id>/        the same while it is written; renamed to slides/ when complete
    <root>/.gigamil-removed/<slide_id>/        the same while it is deleted
"""

from pathlib import Path
from typing import Final

FORMAT_VERSION: Final = 2
TILES_PER_TAR = 4096  # 50-120 MB of 224-pixel tiles: large enough for one range request, small enough to copy again
TAR_BLOCK = 512  # a USTAR header is one block, and data is padded to whole blocks

SLIDES, COHORT, COHORT_CSV, CONTACT_SHEET = "slides", "cohort.parquet", "cohort.csv", "contact-sheet"
# `gigamil tile` deletes these whatever they hold, so they have names that nobody else gives to a folder.
STAGING, REMOVED, JOBS = ".gigamil-staging", ".gigamil-removed", ".gigamil-jobs"
MANIFEST, INDEX, THUMBNAIL, MASK = "manifest.json", "index.parquet", "thumbnail.jpg", "mask.png"
TISSUE, OVERVIEW = "tissue.geojson", "overview.jpg"
EXTENSION = "jpg"


def tile_key(slide_id: str, number: int) -> str:
    """Webdataset key of a tile.

    The slide is the folder part on purpose: webdataset ends a key at the first dot of the base name, so a TCGA id
    there (`TCGA-83-5908-01Z-00-DX1.381c8f82-...`) would merge all tiles of the slide into one sample.
    """
    return f"{slide_id}/{number:06d}"


def member_name(slide_id: str, number: int) -> str:
    """Name of a tile inside its tar."""
    return f"{tile_key(slide_id, number)}.{EXTENSION}"


def tar_name(number: int) -> str:
    """File name of a slide's n-th tar."""
    return f"tiles-{number:05d}.tar"


def slide_folder(root: Path, slide_id: str) -> Path:
    """Folder of a finished slide."""
    return root / SLIDES / slide_id


def padded(length: int) -> int:
    """Bytes that a member's data takes in a tar."""
    return -(-length // TAR_BLOCK) * TAR_BLOCK
