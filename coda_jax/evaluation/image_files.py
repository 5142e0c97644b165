"""Images in one file, as ADM's evaluation reads and writes them: `arr_0`, uint8 [N, H, W, 3].

A file is read a batch at a time and written a batch at a time; it need not fit into memory.
"""

import contextlib
import hashlib
import pathlib
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from coda_jax.errors import UserError, one_line

KEY = "arr_0"


def sha256(path: pathlib.Path) -> str:
  """The SHA-256 of a file, as `sha256sum` prints it."""
  with path.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def readable(path: pathlib.Path, what: str) -> Iterator[None]:
  """Raises UserError if the block finds a file missing, damaged or of another format."""
  try:
    yield
  except FileNotFoundError as e:
    raise UserError(f"{path}: no such file; give {what}") from e
  except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as e:
    raise UserError(f"{path} is damaged, truncated or not {what} ({one_line(e)})") from e


class ImageFile:
  """The images of an `.npz` file (`arr_0`) or of an `.npy` file.

  Args:
    path: the file. Arrays that are not compressed are mapped; others are read in order.

  Raises:
    UserError: no such file, damaged, or no images.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    with readable(path, f"an .npz file with {KEY}, uint8 [N, H, W, 3]"):
      self._open()
    shape = self.shape
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
      raise UserError(f"{path}: {KEY} has shape {list(shape)}; images are [N, H, W, 3]")
    if np.dtype(self._dtype).kind not in "uif":
      raise UserError(f"{path}: {KEY} holds {self._dtype}; images are uint8")

  def _open(self) -> None:
    self._stream, self._at, self._mapped = None, 0, None
    if self.path.suffix == ".npy":
      self._mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
      self.shape, self._dtype = self._mapped.shape, self._mapped.dtype
      return
    with zipfile.ZipFile(self.path) as archive:
      entry = next((e for e in archive.infolist() if e.filename == f"{KEY}.npy"), None)
      if entry is None:
        names = ", ".join(n.removesuffix(".npy") for n in archive.namelist()[:5])
        raise ValueError(f"it holds {names or 'nothing'}")
      with archive.open(entry) as f:
        self.shape, fortran, self._dtype = _header(f)
        begin = f.tell()
      if fortran or self._dtype.hasobject:
        raise ValueError("an array in another order, or of objects")
      if entry.file_size - begin != self._dtype.itemsize * int(np.prod(self.shape)):
        raise ValueError("fewer bytes than its header says")
      if entry.compress_type == zipfile.ZIP_STORED:
        self._mapped = self._map(entry, begin)

  def _map(self, entry: zipfile.ZipInfo, begin: int) -> np.ndarray:
    with self.path.open("rb") as f:
      f.seek(entry.header_offset + 26)  # the local header's lengths may differ from the directory's
      lengths = int.from_bytes(f.read(2), "little") + int.from_bytes(f.read(2), "little")
    start = entry.header_offset + 30 + lengths + begin
    return np.memmap(self.path, self._dtype, "r", start, self.shape)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice) -> UInt8[np.ndarray, "n h w 3"]:
    """The images `start` to `stop`.

    Raises:
      UserError: values that are no bytes, or a damaged file.
    """
    start, stop, _ = rows.indices(len(self))
    if self._mapped is not None:
      x = self._mapped[start:stop]
    else:
      with readable(self.path, "an .npz file that numpy wrote"):
        x = self._read(start, stop)
    return _bytes(np.asarray(x), self.path)

  def _read(self, start: int, stop: int) -> np.ndarray:
    size = int(self._dtype.itemsize * np.prod(self.shape[1:]))
    if self._stream is None or self._at > start:
      self._stream = zipfile.ZipFile(self.path).open(f"{KEY}.npy")
      _header(self._stream)
      self._at = 0
    while self._at < start:
      self._take(size)
    return np.stack(
      [
        np.frombuffer(self._take(size), self._dtype).reshape(self.shape[1:])
        for _ in range(start, stop)
      ]
    )

  def _take(self, size: int) -> bytes:
    assert self._stream is not None
    data = self._stream.read(size)
    if len(data) != size:
      raise EOFError(f"image {self._at} is cut off")
    self._at += 1
    return data


def _header(f) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Shape, order and type of an `.npy` stream, which then stands at its first value."""
  version = np.lib.format.read_magic(f)
  read = np.lib.format.read_array_header_1_0
  return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(f)


def _bytes(x: np.ndarray, path: pathlib.Path) -> UInt8[np.ndarray, "n h w 3"]:
  if x.dtype == np.uint8:
    return np.array(x)
  low, high = x.min(), x.max()
  if not (low >= 0 and high <= 255):
    raise UserError(
      f"{path} holds values from {low:g} to {high:g}; samples are bytes, 0 to 255: save uint8"
    )
  if np.any(x != np.floor(x)):
    raise UserError(f"{path} holds fractions; samples are bytes, 0 to 255: round and save uint8")
  return x.astype(np.uint8)


class ImageFileWriter:
  """Writes `count` images to an `.npz` file with the key `arr_0`, a batch at a time.

  The array grows in `path` with `.npy` after its name; `close` makes the archive of it that
  `np.savez` would write.
  """

  def __init__(self, path: pathlib.Path, count: int, size: Sequence[int]):
    self._path, self._npy = path, path.with_name(f"{path.name}.npy")
    shape = (count, *size, 3)
    self._images = np.lib.format.open_memmap(self._npy, "w+", np.uint8, shape)

  def write(self, first: int, images: UInt8[np.ndarray, "n h w 3"]) -> None:
    """Places images from the row `first` on."""
    self._images[first : first + len(images)] = images

  def close(self) -> None:
    self._images.flush()
    del self._images
    with zipfile.ZipFile(self._path, "w") as archive:
      archive.write(self._npy, f"{KEY}.npy")
    self._npy.unlink()
