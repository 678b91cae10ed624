"""One slide file -> one finished shard folder, in pieces: prepare it, store one tar after the other, finish it.

The pieces of a slide may run in different processes. What lies between them are the small values below and the files
in the slide's staging folder, so the bytes of a finished slide do not depend on who made which piece.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from gigamil.errors import SlideError
from gigamil.shards.format import FORMAT_VERSION, INDEX, MASK, OVERVIEW, THUMBNAIL, TISSUE, tar_name
from gigamil.shards.index import SlideIndex, write_index
from gigamil.shards.job import SlideJob, fingerprint, refuse_link
from gigamil.shards.manifest import Setting, SlideManifest, digest_file, settings_digest
from gigamil.shards.write import StoredTar, commit, discard, place_tiles, stage, staging_folder, write_tar
from gigamil.slides.grid import TileGrid, check_scale, choose_tiles, slide_grid
from gigamil.slides.masks import load_mask, write_mask_geojson
from gigamil.slides.native import NativeTiles, NotNative, native_tiles
from gigamil.slides.overview import draw_overview
from gigamil.slides.points import PointGrid
from gigamil.slides.quality import find_pen, sharpness
from gigamil.slides.reader import Slide, SlideInfo, open_slide
from gigamil.slides.tissue import TissueMask, find_tissue, mask_mpp

Way = Literal["raw", "resampled"]


@dataclass(frozen=True, eq=False)
class PreparedSlide:
    """What is known of a slide once its tissue is found and its tiles are chosen; its pictures lie in staging.

    Attributes:
        settings: of the job, with the digests that its mask and its file of positions had before they were read.
        way, way_reason: as in the manifest.
        mask_mpp, mask_sha256, tissue_area_um2: of the tissue mask.
        source_fingerprint: of the file that was opened.
        cells_N: tiles of the grid, int64, in stored order.
        tissue_N, pen_N: float32, shares of each tile.
        num_penned: tiles that were dropped for pen marks.
    """

    job: SlideJob
    settings: dict[str, Setting]
    info: SlideInfo
    grid: TileGrid
    way: Way
    way_reason: str
    mask_mpp: float
    mask_sha256: str
    tissue_area_um2: float
    source_fingerprint: str
    cells_N: np.ndarray
    tissue_N: np.ndarray
    pen_N: np.ndarray
    num_penned: int

    def parts(self) -> list["Part"]:
        """The pieces in which its tiles are stored: one tar each. None if no pixel has to be read."""
        if not self.job.stored and self.job.slides.min_sharpness is None:
            return []
        num = self.job.tiles_per_tar
        return [
            Part(self.job, self.grid, self.way, number, first, self.cells_N[first : first + num])
            for number, first in enumerate(range(0, len(self.cells_N), num))
        ]


@dataclass(frozen=True, eq=False)
class Part:
    """The tiles of one tar: `cells_n` of the grid, of which the first is number `first` of the slide."""

    job: SlideJob
    grid: TileGrid
    way: Way
    number: int
    first: int
    cells_n: np.ndarray


@dataclass(frozen=True, eq=False)
class StoredPart:
    """The tiles of a part that were kept.

    Attributes:
        number: of the part.
        number_n, sharpness_n: of each tile, int64 and float32.
        num_raw: tiles whose bytes are the slide file's own.
        tar: None if there are no bytes.
    """

    number: int
    number_n: np.ndarray
    sharpness_n: np.ndarray
    num_raw: int
    tar: StoredTar | None


def build_slide(job: SlideJob) -> SlideManifest:
    """Tile a slide: find tissue, choose tiles, read, encode and store them in the job's order.

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
    try:
        prepared = prepare_slide(job)
        return finish_slide(prepared, [store_part(part) for part in prepared.parts()])
    finally:
        discard(job.root, job.slide_id)


def open_job(job: SlideJob) -> Slide:
    """Open the slide of a job."""
    return open_slide(job.path, mpp=job.mpp, default_mpp=job.slides.default_mpp, icc=job.slides.icc)


