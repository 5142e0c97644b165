"""Captions of image sets: where they stand, and which image each belongs to.

  parquet:     the column `caption`, `captions`, `text` or `texts`: a text, or a list of them
  webdataset:  `x.txt` beside `x.jpg`, one caption; or `x.json` with one of those keys
  folder:      a file of captions, found beside the images or named:
    metadata.jsonl, metadata.csv   Hugging Face's imagefolder: `file_name` and one of those columns;
                                   a caption a line, or several in a list; in the image folder
    captions_NAME.json             COCO's annotations (`images`, `annotations`) of the folder NAME;
                                   in it, beside it, or in `annotations` beside it

White space in a caption counts as one space; an empty caption is none.
"""

import array
import csv
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from coda_jax import storage
from coda_jax.data.folder import METADATA, FolderSource, few
from coda_jax.data.records import first_line
from coda_jax.errors import UserError

COLUMNS = ("caption", "captions", "text", "texts")
_NAMES = ("file_name", "filename", "image", "file", "path")


@runtime_checkable
class Captioned(Protocol):
  """A source of images that holds their captions."""

  def captions(self) -> Iterator[list[str]]:
    """Those of every row, in order. Raises UserError if it cannot have them."""
    ...

  def name(self, row: int) -> str: ...


class Captions:
  """Captions of images by row. One blob instead of a million strings."""

  def __init__(self, rows: Iterable[Sequence[str]]):
    texts, ends, firsts = bytearray(), array.array("q", [0]), array.array("q", [0])
    for captions in rows:
      for text in captions:
        texts += text.encode(errors="replace")
        ends.append(len(texts))
      firsts.append(len(ends) - 1)
    self._texts, self._ends, self._firsts = bytes(texts), ends, firsts

  def __len__(self) -> int:
    return len(self._firsts) - 1

  def count(self, row: int) -> int:
    return self._firsts[row + 1] - self._firsts[row]

  def __getitem__(self, row: int) -> list[str]:
    bounds = self._ends[self._firsts[row] : self._firsts[row + 1] + 1]
    return [self._texts[a:b].decode() for a, b in itertools.pairwise(bounds)]

  def fingerprint(self) -> str:
    """SHA-256 of all captions and of whose they are."""
    found = hashlib.sha256(self._texts)
    for part in (self._ends, self._firsts):
      found.update(part.tobytes())
    return found.hexdigest()


def open_captions(source: Any, spec: str, file: storage.Path | None = None) -> Captions:
  """The captions of the images of `source`, which `spec` opened.

  Args:
    file: .json of COCO, .jsonl or .csv; None for what is found beside the images.

  Raises:
    UserError: no captions there, a file that is none of captions, images without a caption, or
      captions of images that are not there.
  """
  if isinstance(source, FolderSource):
    file = _beside(pathlib.Path(source.root)) if file is None else file
    captions, where = Captions(_of_folder(source, spec, file)), f" in {file}"
  elif not isinstance(source, Captioned):
    raise UserError(f"{spec} has no captions: folder:, parquet:, webdataset: and embedded have")
  elif file is not None:
    raise UserError(f"{spec} holds its captions itself; leave out --captions {file}")
  else:
    captions, where = Captions(source.captions()), ""
  if missing := [row for row in range(len(captions)) if not captions.count(row)]:
    names = ", ".join(source.name(row) for row in missing[:3])
    raise UserError(
      f"{len(missing)} of {len(captions)} images of {spec} have no caption{where}: {names}"
      f"{', ...' if len(missing) > 3 else ''}; write them, or remove the images"
    )
  return captions


def texts(fields: Mapping[str, Any]) -> list[str]:
  """The captions of one image by the name of their column.

  Raises ValueError if they are neither a text nor a list of texts.
  """
  column = next((c for c in COLUMNS if fields.get(c) is not None), None)
  value = [] if column is None else fields[column]
  value = [value] if isinstance(value, str) else value
  if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
    raise ValueError(f"{column} is neither a text nor a list of texts")
  return clean(value)


def clean(captions: Iterable[str]) -> list[str]:
  """Captions without what is not seen of them; see the module's docstring."""
  return [text for text in (" ".join(caption.split()) for caption in captions) if text]


