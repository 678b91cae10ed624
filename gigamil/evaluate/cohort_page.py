"""The page of `gigamil inspect`: the slides of a cohort, their histograms, and what tiling them will cost."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from gigamil.data.inspect import HEAD, CohortInspection, InspectedSlide, histogram, time_text
from gigamil.evaluate.html import Html, image, page, table, tag
from gigamil.evaluate.style import PALETTE, drawing
from gigamil.files import replace_file
from gigamil.units import format_bytes


def write_cohort_page(path: Path, inspection: CohortInspection) -> None:
    """Write one HTML file that needs no other: no script, no request, every text of a slide escaped.

    It names slides by id and holds no path.
    """
    settings = inspection.slides.model_dump(mode="json")
    for folder in ("masks", "coords"):
        settings[folder] = settings[folder] and Path(settings[folder]).name
    title = f"{len(inspection.rows):,} slides"
    body = [
        tag("h1", title),
        *(tag("p", line[0].upper() + line[1:] + ".") for line in inspection.summary()),
        _facts(inspection),
        _histograms(inspection),
        tag("h2", "Slides"),
        _slides(inspection.rows),
        tag("h2", "Settings"),
        tag("pre", "\n".join(f"slides.{name}: {json.dumps(value)}" for name, value in settings.items())),
        tag("footer", tag("p", "Written by gigamil inspect. For research; not a medical device.", class_="note")),
    ]
    replace_file(path, page(title, *body))


def _facts(inspection: CohortInspection) -> Html:
    num_bad = len(inspection.rows) - len(inspection.good)
    facts = {
        "slides": f"{len(inspection.rows):,}",
        "with a problem": f"{num_bad:,}",
        "tiles expected": f"{inspection.num_tiles:,}",
        "tissue": f"{sum(inspection.values['tissue mm2']):,.1f} mm2",
        "storage expected": format_bytes(inspection.bytes),
        "time expected": f"{time_text(inspection.seconds)} on {inspection.num_workers} cores",
    }
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()), class_="facts")


def _histograms(inspection: CohortInspection) -> Html:
    shown = {name: values for name, values in inspection.values.items() if values}
    if not shown:
        return Html()
    names = {"um/px": "Micron per pixel of level 0", "tiles": "Tiles per slide", "tissue mm2": "Tissue per slide, mm2"}
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "histograms.png"
        with drawing(picture, 3.7 * len(shown), 2.7) as figure:
            for axes, (kind, values) in zip(
                figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
            ):
                bars = histogram(values)
                axes.barh(range(len(bars)), [count for _, count in bars], color=PALETTE[0])
                axes.set_yticks(range(len(bars)), [name for name, _ in bars])
                axes.invert_yaxis()
                axes.set_title(names[kind])
                axes.set_xlabel("Slides")
                axes.xaxis.get_major_locator().set_params(integer=True)
        return tag("figure", image(picture, "histograms of " + ", ".join(names[name] for name in shown)))


def _slides(rows: tuple[InspectedSlide, ...]) -> Html:
    cells = [("wrong" if row.problem else "", row.cells()) for row in rows]
    return tag("div", table(HEAD, cells), class_="scroll")
