"""ArrayRecord files appear when they are whole; other ones are refused by name."""

import os
import sys

import pytest

from coda_jax.data import records
from coda_jax.errors import UserError

INDEX = "train.json"


def test_records_of_several_files_are_read_in_any_order(tmp_path):
  pytest.importorskip("array_record.python", reason="array-record exists for Linux alone")
  files = [tmp_path / "a", tmp_path / "b"]
  records.write(files[0], [b"0", b"1"])
  records.write(files[1], iter([b"2"]))
  found = records.read(files, 3, tmp_path / INDEX, mend="restore it")
  assert len(found) == 3 and found[2] == b"2"
  assert found.__getitems__([2, 0, 1]) == [b"2", b"0", b"1"]
  with pytest.raises(UserError, match="promises 4 records, its files hold 3; restore it"):
    records.read(files, 4, tmp_path / INDEX, mend="restore it")
  files[1].unlink()
  with pytest.raises(UserError, match="train.json lists files that do not exist: .*b; restore it"):
    records.read(files, 3, tmp_path / INDEX, mend="restore it")
  files[1].write_bytes(b"")
  with pytest.raises(UserError, match="of .*train.json cannot be read: .*/b .*; restore it"):
    records.read(files, 3, tmp_path / INDEX, mend="restore it")


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
  pytest.importorskip("array_record.python", reason="array-record exists for Linux alone")

  def failing():
    yield b"1"
    raise OSError("no disk")

  records.write(tmp_path / "a", [b"old"])
  with pytest.raises(OSError, match="no disk"):
    records.write(tmp_path / "a", failing())
  assert os.listdir(tmp_path) == ["a"]
  assert records.read([tmp_path / "a"], 1, tmp_path / INDEX, mend="")[0] == b"old"


def test_the_package_is_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
  with pytest.raises(UserError, match="needs the package array-record"):
    records.write(tmp_path / "a", [])
  with pytest.raises(UserError, match="needs the package array-record"):
    records.read([tmp_path / "a"], 0, tmp_path / INDEX, mend="")
  assert not os.listdir(tmp_path)
