"""Metadata never spoil pixels, and what spoils pixels is refused still."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from coda_jax.data import decode
from coda_jax.data.metadata import without_metadata
from tests.data.images import encode, photo

RGB = photo(40, 56)
PNG, JPEG, TIFF = encode(RGB), encode(RGB, "jpeg"), encode(RGB, "tiff")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's about metadata


def pixels(data: bytes) -> np.ndarray:
  return np.asarray(decode.decode_image(data))


def chunk(name: bytes, content: bytes, crc: int | None = None) -> bytes:
  crc = zlib.crc32(name + content) if crc is None else crc
  return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(*chunks: bytes, last: bool = False) -> bytes:
  """A PNG with chunks after its header, or before its end."""
  at = len(PNG) - 12 if last else 33
  return PNG[:at] + b"".join(chunks) + PNG[at:]


def jpeg(marker: int, content: bytes) -> bytes:
  return JPEG[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + JPEG[2:]


def tiff(tag: int, kind: int, count: int, value: int) -> bytes:
  """A TIFF of one strip with one tag more; its pixels are RGB."""
  h, w, _ = RGB.shape
  entries = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
  entries += [(277, 3, 1, 3), (278, 4, 1, h), (279, 4, 1, RGB.size), (tag, kind, count, value)]
  start = 8 + 2 + 12 * (len(entries) + 1) + 4
  entries.append((273, 4, 1, start))
  directory = b"".join(struct.pack("<HHII", *e) for e in sorted(entries))
  return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4) + RGB.tobytes()


ZEROS = zlib.compress(bytes(2_000_000))


@pytest.mark.parametrize(
  "chunks",
  [
    [chunk(b"tEXt", b"key\0" + b"x" * 2_000_000)],
    [chunk(b"zTXt", b"key\0\0" + ZEROS)],
    [chunk(b"iTXt", b"key\0\1\0\0\0" + ZEROS)],
    [chunk(b"tEXt", b"%d\0" % i + b"x" * 900_000) for i in range(80)],
    [chunk(b"tEXt", b"key\0text", crc=1)],
    [chunk(b"iCCP", b"name\0\x07profile")],
    [chunk(b"eXIf", b"MM\0*", crc=1)],
    [chunk(b"pHYs", b"\0")],
    [chunk(b"acTL", b"\0"), chunk(b"fcTL", b"")],
  ],
  ids="tEXt zTXt iTXt much-tEXt checksum iCCP eXIf pHYs animation".split(),
)
@pytest.mark.parametrize("last", [False, True])
def test_png(chunks, last):
  np.testing.assert_array_equal(pixels(png(*chunks, last=last)), RGB)
  np.testing.assert_array_equal(pixels(png(*chunks, last=last) + b"more bytes"), RGB)


def test_a_png_keeps_transparency_and_orientation_beside_broken_text():
  bad = chunk(b"tEXt", b"key\0text", crc=1)
  exif = Image.Exif()
  exif[0x0112] = 3
  turned = encode(RGB, exif=exif)
  np.testing.assert_array_equal(pixels(turned[:33] + bad + turned[33:]), RGB[::-1, ::-1])
  palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
  palette.putpalette([10, 20, 30, 40, 50, 60])
  clear = encode(palette, "png", transparency=0)
  expected = [[[255, 255, 255], [40, 50, 60]]]
  assert pixels(clear[:33] + bad + clear[33:]).tolist() == expected


@pytest.mark.parametrize(
  ("marker", "content"),
  [
    (0xE0, b"JFIF\0"),
    (0xE2, b"ICC_PROFILE\0"),
    (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0"),
    (0xEE, b"Adobe"),
    (0xFE, b"\xff\xd8\xff\0"),
  ],
)
def test_jpeg(marker, content):
  np.testing.assert_array_equal(pixels(jpeg(marker, content)), pixels(JPEG))


@pytest.mark.parametrize(
  ("tag", "kind", "count", "value"),
  [(700, 4, 1, 7), (34665, 9, 1, 2**32 - 9), (34853, 4, 1, 2**32 - 9), (274, 12, 9, 2**31)],
  ids="XMP Exif GPS orientation".split(),
)
def test_tiff(tag, kind, count, value):
  np.testing.assert_array_equal(pixels(tiff(tag, kind, count, value)), RGB)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_a_tiff_keeps_its_orientation(compression):
  data = encode(RGB, "tiff", compression=compression, tiffinfo={274: 3, 270: "about it"})
  bare = without_metadata(data)
  assert bare != data
  np.testing.assert_array_equal(pixels(bare), RGB[::-1, ::-1])


@pytest.mark.parametrize("form", ["jpeg", "webp", "gif", "tiff", "png"])
def test_random_bytes_in_metadata(form):
  rng = np.random.default_rng(0)
  image = Image.fromarray(RGB).quantize(64) if form == "gif" else Image.fromarray(RGB)
  expected = None
  for length in rng.integers(0, 90, 40):
    noise = rng.bytes(length)
    options = {
      "jpeg": {"comment": noise, "icc_profile": noise, "exif": b"Exif\0\0MM\0*" + noise},
      "webp": {"xmp": noise, "icc_profile": noise, "exif": b"Exif\0\0II*\0" + noise},
      "gif": {"comment": noise},
      "tiff": {"icc_profile": noise, "tiffinfo": {270: noise, 700: noise}},
      "png": {"icc_profile": noise},
    }[form]
    found = np.sort(pixels(encode(image, form, **options)).ravel())  # however it is turned
    expected = found if expected is None else expected
    np.testing.assert_array_equal(found, expected)


def damaged_png(name: bytes) -> bytes:
  return PNG.replace(name, name.lower(), 1)


@pytest.mark.parametrize(
  "data",
  [png(chunk(b"tEXt", b"k", crc=1))[:-200], damaged_png(b"IDAT"), damaged_png(b"IHDR"), PNG[:30]]
  + [JPEG[: len(JPEG) // 2], jpeg(0xE2, b"ICC_PROFILE\0")[: len(JPEG) // 2], JPEG[:3], TIFF[:100]],
)
def test_damaged_pixels_are_refused(data):
  with pytest.raises(decode.UnreadableImage):
    decode.decode_image(data)


@pytest.mark.parametrize("data", [PNG, JPEG, TIFF, encode(RGB, "tiff", compression="tiff_lzw")])
def test_without_metadata_the_pixels_are_the_same(data):
  np.testing.assert_array_equal(pixels(without_metadata(data)), pixels(data))
  for cut in range(0, 60):
    without_metadata(data[:cut])  # raises nothing
  assert Image.open(io.BytesIO(without_metadata(data))).size == (56, 40)
