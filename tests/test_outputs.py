"""Outputs, directories and files, are complete or not there."""

import os

import pytest

from coda_jax.errors import UserError
from coda_jax.outputs import check_output, replaced, write_text, written_aside


def test_what_is_there_is_replaced_only_when_asked(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  check_output(out, overwrite=False)  # empty
  (out / "mine").touch()
  check_output(out, overwrite=True)
  with pytest.raises(UserError, match="not empty"):
    check_output(out, overwrite=False)
  with pytest.raises(UserError, match="no directory"):
    check_output(out / "mine", overwrite=True)


def test_a_failed_block_leaves_what_was_there(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "mine").touch()
  with pytest.raises(ZeroDivisionError), written_aside(out) as aside:
    (aside / "half").touch()
    _ = 1 / 0
  assert os.listdir(out) == ["mine"] and os.listdir(tmp_path) == ["out"]
  with written_aside(out) as aside:
    (aside / "new").touch()
  assert os.listdir(out) == ["new"] and os.listdir(tmp_path) == ["out"]


def test_a_file_is_whole_or_as_it_was(tmp_path):
  file = tmp_path / "metrics.jsonl"
  write_text(file, "old")
  (tmp_path / "metrics.jsonl.partial").write_text("left by a killed process, and longer")
  with pytest.raises(ZeroDivisionError), replaced(file) as aside:
    aside.write_text("ne")
    assert file.read_text() == "old"
    _ = 1 / 0
  assert file.read_text() == "old" and os.listdir(tmp_path) == [file.name]
  with replaced(file) as aside:
    aside.write_text("new")
    assert file.read_text() == "old"
  assert file.read_text() == "new" and os.listdir(tmp_path) == [file.name]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
  with pytest.raises(FileNotFoundError):
    write_text(tmp_path / "nowhere" / "config.json", "{}")
  (tmp_path / "config.json").mkdir()
  with pytest.raises(IsADirectoryError):
    write_text(tmp_path / "config.json", "{}")
  assert os.listdir(tmp_path) == ["config.json"]
