"""Which folders are classes, which files are images, and what a split's labels mean."""

import json
import os

import pytest
from PIL import Image

from coda_jax.data import decode, folder, inventory, sources
from coda_jax.data.folder import FolderSource
from coda_jax.errors import UserError
from tests.data.images import encode, photo

PNG = encode(photo(8, 8))


def make(root, *files: str):
  """Writes files below `root`; those whose name ends in / are empty folders."""
  for file in files:
    path = root / file
    if file.endswith("/"):
      path.mkdir(parents=True)
    else:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(PNG)
  return root


def labels(source) -> dict[str, int]:
  return {os.path.relpath(source.name(i), source.root): source[i][1] for i in range(len(source))}


def error(*args) -> str:
  with pytest.raises(UserError) as e:
    FolderSource(*args)
  assert "\n" not in str(e.value)
  return str(e.value)


@pytest.mark.parametrize("split", [None, "train"])
def test_folders_without_images_are_no_classes(tmp_path, split):
  root = tmp_path / (split or "")
  junk = ("__MACOSX/a/x.png", "@eaDir/x.png", ".ipynb_checkpoints/x.png", "aa/.hidden.png")
  make(root, "b/1.png", "d/2.png", "a/", "c/notes.txt", "e/deep/er/", *junk)
  make(tmp_path / "val", "d/3.png")
  if split is None:
    (tmp_path / "val" / "d" / "3.png").unlink()
  source = FolderSource(tmp_path, split)
  assert source.class_names == ("b", "d")
  assert labels(source) == {"b/1.png": 0, "d/2.png": 1}
  assert source.skipped == {".txt": 1}
  if split:
    assert FolderSource(tmp_path, "val")[0][1] == 1


def test_a_class_that_train_lacks_is_an_error(tmp_path):
  make(tmp_path / "train", "n01/images/1.png", "n02/images/2.png", "n03/3.png", "n04/4.png")
  make(tmp_path / "val", "images/1.png", "val_annotations.txt")
  message = error(tmp_path, "val")
  assert f"{tmp_path}/val has classes that {tmp_path}/train lacks: images;" in message
  assert "those of train: n01, n02, n03, ... (4)." in message
  assert FolderSource(tmp_path, "train").class_names == ("n01", "n02", "n03", "n04")


def test_without_train_the_splits_share_their_classes(tmp_path):
  make(tmp_path, "val/a/1.png", "val/c/1.png", "test/b/2.png", "train/")
  assert FolderSource(tmp_path, "val").class_names == ("a", "b", "c")
  assert labels(FolderSource(tmp_path, "test")) == {"b/2.png": 1}


def test_a_split_without_labels_beside_a_labelled_train(tmp_path):
  make(tmp_path, "train/a/1.png", "val/1.png")
  val = FolderSource(tmp_path, "val")
  assert val.class_names == () and labels(val) == {"1.png": -1}


def test_a_labelled_split_beside_a_train_without_labels(tmp_path):
  make(tmp_path, "train/1.png", "val/a/1.png", "test/b/1.png")
  assert FolderSource(tmp_path, "train").class_names == ()
  assert FolderSource(tmp_path, "test").class_names == ("a", "b")


@pytest.mark.parametrize(
  ("files", "first"),
  [
    (["train/1.png", "val/2.png"], "train, val; name one: folder:{}@train"),
    (["train/a/1.png", "val/a/2.png", "more/3.png"], "train, val; name one: folder:{}@train"),
    (["Test/1.png", "Train/2.png"], "Train, Test; name one: folder:{}@Train"),
    (["train/a/1.png"], "train; name one: folder:{}@train"),
    (["val/a/1.png", "train/", "b/.hidden.png"], "val; name one: folder:{}@val"),
  ],
)
def test_a_folder_of_splits_must_be_given_one(tmp_path, files, first):
  assert f"holds splits {first.format(tmp_path)}" in error(make(tmp_path, *files))


def test_a_named_folder_of_splits_must_be_given_one(tmp_path):
  make(tmp_path / "set", "train/a/1.png", "val/a/1.png")
  assert f"name one: folder:{tmp_path}/set@train" in error(tmp_path, "set")


def test_a_class_may_be_called_train(tmp_path):
  make(tmp_path, "bus/1.png", "train/2.png", "val/")
  assert FolderSource(tmp_path).class_names == ("bus", "train")


def test_names_of_classes(tmp_path):
  make(tmp_path / "train", "10/1.png", "9/1.png", "Ä/1.png", "日本/1.png", "a b/1.png")
  os.makedirs(os.fsencode(tmp_path / "train") + b"/\xff")
  (tmp_path / "train" / os.fsdecode(b"\xff") / "1.png").write_bytes(PNG)
  make(tmp_path / "val", "9/1.png", "日本/1.png")
  train, val = FolderSource(tmp_path, "train"), FolderSource(tmp_path, "val")
  assert train.class_names == tuple(sorted(train.class_names)) and len(train.class_names) == 6
  assert train.class_names[:2] == ("10", "9")
  assert val.class_names == train.class_names
  assert labels(val) == {"9/1.png": 1, "日本/1.png": train.class_names.index("日本")}
  assert len(train.fingerprint()) == 64


