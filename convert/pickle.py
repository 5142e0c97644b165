"""Reads and writes files of `torch.save` without torch and without executing anything.

A pickle is a program for a stack machine. The one here knows the instructions that build plain
containers, and instead of importing what the program names, it looks the name up in `_KNOWN`:
tensors, NumPy arrays and plain containers are there, everything else is refused by name.

Formats: the zip archive (torch 1.6 and newer), the legacy stream (before, or
`_use_new_zipfile_serialization=False`), and plain pickles of NumPy arrays.
"""

import collections
import io
import math
import mmap
import os
import pathlib
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from coda_jax.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
  "UntypedStorage": np.uint8,
}
_TORCH_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()


class _Refused(Exception):
  """Something in a file that is not a tensor, an array or a plain container."""


class _Damaged(Exception):
  """A file that is not what it should be."""


class _Name:
  """`module.name` in a pickle: looked up in `_KNOWN` when called, never imported."""

  def __init__(self, module: str, name: str):
    self.full = f"{module}.{name}"


class _Array:
  """The empty array that NumPy's pickles make first and fill by its state."""

  value: np.ndarray | None = None


class _DType:
  """A NumPy dtype that gets its byte order by its state."""

  def __init__(self, name: Any):
    if isinstance(name, _Name) and name.full == "ml_dtypes.bfloat16":
      self.value = np.dtype(ml_dtypes.bfloat16)
    elif isinstance(name, str) and re.fullmatch(r"[<>=|]?(b1|[iuf][1248]|bool)", name):
      self.value = np.dtype(name)
    else:
      shown = name.full if isinstance(name, _Name) else name
      raise _Refused(f"an array of type {shown!r}")

  def set(self, state):
    if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
      self.value = self.value.newbyteorder(state[1])


