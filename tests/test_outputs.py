"""Outputs, directories and files, are complete or not there, and nothing else is lost."""

import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from coda_jax.errors import UserError
from coda_jax.outputs import (
  LOCK,
  MARKER,
  check_output,
  locked,
  present,
  replaced,
  shared,
  write_text,
  writers,
  written_aside,
)


def make(path, kind="reconstruct", **options):
  with written_aside(path, kind, **options) as aside:
    (aside / "images").mkdir()
    (aside / "images" / "a.png").write_text("new")


def tree(folder):
  return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def refused(path, kind="reconstruct", message="would be lost", **options):
  before = tree(path)
  with pytest.raises(UserError, match=message):
    check_output(path, kind, overwrite=True, **options)
  assert tree(path) == before


def test_what_the_same_command_wrote_is_replaced_when_asked(tmp_path):
  out = tmp_path / "out"
  check_output(out, "reconstruct", overwrite=False)
  out.mkdir()
  check_output(out, "reconstruct", overwrite=False)  # empty
  make(out)
  assert json.loads((out / MARKER).read_text())["files"] == ["images/a.png"]
  with pytest.raises(UserError, match="not empty; --overwrite replaces it"):
    check_output(out, "reconstruct", overwrite=False)
  check_output(out, "reconstruct", overwrite=True)
  (out / "images" / "a.png").write_text("old")
  make(out)
  assert tree(out)["images/a.png"] == "new" and os.listdir(tmp_path) == ["out"]


def test_what_another_wrote_is_not(tmp_path):
  out = tmp_path / "out"
  make(out)
  refused(out, "generate")
  (out / "images" / "mine.txt").write_text("notes")
  refused(out, message="holds images/mine.txt")
  (out / "images" / "mine.txt").unlink()
  (out / "images" / "link").symlink_to(tmp_path)
  refused(out, message="holds images/link")
  (out / "images" / "link").unlink()
  (out / ".DS_Store").write_text("")
  check_output(out, "reconstruct", overwrite=True)
  (out / MARKER).write_text("{")
  refused(out)
  with pytest.raises(UserError, match="no directory"):
    check_output(out / MARKER, "reconstruct", overwrite=True)


def test_weights_are_their_own_mark(tmp_path):
  def write(folder, kind):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"kind": kind}))
    (folder / "model.safetensors").write_text("")

  write(tmp_path / "t", "tokenizer")
  check_output(tmp_path / "t", "tokenizer", overwrite=True)
  refused(tmp_path / "t", "vae")
  refused(tmp_path / "t", "reconstruct")
  write(tmp_path / "g", "generator")
  write(tmp_path / "g" / "tokenizer", "tokenizer")
  check_output(tmp_path / "g", "generator", overwrite=True)
  (tmp_path / "g" / "README.md").write_text("a model card")
  refused(tmp_path / "g", "generator", "holds README.md")


@pytest.mark.parametrize("given", ["", "images", "images/a.png"])
def test_an_output_never_holds_an_input(tmp_path, given):
  out = tmp_path / "out"
  make(out)
  (tmp_path / "link").symlink_to(out)
  for path in (out, tmp_path / "link"):
    refused(path, message="holds the input", inputs=[None, tmp_path / "x", out / given])
    refused(path, message="holds the input", inputs=[tmp_path / "link" / given])
  check_output(out, "reconstruct", overwrite=True, inputs=[tmp_path])  # lies in the input


def test_a_failed_block_leaves_what_was_there(tmp_path):
  out = tmp_path / "out"
  make(out)
  (out / "images" / "a.png").write_text("old")
  with pytest.raises(ZeroDivisionError), written_aside(out, "reconstruct") as aside:
    (aside / "half").touch()
    _ = 1 / 0
  assert tree(out)["images/a.png"] == "old" and os.listdir(tmp_path) == ["out"]


def test_what_came_meanwhile_is_kept_and_so_is_the_result(tmp_path):
  out = tmp_path / "out"
  with (
    pytest.raises(UserError, match="holds mine.txt.* what was made is in (.*)") as e,
    written_aside(out, "reconstruct") as aside,
  ):
    (aside / "result").write_text("made")
    out.mkdir()
    (out / "mine.txt").write_text("notes")
  assert tree(out) == {"mine.txt": "notes"}
  kept = pathlib.Path(str(e.value).rpartition(" ")[2])
  assert (kept / "result").read_text() == "made"


def test_the_current_folder_stays_the_current_folder(tmp_path, monkeypatch):
  out = tmp_path / "out"
  out.mkdir()
  monkeypatch.chdir(out)
  for _ in range(2):
    make(pathlib.Path("."))
    assert sorted(os.listdir(".")) == [MARKER, "images"] and os.listdir(tmp_path) == ["out"]
    assert out.samefile(".")


def test_a_link_to_a_folder_stays_a_link(tmp_path):
  (tmp_path / "disk").mkdir()
  (tmp_path / "out").symlink_to("disk")
  make(tmp_path / "out")
  make(tmp_path / "out")
  assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "images").is_dir()


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


def test_one_process_holds_a_folder(tmp_path):
  with locked(tmp_path), pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*"):
    with locked(tmp_path):
      pass
  assert not os.listdir(tmp_path)
  with locked(tmp_path):
    assert os.listdir(tmp_path) == [LOCK]


def test_a_killed_process_holds_nothing(tmp_path):
  code = (
    "import os, pathlib, sys; from coda_jax.outputs import locked\n"
    "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); os.read(0, 1)"
  )
  command = [sys.executable, "-c", code, tmp_path]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen(command, **pipes) as other:
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {other.pid} on "), locked(tmp_path):
      pass
    other.kill()
  assert os.listdir(tmp_path) == [LOCK]
  with locked(tmp_path):
    pass
  assert not os.listdir(tmp_path)


def test_workers_share_tasks(tmp_path):
  """Threads stand for processes: a lock belongs to an open file, not to a process."""
  done, taken = set(), []
  at_work = threading.Barrier(2, timeout=20)

  def work(name, i):
    if i not in done:
      if name not in {who for who, _ in taken}:
        at_work.wait()
      taken.append((name, i))
      time.sleep(0.01)
      done.add(i)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    both = [
      pool.submit(shared, tmp_path, order, functools.partial(work, name), "tasks")
      for name, order in (("a", range(6)), ("b", [3, 4, 5, 0, 1, 2]))
    ]
    for each in both:
      each.result(20)
  assert sorted(i for _, i in taken) == [*range(6)] and {name for name, _ in taken} == {"a", "b"}
  assert not os.listdir(tmp_path)


def test_writers_are_those_that_live(tmp_path):
  (tmp_path / f"{LOCK}-7").write_text("process 1 on a machine that is gone\n")
  with present(tmp_path):
    (found,) = writers(tmp_path)
    assert found.startswith(f"process {os.getpid()} on ")
    assert len(os.listdir(tmp_path)) == 1
  assert not writers(tmp_path) and not os.listdir(tmp_path)
