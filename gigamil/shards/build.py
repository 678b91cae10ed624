"""One slide file -> one finished shard folder."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from gigamil.config.schema import Slides
from gigamil.errors import ShardError, SlideError
from gigamil.shards.format import FORMAT_VERSION, INDEX, MASK, THUMBNAIL, slide_folder
from gigamil.shards.index import SlideIndex, write_index
from gigamil.shards.manifest import Setting, SlideManifest, digest_file, read_manifest, settings_digest
from gigamil.shards.write import StoredTiles, commit, staged_slide, write_tars
from gigamil.slides.grid import TileGrid, choose_tiles
from gigamil.slides.reader import Slide, open_slide
from gigamil.slides.tissue import TissueMask, find_tissue

# (columns, rows) of grid cells -> the permutation in which their tiles are stored.
CellOrder = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Keys of `slides` that decide the tiles: all but max_failed.
_TILING_KEYS = tuple(key for key in Slides.model_fields if key != "max_failed")
_FINGERPRINT_BYTES = 1 << 16
# A slide at twice the wanted mpp still shows nuclei; an overview image among the slides would give 28,000 blurs.
_MAX_ENLARGEMENT = 4.0


@dataclass(frozen=True)
class SlideJob:
    """A slide to be tiled. `mpp` is that of the slide table and wins over the file's."""

    slide_id: str
    path: Path
    mpp: float | None
    slides: Slides
    root: Path

    @property
    def settings(self) -> dict[str, Setting]:
        """Every value that decides the tiles."""
        chosen: dict[str, Setting] = {key: getattr(self.slides, key) for key in _TILING_KEYS}
        return {"format_version": FORMAT_VERSION, "table_mpp": self.mpp} | chosen


def finished_slide(job: SlideJob) -> SlideManifest | None:
    """The manifest of a slide that needs no tiling: same settings, same slide file, all files there in full size.

    A slide file that is gone or cannot be read (moved to an archive, on a server that is away) does not make its shards
    stale.
    """
    try:
        manifest = read_manifest(slide_folder(job.root, job.slide_id))
    except ShardError:
        return None  # missing, damaged or of another version: tile it anew
    folder = slide_folder(job.root, job.slide_id)
    complete = all(_size(folder / file.name) == file.bytes for file in manifest.files)
    same_settings = manifest.settings_hash == settings_digest(job.settings)
    return manifest if complete and same_settings and _same_source(job.path, manifest) else None


def build_slide(job: SlideJob, order: CellOrder) -> SlideManifest:
    """Tile a slide: find tissue, choose tiles, read, encode and store them in the given order.

    A slide without a tile gets a manifest too, which says why, so that it is not tried again. Shards that are there
    already are replaced when the new ones are complete; on an error they stay, and `finished_slide` and
    `ShardSet.check_tiles` tell them from those of today's settings.

    Returns:
        The manifest. Equal files and settings give equal bytes in every file.
    Raises:
        SlideError: the slide cannot be opened or read, its mpp are unknown, or over four times the wanted `tile_mpp`.
        OSError: the shards cannot be written.
    Cost: reads the slide once at `tissue_mpp` and its tissue once at `tile_mpp`, tile by tile: memory holds the
        thumbnail and one tile.
    """
    settings = job.slides
    with (
        open_slide(job.path, mpp=job.mpp, default_mpp=settings.default_mpp) as slide,
        staged_slide(job.root, job.slide_id) as folder,
    ):
        _check_scale(job, slide)
        mask = find_tissue(
            slide,
            tissue_mpp=settings.tissue_mpp,
            min_area_um2=settings.min_tissue_area_um2,
            max_hole_area_um2=settings.max_hole_area_um2,
        )
        grid = TileGrid(slide.info.width_um, slide.info.height_um, settings.tile_px, settings.tile_mpp)
        chosen, tissue = choose_tiles(grid, mask, settings.min_tissue)
        along = order(*grid.col_row(chosen))
        chosen, tissue = chosen[along], tissue[along]
        stored = write_tars(folder, job.slide_id, _jpegs(slide, grid, chosen, settings.jpeg_quality))
        write_index(folder / INDEX, _index(slide, grid, chosen, tissue, stored))
        _write_images(folder, slide, mask)
        manifest = _manifest(job, slide, mask, grid, stored, folder)
        commit(job.root, folder, manifest)
    return manifest


