"""Where the images of tar shards lie: an index that is made once and kept in a file.

A sample is what shares a name up to the first dot of its last part (WebDataset's rule): an image,
its label in `.cls` or `.json`, and its captions in `.txt` or `.json`.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from coda_jax import outputs, storage
from coda_jax.data import shards
from coda_jax.data.folder import image_extensions
from coda_jax.errors import UserError

log = logging.getLogger("coda_jax")

_FORMAT = "coda_jax tar index 2"
_LABEL_KEYS = ("label", "cls", "class", "class_id")  # of .json
_MOST_BYTES = 1 << 20  # of a .cls or .json that is read
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class TarIndex:
  """The images of tar files, in the files' order.

  Attributes:
    counts: images of each tar.
    offsets, sizes: int64 [n], where an image begins in its tar, and its bytes.
    names: of all images, one after the other, in UTF-8.
    ends: int64 [n], where each name ends.
    labels: the label of each image: a number, a class name, or None.
    texts: int64 [n, 3], where the file of an image's captions begins, its bytes, and what it is:
      0 for none, 1 for `.txt`, 2 for `.json`.
    skipped: how many members are not read, by their ending.
  """

  counts: tuple[int, ...]
  offsets: np.ndarray
  sizes: np.ndarray
  names: bytes
  ends: np.ndarray
  labels: tuple[int | str | None, ...]
  texts: np.ndarray
  skipped: Mapping[str, int]


def load(files: Sequence[pathlib.Path], name: str) -> TarIndex:
  """The index of tars in one folder or below it. Tars that are new or changed are read.

  It is kept as `.NAME.coda_jax_index.npz` beside the first tar, otherwise in the user's cache.

  Raises:
    UserError: a tar is damaged, cut short or compressed.
  """
  folder = files[0].parent
  own = folder / f".{name}.coda_jax_index.npz"
  cache = storage.cache_folder()
  place = hashlib.sha256(f"{folder.resolve()}/{name}".encode()).hexdigest()[:32]
  places = (own, cache / "tars" / f"{place}.npz") if cache else (own,)
  known = {key: tar for place in places for key, tar in _read(place).items()}
  keys = [(os.path.relpath(f, folder), *shards.stat(f)) for f in files]
  new = [(key, f) for key, f in zip(keys, files, strict=True) if key not in known]
  if new:
    log.info("indexing %d of the %d tar files in %s, once", len(new), len(files), folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
      scanned = threads.map(scan, [f for _, f in new])
      bar = tqdm.tqdm(scanned, total=len(new), desc="indexing", unit="tar", disable=None)
      known |= {key: index for (key, _), index in zip(new, bar, strict=True)}
    _write(places, keys, [known[key] for key in keys])
  return _joined([known[key] for key in keys])


def scan(file: pathlib.Path) -> TarIndex:
  """The images of one tar. Raises as `load`."""
  samples: dict[str, dict[str, tuple[int, int]]] = {}
  try:
    with tarfile.open(file, "r:") as tar:
      while member := tar.next():
        vars(tar)["members"] = []  # tarfile keeps them all
        if member.isreg() and not member.sparse:
          folder, base = os.path.split(member.name)
          key, _, ending = base.partition(".")
          sample = samples.setdefault(os.path.join(folder, key), {})
          sample[f".{ending.lower()}"] = member.offset_data, member.size
      with file.open("rb") as f:
        f.seek(tar.offset)
        if f.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
          raise tarfile.ReadError("it is cut short")
      return _index(file, samples)
  except (OSError, tarfile.TarError) as e:
    with file.open("rb") as f:
      packed = f.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))
    mend = "it is compressed: unpack it to a plain .tar" if packed else f"{e}; fetch it again"
    raise UserError(f"{file} cannot be read as a tar file: {mend}") from e


def _index(file: pathlib.Path, samples: Mapping[str, Mapping[str, tuple[int, int]]]) -> TarIndex:
  extensions, skipped = image_extensions(), collections.Counter()
  found, labels, captions = [], [], []
  with file.open("rb") as f:
    for key, members in samples.items():
      images = [ending for ending in members if ending in extensions]
      used = {images[0], ".cls", ".json", ".txt"} if images else set()
      skipped.update(ending for ending in members if ending not in used)
      if images:
        found.append((f"{key}{images[0]}".encode(errors="replace"), *members[images[0]]))
        texts = {k: _text(f, *members[k]) for k in (".cls", ".json") if k in members}
        labels.append(_label(texts))
        kind = next((i for i, k in enumerate((".txt", ".json"), 1) if k in members), 0)
        captions.append((*members[(".txt", ".json")[kind - 1]], kind) if kind else (0, 0, 0))
  names, offsets, sizes = zip(*found, strict=True) if found else ((), (), ())
  return TarIndex(
    counts=(len(found),),
    offsets=np.array(offsets, "<i8"),
    sizes=np.array(sizes, "<i8"),
    names=b"".join(names),
    ends=np.cumsum([len(n) for n in names], dtype="<i8"),
    labels=tuple(labels),
    texts=np.array(captions, "<i8").reshape(-1, 3),
    skipped=dict(skipped.most_common()),
  )


def _text(f: Any, offset: int, size: int) -> str:
  f.seek(offset)
  return f.read(min(size, _MOST_BYTES)).decode(errors="replace").strip()


def _label(texts: Mapping[str, str]) -> int | str | None:
  """What `.cls` or else `.json` says."""
  value: Any = texts.get(".cls")
  if not value:
    try:
      fields = json.loads(texts.get(".json", ""))
      value = next((fields[k] for k in _LABEL_KEYS if k in fields), None)
    except (ValueError, TypeError):
      value = None
  if isinstance(value, str):
    try:
      return int(value)
    except ValueError:
      return value
  return value if isinstance(value, int) else None


def _joined(parts: Sequence[TarIndex]) -> TarIndex:
  lengths = np.cumsum([0] + [len(p.names) for p in parts])
  skipped = collections.Counter()
  for part in parts:
    skipped.update(part.skipped)
  return TarIndex(
    counts=tuple(sum(p.counts) for p in parts),
    offsets=np.concatenate([p.offsets for p in parts]),
    sizes=np.concatenate([p.sizes for p in parts]),
    names=b"".join(p.names for p in parts),
    ends=np.concatenate([p.ends + n for p, n in zip(parts, lengths, strict=False)]),
    labels=tuple(label for p in parts for label in p.labels),
    texts=np.concatenate([p.texts for p in parts]),
    skipped=dict(skipped.most_common()),
  )


def _write(places: Sequence[pathlib.Path], keys: Sequence, parts: Sequence[TarIndex]) -> None:
  """Writes the index to the first place that can be written."""
  whole = _joined(parts)
  kinds = {label: i for i, label in enumerate(dict.fromkeys(whole.labels))}
  tars = [
    (*key, sum(p.counts), len(p.names), p.skipped) for key, p in zip(keys, parts, strict=True)
  ]
  header = json.dumps({"format": _FORMAT, "labels": list(kinds), "tars": tars}).encode()
  columns = {
    "header": np.frombuffer(header, np.uint8),
    "offsets": whole.offsets,
    "sizes": whole.sizes,
    "names": np.frombuffer(whole.names, np.uint8),
    "ends": whole.ends,
    "labels": np.array([kinds[label] for label in whole.labels], "<i4"),
    "texts": whole.texts,
  }
  for place in places:
    try:
      place.parent.mkdir(parents=True, exist_ok=True)
      with outputs.replaced(place) as aside, aside.open("wb") as f:
        np.savez(f, **columns)
      return
    except OSError as e:
      log.info("the index of the tar files cannot be kept in %s: %s", place.parent, e.strerror)
  log.warning("the index of the tar files could not be kept and is made anew each time")


def _read(place: pathlib.Path) -> dict[tuple[str, int, int], TarIndex]:
  """The index of every tar, by its name, bytes and time of change; empty if there is none."""
  try:
    with np.load(place) as f:
      header = json.loads(f["header"].tobytes())
      if header["format"] != _FORMAT:
        return {}
      offsets, sizes, ends, texts = f["offsets"], f["sizes"], f["ends"], f["texts"]
      names, labels = f["names"].tobytes(), [header["labels"][i] for i in f["labels"]]
    found, first, byte = {}, 0, 0
    for name, size, changed, count, length, skipped in header["tars"]:
      here = slice(first, first + count)
      found[name, size, changed] = TarIndex(
        counts=(count,),
        offsets=offsets[here],
        sizes=sizes[here],
        names=names[byte : byte + length],
        ends=ends[here] - byte,
        labels=tuple(labels[here]),
        texts=texts[here],
        skipped=skipped,
      )
      first, byte = first + count, byte + length
    return found
  except FileNotFoundError:
    return {}
  except Exception as e:  # a damaged zip raises all sorts
    log.info("%s cannot be read (%s); the tar files are indexed anew", place, e)
    return {}
