"""JPEG tiles -> pixels behind one function: simplejpeg, else Pillow, which give the same bits; or a CUDA batch decoder.

The CUDA decoders (nvJPEG through torchcodec or torchvision) round otherwise: their pixels may differ by one or two grey
levels. So they are taken only where `execution.decoder: cuda` asks for them, and a run records what decoded its tiles.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gigamil.errors import EnvironmentFault, ShardError

if TYPE_CHECKING:
    import torch

Decoder = Callable[[bytes, np.ndarray], None]

# Start-of-frame markers: baseline, extended and progressive, all with Huffman codes, are what every decoder reads.
_FRAMES = {0xC0, 0xC1, 0xC2}
_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_EXIF = 0xE1
# Noise at quality 100 takes about as many bytes as its pixels. A longer file is padding, or a bomb of endless scans.
_MAX_BYTES_PER_PIXEL, _MAX_HEADER = 6, 1 << 17


class BadTile(ShardError):
    """A tile cannot be decoded.

    Attributes:
        position: in the list of tiles.
        why: the reason, for who names slide and tile.
    """

    def __init__(self, text: str, position: int = 0, why: str = "") -> None:
        super().__init__(text)
        self.position = position
        self.why = why


def decode_tiles(
    jpegs: Sequence[bytes],
    tile_px: int,
    decoder: str = "auto",
    device: "torch.device | str" = "cpu",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode tiles.

    The header is checked before a pixel is decoded, so a tile that claims 65535 x 65535 pixels costs nothing.

    Args:
        jpegs: encoded tiles: 8 bits, three components, baseline or progressive.
        tile_px: side that every tile must have.
        decoder: `execution.decoder`, or what `choose_decoder` made of it.
        device: where a CUDA decoder works; the pixels come back to main memory.
        out: uint8 (n, tile_px, tile_px, 3), C-contiguous, to write to; default: a new array.
    Returns:
        uint8 (n, tile_px, tile_px, 3), RGB; n may be 0.
    Raises:
        BadTile: a tile is not such a JPEG, has another size, or is damaged; the caller adds slide and tile.
        EnvironmentFault: the decoder is not there.
    Cost: about 0.2 ms per tile of 224 pixels and core; other threads run meanwhile.
    """
    if out is None:
        out = np.empty((len(jpegs), tile_px, tile_px, 3), dtype=np.uint8)
    for position, jpeg in enumerate(jpegs):
        try:
            check_header(jpeg, tile_px)
        except ValueError as error:
            raise _bad_tile(jpegs, position, error) from error
    name = choose_decoder(decoder, device)
    if name in _BATCH:
        _decode_batch(jpegs, out, name, str(device))
        return out
    decode = _SINGLE[name]
    for position, jpeg in enumerate(jpegs):
        try:
            decode(jpeg, out[position])
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            raise _bad_tile(jpegs, position, error) from error
    return out


@cache
def choose_decoder(wanted: str, device: "torch.device | str" = "cpu") -> str:
    """Settle `execution.decoder`: what the run's record names, and `decode_tiles` takes.

    Args:
        wanted: "auto": simplejpeg where it is installed, else Pillow; "cuda": torchcodec, else torchvision.
        device: of the rank.
    Returns:
        "simplejpeg", "pillow", "torchcodec" or "torchvision".
    Raises:
        EnvironmentFault: what is wanted is not there; says what to install or to set.
    """
    if wanted == "auto":
        return "simplejpeg" if _importable("simplejpeg") else "pillow"
    if wanted == "cuda":
        return _choose_cuda(str(device))
    if wanted != "pillow" and not _importable(wanted):
        raise EnvironmentFault(
            f"execution.decoder={wanted} needs the package {wanted}, which is missing or broken here. Install it, or set "
            "execution.decoder to auto."
        )
    return wanted


def check_header(jpeg: bytes, tile_px: int) -> None:
    """Refuse what is not an 8-bit RGB or YCbCr JPEG of the expected size.

    Raises:
        ValueError: says what it is instead.
    Cost: a few microseconds; no pixel is decoded and nothing is allocated.
    """
    if not jpeg:
        raise ValueError("it is empty")
    if jpeg[:2] != b"\xff\xd8":
        raise ValueError("it is not a JPEG")
    if len(jpeg) > _MAX_BYTES_PER_PIXEL * tile_px * tile_px + _MAX_HEADER:
        raise ValueError(f"{tile_px} x {tile_px} pixels never take so many bytes")
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # fill bytes may precede a marker
            at += 1
            continue
        if marker in _FRAMES:
            return _check_frame(jpeg[at + 4 : at + 10], tile_px)
        if marker in _OTHER_FRAMES:
            raise ValueError(
                f"its coding is lossless, hierarchical or arithmetic (SOF{marker - 0xC0}), expected Huffman"
            )
        if marker == _EXIF and jpeg[at + 4 : at + 8] == b"Exif":
            raise ValueError("it carries Exif data, by which some decoders would turn it")
        length = jpeg[at + 2] << 8 | jpeg[at + 3]
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2:
            break
        at += 2 + length
    raise ValueError("its header is damaged or cut short")


