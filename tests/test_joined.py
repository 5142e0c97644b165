"""Commands over two real processes of 4 simulated devices each, against one such process."""

import collections
import json

import jax
import numpy as np
import pytest

from coda_jax import weights
from coda_jax.data import tokens
from tests import processes, test_eval, tiny
from tests.generation import test_generator
from tests.training import runs

PROGRAM = """
import sys
from coda_jax import eval, hosts, tokenize_dataset
from coda_jax.evaluation import eval_report, parts
from tests.test_eval import Colours

def noting(module, name, what):
  def noted(*args):
    print("writes", what, file=sys.stderr)
    return function(*args)

  function = getattr(module, name)
  setattr(module, name, noted)

noting(tokenize_dataset, "_write_shard", "a shard")
noting(parts, "_write", "a part")
noting(eval_report, "write", "a report")
eval.Networks, hosts.SEEN = Colours, 2
{"eval": eval, "tokenize_dataset": tokenize_dataset}[sys.argv.pop(1)].main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("joined")
  runs.make_inputs(folder)
  test_generator.save(folder)
  weights.save_tokenizer(tiny.tokenizer(seed=1), folder / "other")
  (folder / "grey.py").write_text(test_eval.MODULE)
  return folder


def call(folder, output, several, *words):
  """(exit codes, errors) of processes that have the words and each some of `several`."""
  words = ["-c", PROGRAM, *map(str, words), f"--output={output}"]
  commands = [[*words, *own] for own in several]
  with processes.started(commands, cache=folder / "cache", devices=4) as started:
    return processes.ended(started, timeout=600)


def run(folder, output, count, *words):
  """How often the processes wrote what, all together."""
  codes, errors = call(folder, output, processes.flags(count) if count > 1 else [[]], *words)
  assert set(codes) == {0}, errors
  lines = "\n".join(errors).splitlines()
  return collections.Counter(line for line in lines if line.startswith("writes "))


def names(path):
  return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


@pytest.mark.slow
def test_tokens(folder, tmp_path):
  """Of the same images in the same order, with the same ids and labels."""
  words = ["tokenize_dataset", f"--tokenizer={folder}/tokenizer", "--shards=5"]
  words += [f"--data=folder:{folder}/images@train", "--flip", "--batch-size=8"]
  for name, count in (("one", 1), ("two", 2)):
    assert run(folder, tmp_path / name, count, *words) == {"writes a shard": 5}
  one, two = (tokens.TokenSource(tmp_path / name) for name in ("one", "two"))
  assert one.manifest == two.manifest and len(two) == 48
  assert names(two.path) == names(one.path)
  ours, theirs = (source.records(range(len(source.sizes))) for source in (two, one))
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tokenizers", "generator"])
def test_an_evaluation(folder, tmp_path, what):
  """The numbers agree to 1e-6; every part and the report are written once."""
  words = test_eval.tokenizers(folder)
  if what == "generator":
    words = ["--generator", folder / "generator", "--count", 3, "--steps", 4]
  words = ["eval", *words, f"--data=folder:{folder}/images@train", "--resize-ratio=none"]
  words += ["--max-images=7", "--batch-size=4", "--part=2"]
  sets = 5 if what == "tokenizers" else 2  # of 7 images, or 7 and 9
  expected = {"writes a part": 4 * sets + (what == "generator"), "writes a report": 1}
  for name, count in (("one", 1), ("two", 2)):
    assert run(folder, tmp_path / name, count, *words) == expected
  one, two = (
    jax.tree.flatten(json.loads((tmp_path / name / "results.json").read_text()))
    for name in ("one", "two")
  )
  assert two[1] == one[1]
  for ours, theirs in zip(two[0], one[0], strict=True):
    if isinstance(theirs, float):
      theirs = pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert ours == theirs
  assert names(tmp_path / "two") == names(tmp_path / "one")


def refused(folder, output, several, *words):
  """The last lines of two processes that end because of process 1."""
  codes, errors = call(folder, output, several, *words)
  assert codes == [1, 1], errors
  lines = [error.splitlines()[-1] for error in errors]
  assert all(line.startswith("error: process 1 on ") for line in lines), lines
  return lines


@pytest.mark.slow
def test_an_evaluation_of_hosts_that_see_other_images(folder, tmp_path):
  first, second = processes.flags(2)
  second.append(f"--data=folder:{folder}/images@val")
  words = ["eval", f"--tokenizer={folder}/tokenizer", f"--data=folder:{folder}/images@train"]
  for line in refused(folder, tmp_path / "out", [first, second], *words):
    assert f"not what process 0 measures (data was 'folder:{folder}/images@train', is" in line
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["tokenize_dataset", "eval"])
def test_an_output_that_is_not_shared(folder, tmp_path, command):
  """Each process would do all of the work."""
  first, second = processes.flags(2)
  second.append(f"--output={tmp_path}/own")
  words = [command, f"--tokenizer={folder}/tokenizer", f"--data=folder:{folder}/images@train"]
  for line in refused(folder, tmp_path / "shared", [first, second], *words):
    assert f"--output={tmp_path}/own is not the folder that process 0 writes to" in line
  assert not (tmp_path / "own").exists()
