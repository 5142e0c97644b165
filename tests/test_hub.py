"""Directories on the Hub, against a stand-in of its HTTP interface."""

import os
import subprocess
import sys
import textwrap

import pytest

from coda_jax import hub, weights
from coda_jax.errors import UserError
from tests import hub_server, tiny


def in_process(address: str | None, home, code: str) -> str:
  """What the code prints; huggingface_hub reads its settings when it is imported."""
  environment = os.environ | {"HF_HOME": str(home), "HF_TOKEN": "hf_x", "PYTHONPATH": os.getcwd()}
  environment |= {"HF_ENDPOINT": address} if address else {"HF_HUB_OFFLINE": "1"}
  environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


@pytest.mark.slow  # four processes
def test_a_directory_is_pushed_loaded_by_revision_and_kept_offline(tmp_path):
  weights.save_tokenizer(tiny.tokenizer(), tmp_path / "tokenizer")
  (tmp_path / "tokenizer" / "notes.txt").write_text("mine")
  push = f"""
    from coda_jax import hub
    for _ in range(2):
      print(hub.push({str(tmp_path / "tokenizer")!r}, "hf://me/tok"))
  """
  load = """
    from coda_jax import hub, weights
    for revision in ("", "@main", "@" + "2".zfill(40)):
      path = hub.local("hf://me/tok" + revision)
      weights.load_tokenizer(path)
      print(weights.read_config(path, "tokenizer")["fingerprint"])
  """
  expected = weights.read_config(tmp_path / "tokenizer", "tokenizer")["fingerprint"]
  with hub_server.serve() as (address, repos):
    assert in_process(address, tmp_path / "home", push).splitlines()[0].endswith("2".zfill(40))
    assert sorted(repos["me/tok"][0]) == ["README.md", "config.json", "model.safetensors"]
    assert in_process(address, tmp_path / "home2", load).split() == [expected] * 3
    wrong = """
      from coda_jax import api, errors
      for path in ("hf://me/other", "hf://me/tok@none"):
        try:
          api.load_tokenizer(path)
        except errors.UserError as e:
          print(e)
    """
    lines = in_process(address, tmp_path / "home2", wrong).splitlines()
    assert len(lines) == 2 and lines[0].startswith("hf://me/other cannot be fetched: ")
  assert in_process(None, tmp_path / "home2", load).split() == [expected] * 3


@pytest.mark.parametrize("path", ["hf://me", "hf://me/a/b", "hf://me/a@", "me/a"])
def test_addresses_are_checked(path):
  with pytest.raises(UserError, match=r"is no address on the Hub; hf://OWNER/NAME"):
    hub.push("x", path)


def test_only_saved_directories_and_models_are_pushed(tmp_path):
  with pytest.raises(UserError, match="no config.json"):
    hub.push(tmp_path, "hf://me/tok")
  with pytest.raises(UserError, match="int: no VAE and no tokenizer"):
    hub.push(3, "hf://me/tok")


def test_other_paths_are_left_alone(tmp_path):
  assert hub.local(tmp_path) is tmp_path and hub.local("a/b") == "a/b"


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UserError, match=r"pip install 'coda_jax\[hub\]'"):
    hub.local("hf://me/tok")