def prepare_slide(job: SlideJob) -> PreparedSlide:
    """First piece: find tissue, choose and order tiles, draw pictures into a new staging folder.

    Raises: as `build_slide`.
    """
    refuse_link(job)
    # Before the files are read: if one is replaced from here on, the slide counts as tiled with the old one, and is
    # tiled again.
    settings = job.settings
    # Before the file is opened: it may be a pipe. That it is missing is for the reader to say.
    source = fingerprint(job.path) if job.path.exists() else ""
    with open_job(job) as slide:
        check_scale(slide.info, job.slides.tile_mpp)
        given = None
        if job.coords is not None:
            assert job.read_positions is not None, "a job with slides.coords needs a reader for them"
            given = job.read_positions(job.coords, slide.info, job.slides.tile_px, job.slides.tile_mpp)
        grid, way, way_reason = _choose_way(job, slide)
        thumbnail_HW3 = slide.thumbnail(mask_mpp(slide.info, job.slides.tissue_mpp))
    # The slide is closed, and the thumbnail goes before the tiles are chosen: each may hold 100 MB.
    mask = _mask(job, slide, thumbnail_HW3)
    pen_mask = TissueMask(find_pen(thumbnail_HW3), mask.mpp)
    folder = stage(job.root, job.slide_id)
    Image.fromarray(thumbnail_HW3).save(folder / THUMBNAIL, quality=90)
    del thumbnail_HW3
    Image.fromarray(mask.mask_HW).save(folder / MASK)
    write_mask_geojson(folder / TISSUE, mask, slide.info)
    cells, tissue = (
        choose_tiles(grid, mask, job.slides.min_tissue) if given is None else _given_tiles(given, grid, mask)
    )
    pen = pen_mask.fraction(*grid.position_um(cells), grid.tile_width_um, grid.tile_height_um).astype(np.float32)
    clean = np.ones(len(cells), bool) if job.slides.max_pen is None else pen <= job.slides.max_pen
    kept = np.flatnonzero(clean)
    kept = kept[job.order(*grid.col_row(cells[kept]))]
    return PreparedSlide(
        job=job,
        settings=settings,
        info=slide.info,
        grid=grid,
        way=way,
        way_reason=way_reason,
        mask_mpp=mask.mpp,
        mask_sha256=mask.sha256(),
        tissue_area_um2=mask.area_um2,
        source_fingerprint=source,
        cells_N=cells[kept],
        tissue_N=tissue[kept],
        pen_N=pen[kept],
        num_penned=int(np.count_nonzero(~clean)),
    )


def store_part(part: Part) -> StoredPart:
    """Second piece: read, encode and store the tiles of one tar in the staging folder.

    Raises: as `build_slide`.
    """
    job, tar = part.job, None
    kept: list[tuple[int, float, bool]] = []
    with ExitStack() as stack:
        slide = stack.enter_context(open_job(job))
        native = stack.enter_context(_native(job, slide)) if part.way == "raw" else None

        def tiles() -> Iterator[tuple[int, bytes]]:
            for number, jpeg, value, is_raw in _sharp_tiles(part, slide, native):
                kept.append((number, value, is_raw))
                yield number, jpeg

        if job.stored:
            tar = write_tar(staging_folder(job.root, job.slide_id) / tar_name(part.number), job.slide_id, tiles())
        else:
            deque(tiles(), maxlen=0)
    if tar and not kept:
        (staging_folder(job.root, job.slide_id) / tar.file.name).unlink()
        tar = None
    numbers, values, are_raw = zip(*kept, strict=True) if kept else ((), (), ())
    return StoredPart(part.number, np.array(numbers, np.int64), np.array(values, np.float32), sum(are_raw), tar)


def finish_slide(prepared: PreparedSlide, parts: Sequence[StoredPart]) -> SlideManifest:
    """Last piece: index, overview and manifest; then the slide appears under its final name.

    Args:
        parts: in order; empty if no pixel had to be read.
    Raises:
        SlideError: the slide file is no longer the one that was prepared.
        OSError: the shards cannot be written.
    """
    job, info, grid = prepared.job, prepared.info, prepared.grid
    folder = staging_folder(job.root, job.slide_id)
    number_N = _joined([part.number_n for part in parts]) if parts else np.arange(len(prepared.cells_N))
    cells_N = prepared.cells_N[number_N]
    write_index(folder / INDEX, _index(prepared, parts, number_N))
    with Image.open(folder / THUMBNAIL) as thumbnail, Image.open(folder / MASK) as image:
        mask = TissueMask(np.asarray(image), prepared.mask_mpp)
        overview = draw_overview(np.asarray(thumbnail), mask, grid, cells_N)
    overview.save(folder / OVERVIEW, quality=85, subsampling="4:4:4")  # thin lines keep their colour
    if fingerprint(job.path) != prepared.source_fingerprint:
        raise SlideError(
            f"slide '{job.path}' changed while it was tiled. Type `gigamil tile` again when it is complete."
        )
    manifest = SlideManifest(
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
        icc_sha256=info.icc_sha256,
        tile_px=grid.tile_px,
        tile_mpp=job.slides.tile_mpp,
        stride_px=grid.stride_px,
        pixel_mpp_x=grid.mpp_x,
        pixel_mpp_y=grid.mpp_y,
        num_x=grid.num_x,
        num_y=grid.num_y,
        num_tiles=len(number_N),
        num_raw=sum(part.num_raw for part in parts),
        num_dropped=prepared.num_penned + len(prepared.cells_N) - len(number_N),
        way=prepared.way,
        way_reason=prepared.way_reason,
        stored=job.stored,
        tissue_area_mm2=round(prepared.tissue_area_um2 * 1e-6, 6),
        thumbnail_mpp=prepared.mask_mpp,
        mask_sha256=prepared.mask_sha256,
        settings=prepared.settings,
        settings_hash=settings_digest(prepared.settings),
        source_fingerprint=prepared.source_fingerprint,
        tars=tuple(part.tar.file for part in parts if part.tar),
        index=digest_file(folder / INDEX),
        thumbnail=digest_file(folder / THUMBNAIL),
        mask=digest_file(folder / MASK),
        tissue=digest_file(folder / TISSUE),
        overview=digest_file(folder / OVERVIEW),
    )
    commit(job.root, folder, manifest)
    return manifest


