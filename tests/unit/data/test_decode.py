"""Good tiles decode to the same bits with either library; bad ones are refused before they cost anything."""

from io import BytesIO

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from gigamil.data.decode import Decoder, decode_tiles, decode_with_pillow, decode_with_simplejpeg
from gigamil.errors import ShardError
from gigamil.testing.shards import noise_jpegs

DECODERS = [decode_with_simplejpeg, decode_with_pillow]


def test_batch_shape_and_content() -> None:
    jpegs = noise_jpegs(3, 32)
    tiles_nHW3 = decode_tiles(jpegs, 32)
    assert tiles_nHW3.shape == (3, 32, 32, 3)
    assert tiles_nHW3.dtype == np.uint8
    np.testing.assert_array_equal(tiles_nHW3[1], np.asarray(Image.open(BytesIO(jpegs[1]))))


def test_no_tiles() -> None:
    assert decode_tiles([], 32).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_both_decoders_give_the_same_bits(subsampling: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    jpeg = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=subsampling)
    first, second = (np.zeros((48, 48, 3), np.uint8) for _ in DECODERS)
    decode_with_simplejpeg(jpeg, first)
    decode_with_pillow(jpeg, second)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("decode", DECODERS)
def test_grey_becomes_rgb(decode: Decoder) -> None:
    buffer = BytesIO()
    Image.new("L", (16, 16), 77).save(buffer, "JPEG")
    out = np.zeros((16, 16, 3), np.uint8)
    decode(buffer.getvalue(), out)
    assert (out == 77).all()


def bad_jpegs() -> dict[str, bytes]:
    good = noise_jpegs(1, 16)[0]
    png = BytesIO()
    Image.new("RGB", (16, 16)).save(png, "PNG")
    # The frame header claims 65535 x 65535 pixels: decoding it would take 12 GB.
    start = good.index(b"\xff\xc0") + 5
    bomb = good[:start] + b"\xff\xff\xff\xff" + good[start + 4 :]
    return {
        "empty": b"",
        "text": b"not a jpeg at all",
        "png": png.getvalue(),
        "truncated": good[: len(good) // 2],
        "wrong size": noise_jpegs(1, 24)[0],
        "bomb": bomb,
    }


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("kind", list(bad_jpegs()))
def test_bad_tiles_are_refused(kind: str, decode: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigamil.data.decode._decoder", lambda: decode)
    good = noise_jpegs(2, 16)
    with pytest.raises(ShardError, match=r"position 1 of 3 \(\d+ bytes\) cannot be decoded: .*gigamil tile"):
        decode_tiles([good[0], bad_jpegs()[kind], good[1]], 16)


def test_size_is_in_the_message() -> None:
    with pytest.raises(ShardError, match="it is 24 x 24 pixels, expected 16 x 16"):
        decode_tiles(noise_jpegs(1, 24), 16)
