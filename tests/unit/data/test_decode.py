"""Good tiles decode to the same bits with either library; bad ones are refused before they cost anything."""

import pickle
import resource
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from gigamil.data import decode
from gigamil.data.decode import BadTile, choose_decoder, decode_tiles
from gigamil.errors import EnvironmentFault
from gigamil.testing.shards import noise_jpegs

DECODERS = ["simplejpeg", "pillow"]


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
    first, second = (decode_tiles([jpeg], 48, decoder) for decoder in DECODERS)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("decoder", DECODERS)
def test_progressive_tiles_decode(decoder: str) -> None:
    jpeg = saved(Image.fromarray(NOISE), progressive=True)
    assert b"\xff\xc2" in jpeg
    np.testing.assert_array_equal(decode_tiles([jpeg], 16, decoder)[0], np.asarray(Image.open(BytesIO(jpeg))))


def test_tiles_are_written_to_a_given_place() -> None:
    jpegs, whole = noise_jpegs(3, 16), np.zeros((5, 16, 16, 3), np.uint8)
    assert decode_tiles(jpegs, 16, out=whole[1:4]).base is not None
    np.testing.assert_array_equal(whole[1:4], decode_tiles(jpegs, 16))
    assert not whole[[0, 4]].any()


NOISE = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def patched(jpeg: bytes, after: bytes, skip: int, new: bytes) -> bytes:
    start = jpeg.index(after) + skip
    return jpeg[:start] + new + jpeg[start + len(new) :]


