"""A simulation as a picture: what was measured is filled, what is predicted is hollow and dashed, its error band shaded."""

from pathlib import Path
from typing import TYPE_CHECKING

from gigamil.evaluate.style import INK, MUTED, PALETTE, drawing
from gigamil.scaling.simulate import NodePoint, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_simulation(simulation: Simulation, out_png: Path) -> None:
    """Slides per second, and efficiency with the kept share, over the number of nodes; as PNG."""
    nodes = [point.nodes for point in simulation.points]
    with drawing(out_png, 9.0, 3.8) as figure:
        speed, share = figure.subplots(1, 2)
        first = simulation.points[0]
        speed.plot(
            nodes, [first.slides_s * n / first.nodes for n in nodes], color=MUTED, linewidth=1, label="in proportion"
        )
        _curve(speed, simulation, [point.slides_s for point in simulation.points], PALETTE[0], "this run")
        speed.set(xscale="log", yscale="log", xlabel="nodes", ylabel="slides per second", title=_title(simulation))
        _curve(share, simulation, [point.efficiency for point in simulation.points], PALETTE[0], "efficiency")
        kept = [point.kept_share for point in simulation.points]
        share.plot(
            nodes, kept, color=PALETTE[1], linestyle=":", marker="s", markerfacecolor="white", label="kept graphs, f"
        )
        share.axhline(1.0, color=MUTED, linewidth=0.8)
        share.set(xscale="log", xlabel="nodes", ylim=(0, None), title="efficiency and kept share")
        speed.margins(y=0.1)
        for axes in (speed, share):
            axes.set_xticks(nodes, [str(n) for n in nodes])
            axes.minorticks_off()
            axes.grid(axis="y")
            axes.legend(loc="lower right" if axes is speed else "lower left")
        for point in simulation.points:
            # Below the curve, where the line of proportion never is.
            place, side = ((4, -14), "right") if point is simulation.points[-1] else ((9, -9), "left")
            speed.annotate(
                point.bottleneck,
                (point.nodes, point.slides_s),
                place,
                textcoords="offset points",
                color=INK,
                fontsize=8,
                ha=side,
            )
        figure.suptitle(simulation.machine, fontsize=9, color=MUTED, x=0.01, ha="left")


def _curve(axes: "Axes", simulation: Simulation, values: list[float], colour: str, label: str) -> None:
    points = simulation.points
    nodes = [point.nodes for point in points]
    axes.plot(nodes, values, color=colour, linestyle="--", linewidth=1.2, label=label)
    for is_predicted, fill, words in ((False, colour, "measured sizes"), (True, "white", "predicted")):
        found = [(p.nodes, v) for p, v in zip(points, values, strict=True) if p.is_predicted is is_predicted]
        if found:
            axes.plot(*zip(*found, strict=True), "o", color=colour, markerfacecolor=fill, label=words)
    band = simulation.band
    if band is not None:
        low, high = zip(*(_bounds(p, v, band) for p, v in zip(points, values, strict=True)), strict=True)
        axes.fill_between(nodes, low, high, color=colour, alpha=0.15, linewidth=0)


def _bounds(point: NodePoint, value: float, band: float) -> tuple[float, float]:
    """Of a value that is as uncertain as the step time; nothing is added within measured sizes."""
    return (value / (1 + band), value / (1 - min(band, 0.9))) if point.is_predicted else (value, value)


def _title(simulation: Simulation) -> str:
    if not any(point.is_predicted for point in simulation.points):
        return "within measured sizes"
    return "predicted, not validated" if simulation.band is None else f"predicted, band {simulation.band:.0%}"
