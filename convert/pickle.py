"""Reads and writes files of `torch.save` without torch and without executing anything.

Formats: the zip archive (torch 1.6 and newer), the legacy stream (before, or
`_use_new_zipfile_serialization=False`), and plain pickles of NumPy arrays.
"""

import io
import math
import mmap
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np

from coda_jax.errors import UserError

from .unpickler import Damaged, Refused, Unpickler, sizes, storage_type

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def load(path: str | os.PathLike) -> Any:
  """What `torch.save` or `pickle.dump` wrote to `path`, tensors as read-only NumPy arrays.

  Tensors are views of the mapped file: nothing is read before it is used. bfloat16 is
  `ml_dtypes.bfloat16`.

  Raises:
    UserError: damaged, truncated, or holding anything but tensors, arrays and plain containers.
  """
  path = pathlib.Path(path)
  with path.open("rb") as f:
    if not os.fstat(f.fileno()).st_size:
      raise UserError(f"{path} is empty")
    mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    is_zip = mapped[:4] == b"PK\x03\x04"
    try:
      return _load_zip(f, memoryview(mapped)) if is_zip else _load_stream(mapped)
    except Refused as e:
      raise UserError(
        f"{path} holds {e}; only tensors, arrays and plain containers are read, "
        "nothing is executed. Save the state_dict alone"
      ) from e
    except Damaged as e:
      raise UserError(f"{path} is damaged or truncated: {e}") from e
    except _NONSENSE as e:
      raise UserError(f"{path} is damaged, truncated or no file of torch.save ({e!r})") from e


# What a damaged file runs into.
_NONSENSE = (ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError)
_NONSENSE += (MemoryError, NotImplementedError, RecursionError, TypeError, ValueError)
_NONSENSE += (UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error)


def _load_zip(file: BinaryIO, data: memoryview) -> Any:
  with zipfile.ZipFile(file) as archive:
    entries = {i.filename: i for i in archive.infolist()}
    pickles = [n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise Damaged("the archive is not one of torch.save: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
      raise Refused(
        "a TorchScript program (OpenAI publishes CLIP so): with torch installed,"
        " torch.save(torch.jit.load(FILE, 'cpu').state_dict(), NEW) writes its weights"
      )
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
    if order != b"little":
      raise Refused(f"numbers in {order.decode()} byte order")
    cache: dict[str, np.ndarray] = {}

    def load_storage(pid):
      _, kind, key, _, count = pid
      dtype = storage_type(kind)
      if key not in cache:
        cache[key] = _entry(archive, entries[f"{root}data/{key}"], data)
      raw = cache[key]
      if not isinstance(count, int) or raw.nbytes < count * dtype.itemsize:
        raise Damaged(f"storage {key} has {raw.nbytes} bytes")
      return raw[: count * dtype.itemsize].view(dtype)

    return Unpickler(io.BytesIO(archive.read(pickles[0])), load_storage).load()


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, data: memoryview) -> np.ndarray:
  """The bytes of an archive's entry: mapped if stored as is, which torch always does."""
  if entry.compress_type != zipfile.ZIP_STORED:
    return np.frombuffer(archive.read(entry), np.uint8)
  # The name and extra field of the local header may differ in length from the directory's.
  local = entry.header_offset
  name, extra = struct.unpack("<HH", data[local + 26 : local + 30])
  start = local + 30 + name + extra
  if start + entry.file_size > len(data):
    raise Damaged(f"{entry.filename} is cut off")
  return np.frombuffer(data[start : start + entry.file_size], np.uint8)


def _load_stream(stream: mmap.mmap) -> Any:  # its reads never reserve more than there is
  data = memoryview(stream)
  dtypes: dict[str, np.dtype] = {}

  def collect(pid):  # first pass: the types of the storages that follow the pickle
    _, kind, key, *_ = pid
    dtypes[key] = storage_type(kind)

  first = Unpickler(stream, collect).load()
  if not isinstance(first, int) or first != _LEGACY_MAGIC:
    return first
  protocol, system = (Unpickler(stream, collect).load() for _ in range(2))
  if protocol != 1001 or not system.get("little_endian", True):
    raise Refused(f"torch's protocol {protocol} in {system}")
  start = stream.tell()
  Unpickler(stream, collect).load()
  keys = Unpickler(stream, collect).load()
  arrays = {}
  for key in keys:
    dtype = dtypes[key]
    (count,) = struct.unpack("<q", stream.read(8))
    begin = stream.tell()
    end = begin + count * dtype.itemsize
    if count < 0 or end > len(data):
      raise Damaged(f"storage {key} is cut off")
    arrays[key] = np.frombuffer(data[begin:end], dtype)
    stream.seek(end)

  def load_storage(pid):
    _, _, key, _, _, *view = pid
    storage = arrays[key]
    if view and view[0] is not None:
      _, offset, count = view[0]
      offset, count = sizes([offset, count])
      storage = storage[offset : offset + count]
    return storage

  stream.seek(start)
  return Unpickler(stream, load_storage).load()


def save(path: str | os.PathLike, items: Iterable[tuple[str, Callable[[], np.ndarray]]]) -> None:
  """Writes a state dict that `torch.load(path, weights_only=True)` reads, in torch's zip format.

  Args:
    path: the file.
    items: keys, in the order of the state dict, and functions that give their float32 array;
      each is called once and its array dropped, so one tensor is held at a time.
  """
  pickled = bytearray(b"\x80\x02" + _ordered_dict() + b"(")
  try:
    with open(path, "wb") as f, zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
      for index, (key, make) in enumerate(items):
        array = make()
        if array.dtype != np.float32:
          raise TypeError(f"{key}: {array.dtype}")
        shape = array.shape
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        _write_entry(archive, f.tell(), f"archive/data/{index}", raw)
        pickled += _text(key) + _pickled_tensor(str(index), shape)
      _write_entry(archive, f.tell(), "archive/data.pkl", bytes(pickled) + b"u.")
      _write_entry(archive, f.tell(), "archive/byteorder", b"little")
      _write_entry(archive, f.tell(), "archive/version", b"3\n")
  except OSError as e:  # a failed write does not know its file
    raise OSError(e.errno, e.strerror, str(path)) from e


def _write_entry(
  archive: zipfile.ZipFile, position: int, name: str, data: bytes | memoryview
) -> None:
  entry = zipfile.ZipInfo(name)  # dated 1980, so that equal weights make equal files
  start = position + 30 + len(name.encode()) + 4
  pad = -start % 64  # torch maps storages and wants them aligned; the extra field fills up
  entry.extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
  with archive.open(entry, "w") as f:
    f.write(data)


def _text(text: str) -> bytes:
  raw = text.encode()
  return b"X" + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
  return b"J" + struct.pack("<i", value)


def _ordered_dict() -> bytes:
  return b"ccollections\nOrderedDict\n)R"


def _pickled_tensor(storage: str, shape: tuple[int, ...]) -> bytes:
  """`torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
  strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
  sizes, steps = (b"(" + b"".join(map(_int, v)) + b"t" for v in (shape, strides))
  pid = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(storage) + _text("cpu")
  pid += _int(math.prod(shape)) + b"tQ"
  call = b"ctorch._utils\n_rebuild_tensor_v2\n("
  return call + pid + _int(0) + sizes + steps + b"\x89" + _ordered_dict() + b"tR"
