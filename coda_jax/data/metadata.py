"""Encoded images without what says nothing about their pixels.

Pillow reads comments, profiles and thumbnails before the pixels, and refuses some images for them.
"""

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_APP0, _APP1, _APP14, _APP15, _COM, _SOS = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE, 0xDA
_TIFF_ORIENTATION = 274
# TIFF 6.0 and its JPEG supplement: sizes, samples, strips, tiles, compression, colours.
_TIFF_PIXELS = frozenset(
  (256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325)
  + (332, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532)
)


def without_metadata(data: bytes) -> bytes:
  """A PNG, JPEG or TIFF without metadata but its orientation; anything else as it is.

  What does not follow its format's structure is returned as it is, too.
  """
  try:
    if data.startswith(_PNG):
      return _PNG + b"".join(_png(data))
    if data.startswith(b"\xff\xd8"):
      return data[:2] + b"".join(_jpeg(data))
    if data[:4] in (b"II*\0", b"MM\0*"):
      return _tiff(data)
  except (IndexError, struct.error):
    pass
  return data


def _png(data: bytes) -> Iterator[bytes]:
  """The chunks that decide the pixels, and `eXIf` if its checksum is right."""
  at, name = len(_PNG), b""
  while name != b"IEND":  # what follows is none of it
    (length,) = struct.unpack_from(">I", data, at)
    name, end = data[at + 4 : at + 8], at + 12 + length
    ancillary = bool(name[0] & 32)  # PNG specification 5.4
    right = struct.pack(">I", zlib.crc32(data[at + 4 : end - 4])) == data[end - 4 : end]
    if not ancillary or name == b"tRNS" or (name == b"eXIf" and right):
      yield data[at:end]
    at = end


def _jpeg(data: bytes) -> Iterator[bytes]:
  """The segments that decide the pixels, JFIF and Adobe among them, and Exif."""
  at = 2
  while data[at + 1] != _SOS:
    marker = data[at + 1]
    if data[at] != 0xFF or marker == 0xFF:
      break
    end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
    content = data[at + 4 : end]
    if (
      not (_APP0 <= marker <= _APP15 or marker == _COM)
      or (marker == _APP0 and content.startswith(b"JFIF\0") and len(content) >= 14)
      or (marker == _APP1 and content.startswith(b"Exif\0\0"))
      or (marker == _APP14 and content.startswith(b"Adobe") and len(content) >= 12)
    ):
      yield data[at:end]
    at = end
  yield data[at:]


def _tiff(data: bytes) -> bytes:
  """The first page alone; its directory lists what decides the pixels."""
  order = "<" if data.startswith(b"II") else ">"
  (at,) = struct.unpack_from(f"{order}I", data, 4)
  (count,) = struct.unpack_from(f"{order}H", data, at)
  entries = [data[i : i + 12] for i in range(at + 2, at + 2 + 12 * count, 12)]
  kept = []
  for entry in entries:
    tag, kind, values = struct.unpack_from(f"{order}HHI", entry)
    if tag in _TIFF_PIXELS or (tag == _TIFF_ORIENTATION and (kind, values) == (3, 1)):
      kept.append(entry)
  directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
  return data[:at] + directory + data[at + len(directory) :]