def fingerprint(path: Path) -> str:
    """Digest of the size, the first and the last 64 KiB of a slide file, or of the files in a slide folder.

    Tells a re-exported or a truncated copy from the original without reading gigabytes; headers and directories of
    all common formats lie at one of the ends.

    Raises:
        SlideError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        for file in files:
            with file.open("rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                digest.update(size.to_bytes(8, "little") + handle.read(_FINGERPRINT_BYTES))
                handle.seek(max(0, size - _FINGERPRINT_BYTES))
                digest.update(handle.read(_FINGERPRINT_BYTES))
    except OSError as error:
        raise SlideError(f"slide '{path}' cannot be read: {error}") from error
    return digest.hexdigest()


def _same_source(path: Path, manifest: SlideManifest) -> bool:
    try:
        return fingerprint(path) == manifest.source_fingerprint
    except SlideError:
        return True  # as far as anyone can see now


def _check_scale(job: SlideJob, slide: Slide) -> None:
    slide_mpp, tile_mpp = max(slide.info.mpp_x, slide.info.mpp_y), job.slides.tile_mpp
    if slide_mpp > _MAX_ENLARGEMENT * tile_mpp:
        raise SlideError(
            f"slide '{job.path}': its mpp {slide_mpp:g} ({slide.info.mpp_source}) is over {_MAX_ENLARGEMENT:g} times "
            f"slides.tile_mpp={tile_mpp:g}, so tiles would be blurs. Correct its mpp column, raise slides.tile_mpp, or "
            "remove its row."
        )


def _jpegs(slide: Slide, grid: TileGrid, chosen: np.ndarray, quality: int) -> Iterator[bytes]:
    for number in chosen:
        x_um, y_um = grid.position_um(int(number))
        tile_HW3 = slide.read_um(x_um, y_um, grid.tile_um, grid.tile_um, grid.tile_px, grid.tile_px)
        # 4:2:0 as scanners themselves write; 4:4:4 costs a third more bytes and decoding time.
        yield simplejpeg.encode_jpeg(np.ascontiguousarray(tile_HW3), quality=quality, colorsubsampling="420")


def _index(slide: Slide, grid: TileGrid, chosen: np.ndarray, tissue: np.ndarray, stored: StoredTiles) -> SlideIndex:
    x_um, y_um = grid.position_um(chosen)
    return SlideIndex(
        tar=stored.tar,
        offset=stored.offset,
        length=stored.length,
        number=np.arange(len(chosen), dtype=np.int64),
        x_um=x_um.astype(np.float64),
        y_um=y_um.astype(np.float64),
        x_px0=np.rint(x_um / slide.info.mpp_x).astype(np.int64),
        y_px0=np.rint(y_um / slide.info.mpp_y).astype(np.int64),
        tissue=tissue,
        crc32=stored.crc32,
    )


def _write_images(folder: Path, slide: Slide, mask: TissueMask) -> None:
    """Thumbnail and mask on the same pixels: for heatmaps and reports when the slide file is gone."""
    Image.fromarray(slide.thumbnail(mask.mpp)).save(folder / THUMBNAIL, quality=90)
    Image.fromarray(mask.mask_HW).save(folder / MASK)


def _manifest(
    job: SlideJob, slide: Slide, mask: TissueMask, grid: TileGrid, stored: StoredTiles, folder: Path
) -> SlideManifest:
    info = slide.info
    return SlideManifest(
        format_version=FORMAT_VERSION,
        slide_id=job.slide_id,
        vendor=info.vendor,
        objective=info.objective,
        width_px0=info.width,
        height_px0=info.height,
        bounds_x_px0=info.bounds_x,
        bounds_y_px0=info.bounds_y,
        mpp_x=info.mpp_x,
        mpp_y=info.mpp_y,
        mpp_source=info.mpp_source,
        tile_px=grid.tile_px,
        tile_mpp=grid.tile_mpp,
        num_x=grid.num_x,
        num_y=grid.num_y,
        num_tiles=len(stored.tar),
        tissue_area_mm2=round(mask.area_um2 * 1e-6, 6),
        thumbnail_mpp=mask.mpp,
        mask_sha256=mask.sha256(),
        settings=job.settings,
        settings_hash=settings_digest(job.settings),
        source_fingerprint=fingerprint(job.path),
        tars=stored.tars,
        index=digest_file(folder / INDEX),
        thumbnail=digest_file(folder / THUMBNAIL),
        mask=digest_file(folder / MASK),
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