def _beside(root: pathlib.Path) -> pathlib.Path:
  """The file of captions of an image folder."""
  coco = f"captions_{root.name}.json"
  folders = (root, root.parent, root.parent / "annotations")
  candidates = [*(root / name for name in METADATA), *(folder / coco for folder in folders)]
  found = [file for file in candidates if file.is_file()]
  if not found:
    raise UserError(
      f"{root} has no captions: no {' or '.join(METADATA)} in it, and no {coco} beside it;"
      " name a file with --captions"
    )
  if len(found) > 1:
    names = ", ".join(map(str, found))
    raise UserError(f"{root} has several files of captions: {names}; name one by --captions")
  return found[0]


def _of_folder(source: FolderSource, spec: str, file: storage.Path) -> list[list[str]]:
  """The captions of every image of a folder, as the file has them."""
  names = source.file_names()
  rows = {name: row for row, name in enumerate(names)}
  alone: dict[str, int | None] = {}  # by the file's name; None where two folders have it
  for row, name in enumerate(names):
    base = os.path.basename(name)
    alone[base] = None if base in alone else row
  found: list[list[str]] = [[] for _ in names]
  unknown: dict[str, None] = {}
  for name, captions in _entries(file):
    row = rows.get(os.path.normpath(name))
    if row is None:  # the path may begin where the file lies
      row = rows.get(os.path.relpath(os.path.join(file.parent, name), source.root))
    row = alone.get(name) if row is None else row
    if row is not None:
      found[row] += captions
    elif captions:
      unknown[name] = None
  if unknown:
    raise UserError(
      f"{file} has captions of images that {spec} lacks: {few([*unknown])}; restore the images, or"
      " remove their captions"
    )
  return found


def _entries(file: storage.Path) -> Iterator[tuple[str, list[str]]]:
  """(name of the image, captions) of every line, or of every annotation of COCO's."""
  kinds = {".json": _coco, ".jsonl": _jsonl, ".csv": _csv}
  if file.suffix not in kinds:
    raise UserError(f"{file} is no file of captions; give COCO's .json, a .jsonl or a .csv")
  try:
    yield from kinds[file.suffix](file.read_bytes().decode("utf-8-sig"))
  except OSError as e:
    raise UserError(f"{file} cannot be read: {e.strerror or first_line(e)}") from e
  except (ValueError, KeyError, TypeError, csv.Error) as e:
    raise UserError(f"{file} has no captions as expected: {first_line(e)}") from e


def _coco(text: str) -> Iterator[tuple[str, list[str]]]:
  fields = json.loads(text)
  if not isinstance(fields, dict) or not {"images", "annotations"} <= fields.keys():
    raise ValueError("COCO's have lists `images` and `annotations`")
  names = {image["id"]: image["file_name"] for image in fields["images"]}
  for number, annotation in enumerate(fields["annotations"], 1):
    if not {"image_id", "caption"} <= annotation.keys() or annotation["image_id"] not in names:
      raise ValueError(f"annotation {number} has no `caption`, or no image in `images`")
    yield names[annotation["image_id"]], texts(annotation)


def _jsonl(text: str) -> Iterator[tuple[str, list[str]]]:
  for number, line in enumerate(text.splitlines(), 1):
    if line.strip():
      try:
        yield _entry(json.loads(line))
      except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"line {number}: {e}") from e


def _csv(text: str) -> Iterator[tuple[str, list[str]]]:
  lines = csv.DictReader(io.StringIO(text, newline=""))
  for fields in lines:
    try:
      yield _entry({key: _list(value) for key, value in fields.items()})
    except ValueError as e:
      raise ValueError(f"line {lines.line_num}: {e}") from e


def _list(value: Any) -> Any:
  """A list of texts where a cell of a table holds one in JSON."""
  if isinstance(value, str) and value.startswith("["):
    try:
      found = json.loads(value)
    except ValueError:
      return value
    return found if isinstance(found, list) and all(isinstance(t, str) for t in found) else value
  return value


def _entry(fields: Mapping[str, Any]) -> tuple[str, list[str]]:
  name = next((fields[c] for c in _NAMES if isinstance(fields.get(c), str)), None)
  if not name or not any(c in fields for c in COLUMNS):
    raise ValueError(f"no `file_name`, or none of {', '.join(f'`{c}`' for c in COLUMNS)}")
  return name, texts(fields)
