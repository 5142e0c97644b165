"""Tar shards of WebDataset: samples, labels, the index and what damages it."""

import bz2
import io
import json
import logging
import os
import pathlib
import pickle
import tarfile

import pytest

from coda_jax.data import inventory, sources, tar_index
from coda_jax.data.decode import UnreadableImage
from coda_jax.errors import UserError
from tests.data.images import encode, photo


def picture(i: int) -> bytes:
  return encode(photo(40, 52, seed=i), "jpeg")


def write(file: pathlib.Path, members) -> pathlib.Path:
  """A tar file of (name, bytes) in this order."""
  file.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(file, "w") as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return file


def samples(rows, folder=""):
  for i in rows:
    yield f"{folder}{i:04}.cls", str(i % 2).encode()
    yield f"{folder}{i:04}.jpg", picture(i)


def error(spec: str) -> str:
  with pytest.raises(UserError) as e:
    sources.open_source(spec)
  assert "\n" not in str(e.value)
  return str(e.value)


@pytest.fixture
def shards(tmp_path, monkeypatch):
  """Two shards of train and one of val."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  write(tmp_path / "set" / "set-train-0000.tar", samples(range(3)))
  write(tmp_path / "set" / "set-train-0001.tar", samples(range(3, 5), "n0/"))
  write(tmp_path / "set" / "set-val-0000.tar", samples(range(2)))
  return tmp_path / "set"


def test_shards(shards):
  source = sources.open_source(f"webdataset:{shards}@train")
  assert isinstance(source, sources.ImageSource)
  assert source.class_names == ("0", "1")
  for row in (4, 0, 3, 1, 2):
    assert source[row] == (picture(row), row % 2)
  assert source.name(3) == f"{shards / 'set-train-0001.tar'} member n0/0003.jpg"
  assert source.name(0) == f"{shards / 'set-train-0000.tar'} member 0000.jpg"
  copy = pickle.loads(pickle.dumps(source))
  assert copy[4] == source[4] and copy.fingerprint() == source.fingerprint()
  one = sources.open_source(f"webdataset:{shards}/set-val-0000.tar")
  assert [one[i] for i in range(len(one))] == [(picture(0), 0), (picture(1), 1)]
  line = inventory.describe(source, "webdataset:x@train").line()
  assert line == "webdataset:x@train: 5 images in 2 classes"


def test_what_a_sample_is(shards):
  named = [
    ("a.JPG", picture(0)),
    ("a.json", json.dumps({"label": "dog", "width": 3}).encode()),
    ("b.seg.png", b"mask"),
    ("b.png", picture(1)),
    ("b.txt", b"a photo"),
    ("b.cls", b"cat\n"),
    ("c.webp", picture(2)),
    ("c.jpg", b"another"),
    ("c.json", b"not json"),
    ("d.cls", b"dog"),
    ("x" * 150 + "é/e.jpg", picture(3)),
  ]
  write(shards / "names" / "train-0.tar", named)
  write(shards / "names" / "val-0.tar", [("v.jpg", picture(4)), ("v.cls", b"eel")])
  source = sources.open_source(f"webdataset:{shards}/names@train")
  assert source.class_names == ("cat", "dog", "eel"), "names of all splits count"
  assert [source[i] for i in range(len(source))] == [
    (picture(0), 1),
    (picture(1), 0),
    (picture(2), -1),
    (picture(3), -1),
  ]
  assert source.name(3).endswith("é/e.jpg")
  assert source.skipped == {".seg.png": 1, ".jpg": 1, ".cls": 1}


def test_the_index_is_kept_and_only_changed_tars_are_read(shards, monkeypatch):
  scanned, scan = [], tar_index.scan
  monkeypatch.setattr(tar_index, "scan", lambda f: scanned.append(f.name) or scan(f))
  spec = f"webdataset:{shards}@train"
  first = sources.open_source(spec)
  assert (shards / ".train.coda_jax_index.npz").is_file() and len(scanned) == 2
  again = sources.open_source(spec)
  assert len(scanned) == 2 and again.fingerprint() == first.fingerprint()
  assert [again[i] for i in range(5)] == [first[i] for i in range(5)]
  assert [again.name(i) for i in range(5)] == [first.name(i) for i in range(5)]
  write(shards / "set-train-0001.tar", samples(range(5, 9)))
  changed = sources.open_source(spec)
  assert scanned[2:] == ["set-train-0001.tar"] and len(changed) == 7
  assert changed.fingerprint() != first.fingerprint() and changed[6] == (picture(8), 0)
  with pytest.raises(UnreadableImage, match="set-train-0001.tar changed since it was indexed"):
    first[3]
  assert first[0] == (picture(0), 0)
  (shards / ".train.coda_jax_index.npz").write_bytes(b"damaged")
  assert len(sources.open_source(spec)) == 7 and len(scanned) == 5


def test_a_folder_that_cannot_be_written(shards, tmp_path, monkeypatch, caplog):
  replaced, refused = tar_index.outputs.replaced, [shards]

  def read_only(path):
    if any(path.is_relative_to(r) for r in refused):
      raise PermissionError(13, "Permission denied")
    return replaced(path)

  monkeypatch.setattr(tar_index.outputs, "replaced", read_only)
  sources.open_source(f"webdataset:{shards}@train")
  assert len(list((tmp_path / "cache" / "coda_jax" / "tars").glob("*.npz"))) == 1
  with caplog.at_level(logging.INFO):
    sources.open_source(f"webdataset:{shards}@train")
    assert not caplog.text
    refused.append(tmp_path)
    assert len(sources.open_source(f"webdataset:{shards}@val")) == 2
  assert "could not be kept" in caplog.text


def test_damaged_tars(shards):
  file, spec = shards / "set-train-0001.tar", f"webdataset:{shards}@train"
  whole = file.read_bytes()
  end = len(whole.rstrip(b"\0"))
  for cut in (0, 700, end // 2, end - 100, -(-end // 512) * 512):
    file.write_bytes(whole[:cut])
    assert f"{file} cannot be read as a tar file: " in error(spec), cut
    assert "fetch it again" in error(spec)
  damaged = bytearray(whole)
  second = whole.index(b"n0/0004.cls")
  damaged[second : second + 4] = b"XXXX"  # the header's sum does not fit
  file.write_bytes(damaged)
  assert "fetch it again" in error(spec)
  file.write_bytes(bz2.compress(whole))
  assert "it is compressed: unpack it to a plain .tar" in error(spec)
  file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x\n")
  assert "git lfs pull" in error(spec)


def test_errors(shards):
  here = f"webdataset:{shards}"
  assert "no split 'test' in .tar files; there: train, val" in error(f"{here}@test")
  assert "holds splits train, val; name one" in error(here)
  assert "no such folder or file" in error(f"{here}/nowhere")
  assert "names no path" in error("webdataset:")
  write(shards / "empty" / "0.tar", [("a.txt", b""), ("b.txt", b""), ("b.heic.json", b"")])
  assert "holds no images, only 2 .txt, 1 .heic.json" in error(f"{here}/empty")
  write(
    shards / "mixed" / "0.tar", [("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"x")]
  )
  assert "labels are numbers and names: 1, x" in error(f"{here}/mixed")
  write(shards / "ids" / "0.tar", [("a.jpg", b""), ("a.cls", b"123456789")])
  assert "do not number classes from 0" in error(f"{here}/ids")


def test_shards_that_are_missing(shards, caplog):
  write(shards / "set-train-0004.tar", samples(range(1)))
  assert len(sources.open_source(f"webdataset:{shards}@train")) == 6
  assert "2 of 5 shards are not there: 2, 3" in caplog.text
  assert not os.path.exists(shards / ".train.coda_jax_index.npz.partial")