def _mask(job: SlideJob, slide: Slide, thumbnail_HW3: np.ndarray) -> TissueMask:
    settings = job.slides
    if job.mask is not None:
        return load_mask(job.mask, slide.info, settings.tissue_mpp)
    return find_tissue(
        slide,
        tissue_mpp=settings.tissue_mpp,
        min_area_um2=settings.min_tissue_area_um2,
        max_hole_area_um2=settings.max_hole_area_um2,
        dark_field=settings.dark_field,
        thumbnail_HW3=thumbnail_HW3,
    )


def _choose_way(job: SlideJob, slide: Slide) -> tuple[TileGrid, Way, str]:
    """The file's own tiles where they fit what is asked for, else resampled ones; with the reason."""
    info, settings = slide.info, job.slides
    if job.coords is not None:
        return PointGrid.of(info, settings.tile_px, settings.tile_mpp), "resampled", "positions of slides.coords"
    grid = slide_grid(info, settings.tile_px, settings.tile_mpp, settings.stride_px)
    if settings.raw_tolerance is None:
        return grid, "resampled", "slides.raw_tolerance is null"
    if grid.stride_px != grid.tile_px:
        return grid, "resampled", "slides.stride_px is not tile_px"
    try:
        with _native(job, slide) as native:
            return replace(grid, mpp_x=native.mpp_x, mpp_y=native.mpp_y), "raw", ""
    except NotNative as reason:
        return grid, "resampled", str(reason)


def _given_tiles(given_N2_px0: np.ndarray, grid: TileGrid, mask: TissueMask) -> tuple[np.ndarray, np.ndarray]:
    """As `choose_tiles`, for positions that another tool has chosen: all of them, whatever their tissue."""
    cells = grid.index(given_N2_px0[:, 0], given_N2_px0[:, 1])
    tissue = mask.fraction(*grid.position_um(cells), grid.tile_width_um, grid.tile_height_um)
    return cells, tissue.astype(np.float32)


def _native(job: SlideJob, slide: Slide) -> NativeTiles:
    assert job.slides.raw_tolerance is not None
    return native_tiles(slide, job.slides.tile_px, job.slides.tile_mpp, job.slides.raw_tolerance)


def _sharp_tiles(part: Part, slide: Slide, native: NativeTiles | None) -> Iterator[tuple[int, bytes, float, bool]]:
    """Number, JPEG, sharpness (NaN if it is not asked for), and whether the bytes are the file's own."""
    grid, settings = part.grid, part.job.slides
    places = zip(
        *(axis.tolist() for axis in (*grid.col_row(part.cells_n), *grid.position_um(part.cells_n))), strict=True
    )
    for number, (col, row, x_um, y_um) in enumerate(places, start=part.first):
        jpeg = native.jpeg(col, row) if native else None
        is_raw = jpeg is not None
        if jpeg is None:
            level = native.level if native else None  # a neighbour of copied tiles is of their level
            side_um = grid.tile_width_um, grid.tile_height_um
            tile_HW3 = slide.read_um(x_um, y_um, *side_um, grid.tile_px, grid.tile_px, level=level)
            # 4:2:0 as scanners themselves write; 4:4:4 costs a third more bytes and decoding time.
            jpeg = simplejpeg.encode_jpeg(
                np.ascontiguousarray(tile_HW3), quality=settings.jpeg_quality, colorsubsampling="420"
            )
        value = np.nan
        if settings.min_sharpness is not None:
            value = sharpness(simplejpeg.decode_jpeg(jpeg))
            if value < settings.min_sharpness:
                continue
        yield number, jpeg, value, is_raw


def _index(prepared: PreparedSlide, parts: Sequence[StoredPart], number_N: np.ndarray) -> SlideIndex:
    num, info = len(number_N), prepared.info
    x_um, y_um = prepared.grid.position_um(prepared.cells_N[number_N])
    nothing = {
        "tar": np.zeros(num, np.int32),
        "number": number_N,
        "offset": np.zeros(num, np.int64),
        "length": np.zeros(num, np.int64),
        "crc32": np.zeros(num, np.uint32),
    }
    sharpness_N = _joined([part.sharpness_n for part in parts]) if parts else np.full(num, np.nan, np.float32)
    return SlideIndex(
        **(place_tiles([part.tar for part in parts if part.tar]) if prepared.job.stored else nothing),
        x_um=x_um.astype(np.float64),
        y_um=y_um.astype(np.float64),
        x_px0=np.rint(x_um / info.mpp_x).astype(np.int64),
        y_px0=np.rint(y_um / info.mpp_y).astype(np.int64),
        tissue=prepared.tissue_N[number_N],
        pen=prepared.pen_N[number_N],
        sharpness=sharpness_N,
    )


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(columns)
