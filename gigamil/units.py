"""Units and shape letters that every file uses.

Shape letters: B slides of a step, N tiles of a slide, n tiles on this rank, C H W image (channels, rows, columns),
D embedding, A attention heads, K classes. `logit_nA` is a tensor of n rows and A columns.
Units: `_mpp` micron per pixel, always of something (`slide_mpp`, `tile_mpp`); `_um` micron; `_px0` pixels of level 0 of
the slide file. Positions are (x, y) as in OpenSlide; arrays are (H, W).
"""


def format_bytes(number: float) -> str:
    """Bytes in the unit that suits them, to three digits: 1.3 GB."""
    unit, *larger = ("B", "kB", "MB", "GB", "TB")
    while larger and number >= 999.5:
        number /= 1000
        unit, *larger = larger
    return f"{number:,.0f} {unit}" if unit == "B" or number >= 999.5 else f"{number:.3g} {unit}"
