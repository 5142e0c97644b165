"""ArrayRecord files, whose records are read in any order. Images and tokens are kept in them."""

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

from coda_jax import outputs, storage
from coda_jax.errors import UserError


def _array_record() -> tuple[type, type]:
  """(writer, data source) of the package, which is imported only where it is needed."""
  try:
    writer = importlib.import_module("array_record.python.array_record_module")
    source = importlib.import_module("array_record.python.array_record_data_source")
  except ImportError as e:
    raise UserError(
      "arrayrecord: needs the package array-record, which exists for Linux alone"
    ) from e
  return writer.ArrayRecordWriter, source.ArrayRecordDataSource


def write(path: storage.Path, records: Iterable[bytes], *, compressed: bool = True) -> None:
  """Writes a file, which appears when it is whole. A file that is there is replaced.

  Args:
    compressed: by zstd; not worth its time for floating-point numbers.

  Raises:
    UserError: the package array-record is not installed.
  """
  writer_type, _ = _array_record()
  with outputs.replaced(path) as aside:
    options = "group_size:1" + ("" if compressed else ",uncompressed")  # random access one by one
    writer = writer_type(str(aside), options)
    try:
      for record in records:
        writer.write(record)
    finally:
      writer.close()


def read(files: Sequence[storage.Path], count: int, index: storage.Path, *, mend: str) -> Any:
  """The `count` records of some files: `records[i]`, `records.__getitems__([i, j])`, `len`.

  Args:
    files: what the file `index` lists.
    mend: what to do with a file that is missing or damaged, for messages.

  Raises:
    UserError: the package array-record is not installed; a file is missing or not whole, or they
      hold another number of records.
  """
  storage.check_gs(index, "ArrayRecord files are read from a disk or from gs:// alone")
  _, source_type = _array_record()
  if missing := [str(f) for f in files if not f.is_file()]:
    raise UserError(f"{index} lists files that do not exist: {', '.join(missing)}; {mend}")
  try:
    records = source_type([str(f) for f in files])
  except Exception as e:  # array_record raises bare types on damaged files
    bad = ", ".join(str(f) for f in files if not _opens(source_type, f))
    raise UserError(
      f"the ArrayRecord files of {index} cannot be read: {bad} ({first_line(e)}); {mend}"
    ) from e
  if len(records) != count:
    raise UserError(f"{index} promises {count} records, its files hold {len(records)}; {mend}")
  return records


def _opens(source_type: type, file: storage.Path) -> bool:
  try:
    source_type([str(file)])
  except Exception:
    return False
  return True


def first_line(e: Exception) -> str:
  """The first line of an exception's message, or its type when it has none."""
  message = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
  return next(iter(message.splitlines()), "") or type(e).__name__