def bad_jpegs() -> dict[str, tuple[bytes, str]]:
    """Files, and what is to be said of them."""
    good = noise_jpegs(1, 16)[0]
    png = BytesIO()
    Image.new("RGB", (16, 16)).save(png, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    size = b"\xff\xc0"  # start of frame; bits follow at 4, height and width at 5, components at 9
    return {
        "empty": (b"", "it is empty"),
        "text": (b"not a jpeg at all", "it is not a JPEG"),
        "png": (png.getvalue(), "it is not a JPEG"),
        "two bytes": (good[:2], "damaged or cut short"),
        "cut in its header": (good[: good.index(size) + 6], "damaged or cut short"),
        "cut in its pixels": (good[: len(good) // 2 + 200], ""),
        "scan before frame": (patched(good, size, 0, b"\xff\xda"), "damaged or cut short"),
        "segment of no length": (patched(good, b"\xff\xdb", 2, b"\0\0"), "damaged or cut short"),
        "wrong size": (noise_jpegs(1, 24)[0], "it is 24 x 24 pixels, expected 16 x 16"),
        # Decoding these pixels would take 12 GB.
        "bomb": (patched(good, size, 5, b"\xff\xff\xff\xff"), "it is 65535 x 65535 pixels"),
        "no height": (patched(good, size, 5, b"\0\0"), "it is 16 x 0 pixels"),
        "12 bits": (patched(good, size, 4, b"\x0c"), "it has 12 bits per sample, expected 8"),
        "grey": (saved(Image.new("L", (16, 16))), r"1 components \(grey\)"),
        "CMYK": (saved(Image.new("CMYK", (16, 16))), r"4 components \(CMYK\)"),
        "lossless": (patched(good, size, 1, b"\xc3"), r"\(SOF3\), expected Huffman"),
        "arithmetic": (patched(good, size, 1, b"\xc9"), r"\(SOF9\), expected Huffman"),
        "to be turned": (saved(Image.fromarray(NOISE), exif=exif), "Exif"),
        "endless": (good[:2] + good[2:-2] * 400, "never take so many bytes"),
    }


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", list(bad_jpegs()))
def test_bad_tiles_are_refused_by_name(kind: str, decoder: str) -> None:
    bad, why = bad_jpegs()[kind]
    good = noise_jpegs(2, 16)
    with pytest.raises(BadTile, match=rf"position 1 of 3 \(\d+ bytes\) cannot be decoded: .*{why}") as caught:
        decode_tiles([good[0], bad, good[1]], 16, decoder)
    assert caught.value.position == 1
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 (our own bytes)
    assert (str(copy), copy.position, copy.why) == (str(caught.value), 1, caught.value.why)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_refusal_takes_no_memory(decoder: str) -> None:
    decode_tiles(noise_jpegs(1, 16), 16, decoder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in ("bomb", "endless", "12 bits"):
        with pytest.raises(BadTile):
            decode_tiles([bad_jpegs()[kind][0]], 16, decoder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16_384  # KiB


def test_auto_is_simplejpeg_and_pillow_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_decoder.__wrapped__("auto") == "simplejpeg"
    monkeypatch.setattr(decode, "_importable", lambda module: False)
    assert choose_decoder.__wrapped__("auto") == "pillow"
    with pytest.raises(EnvironmentFault, match=r"execution\.decoder=simplejpeg needs the package"):
        choose_decoder.__wrapped__("simplejpeg")


def test_cuda_is_taken_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_decoder.__wrapped__("auto", "cuda:0") == "simplejpeg"
    with pytest.raises(EnvironmentFault, match=r"decoder=cuda needs a CUDA device, and this run computes on cpu"):
        choose_decoder.__wrapped__("cuda", "cpu")
    present = {"torchcodec.decoders", "torchvision.io"}
    monkeypatch.setattr(decode, "_importable", lambda module: module in present)
    assert choose_decoder.__wrapped__("cuda", "cuda:1") == "torchcodec"
    present.remove("torchcodec.decoders")
    assert choose_decoder.__wrapped__("cuda", "cuda:1") == "torchvision"
    present.clear()
    with pytest.raises(EnvironmentFault, match="pip install torchcodec"):
        choose_decoder.__wrapped__("cuda", "cuda:1")


def test_a_library_that_fails_on_import_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As torchvision of another build of torch does.
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not decode._importable("broken_library")
    assert not decode._importable("no_such_library")


class Batches:
    """In place of nvJPEG, of which a test has none: decodes with Pillow, and fails as a whole."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, jpegs: Sequence[bytes], device: str) -> list[torch.Tensor]:
        self.sizes.append(len(jpegs))
        if b"rotten" in b"".join(jpegs):
            raise RuntimeError("nvjpegDecode failed: 2")
        return [torch.from_numpy(np.array(Image.open(BytesIO(jpeg)))).permute(2, 0, 1) for jpeg in jpegs]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    batches = Batches()
    monkeypatch.setitem(decode._BATCH, "torchvision", batches)
    return batches


def test_a_batch_decoder_gets_all_tiles_at_once(batches: Batches) -> None:
    jpegs = noise_jpegs(5, 16)
    np.testing.assert_array_equal(decode_tiles(jpegs, 16, "torchvision"), decode_tiles(jpegs, 16, "pillow"))
    assert batches.sizes == [5]
    assert decode_tiles([], 16, "torchvision").shape == (0, 16, 16, 3)


def test_the_bad_tile_of_a_batch_is_found(batches: Batches) -> None:
    good = noise_jpegs(3, 16)
    rotten = good[1][:-2] + b"rotten" + good[1][-2:]
    for bad, why in [(rotten, "nvjpegDecode failed"), (good[1][:-30], "cut short"), (bad_jpegs()["bomb"][0], "65535")]:
        with pytest.raises(BadTile, match=why) as caught:
            decode_tiles([good[0], bad, good[2]], 16, "torchvision")
        assert caught.value.position == 1


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_torchvision_is_called_as_it_wants_to_be() -> None:
    """On the CPU, where its decoder is libjpeg too."""
    jpegs = noise_jpegs(2, 16)
    np.testing.assert_allclose(
        decode_tiles(jpegs, 16, "torchvision").astype(int), decode_tiles(jpegs, 16).astype(int), atol=2
    )