def _check_frame(frame: bytes, tile_px: int) -> None:
    if len(frame) < 6:
        raise ValueError("its header is damaged or cut short")
    bits, components = frame[0], frame[5]
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    if (width, height) != (tile_px, tile_px):
        raise ValueError(f"it is {width} x {height} pixels, expected {tile_px} x {tile_px}")
    if bits != 8:
        raise ValueError(f"it has {bits} bits per sample, expected 8")
    if components != 3:
        kind = {1: "grey", 4: "CMYK"}.get(components, "unknown")
        raise ValueError(f"it has {components} components ({kind}), expected 3 (RGB)")


def decode_with_simplejpeg(jpeg: bytes, out_HW3: np.ndarray) -> None:
    """Decode one tile into a C-contiguous array; ValueError if it is damaged."""
    import simplejpeg

    # strict, and the slow but exact transforms: the result is then that of Pillow, bit for bit.
    simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False, buffer=out_HW3, strict=True)


def decode_with_pillow(jpeg: bytes, out_HW3: np.ndarray) -> None:
    """Decode one tile into an array; OSError or ValueError if it is damaged."""
    with Image.open(BytesIO(jpeg), formats=("JPEG",)) as image:
        out_HW3[...] = np.asarray(image.convert("RGB"))


def _bad_tile(jpegs: Sequence[bytes], position: int, error: Exception | str) -> BadTile:
    size = len(jpegs[position])
    why = f"the JPEG ({size} bytes) cannot be decoded: {error}"
    text = f"the JPEG at position {position} of {len(jpegs)} ({size} bytes) cannot be decoded: {error}"
    return BadTile(text, position, why)


def _decode_batch(jpegs: Sequence[bytes], out_nHW3: np.ndarray, name: str, device: str) -> None:
    """Decode on a CUDA device. nvJPEG may fill up a JPEG that is cut short without a word, so its end is looked for."""
    if not jpegs:
        return
    for position, jpeg in enumerate(jpegs):
        if not jpeg.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise _bad_tile(jpegs, position, "it is cut short")
    decode = _BATCH[name]
    try:
        decoded = decode(jpegs, device)
    except RuntimeError:
        # A batch fails as a whole: find the tile that it failed for.
        for position, jpeg in enumerate(jpegs):
            try:
                decode([jpeg], device)
            except RuntimeError as error:
                raise _bad_tile(jpegs, position, error) from error
        raise
    import torch

    out_nHW3[...] = torch.stack(decoded).permute(0, 2, 3, 1).cpu().numpy()


def _torchcodec(jpegs: Sequence[bytes], device: str) -> "list[torch.Tensor]":
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg(list(jpegs), mode="RGB", device=device)


def _torchvision(jpegs: Sequence[bytes], device: str) -> "list[torch.Tensor]":
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    # torch refuses to share memory with bytes, which are not writable, and takes a bytearray.
    encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)


def _choose_cuda(device: str) -> str:
    if not device.startswith("cuda"):
        raise EnvironmentFault(
            f"execution.decoder=cuda needs a CUDA device, and this run computes on {device}. Set execution.decoder to auto."
        )
    for name, module in (("torchcodec", "torchcodec.decoders"), ("torchvision", "torchvision.io")):
        if _importable(module):
            return name
    raise EnvironmentFault(
        "execution.decoder=cuda needs torchcodec (0.16 or newer) or torchvision, and both are missing or broken here. "
        "`pip install torchcodec`, or set execution.decoder to auto."
    )


@cache
def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError, OSError):  # a build for another torch raises the latter two
        return False
    return True


_SINGLE: dict[str, Decoder] = {"simplejpeg": decode_with_simplejpeg, "pillow": decode_with_pillow}
_BATCH: "dict[str, Callable[[Sequence[bytes], str], list[torch.Tensor]]]" = {
    "torchcodec": _torchcodec,
    "torchvision": _torchvision,
}
