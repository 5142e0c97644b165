"""Specs open what they name; everything a user can get wrong is one clear line."""

import io
import os
import pickle
import sys

import numpy as np
import pytest

from coda_jax.data import sources
from coda_jax.data.decode import UnreadableImage
from coda_jax.data.records import write as write_records
from coda_jax.errors import UserError
from tests.data.images import encode, photo, write_folder


def error(spec: str) -> str:
  with pytest.raises(UserError) as e:
    sources.open_source(spec)
  assert "\n" not in str(e.value)
  return str(e.value)


def test_class_folders(tmp_path):
  write_folder(tmp_path / "train", 5)
  source = sources.open_source(f"folder:{tmp_path}@train")
  assert isinstance(source, sources.ImageSource)
  assert source.class_names == ("a", "b")
  names = [os.path.relpath(source.name(i), tmp_path / "train") for i in range(len(source))]
  assert names == ["a/000.png", "a/002.png", "a/004.png", "b/001.png", "b/003.png"]
  assert [source[i][1] for i in range(5)] == [0, 0, 0, 1, 1]
  assert source[3][0] == encode(photo(40, 52, seed=1))


def test_class_folders_without_split_and_nested(tmp_path):
  write_folder(tmp_path, 4)
  (tmp_path / "b" / "more").mkdir()
  (tmp_path / "b" / "more" / "x.JPEG").write_bytes(b"")
  source = sources.open_source(f"folder:{tmp_path}")
  assert [source[i][1] for i in range(len(source))] == [0, 0, 1, 1, 1]
  assert source.name(4) == str(tmp_path / "b" / "more" / "x.JPEG")


def test_flat_folder_has_no_labels(tmp_path):
  for name in ("b.png", "a.jpg", "notes.txt", "._a.jpg"):
    (tmp_path / name).write_bytes(b"")
  source = sources.open_source(f"folder:{tmp_path}")
  assert [os.path.basename(source.name(i)) for i in range(len(source))] == ["a.jpg", "b.png"]
  assert source.class_names == () and source[0][1] == -1


def test_labels_mean_the_same_class_in_every_split(tmp_path):
  write_folder(tmp_path / "train", 6, classes="abc")
  write_folder(tmp_path / "val", 4, classes="ac")
  val = sources.open_source(f"folder:{tmp_path}@val")
  assert val.class_names == sources.open_source(f"folder:{tmp_path}@train").class_names
  assert [val[i][1] for i in range(4)] == [0, 0, 2, 2]


def test_at_sign_and_odd_names_in_paths(tmp_path):
  write_folder(tmp_path / "me@home" / "train", 2)
  assert len(sources.open_source(f"folder:{tmp_path}/me@home@train")) == 2
  assert len(sources.open_source(f"folder:{tmp_path}/me@home/train")) == 2
  odd = os.fsencode(tmp_path / "me@home" / "train" / "a") + b"/\xff\xe9 .png"
  with open(odd, "wb") as f:
    f.write(b"odd")
  source = pickle.loads(pickle.dumps(sources.open_source(f"folder:{tmp_path}/me@home@train")))
  assert os.fsencode(source.name(1)) == odd and source[1] == (b"odd", 0)


