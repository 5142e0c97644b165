"""Captions of image sets: every layout, and what is wrong with a file."""

import json
import pathlib

import pytest

from coda_jax.data import inventory, sources, text
from coda_jax.errors import UserError
from tests.data import images, test_webdataset


def captions(spec, file=None):
  return text.open_captions(sources.open_source(spec), spec, file)


def error(spec, file=None) -> str:
  with pytest.raises(UserError) as e:
    captions(spec, file)
  assert "\n" not in str(e.value)
  return str(e.value)


def of(found):
  return [found[row] for row in range(len(found))]


NAMES = ("000.png", "001.png", "002.png")
TEXTS = [["a red bird", "ein Vögelchen"], ["two"], ['three, "quoted"']]


@pytest.fixture
def flat(tmp_path):
  """Three images in one folder, `train`."""
  images.write_folder(tmp_path / "set", 3, "a")
  (tmp_path / "set" / "a").rename(tmp_path / "set" / "train")
  return tmp_path / "set"


def lines(entries) -> str:
  return "\n".join(json.dumps(entry) for entry in entries)


def coco(names=NAMES, captions=TEXTS, **changes) -> str:
  fields = {
    "info": {},
    "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)],
    "annotations": [
      {"id": 0, "image_id": 10 + i, "caption": caption}
      for i, these in reversed([*enumerate(captions)])
      for caption in these
    ],
  }
  return json.dumps(fields | changes)


