"""Runs pickles without importing or executing anything that they name.

A pickle is a program for a stack machine that may call whatever it names. The machine here never
imports: a name is looked up in `_KNOWN`, which holds functions of ours that make tensors, NumPy
arrays and plain containers. Every other name is refused.
"""

import collections
import math
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

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


class Refused(Exception):
  """Something in a file that is not a tensor, an array or a plain container."""


class Damaged(Exception):
  """A file that is not what it should be."""


class _Name:
  """Stands for `module.name` in a pickle, and is all that a pickle can call."""

  def __init__(self, full: str):
    if full not in _KNOWN:
      raise Refused(full)
    self.full = full

  def __call__(self, *args: Any) -> Any:
    function = _KNOWN[self.full]
    if function is None:
      raise Refused(f"a call of {self.full}")
    return function(*args)


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
      raise Refused(f"an array of type {shown!r}")

  def set(self, state):
    if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
      self.value = self.value.newbyteorder(state[1])


def _ndarray(data: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
  if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
    raise Refused("an array of Python objects")
  shape = sizes(shape)
  if math.prod(shape) * dtype.value.itemsize != len(data):
    raise Damaged("an array's data and its shape disagree")
  return np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C")


def sizes(values: Any) -> tuple[int, ...]:
  """`values` as a tuple. Raises Damaged unless all are integers of at least 0."""
  values = tuple(values)
  if not all(isinstance(v, int) and v >= 0 for v in values):
    raise Damaged(f"a tensor of size {values}")
  return values


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray | None:
  if storage is None:  # the first pass over a legacy file, which only collects storages
    return None
  if not isinstance(storage, np.ndarray) or storage.ndim != 1 or not storage.flags.c_contiguous:
    raise Damaged("a tensor without storage")  # the bound below counts contiguous elements
  size, stride = sizes(size), sizes(stride)
  (offset,) = sizes([offset])
  if len(size) != len(stride):
    raise Damaged("a tensor with more sizes than strides")
  if 0 in size:
    return np.zeros(size, storage.dtype)
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if last >= storage.size:  # as_strided would read whatever lies behind
    raise Damaged("a tensor that reaches beyond its storage")
  step = storage.dtype.itemsize
  return np.lib.stride_tricks.as_strided(
    storage[offset:], size, [s * step for s in stride], writeable=False
  )


def _encode(text: str, codec: str) -> bytes:  # how protocol 2 spells bytes
  if codec not in ("latin1", "latin-1"):
    raise Refused(f"text in {codec!r}")
  return text.encode("latin1")


def _reconstruct(kind: Any, *_: Any) -> _Array:
  if not (isinstance(kind, _Name) and kind.full == "numpy.ndarray"):
    raise Refused(kind.full if isinstance(kind, _Name) else str(type(kind).__name__))
  return _Array()


def _scalar(dtype: Any, data: Any) -> Any:
  return _ndarray(data, dtype, (), False)[()]


def _container(make: Callable) -> Callable:
  def build(items=()):
    if not isinstance(items, list | tuple | dict):
      raise Damaged("a container made of something else")
    return make(items)

  return build


def _path(*parts: Any) -> str:
  return "/".join(map(str, parts))


_BUILTINS = ("builtins", "__builtin__")
_PATHLIB = ("pathlib", "pathlib._local")
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
  "collections.Counter": _container(dict),  # in the state of a learning rate's schedule
  "collections.defaultdict": lambda *_: {},
  **{f"{module}.{name}": None for module in _BUILTINS for name in ("dict", "list", "int")},
  "argparse.Namespace": lambda: {},  # the options of a training script, which are left out
  **{f"{module}.{name}Path": _path for module in _PATHLIB for name in ("Posix", "Windows")},
  **{f"{module}.set": _container(set) for module in _BUILTINS},
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


class _Memo(dict):
  """A memo that answers with an array instead of the stand-in that was made first."""

  def __getitem__(self, key: int) -> Any:
    found = super().__getitem__(key)
    return found.value if isinstance(found, _Array) else found


class Unpickler(pickle._Unpickler):
  """Runs one pickle, with stand-ins for everything that it names.

  It derives from the unpickler that is written in Python. The one in C reserves memory for as many
  memo entries as a damaged index asks for, and takes registered extensions from a cache without a
  call of `find_class`.

  Args:
    stream: a binary file or `mmap`, read up to the end of the pickle.
    load_storage: gives the elements of the storage with a persistent id.
  """

  stack: list[Any]
  read: Callable[[int], bytes]

  def __init__(self, stream: Any, load_storage: Callable[[Any], Any]):
    super().__init__(stream, encoding="latin1")
    self.memo = _Memo()
    self._load_storage = load_storage

  def persistent_load(self, pid: Any) -> Any:
    return self._load_storage(pid)

  def find_class(self, module: str, name: str) -> _Name:
    return _Name(f"{module}.{name}")

  def get_extension(self, code: int) -> None:
    raise Refused(f"the pickle instruction EXT1, EXT2 or EXT4 with code {code}")

  def load_build(self) -> None:
    state, target = self.stack.pop(), self.stack[-1]
    if isinstance(target, _DType):
      target.set(state)
    elif isinstance(target, _Array):
      _, shape, dtype, fortran, data = state
      self.stack[-1] = target.value = _ndarray(data, dtype, shape, fortran)
    # An OrderedDict's state is torch's _metadata, an argparse.Namespace's are options: no weights.
    elif not isinstance(target, dict):
      raise Refused(f"state for {type(target).__name__}")

  def load_newobj(self) -> None:
    args, name = self.stack.pop(), self.stack.pop()
    if not isinstance(name, _Name):
      raise Damaged("an object of no class")
    self.stack.append(name(*args))

  def load_bytearray8(self) -> None:  # the inherited one reserves the bytes before it reads them
    (count,) = struct.unpack("<Q", self.read(8))
    self.stack.append(bytearray(self.read(count)))

  dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
    **pickle._Unpickler.dispatch,
    pickle.BUILD[0]: load_build,
    pickle.NEWOBJ[0]: load_newobj,
    pickle.BYTEARRAY8[0]: load_bytearray8,
  }


def storage_type(storage: Any) -> np.dtype:
  """The type of the elements of a storage, from what a persistent id says.

  Raises:
    Damaged: nothing of the kind.
    Refused: a type that NumPy cannot hold.
  """
  if not isinstance(storage, _Name):
    raise Damaged("a storage without type")
  name = storage.full.rpartition(".")[2]
  if name not in _STORAGES:
    raise Refused(storage.full)
  return np.dtype(_STORAGES[name])