def _ndarray(data: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
  if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
    raise _Refused("an array of Python objects")
  shape = _sizes(shape)
  if math.prod(shape) * dtype.value.itemsize != len(data):
    raise _Damaged("an array's data and its shape disagree")
  return np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C")


def _sizes(values: Any) -> tuple[int, ...]:
  values = tuple(values)
  if not all(isinstance(v, int) and v >= 0 for v in values):
    raise _Damaged(f"a tensor of size {values}")
  return values


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray | None:
  if storage is None:  # the first pass over a legacy file, which only collects storages
    return None
  if not isinstance(storage, np.ndarray):
    raise _Damaged("a tensor without storage")
  size, stride = _sizes(size), _sizes(stride)
  (offset,) = _sizes([offset])
  if len(size) != len(stride):
    raise _Damaged("a tensor with more sizes than strides")
  if 0 in size:
    return np.zeros(size, storage.dtype)
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if last >= storage.size:  # as_strided would read whatever lies behind
    raise _Damaged("a tensor that reaches beyond its storage")
  step = storage.dtype.itemsize
  return np.lib.stride_tricks.as_strided(
    storage[offset:], size, [s * step for s in stride], writeable=False
  )


def _encode(text: str, codec: str) -> bytes:  # how protocol 2 spells bytes
  if codec not in ("latin1", "latin-1"):
    raise _Refused(f"text in {codec!r}")
  return text.encode("latin1")


def _reconstruct(kind: Any, *_: Any) -> _Array:
  if not (isinstance(kind, _Name) and kind.full == "numpy.ndarray"):
    raise _Refused(kind.full if isinstance(kind, _Name) else str(type(kind).__name__))
  return _Array()


def _scalar(dtype: Any, data: Any) -> Any:
  return _ndarray(data, dtype, (), False)[()]


def _container(make: Callable) -> Callable:
  def build(items=()):
    if not isinstance(items, list | tuple | dict):
      raise _Damaged("a container made of something else")
    return make(items)

  return build


_KNOWN: dict[str, Callable | None] = {  # None: may be named, not called
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_tensor": _tensor,
  "torch._utils._rebuild_parameter": lambda data, *_: data,
  "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
  "torch.Size": _container(tuple),
  "torch.device": lambda *args: args[0] if args else None,
  "torch.Tensor": None,
  "torch.nn.parameter.Parameter": None,
  **{f"torch.{name}": None for name in _STORAGES},
  "torch.storage.UntypedStorage": None,
  **{f"torch.{name}": None for name in _TORCH_DTYPES},
  "collections.OrderedDict": _container(collections.OrderedDict),
  **{f"{module}.set": _container(set) for module in ("builtins", "__builtin__")},
  "numpy.ndarray": None,
  "numpy.dtype": lambda name, *_: _DType(name),
  "ml_dtypes.bfloat16": None,
  "_codecs.encode": _encode,
  "__builtin__.bytes": lambda *args: b"",
  "builtins.bytes": lambda *args: b"",
}
for _core in ("numpy.core", "numpy._core"):
  _KNOWN[f"{_core}.multiarray._reconstruct"] = _reconstruct
  _KNOWN[f"{_core}.multiarray.scalar"] = _scalar
  _KNOWN[f"{_core}.numeric._frombuffer"] = lambda data, dtype, shape, order: _ndarray(
    bytes(data), dtype, shape, order == "F"
  )


class _Machine:
  """Runs one pickle. `load_storage(persistent id)` answers with a storage's elements."""

  def __init__(self, load_storage: Callable[[Any], Any]):
    self.load_storage = load_storage

  def run(self, stream: BinaryIO) -> Any:
    """The object that the pickle at the stream's position describes; stops behind it."""
    stack: list[Any] = []
    marks: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    for op, arg, _ in pickletools.genops(stream):
      name = op.name
      if name in ("PROTO", "FRAME"):
        pass
      elif name == "STOP":
        return self._finished(stack[-1])
      elif name == "MARK":
        marks.append(stack)
        stack = []
      elif name in _LITERALS:
        stack.append(_LITERALS[name](arg))
      elif name in ("GLOBAL", "STACK_GLOBAL"):
        if name == "GLOBAL":
          module, _, attribute = arg.partition(" ")
        else:
          attribute, module = stack.pop(), stack.pop()
        stack.append(self._name(module, attribute))
      elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[arg] = stack[-1]
      elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
      elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[arg])
      elif name in ("TUPLE", "LIST", "DICT", "POP_MARK", "FROZENSET"):
        items, stack = stack, marks.pop()
        if name != "POP_MARK":
          stack.append(_COLLECT[name]([self._finished(i) for i in items]))
      elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        stack[-count:] = [tuple(self._finished(i) for i in stack[-count:])]
      elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
        if name.endswith("S"):
          items, stack = stack, marks.pop()
        else:
          count = 2 if name == "SETITEM" else 1
          items = stack[-count:]
          del stack[-count:]
        self._extend(stack[-1], items, name)
      elif name == "POP":
        stack.pop()
      elif name == "DUP":
        stack.append(stack[-1])
      elif name in ("BINPERSID", "PERSID"):
        stack.append(self.load_storage(stack.pop() if name == "BINPERSID" else arg))
      elif name in ("REDUCE", "NEWOBJ"):
        args, function = stack.pop(), stack.pop()
        stack.append(self._call(function, args))
      elif name == "BUILD":
        self._build(stack, stack.pop())
      else:
        named = name == "INST"  # names a class and makes one, in one instruction
        raise _Refused(arg.replace(" ", ".") if named else f"the pickle instruction {name}")
    raise _Damaged("the pickle has no end")

  def _name(self, module: Any, attribute: Any) -> _Name:
    found = _Name(module, attribute)
    if found.full not in _KNOWN:
      raise _Refused(found.full)
    return found

  def _call(self, function: Any, args: Any) -> Any:
    known = _KNOWN[function.full] if isinstance(function, _Name) else None
    if known is None or not isinstance(args, tuple):
      raise _Refused(f"a call of {getattr(function, 'full', type(function).__name__)}")
    return known(*(self._finished(a) for a in args))

  def _build(self, stack: list[Any], state: Any) -> None:
    target = stack[-1]
    if isinstance(target, _DType):
      target.set(state)
    elif isinstance(target, _Array):
      _, shape, dtype, fortran, data = state
      target.value = _ndarray(data, dtype, shape, fortran)
    elif not isinstance(target, dict):  # an OrderedDict's state is torch's _metadata: no weights
      raise _Refused(f"state for {type(target).__name__}")

  def _extend(self, target: Any, items: list[Any], name: str) -> None:
    items = [self._finished(i) for i in items]
    if name.startswith("SETITEM") and isinstance(target, dict):
      target.update(zip(items[::2], items[1::2], strict=True))
    elif name.startswith("APPEND") and isinstance(target, list):
      target.extend(items)
    elif name == "ADDITEMS" and isinstance(target, set):
      target.update(items)
    else:
      raise _Refused(f"{name} on {type(target).__name__}")

  def _finished(self, value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


def _literal(arg: Any) -> Any:
  return arg


_LITERALS: dict[str, Callable[[Any], Any]] = {
  **dict.fromkeys(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "FLOAT BINFLOAT".split(),
    _literal,
  ),
  "NONE": lambda _: None,
  "NEWTRUE": lambda _: True,
  "NEWFALSE": lambda _: False,
  "EMPTY_LIST": lambda _: [],
  "EMPTY_TUPLE": lambda _: (),
  "EMPTY_DICT": lambda _: {},
  "EMPTY_SET": lambda _: set(),
}
_COLLECT: dict[str, Callable[[list], Any]] = {
  "TUPLE": tuple,
  "LIST": list,
  "FROZENSET": frozenset,
  "DICT": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}


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
    data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    try:
      return _load_zip(f, data) if data[:4] == b"PK\x03\x04" else _load_stream(f, data)
    except _Refused as e:
      raise UserError(
        f"{path} holds {e}; only tensors, arrays and plain containers are read, "
        "nothing is executed. Save the state_dict alone"
      ) from e
    except _Damaged as e:
      raise UserError(f"{path} is damaged or truncated: {e}") from e
    except _NONSENSE as e:
      raise UserError(f"{path} is damaged, truncated or no file of torch.save ({e!r})") from e


# What a machine fed with nonsense runs into.
_NONSENSE = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError)
_NONSENSE += (MemoryError, NotImplementedError, RecursionError, TypeError, ValueError)
_NONSENSE += (struct.error, zipfile.BadZipFile, zlib.error)