LAYOUTS = {
  "metadata.jsonl": lines(
    {"file_name": n, "captions": t} for n, t in zip(NAMES, TEXTS, strict=True)
  ),
  "metadata.csv": "\ufefffile_name,label,caption\n"
  '000.png,3,a red  bird \n001.png,,two\n000.png,,ein Vögelchen\n002.png,,"three, ""quoted"""\n'
  "001.png,,  \n",
  "../captions_train.json": coco(),
  "../annotations/captions_train.json": coco(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_captions_beside_a_folder(flat, name):
  (flat / "annotations").mkdir()
  (flat / "train" / name).write_text(LAYOUTS[name], encoding="utf-8")
  found = captions(f"folder:{flat}@train")
  assert of(found) == TEXTS and [found.count(i) for i in range(3)] == [2, 1, 1]
  line = inventory.describe(sources.open_source(f"folder:{flat}/train"), "x").line()
  assert line == "x: 3 images without labels", "the file of captions is not skipped"


def test_a_named_file_and_its_image_names(tmp_path):
  root = images.write_folder(tmp_path / "set" / "train", 4)  # a/000 b/001 a/002 b/003
  (root / "a" / "001.png").write_bytes((root / "b" / "001.png").read_bytes())
  table = tmp_path / "set" / "texts.csv"
  names = ("a/000.png", "train/a/001.png", "002.png", "./b/001.png", "003.png")
  table.write_text("image,captions\n" + "".join(f'{n},"[""{n}"", ""x""]"\n' for n in names))
  found = captions(f"folder:{tmp_path}/set@train", table)
  assert of(found) == [[n, "x"] for n in names]
  table.write_text("image,text\n001.png,which of the two\n")
  assert "has captions of images that folder" in error(f"folder:{tmp_path}/set@train", table)


def test_the_fingerprint_is_that_of_the_texts_and_of_whose_they_are():
  one = text.Captions([["a", "b"], ["c"]])
  assert one.fingerprint() == text.Captions([("a", "b"), ["c"]]).fingerprint()
  others = [[["a"], ["b", "c"]], [["a", "b"], ["d"]], [["ab"], ["c"]]]
  assert len({one.fingerprint(), *(text.Captions(o).fingerprint() for o in others)}) == 4


@pytest.mark.parametrize("column", ["caption", "texts"])
def test_columns_of_parquet(tmp_path, column):
  pa = pytest.importorskip("pyarrow", reason="an optional extra: 'coda_jax[parquet]'")
  parquet = pytest.importorskip("pyarrow.parquet")
  values = ["one", " two\n", "three"] if column == "caption" else TEXTS
  rows = [
    {"image": {"bytes": images.encode(images.photo(8, 8, i))}, column: v}
    for i, v in enumerate(values)
  ]
  parquet.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "train-00000-of-00002.parquet")
  parquet.write_table(pa.Table.from_pylist(rows[2:]), tmp_path / "train-00001-of-00002.parquet")
  spec = f"parquet:{tmp_path}@train"
  assert of(captions(spec)) == ([["one"], ["two"], ["three"]] if column == "caption" else TEXTS)
  line = error(spec, pathlib.Path("x.csv"))
  assert f"{spec} holds its captions itself; leave out --captions x.csv" in line
  parquet.write_table(
    pa.Table.from_pylist([{"image": {"bytes": b""}, "words": "a"}]), tmp_path / "val.parquet"
  )
  assert "has no column of captions; its columns: image, words" in error(f"parquet:{tmp_path}@val")


def test_members_of_webdataset(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  members = [
    ("0.jpg", test_webdataset.picture(0)),
    ("0.txt", b"a\nphoto"),
    ("0.json", b'{"label": 1, "caption": "not this"}'),
    ("1.json", json.dumps({"captions": TEXTS[0]}).encode()),
    ("1.jpg", test_webdataset.picture(1)),
    ("2.jpg", test_webdataset.picture(2)),
    ("2.json", b'{"text": 7}'),
  ]
  test_webdataset.write(tmp_path / "train-0.tar", members[:-2])
  for _ in range(2):  # the second time from the index
    assert of(captions(f"webdataset:{tmp_path}@train")) == [["a photo"], TEXTS[0]]
  test_webdataset.write(tmp_path / "train-1.tar", members[-2:])
  spec = f"webdataset:{tmp_path}@train"
  assert "2.jpg: its captions cannot be read: text is neither" in error(spec)
  test_webdataset.write(tmp_path / "train-1.tar", members[-2:-1])
  line = error(spec)
  assert f"1 of 3 images of {spec} have no caption: " in line
  assert "train-1.tar member 2.jpg; write them" in line


def test_images_without_captions_and_captions_without_images(flat):
  spec, file = f"folder:{flat}@train", flat / "train" / "metadata.jsonl"
  line = error(spec)
  assert f"{flat}/train has no captions: no metadata.jsonl or metadata.csv in it, and no" in line
  file.write_text(
    lines([{"file_name": "001.png", "text": "one"}, {"file_name": NAMES[0], "text": ""}])
  )
  line = error(spec)
  assert f"2 of 3 images of {spec} have no caption in {file}: {flat}/train/000.png, " in line
  names = [*NAMES, "3.png", "x/000.png"]
  file.write_text(lines({"file_name": n, "text": "a"} for n in [*names, "3.png"]))
  assert f"{file} has captions of images that {spec} lacks: 3.png, x/000.png; " in error(spec)
  (flat / "captions_train.json").write_text(coco())
  assert "several files of captions" in error(spec)
  assert of(captions(spec, flat / "captions_train.json")) == TEXTS
  assert "embedded have" in error(f"arrayrecord:{records(spec, flat)}@train")


def records(spec, folder):
  sources.write_arrayrecord(sources.open_source(spec), folder / "records", "train")
  return folder / "records"


WRONG = {
  ".json": {
    "[]": "lists `images` and `annotations`",
    "{": "Expecting property name",
    '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}': "annotation 1 has no",
    coco(annotations=[{"image_id": 10, "bbox": []}]): "annotation 1 has no `caption`",
    '{"images": [{"id": 1}], "annotations": []}': "file_name",
  },
  ".jsonl": {
    '{"file_name": "000.png", "caption": 3}': "line 1: caption is neither a text nor",
    lines([{"file_name": "000.png", "text": "a"}, {"text": "a"}]): "line 2: no `file_name`, or",
    '{"file_name": "000.png"}': "line 1: no `file_name`, or none of `caption`",
    "[1]": "line 1: ",
    '{"file_name"': "line 1: ",
  },
  ".csv": {
    "000.png,a photo\n001.png,another\n": "line 2: no `file_name`",
    "file_name,words\n000.png,a\n": "line 2: no `file_name`, or none of `caption`",
    "": "have no caption",
  },
  ".txt": {"000.png a": "is no file of captions; give COCO's .json"},
}


@pytest.mark.parametrize("ending", WRONG)
def test_files_that_are_none_of_captions(flat, ending):
  file = flat / f"texts{ending}"
  for content, message in WRONG[ending].items():
    file.write_text(content)
    line = error(f"folder:{flat}@train", file)
    assert str(file) in line and message in line, line
  file.unlink()
  assert str(file) in error(f"folder:{flat}@train", file)


def test_bytes_that_are_no_text(flat):
  (flat / "train" / "metadata.csv").write_bytes(b"file_name,text\n000.png,\xff\xfe")
  assert "metadata.csv has no captions as expected: 'utf-8" in error(f"folder:{flat}@train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_embedded_photos_have_three_captions_each(split):
  found = captions(f"embedded@{split}")
  assert {found.count(row) for row in range(len(found))} == {3}
  assert all(len({*found[row]}) == 3 for row in range(len(found)))
