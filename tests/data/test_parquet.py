"""Parquet files as Hugging Face writes them: layouts, labels, damage, one line an error."""

import concurrent.futures
import json
import os
import pathlib
import pickle
import sys

import numpy as np
import pytest

from coda_jax.data import pipeline, sources
from coda_jax.data.decode import UnreadableImage
from coda_jax.errors import UserError
from tests.data.images import encode, photo

pa = pytest.importorskip("pyarrow", reason="pyarrow is an optional extra: 'coda_jax[parquet]'")
parquet = pytest.importorskip("pyarrow.parquet")

CLASSES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def picture(i: int) -> bytes:
  return encode(photo(40, 52, seed=i), "jpeg")


def write(
  file: pathlib.Path, rows: range, labels=None, features=None, column="image", as_struct=True
):
  """Images `rows` in row groups of two; labels are given, i % 2 or left out (`()`)."""
  images = [picture(i) for i in rows]
  if as_struct:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array(
      [{"bytes": x, "path": f"{i}.jpg"} for i, x in zip(rows, images, strict=True)], kind
    )
  columns = {column: images}
  if labels != ():
    columns["label"] = pa.array([i % 2 for i in rows] if labels is None else labels)
  table = pa.table(columns)
  if features:
    table = table.replace_schema_metadata(
      {"huggingface": json.dumps({"info": {"features": features}})}
    )
  file.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(table, file, row_group_size=2)


def error(spec: str) -> str:
  with pytest.raises(UserError) as e:
    sources.open_source(spec)
  assert "\n" not in str(e.value)
  return str(e.value)


@pytest.fixture
def imagenet(tmp_path):
  """As imagenet-1k lies: two shards of train, one of validation, one of test without labels."""
  for shard, rows in enumerate((range(0, 5), range(5, 8))):
    write(tmp_path / "data" / f"train-{shard:05}-of-00002.parquet", rows, features=CLASSES)
  write(tmp_path / "data" / "validation-00000-of-00001.parquet", range(3), features=CLASSES)
  write(tmp_path / "data" / "test-00000-of-00001.parquet", range(2), [-1, -1], CLASSES)
  (tmp_path / ".cache").mkdir()
  (tmp_path / ".cache" / "train-00000-of-00001.parquet").write_bytes(b"half a download")
  return tmp_path


def test_imagenet_as_it_is_published(imagenet):
  source = sources.open_source(f"parquet:{imagenet}@train")
  assert isinstance(source, sources.ImageSource)
  assert source.class_names == ("cat", "dog") and len(source) == 8
  for row in (7, 0, 5, 4, 1, 6, 3, 2):
    assert source[row] == (picture(row), row % 2)
  second = imagenet / "data" / "train-00001-of-00002.parquet"
  assert source.name(6) == f"{second} row 1 (6.jpg)"
  copy = pickle.loads(pickle.dumps(source))
  assert copy[6] == source[6] and copy.fingerprint() == source.fingerprint()
  test = sources.open_source(f"parquet:{imagenet}@test")
  assert [test[i][1] for i in range(2)] == [-1, -1] and test.class_names == ("cat", "dog")
  assert sources.location(f"parquet:{imagenet}@train") == str(imagenet)
  with pytest.raises(IndexError):
    source[8]


@pytest.mark.parametrize(
  ("names", "spec"),
  [
    (["train/0000.parquet", "test/0000.parquet"], "@train"),
    (["train-00000-of-00001-a09b74b3ef9c3b56.parquet", "test.parquet"], "@train"),
    (["my-set-train.parquet", "my-set-val.parquet"], "@train"),
    (["0000.parquet"], ""),
    (["anything.parquet"], "/anything.parquet"),
  ],
)
def test_layouts(tmp_path, names, spec):
  for i, name in enumerate(names):
    write(tmp_path / name, range(2 * i, 2 * i + 2))
  source = sources.open_source(f"parquet:{tmp_path}{spec}")
  assert [source[i] for i in range(len(source))] == [(picture(0), 0), (picture(1), 1)]


def test_columns_and_labels(tmp_path):
  write(tmp_path / "train.parquet", range(3), ["dog", None, "dog"], column="img", as_struct=False)
  write(tmp_path / "val.parquet", range(3), ["eel", "cat", "dog"], column="img", as_struct=False)
  source = sources.open_source(f"parquet:{tmp_path}@train")
  assert source.class_names == ("cat", "dog", "eel"), "names of all splits count"
  assert [source[i] for i in range(3)] == [
    (picture(i), label) for i, label in enumerate((1, -1, 1))
  ]
  assert source.name(2) == f"{tmp_path / 'train.parquet'} row 2"
  write(tmp_path / "n" / "train.parquet", range(2), [0, 2])
  write(tmp_path / "n" / "val.parquet", range(2), [1, 4])
  assert sources.open_source(f"parquet:{tmp_path}/n@train").class_names == tuple("01234")
  write(tmp_path / "no" / "train.parquet", range(2), ())
  assert sources.open_source(f"parquet:{tmp_path}/no@train")[1] == (picture(1), -1)
  write(tmp_path / "lists" / "x.parquet", range(2), [[1, 2], [3]])
  assert sources.open_source(f"parquet:{tmp_path}/lists").class_names == ()