def test_links(tmp_path):
  make(tmp_path / "store", "x/1.png", "2.png")
  make(tmp_path / "set" / "train", "b/3.png", "c/")
  (tmp_path / "set/train/a").symlink_to(tmp_path / "store/x")
  (tmp_path / "set/train/c/2.png").symlink_to(tmp_path / "store/2.png")
  (tmp_path / "set/train/c/up").symlink_to(tmp_path / "set/train/c")
  (tmp_path / "set/val").symlink_to(tmp_path / "set/train")
  for split in ("train", "val"):
    found = labels(FolderSource(tmp_path / "set", split))
    assert found == {"a/1.png": 0, "b/3.png": 1, "c/2.png": 2}


def test_empty_splits(tmp_path):
  make(tmp_path, "train/", "val/.hidden.png", "test/a/x.heic", "test/a/y.txt", "test/a/z.heic")
  assert "holds no images" in error(tmp_path, "train")
  assert "holds no images" in error(tmp_path, "val")
  assert error(tmp_path, "test").endswith("only other files: 2 .heic, 1 .txt")
  assert "holds no images" in error(tmp_path)


def test_all_that_pillow_reads_is_read(tmp_path):
  image = Image.fromarray(photo(8, 8))
  grey = image.convert("L")
  forms = {"JPEG": "jpg JPE jif jfif", "JPEG2000": "jp2 j2k jpx", "PNG": "png apng", "TGA": "tga"}
  forms |= {"PPM": "ppm pnm", "BMP": "bmp dib", "WEBP": "webp", "GIF": "gif", "TIFF": "TIF"}
  forms |= {"MPO": "mpo", "PCX": "pcx", "SGI": "sgi", "QOI": "qoi"}
  names = []
  for form, endings in forms.items():
    for ending in endings.split():
      image.save(tmp_path / f"x.{ending}", form)
      names.append(f"x.{ending}")
  for ending in ("pgm", "pbm"):
    (grey if ending == "pgm" else grey.convert("1")).save(tmp_path / f"x.{ending}", "PPM")
    names.append(f"x.{ending}")
  source = FolderSource(tmp_path)
  assert sorted(labels(source)) == sorted(names) and not source.skipped
  for i in range(len(source)):
    assert decode.decode_image(source[i][0]).size == (8, 8), source.name(i)


def test_plugins_add_their_endings(tmp_path, monkeypatch):
  make(tmp_path, "a.png", "b.heic")
  assert len(FolderSource(tmp_path)) == 1 and ".heic" not in folder.image_extensions()
  monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
  source = FolderSource(tmp_path)
  assert len(source) == 2 and not source.skipped


def test_other_files_are_counted(tmp_path):
  make(tmp_path, "a/1.png", "a/2.HEIC", "a/deep/3.heic", "b/1.psd", "b/2.png", "b/README")
  make(tmp_path, "labels.txt", "odd.é", "b/x.averylongending", ".DS_Store")
  found = inventory.describe(FolderSource(tmp_path), f"folder:{tmp_path}")
  assert found.skipped == {".heic": 2, ".psd": 1, ".txt": 1, "other": 3}
  assert found.unread_images == [".heic", ".psd"]


def test_the_list_decides_the_fingerprint(tmp_path):
  def fingerprint(name: str, *files: str) -> str:
    return FolderSource(make(tmp_path / name, *files)).fingerprint()

  first = fingerprint("1", "a/1.png", "b/2.png")
  assert fingerprint("2", "a/1.png", "b/2.png", "c/") == first
  others = [
    fingerprint("3", "a/1.png", "b/2.png", "b/3.png"),
    fingerprint("4", "a/1.png", "b/3.png"),
    fingerprint("5", "a/1.png", "c/2.png"),
    fingerprint("6", "a/1.png", "a/2.png"),
    fingerprint("7", "a1.png", "b2.png"),
    fingerprint("8", "1.png", "2.png"),
  ]
  assert len({first, *others}) == 7
  make(tmp_path / "val", "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/a/1.png")
  before = FolderSource(tmp_path / "val", "val").fingerprint()
  make(tmp_path / "val", "train/d/1.png")
  assert FolderSource(tmp_path / "val", "val").fingerprint() != before, "labels have more classes"


def test_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  make(tmp_path, "me@home/a.png", "set/train/a/1.png")
  assert len(sources.open_source("folder:~/me@home")) == 1
  assert len(sources.open_source("folder:~/set@train")) == 1
  pytest.importorskip("array_record.python", reason="array-record exists for Linux alone")
  sources.write_arrayrecord(sources.open_source("folder:~/set@train"), "~/records", "train")
  records = sources.open_source("arrayrecord:~/records@train")
  index = tmp_path / "records" / "train.json"
  before = records.fingerprint()
  (tmp_path / "moved").symlink_to(tmp_path / "records")
  assert sources.open_source("arrayrecord:~/moved@train").fingerprint() == before
  index.write_text(json.dumps(json.loads(index.read_text()) | {"class_names": ["b"]}))
  assert sources.open_source("arrayrecord:~/records@train").fingerprint() != before