def test_circular_links_end(tmp_path):
  write_folder(tmp_path, 4)
  (tmp_path / "a" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
  assert len(sources.open_source(f"folder:{tmp_path}")) == 4


def test_folder_errors(tmp_path):
  write_folder(tmp_path / "data" / "train", 2)
  write_folder(tmp_path / "data" / "val", 2)
  (tmp_path / "empty").mkdir()
  write_folder(tmp_path / "mixed", 2)
  (tmp_path / "mixed" / "stray.png").write_bytes(b"")
  assert "does not exist" in error(f"folder:{tmp_path}/nowhere@train")
  assert "no split 'test'; folders there: train, val" in error(f"folder:{tmp_path}/data@test")
  assert "holds splits train, val; name one: " in error(f"folder:{tmp_path}/data")
  assert "holds no images" in error(f"folder:{tmp_path}/empty")
  assert "stray.png" in error(f"folder:{tmp_path}/mixed")
  assert "names no path" in error("folder:@train")


@pytest.mark.parametrize("spec", ["s3:bucket@train", "imagenet", "/data/imagenet", ""])
def test_unknown_forms(spec):
  assert "folder:PATH@SPLIT" in error(spec)


def test_no_split_after_the_at_sign(tmp_path):
  assert "names no split" in error(f"folder:{tmp_path}@")


def test_embedded():
  train, val = (sources.open_source(f"embedded@{split}") for split in ("train", "val"))
  assert train.class_names == val.class_names and len(train.class_names) > 1
  assert val.name(len(val) - 1).endswith((".webp", ".png"))
  data, label = val[len(val) - 1]
  assert f"/{val.class_names[label]}/" in val.name(len(val) - 1) and data
  assert "train, val" in error("embedded")
  assert "no split 'test'" in error("embedded@test")


def test_embedded_without_a_checkout(monkeypatch, tmp_path):
  monkeypatch.setattr(sources, "EMBEDDED_PHOTOS", tmp_path / "assets")
  assert "checkout" in error("embedded@val")


@pytest.fixture
def records(tmp_path):
  """(folder source, its ArrayRecord copy's folder)."""
  pytest.importorskip("array_record.python", reason="array-record exists for Linux alone")
  folder = sources.FolderSource(write_folder(tmp_path / "images", 7, classes="abc"))
  sources.write_arrayrecord(folder, tmp_path / "records", "train", files=3)
  return folder, tmp_path / "records"


def test_arrayrecord_holds_the_same_images(records):
  folder, path = records
  source = pickle.loads(pickle.dumps(sources.open_source(f"arrayrecord:{path}@train")))
  assert source.class_names == folder.class_names
  assert [source[i] for i in range(len(source))] == [folder[i] for i in range(len(folder))]
  assert source.name(3) == f"{path}@train record 3 (001.png)"
  assert sorted(p.name for p in path.iterdir()) == [
    "train-00000-of-00003.array_record",
    "train-00001-of-00003.array_record",
    "train-00002-of-00003.array_record",
    "train.json",
  ]


def test_arrayrecord_errors(records):
  folder, path = records
  assert "no split 'val'; there: train" in error(f"arrayrecord:{path}@val")
  assert "needs a split; there: train" in error(f"arrayrecord:{path}")
  assert "holds no SPLIT.json" in error(f"arrayrecord:{path.parent}@train")
  with pytest.raises(UserError, match="exists"):
    sources.write_arrayrecord(folder, path, "train")
  last = path / "train-00002-of-00003.array_record"
  whole = last.read_bytes()
  last.write_bytes(whole[:100])
  assert str(path) in error(f"arrayrecord:{path}@train")
  last.unlink()
  assert "do not exist" in error(f"arrayrecord:{path}@train")
  (path / "train.json").write_text("{}")
  assert "no list of ArrayRecord images" in error(f"arrayrecord:{path}@train")


def test_a_foreign_record_is_an_unreadable_image(records):
  _, path = records
  write_records(path / "train-00000-of-00003.array_record", [b"something else", b""])
  source = sources.open_source(f"arrayrecord:{path}@train")
  with pytest.raises(UnreadableImage, match="starts with"):
    source[0]
  assert source.name(0) == f"{path}@train record 0"
  assert source[2][0].startswith(b"\x89PNG")


def test_writing_an_unreadable_source_leaves_no_split(tmp_path):
  pytest.importorskip("array_record.python", reason="array-record exists for Linux alone")
  folder = sources.FolderSource(write_folder(tmp_path / "images", 3))
  os.remove(folder.name(2))
  with pytest.raises(UserError, match="cannot write"):
    sources.write_arrayrecord(folder, tmp_path / "records", "train")
  assert not (tmp_path / "records" / "train.json").exists()


def test_tfds_is_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  assert "pip install 'coda_jax[tfds]'" in error("tfds:imagenet2012@validation")
  assert "a split" in error("tfds:imagenet2012")


@pytest.fixture(scope="module")
def tfds_data(tmp_path_factory):
  """Tiny datasets made by TFDS itself, where TFDS_DATA_DIR points."""
  tfds = pytest.importorskip(
    "tensorflow_datasets", reason="TFDS is an optional extra: pip install 'coda_jax[tfds]'"
  )
  path = tmp_path_factory.mktemp("tfds")

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": self.LABEL,
        "file_name": tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(labels) for split, labels in self.LABELS.items()}

    def _generate_examples(self, labels):
      for i, label in enumerate(labels):
        image = io.BytesIO(encode(photo(40, 52, seed=i), "jpeg"))
        yield i, {"image": image, "label": label, "file_name": f"{i}.jpg"}

  def build(name, feature, train, validation):
    members = {"LABEL": feature, "LABELS": {"train": train, "validation": validation}}
    # TFDS would look for the files of this module's package.
    cls = type(name, (Builder,), members | {"__module__": name.lower()})
    cls(data_dir=path, file_format="array_record").download_and_prepare()

  build("CodaTiny", tfds.features.ClassLabel(names=["cat", "dog"]), [0, 1, 0, 1, 0], [0, 1, 0])
  build("CodaInteger", tfds.features.Scalar(np.int32), [2, 0, 2], [11, 1])
  build("CodaNumbered", tfds.features.ClassLabel(num_classes=3), [0, 1], [1])
  build("CodaNegative", tfds.features.Scalar(np.int64), [0, 1], [-1])
  build("CodaIds", tfds.features.Scalar(np.int64), [10**9], [0])
  build("CodaText", tfds.features.Text(), ["a"], ["b"])
  build("CodaPair", tfds.features.Tensor(shape=(2,), dtype=np.int64), [[0, 1]], [[0, 1]])
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(path))
    patch.setattr(tfds.core.constants, "DATA_DIR", str(path))  # read at import
    yield path


