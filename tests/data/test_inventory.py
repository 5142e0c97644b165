"""What a run found is one line, and other data later are an error."""

import dataclasses
import logging

import pytest

from coda_jax.data import inventory
from coda_jax.data.folder import FolderSource
from coda_jax.data.inventory import Inventory
from coda_jax.errors import UserError
from tests.data.images import write_folder

FOUND = Inventory("folder:x@train", 1234, 10, {}, "abc")


@pytest.mark.parametrize(
  ("changes", "rest"),
  [
    ({}, "1,234 images in 10 classes"),
    ({"images": 1, "classes": 1}, "1 image in 1 class"),
    ({"classes": 0}, "1,234 images without labels"),
    ({"skipped": {".txt": 1}}, "1,234 images in 10 classes; skipped 1 file (.txt 1)"),
    (
      {"skipped": {".heic": 2000, ".txt": 1}},
      "1,234 images in 10 classes; skipped 2,001 files (.heic 2,000, .txt 1); convert .heic to have"
      " them read",
    ),
    (
      {"skipped": {f".{i}": 1 for i in range(7)}},
      "1,234 images in 10 classes; skipped 7 files (.0 1, .1 1, .2 1, .3 1, .4 1, ...)",
    ),
  ],
)
def test_the_line(changes, rest):
  assert dataclasses.replace(FOUND, **changes).line() == f"folder:x@train: {rest}"


@pytest.mark.parametrize(("ending", "level"), [(".txt", "INFO"), (".heic", "WARNING")])
def test_skipped_images_are_a_warning(caplog, ending, level):
  with caplog.at_level(logging.INFO):
    dataclasses.replace(FOUND, skipped={ending: 1}).log("data.train")
  (record,) = caplog.records
  assert record.levelname == level and record.message.startswith("data.train folder:x@train: 1,234")


def test_unchanged_data(tmp_path):
  file = tmp_path / "data.json"
  found = {"data.train": FOUND, "data.eval": dataclasses.replace(FOUND, fingerprint="e")}
  inventory.check_unchanged(file, found, accept=False)  # nothing is noted yet
  inventory.write(file, {"data.train": FOUND})
  inventory.check_unchanged(file, found, accept=False)
  moved = dataclasses.replace(FOUND, spec="folder:y@train", skipped={".txt": 3})
  inventory.check_unchanged(file, {"data.train": moved}, accept=False)


def test_changed_data(tmp_path, caplog):
  file = tmp_path / "data.json"
  write_folder(tmp_path / "train", 4)

  def found() -> dict[str, Inventory]:
    return {"data.train": inventory.describe(FolderSource(tmp_path / "train"), "folder:x@train")}

  inventory.write(file, found())
  inventory.check_unchanged(file, found(), accept=False)
  image = tmp_path / "train" / "a" / "000.png"
  image.rename(image.with_name("other.png"))
  with pytest.raises(UserError, match="4 images then and 4 now, with other names or labels"):
    inventory.check_unchanged(file, found(), accept=False)
  image.with_name("other.png").unlink()
  with pytest.raises(UserError) as e:
    inventory.check_unchanged(file, found(), accept=False)
  assert str(e.value) == (
    "the data are not those that the run began with: data.train folder:x@train: 4 images then and 3"
    " now. Restore the images, or go on with the data as they are by --accept-changed-data"
  )
  with caplog.at_level(logging.WARNING):
    inventory.check_unchanged(file, found(), accept=True)
  assert "going on with changed data: data.train folder:x@train: 4 images then" in caplog.text
  inventory.write(file, found())
  inventory.check_unchanged(file, found(), accept=False)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"data.train": 3}', '{"data.train": {}}', "\xff"])
@pytest.mark.parametrize("accept", [False, True])
def test_a_malformed_file(tmp_path, text, accept):
  file = tmp_path / "data.json"
  file.write_bytes(text.encode("latin-1"))
  with pytest.raises(UserError, match=f"{file}, which .*cannot be read .*; restore it, or remove"):
    inventory.check_unchanged(file, {"data.train": FOUND}, accept=accept)
