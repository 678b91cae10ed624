"""What is in one slide file, for people: format, levels, mpp and its source, tissue, tiles."""

from dataclasses import dataclass
from pathlib import Path

from gigamil.slides.backend import shown
from gigamil.slides.grid import check_scale, choose_tiles, slide_grid
from gigamil.slides.reader import SlideInfo, open_slide
from gigamil.slides.tissue import DarkField, find_tissue

# Tiles finer than the slide by more than this show no more than the slide holds: worth a word to the reader.
UPSAMPLING_NOTED = 1.25
SOURCE_TEXT = {"table": "given", "file": "from the file", "default": "the default, the file has none"}


@dataclass(frozen=True)
class SlideReport:
    """Facts of one slide; `text` prints them."""

    info: SlideInfo
    tile_px: int
    tile_mpp: float
    min_tissue: float
    tissue_area_mm2: float
    tissue_share: float  # of the slide's area, 0..1
    num_tiles: int  # with enough tissue
    num_grid_tiles: int

    @property
    def upsampling(self) -> float:
        """How many times finer the tiles are than the slide; at most 1 where nothing is made up."""
        return max(self.info.mpp_x, self.info.mpp_y) / self.tile_mpp

    def text(self) -> str:
        """A table of two columns, ready to print."""
        rows = [*self._slide_rows(), *self._tile_rows()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _slide_rows(self) -> list[tuple[str, str]]:
        info = self.info
        mpp = f"{info.mpp_x:.4g}" if info.mpp_x == info.mpp_y else f"{info.mpp_x:.4g} x {info.mpp_y:.4g}"
        levels = [
            (f"level {number}", f"{width} x {height} px, downsample {downsample:.4g}")
            for number, ((width, height), downsample) in enumerate(
                zip(info.level_dimensions, info.level_downsamples, strict=True)
            )
        ]
        return [
            ("slide", shown(info.path)),
            ("format", info.vendor),
            ("size", f"{info.width} x {info.height} px, {info.width_um / 1000:.3g} x {info.height_um / 1000:.3g} mm"),
            ("mpp", f"{mpp} um/px ({SOURCE_TEXT[info.mpp_source]})"),
            ("objective", info.objective or "not stated"),
            *levels,
        ]

    def _tile_rows(self) -> list[tuple[str, str]]:
        tile_um = self.tile_px * self.tile_mpp
        tiles = f"{self.num_tiles} of {self.num_grid_tiles} with at least {self.min_tissue:.0%} tissue"
        rows = [
            ("tissue", f"{self.tissue_area_mm2:.3f} mm2, {self.tissue_share:.1%} of the slide"),
            ("tile", f"{self.tile_px} px at {self.tile_mpp:g} um/px = {tile_um:g} um"),
            ("tiles", tiles),
        ]
        if self.upsampling > UPSAMPLING_NOTED:
            rows.append(
                ("note", f"the tiles are {self.upsampling:.3g} times finer than the slide: raise slides.tile_mpp")
            )
        return rows


def inspect_slide(
    path: Path | str,
    *,
    mpp: float | None = None,
    default_mpp: float | None = None,
    tile_px: int = 224,
    tile_mpp: float = 0.5,
    min_tissue: float = 0.25,
    tissue_mpp: float = 8.0,
    min_area_um2: float = 20_000.0,
    max_hole_area_um2: float = 20_000.0,
    stride_px: int | None = None,
    dark_field: DarkField = "refuse",
) -> SlideReport:
    """Open a slide, find its tissue and count its tiles; nothing is written.

    Args: as `open_slide`, `TileGrid`, `choose_tiles` and `find_tissue`; the defaults are those of the configuration.
    Raises:
        SlideError: the slide cannot be opened or read, its mpp is over four times `tile_mpp`, its grid has over 5
            million tiles, or its background is dark and `dark_field` is "refuse".
        MppError: its mpp is missing or absurd.
        ValueError: a tile size that is not positive.
    Cost: one thumbnail at `tissue_mpp`.
    """
    with open_slide(path, mpp=mpp, default_mpp=default_mpp) as slide:
        info = slide.info
        check_scale(info, tile_mpp)
        grid = slide_grid(info, tile_px, tile_mpp, stride_px)
        mask = find_tissue(
            slide,
            tissue_mpp=tissue_mpp,
            min_area_um2=min_area_um2,
            max_hole_area_um2=max_hole_area_um2,
            dark_field=dark_field,
        )
    chosen, _ = choose_tiles(grid, mask, min_tissue)
    return SlideReport(
        info=info,
        tile_px=tile_px,
        tile_mpp=tile_mpp,
        min_tissue=min_tissue,
        tissue_area_mm2=mask.area_um2 / 1e6,
        tissue_share=mask.area_um2 / (info.width_um * info.height_um),
        num_tiles=len(chosen),
        num_grid_tiles=grid.num_tiles,
    )
