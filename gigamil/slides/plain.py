"""Plain images, which are no slide format: PNG, JPEG and striped TIFF as slides of one level."""

from pathlib import Path

import numpy as np
from PIL import Image

from gigamil.errors import SlideError
from gigamil.slides.backend import Header, ReadError, shown
from gigamil.slides.tiff import num_directories

# By suffix too, not by content alone: a .mrxs whose data folder is gone is a JPEG of the label side.
PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# Decoding takes up to 10 bytes per pixel (Pillow's 4, and the coefficients of a progressive JPEG), so 400 MB.
MAX_PLAIN_PX = 40_000_000
# Resolution tags from 600 dpi (42 micron) down are about paper. 2540 dpi and finer is a scan of the specimen itself.
MAX_TAG_MPP = 10.0
UM_PER_INCH = 25_400.0
MIN_PAPER_DPI = 10  # less is what writers put where they must put something
WHITE = (255, 255, 255)
# 16-bit and floating-point grey have no range of their own in which to show them.
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_ROWS_AT_ONCE = 512


class PlainImage:
    """An image file as a slide of one level. The whole image is decoded at the first read, and kept until `close`.

    Resolution tags become the mpp where they can be meant so (at most 10 micron per pixel; 72 dpi cannot). An EXIF
    orientation is not followed: positions are those of the stored pixels.

    Args:
        path: the file; only its header is read.
    Raises:
        SlideError: not such an image, damaged, of several pages, tiled, of over 40 million pixels, or of a kind (16 bit
            grey) that has no 8-bit colour.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pixels_HW3: np.ndarray | None = None
        with _opened(path) as image:
            name = (image.format or "image").lower()
            _check(path, image)
            mpp, note = _mpp(image.info.get("dpi"))
            icc = image.info.get("icc_profile")
            self.header = Header(vendor=name, level_dimensions=(image.size,), mpp=mpp, mpp_note=note, icc=icc or None)

    @property
    def held_bytes(self) -> int:
        """Three bytes per pixel from the first read on."""
        return 0 if self._pixels_HW3 is None else self._pixels_HW3.nbytes

    def read(self, x: float, y: float, level: int, width: int, height: int) -> tuple[Image.Image, float, float]:
        """As `Backend.read`."""
        if self._pixels_HW3 is None:
            self._pixels_HW3 = self._decode()
        left, top = int(x), int(y)
        return Image.fromarray(self._pixels_HW3[top : top + height, left : left + width]), left - x, top - y

    def close(self) -> None:
        """Let go of the pixels."""
        self._pixels_HW3 = None

    def _decode(self) -> np.ndarray:
        try:
            with _opened(self._path) as image:
                _check(self._path, image)
                image.load()
                pixels_HW3 = np.empty((image.height, image.width, 3), np.uint8)
                for top in range(0, image.height, _ROWS_AT_ONCE):
                    rows = image.crop((0, top, image.width, min(top + _ROWS_AT_ONCE, image.height)))
                    pixels_HW3[top : top + _ROWS_AT_ONCE] = _on_white(rows)
        except SlideError:
            raise
        except Exception as error:  # Pillow raises a dozen kinds on damaged files
            raise ReadError(shown(error)) from error
        return pixels_HW3


def is_plain(path: Path) -> bool:
    """Whether a file is a PNG, JPEG or TIFF, by suffix and first bytes."""
    if path.suffix.lower() not in PLAIN_SUFFIXES:
        return False
    with path.open("rb") as file:
        start = file.read(8)
    return start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=("PNG", "JPEG", "TIFF"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, shown(error)) from error
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise SlideError(
            f"slide '{shown(path)}': not a slide that OpenSlide can open, and as a plain image it is damaged, "
            f"truncated ({path.stat().st_size} bytes) or of an unknown kind: {shown(error)}. Copy it again from its "
            "source, or remove its row."
        ) from error


def _check(path: Path, image: Image.Image) -> None:
    """Refuse from the header what cannot be decoded in bounded memory, or not into one picture of 8-bit colour."""
    if image.width * image.height > MAX_PLAIN_PX:
        raise _too_large(path, f"{image.width} x {image.height} pixels")
    if image.mode not in _MODES:
        raise SlideError(
            f"slide '{shown(path)}': a plain image with pixels of kind '{image.mode}' (16 bit or floating point) has "
            "no 8-bit colours. Convert it to 8-bit RGB, in the range that you choose."
        )
    if image.format == "TIFF":
        if 322 in image.tag_v2:  # type: ignore[attr-defined]
            raise SlideError(
                f"slide '{shown(path)}': a tiled TIFF that OpenSlide does not take: it is truncated, or its "
                "compression is unknown. Copy it again from its source, or convert it."
            )
        num_pages = num_directories(path)
    else:
        num_pages = getattr(image, "n_frames", 1)
    if num_pages != 1:
        raise SlideError(
            f"slide '{shown(path)}': a plain image of several pages or frames, or truncated: it is not clear which one "
            "is the specimen. Save that one as a file of its own."
        )


def _too_large(path: Path, what: str) -> SlideError:
    return SlideError(
        f"slide '{shown(path)}': {what} are too many for a plain image, which is decoded as a whole (limit: "
        f"{MAX_PLAIN_PX // 1_000_000} million). Convert it to a tiled pyramid, for example with "
        "`vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`."
    )


def _mpp(dpi: tuple[float, float] | None) -> tuple[tuple[str, str] | None, str]:
    """Micron per pixel from dots per inch; else None, and why."""
    if dpi is None:
        return None, ""
    try:
        dots = [float(value) for value in dpi]
        x, y = (UM_PER_INCH / value for value in dots)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        return None, ""
    if not (0 < x <= MAX_TAG_MPP and 0 < y <= MAX_TAG_MPP):
        return None, f" (its resolution of {dots[0]:.0f} dpi is one for paper)" if dots[0] >= MIN_PAPER_DPI else ""
    return (repr(x), repr(y)), ""


def _on_white(image: Image.Image) -> np.ndarray:
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, WHITE)
        canvas.paste(image, mask=image.getchannel("A"))
        return np.asarray(canvas)
    return np.asarray(image.convert("RGB"))
