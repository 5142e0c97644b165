"""Output directories are complete or not there."""

import os

import pytest

from coda_jax.errors import UserError
from coda_jax.outputs import check_output, written_aside


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