def _dtype(storage: Any) -> np.dtype:
  if not isinstance(storage, _Name):
    raise _Damaged("a storage without type")
  name = storage.full.rpartition(".")[2]
  if name not in _STORAGES:
    raise _Refused(storage.full)
  return np.dtype(_STORAGES[name])


def _load_zip(file: BinaryIO, data: memoryview) -> Any:
  with zipfile.ZipFile(file) as archive:
    entries = {i.filename: i for i in archive.infolist()}
    pickles = [n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise _Damaged("the archive is not one of torch.save: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
    if order != b"little":
      raise _Refused(f"numbers in {order.decode()} byte order")
    cache: dict[str, np.ndarray] = {}

    def load_storage(pid):
      _, kind, key, _, count = pid
      dtype = _dtype(kind)
      if key not in cache:
        cache[key] = _entry(archive, entries[f"{root}data/{key}"], data)
      raw = cache[key]
      if not isinstance(count, int) or raw.nbytes < count * dtype.itemsize:
        raise _Damaged(f"storage {key} has {raw.nbytes} bytes")
      return raw[: count * dtype.itemsize].view(dtype)

    return _Machine(load_storage).run(io.BytesIO(archive.read(pickles[0])))


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, data: memoryview) -> np.ndarray:
  """The bytes of an archive's entry: mapped if stored as is, which torch always does."""
  if entry.compress_type != zipfile.ZIP_STORED:
    return np.frombuffer(archive.read(entry), np.uint8)
  # The name and extra field of the local header may differ in length from the directory's.
  local = entry.header_offset
  name, extra = struct.unpack("<HH", data[local + 26 : local + 30])
  start = local + 30 + name + extra
  if start + entry.file_size > len(data):
    raise _Damaged(f"{entry.filename} is cut off")
  return np.frombuffer(data[start : start + entry.file_size], np.uint8)


def _load_stream(stream: BinaryIO, data: memoryview) -> Any:
  dtypes: dict[str, np.dtype] = {}

  def collect(pid):  # first pass: the types of the storages that follow the pickle
    _, kind, key, *_ = pid
    dtypes[key] = _dtype(kind)

  first = _Machine(collect).run(stream)
  if not isinstance(first, int) or first != _LEGACY_MAGIC:
    return first
  protocol, system = (_Machine(collect).run(stream) for _ in range(2))
  if protocol != 1001 or not system.get("little_endian", True):
    raise _Refused(f"torch's protocol {protocol} in {system}")
  start = stream.tell()
  _Machine(collect).run(stream)
  keys = _Machine(collect).run(stream)
  arrays = {}
  for key in keys:
    dtype = dtypes[key]
    (count,) = struct.unpack("<q", stream.read(8))
    begin = stream.tell()
    end = begin + count * dtype.itemsize
    if count < 0 or end > len(data):
      raise _Damaged(f"storage {key} is cut off")
    arrays[key] = np.frombuffer(data[begin:end], dtype)
    stream.seek(end)

  def load_storage(pid):
    _, _, key, _, _, *view = pid
    storage = arrays[key]
    if view and view[0] is not None:
      _, offset, count = view[0]
      offset, count = _sizes([offset, count])
      storage = storage[offset : offset + count]
    return storage

  stream.seek(start)
  return _Machine(load_storage).run(stream)


def save(path: str | os.PathLike, items: Iterable[tuple[str, Callable[[], np.ndarray]]]) -> None:
  """Writes a state dict that `torch.load(path, weights_only=True)` reads, in torch's zip format.

  Args:
    path: the file.
    items: keys, in the order of the state dict, and functions that give their float32 array;
      each is called once and its array dropped, so one tensor is held at a time.
  """
  pickled = bytearray(b"\x80\x02" + _ordered_dict() + b"(")
  try:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
      for index, (key, make) in enumerate(items):
        array = make()
        if array.dtype != np.float32:
          raise TypeError(f"{key}: {array.dtype}")
        shape = array.shape
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        _write_entry(archive, f"archive/data/{index}", raw)
        pickled += _text(key) + _pickled_tensor(str(index), shape)
      _write_entry(archive, "archive/data.pkl", bytes(pickled) + b"u.")
      _write_entry(archive, "archive/byteorder", b"little")
      _write_entry(archive, "archive/version", b"3\n")
  except OSError as e:  # a failed write does not know its file
    raise OSError(e.errno, e.strerror, str(path)) from e


def _write_entry(archive: zipfile.ZipFile, name: str, data) -> None:
  entry = zipfile.ZipInfo(name)  # dated 1980, so that equal weights make equal files
  start = archive.fp.tell() + 30 + len(name.encode()) + 4
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
