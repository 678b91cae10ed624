"""HTML that cannot be broken by a slide name: every text is escaped unless it was made by `tag` here."""

import base64
import html
import io
from pathlib import Path

from PIL import Image

PHOTO_WIDTH_PX = 1600
PHOTO_QUALITY = 88


class Html(str):
    """Finished markup, as opposed to text."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """Build an element; children that are plain text are escaped. Write `class_` for `class`."""
    written = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*parts: str) -> Html:
    """Put parts one after the other, escaping those that are plain text."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def table(head: list[str], rows: list[tuple[str, list[str]]], class_: str = "") -> Html:
    """Build a table; each row is its class (or "") and its cells."""
    titles = tag("tr", *(tag("th", title, scope="col") for title in head))
    body = [tag("tr", *(tag("td", cell) for cell in cells), class_=kind) for kind, cells in rows]
    return tag("table", tag("thead", titles), tag("tbody", *body), class_=class_)


def image(path: Path, alt: str, *, photo: bool = False) -> Html:
    """Embed a picture. A photo becomes a JPEG of at most 1600 pixels across: a tenth of the size of its PNG."""
    kind, content = ("jpeg", _as_jpeg(path)) if photo else ("png", path.read_bytes())
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Html(f'<img src="{uri}" alt="{html.escape(alt)}">')


def page(title: str, *body: str) -> str:
    """Wrap a body into a document that loads nothing from anywhere: the policy forbids it even to a browser."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{join(*body)}\n</main>\n</body>\n</html>\n"
    )


def _as_jpeg(path: Path) -> bytes:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((PHOTO_WIDTH_PX, 4 * PHOTO_WIDTH_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=PHOTO_QUALITY)
    return buffer.getvalue()


_STYLE = """
:root { color-scheme: light; --ink: #1f2937; --muted: #6b7280; --rule: #e5e7eb; --soft: #f8fafc; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: white; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-bottom: .35rem; border-bottom: 1px solid var(--rule); }
p { margin: .5rem 0; max-width: 56rem; }
.lead { font-size: 1.1rem; }
.note, figcaption { color: var(--muted); font-size: .875rem; }
.warn { border-left: 4px solid #d55e00; background: #fff7ed; padding: .6rem .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .75rem 1.5rem; margin: 1.25rem 0 0;
  padding: 1rem 1.25rem; background: var(--soft); border: 1px solid var(--rule); border-radius: 6px; }
.facts div.long { grid-column: 1 / -1; }
.facts dt { color: var(--muted); font-size: .8125rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; font-size: .9375rem; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: .8125rem; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid var(--rule); vertical-align: middle; }
td { overflow-wrap: anywhere; }
.scroll { max-height: 40rem; overflow: auto; border: 1px solid var(--rule); border-radius: 6px; }
.scroll thead th { position: sticky; top: 0; background: var(--soft); box-shadow: inset 0 -1px var(--rule); }
tr.wrong td { background: #fff1e8; }
tr.wrong td:first-child { box-shadow: inset 4px 0 #d55e00; }
tr.wrong strong { color: #a34700; white-space: nowrap; }
.range { position: relative; display: block; min-width: 12rem; height: 1.1rem; background: var(--soft);
  border: 1px solid var(--rule); border-radius: 3px; }
.range i { position: absolute; top: 30%; height: 40%; background: #8cc3e6; }
.range b { position: absolute; top: 0; bottom: 0; width: 3px; margin-left: -1.5px; background: var(--blue); }
.probability { white-space: nowrap; }
.number { display: inline-block; width: 3.2em; }
.meter { display: inline-block; width: 5rem; height: .55rem; background: var(--rule); border-radius: 2px; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--blue); }
figure { margin: 1rem 0; break-inside: avoid; }
img { max-width: 100%; height: auto; display: block; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.pair figure { flex: 1 1 24rem; max-width: 34rem; }
.gallery figure { padding: 1rem; border: 1px solid var(--rule); border-radius: 6px; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--blue); }
pre { overflow: auto; max-height: 36rem; padding: 1rem; background: var(--soft); border: 1px solid var(--rule);
  border-radius: 6px; font-size: .8125rem; line-height: 1.45; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
@media print { .scroll { max-height: none; overflow: visible; } main { max-width: none; padding: 0; } }
"""