def test_errors(imagenet, monkeypatch):
  here = f"parquet:{imagenet}"
  assert "no split 'val' in .parquet files; there: test, train, validation" in error(f"{here}@val")
  assert "holds splits test, train, validation; name one" in error(here)
  assert "no such folder or file" in error(f"{here}/nowhere@train")
  assert "names no path" in error("parquet:@train")
  file = imagenet / "data" / "train-00001-of-00002.parquet"
  assert "is one file, which has no splits" in error(f"parquet:{file}@train")
  whole = file.read_bytes()
  file.write_bytes(whole[:-40])
  assert f"{file} cannot be read: " in error(f"{here}@train")
  file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x\n")
  assert "git lfs pull" in error(f"{here}@train")
  for labels, message in (
    ([0, 7], "its labels, 0 to 7, do not number the 2 classes"),
    ([0, -2], "its labels, -2 to 0, do not number"),
  ):
    write(imagenet / "bad" / "x.parquet", range(2), labels, CLASSES)
    assert message in error(f"{here}/bad")
  table = pa.table({"text": ["a"], "image": [1]})
  parquet.write_table(table, imagenet / "bad" / "x.parquet")
  assert "no column of encoded images; its columns: text, image" in error(f"{here}/bad")
  parquet.write_table(table.slice(0, 0), imagenet / "bad" / "x.parquet")
  write(imagenet / "bad" / "x.parquet", range(0))
  assert "holds no images" in error(f"{here}/bad")
  (imagenet / "bad" / "x.parquet").unlink()
  assert "holds no .parquet files" in error(f"{here}/bad")
  for name in ("a", "b"):
    write(imagenet / "bad" / name / "train-00000-of-00001.parquet", range(2))
  assert "several sets of .parquet files: a/train, b/train" in error(f"{here}/bad@train")
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  assert "pip install 'coda_jax[parquet]'" in error(f"{here}@train")


def test_a_missing_shard_is_told(imagenet, caplog):
  os.remove(imagenet / "data" / "train-00000-of-00002.parquet")
  assert len(sources.open_source(f"parquet:{imagenet}@train")) == 3
  assert "1 of 2 shards are not there: 0" in caplog.text


def test_damage_is_an_unreadable_image(imagenet):
  file = imagenet / "data" / "train-00000-of-00002.parquet"
  source = sources.open_source(f"parquet:{imagenet}@train")
  data = bytearray(file.read_bytes())
  data[:200] = bytes(200)  # the page header of the first row group
  mtime = file.stat().st_mtime_ns
  file.write_bytes(data)
  os.utime(file, ns=(mtime, mtime))
  with pytest.raises(UnreadableImage, match="row group 0 of .*train-00000"):
    source[0]
  assert source[2] == (picture(2), 0) and source.name(0) == f"{file} row 0 (0.jpg)"
  file.write_bytes(data + b"x")
  fresh = pickle.loads(pickle.dumps(source))
  with pytest.raises(UnreadableImage, match="changed since it was opened"):
    fresh[2]
  write(file, range(5), features=CLASSES, as_struct=True)
  table = pa.table({"image": [{"bytes": None, "path": "a.jpg"}], "label": [0]})
  parquet.write_table(table, imagenet / "x.parquet")
  with pytest.raises(UnreadableImage, match="no bytes of it"):
    sources.open_source(f"parquet:{imagenet}/x.parquet")[0]


def test_the_fingerprint_tells_other_images(imagenet, tmp_path):
  fingerprint = lambda: sources.open_source(f"parquet:{imagenet}@train").fingerprint()
  file, before = imagenet / "data" / "train-00001-of-00002.parquet", fingerprint()
  write(file, range(5, 8), features=CLASSES)
  assert fingerprint() == before
  write(file, range(5, 8), [0, 0, 0], features=CLASSES)
  assert fingerprint() != before
  write(file, range(6, 9), [1, 0, 1], features=CLASSES)
  assert fingerprint() != before


def test_batches_are_those_of_the_folder(imagenet):
  """The same images through grain, threads and all, as from anywhere else."""
  for i in range(8):
    folder = imagenet / "folder" / "cd"[i % 2]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{i}.jpg").write_bytes(picture(i))
  options = {"image_size": 32, "batch_size": 4, "resize_ratio": None}
  found = [
    {
      image.tobytes(): int(label)
      for batch in pipeline.eval_batches(spec, **options)
      for image, label in zip(batch["image"], batch["label"], strict=True)
    }
    for spec in (f"parquet:{imagenet}@train", f"folder:{imagenet}/folder")
  ]
  assert found[0] == found[1] and len(found[0]) == 8
  assert np.unique([*found[0].values()]).tolist() == [0, 1]


def test_large_row_groups_are_told(imagenet, monkeypatch, caplog):
  sources.open_source(f"parquet:{imagenet}@train")
  assert not caplog.text
  monkeypatch.setattr("coda_jax.data.parquet._LARGE_BYTES", 1000)
  sources.open_source(f"parquet:{imagenet}@train")
  assert "copy them once with write_arrayrecord" in caplog.text


@pytest.mark.parametrize(("kept_bytes", "expected"), [(1 << 20, [0, 2]), (1, [0, 2, 0])])
def test_row_groups_are_kept_within_their_bytes(imagenet, monkeypatch, kept_bytes, expected):
  monkeypatch.setattr("coda_jax.data.parquet._KEPT_BYTES", kept_bytes)
  source, reads = counted(imagenet, monkeypatch)
  for row in (0, 1, 4, 0):
    source[row]
  assert reads == expected


def test_threads_read_a_row_group_once(imagenet, monkeypatch):
  source, reads = counted(imagenet, monkeypatch)
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    found = list(threads.map(lambda i: source[i % 8], range(64)))
  assert found == [(picture(i % 8), i % 2) for i in range(64)]
  assert sorted(reads) == [0, 1, 2, 3, 4]


def counted(folder, monkeypatch):
  """A source, and the row groups that it reads from now on."""
  source = sources.open_source(f"parquet:{folder}@train")
  read, reads = source._images._read, []
  monkeypatch.setattr(source._images, "_read", lambda n: reads.append(n) or read(n))
  return source, reads