def test_tfds(tfds_data):
  folder = f"{tfds_data}/coda_tiny/1.0.0"
  for spec, count in (
    ("coda_tiny@train", 5),
    ("coda_tiny:1.0.0@train[:40%]", 2),
    (f"{folder}@validation", 3),
  ):
    source = sources.open_source(f"tfds:{spec}")
    assert len(source) == count and source.class_names == ("cat", "dog")
    for row in range(count):
      data, label = source[row]
      i = int(source.name(row).split("(")[1].split(".")[0])
      assert data == encode(photo(40, 52, seed=i), "jpeg") and label == i % 2
  assert pickle.loads(pickle.dumps(source))[1] == source[1]
  assert "tensorflow" not in sys.modules


def test_tfds_errors(tfds_data):
  assert "['train', 'validation']" in error("tfds:coda_tiny@test")
  assert "nosuchdata not found" in error("tfds:nosuchdata@train")
  assert "tfds build mnist --file_format=array_record" in error("tfds:mnist@test")


def tfds_labels(spec: str) -> tuple[tuple[str, ...], list[int]]:
  source = sources.open_source(f"tfds:{spec}")
  rows = {source.name(i): source[i][1] for i in range(len(source))}
  return tuple(source.class_names), [rows[name] for name in sorted(rows, key=lambda n: n[-6:])]


def test_tfds_labels_without_names(tfds_data, caplog):
  numbers = tuple(str(i) for i in range(12))
  with caplog.at_level("INFO"):
    assert tfds_labels("coda_integer@train") == (numbers, [2, 0, 2])
  assert "coda_integer@train: its labels have no names; reading them all" in caplog.text
  assert tfds_labels(f"{tfds_data}/coda_integer/1.0.0@validation") == (numbers, [11, 1])
  assert tfds_labels("coda_integer@train[:2]")[0] == numbers
  assert tfds_labels("coda_numbered@train") == (("0", "1", "2"), [0, 1])
  assert tfds_labels("coda_text@train") == ((), [-1])
  assert tfds_labels("coda_pair@train") == ((), [-1])
  for name, values in (("coda_negative", "-1 to 1"), ("coda_ids", "0 to 1000000000")):
    assert f"its labels, {values}, do not number classes from 0" in error(f"tfds:{name}@train")


def test_tfds_fingerprint(tfds_data, monkeypatch):
  fingerprint = lambda spec: sources.open_source(f"tfds:{spec}").fingerprint()
  same = fingerprint("coda_tiny@train")
  monkeypatch.setenv("HOME", str(tfds_data))
  assert fingerprint("~/coda_tiny/1.0.0@train") == same
  others = {fingerprint(f"coda_{x}") for x in ("tiny@train[:3]", "tiny@validation", "pair@train")}
  assert len(others | {same}) == 4
