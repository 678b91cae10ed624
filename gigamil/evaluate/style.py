"""One look for every picture, whatever the user's matplotlibrc says, so that the same numbers give the same bytes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigamil.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1f2937"
MUTED = "#6b7280"
RULE = "#e5e7eb"
# Okabe and Ito 2008: told apart with any colour vision. Sky blue, orange and yellow come last, they are pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
DPI = 150
LONGEST_NAME = 28

_RC = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def class_style(number: int) -> dict[str, Any]:
    """Colour and line style of class `number`; they repeat only after 28 classes."""
    style = LINE_STYLES[number // len(PALETTE) % len(LINE_STYLES)]
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": style}


def short_name(name: str) -> str:
    """Names from a table are free text: cut long ones, and keep matplotlib from reading a dollar as mathematics."""
    cut = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1].rstrip() + "…"
    return cut.replace("$", r"\$")


@contextmanager
def drawing(out_png: Path, width_in: float, height_in: float, *, constrained: bool = True) -> Iterator["Figure"]:
    """Give an empty figure in the house style, and write it to `out_png` (a whole file or none) at the end.

    No pyplot: no global figure, no display, safe in worker processes. `constrained` lets matplotlib arrange the axes.
    """
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.style.context(["default", _RC]):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1) if constrained else None
        figure = Figure(figsize=(width_in, height_in), layout=layout)
        yield figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    replace_file(out_png, buffer.getvalue())
