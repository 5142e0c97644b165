"""The command, on devices of this machine in place of a pod's."""

import json

import jax
import pytest

from coda_jax import cli, compile_check
from coda_jax.planning import chips, compiling, early
from tests.training import runs

CONFIG = """
import pathlib
from coda_jax import config as c
from tests.training import runs

def get_config():
  return c.config_dict(runs.config(pathlib.Path({folder!r})))
"""


@pytest.fixture(autouse=True)
def _here(monkeypatch):
  monkeypatch.setattr(cli, "quiet", lambda: None)
  monkeypatch.setattr(chips, "devices", lambda topology: jax.devices()[: topology.chips])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  runs.make_inputs(folder)
  (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
  return folder / "config.py"


def call(*argv):
  with pytest.raises(SystemExit) as e:
    compile_check.main([str(a) for a in argv])
  return e.value.code


def test_a_program_that_fits(config, tmp_path, capsys, monkeypatch):
  file = tmp_path / "out" / "check.json"
  argv = (f"--config={config}", "--topology=v5e-4", "--what=encode", f"--json={file}")
  assert call(*argv) == 0
  out = capsys.readouterr().out
  assert out.splitlines()[-1] == "fits" and "8 images, 2 a chip" in out
  for word in ("frozen networks", "temporaries", "of 15.750 GiB", "roofline", "images/s"):
    assert word in out
  result = json.loads(file.read_text())["result"]
  assert result["fits"] and result["costs"]["flops"] > 1e6 and result["chips"] == 4
  # The second time nothing compiles.
  monkeypatch.setattr(compiling, "_compile", None)
  assert call(*argv) == 0
  assert capsys.readouterr().out == out


def test_without_code_generation(config, tmp_path, capsys, monkeypatch):
  program = (
    "ENTRY %main (x: f32[8,128]) -> f32[8,128] {\n  ROOT %x = f32[8,128]{1,0} parameter(0)\n}"
  )
  given = []

  def optimize(*args):
    given.append(args)
    if len(given) == 2:
      raise early.CompilerError("RESOURCE_EXHAUSTED: Used 20.0G of 15.75G hbm")
    return program, 2**31

  monkeypatch.setattr(early, "optimize", optimize)
  argv = (f"--config={config}", "--topology=v5e-4", "--what=encode", "--no-code")
  assert call(*argv) == 0
  out = capsys.readouterr().out
  assert "all arrays" in out and "2.000 GiB of 15.750 GiB" in out and "XLA" not in out
  assert out.splitlines()[-1] == (
    "the arrays fit; 13.750 GiB are left for the program's code and what else is not counted"
  )
  assert given[0][0] == "encode" and given[0][2] == chips.parse("v5e-4")
  assert call(*argv, "--no-remedies") == 1
  assert capsys.readouterr().out.splitlines()[-1] == (
    "does not fit: needs 20.000 GiB of 15.750 GiB"
  )


def fake_compile(limit: int):
  """Programs whose local batch holds more than `limit` images do not fit."""

  def fake(lowered, topology):
    (batch,) = {x.shape for x in jax.tree.leaves(lowered.in_avals) if x.dtype == "uint8"}
    images = batch[-4] // topology.chips
    if images > limit:
      return {"fits": False, "needs": 2.0**34 * images, "error": "no", "compile_seconds": 0.0}
    counts = {"count": {}, "payload": {}, "unknown_loops": 0, "flops": 1e9, "passes": 1e9}
    costs = counts | {"traffic": 1e9, "sent": 0.0}
    xla = {"flops": 1e9, "bytes accessed": 1e9}
    found = {"fits": True, "needs": 1e9, "memory": {"temporaries": 1e9}, "xla": xla}
    return found | {"costs": costs, "compile_seconds": 0.0}

  return fake


@pytest.mark.slow
def test_one_that_does_not_and_what_makes_it_fit(config, capsys, monkeypatch):
  monkeypatch.setattr(compiling, "_compile", fake_compile(1))
  argv = (f"--config={config}", "--topology=v5e-4")
  assert call(*argv) == 1
  *_, remat, mesh, batch, last = capsys.readouterr().out.splitlines()
  assert remat.startswith("tried: --config.remat=blocks: does not fit")
  assert mesh.startswith("tried: --config.mesh.data=-1 --config.mesh.fsdp=4: does not fit")
  assert batch.startswith("tried: --config.data.accumulation=2: fits")
  assert last == (
    "does not fit: needs 32.000 GiB of 15.750 GiB; it fits with --config.data.accumulation=2"
  )
  assert call(*argv, "--no-remedies") == 1
  assert "tried" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_largest_batch(config, capsys, monkeypatch):
  monkeypatch.setattr(compiling, "_compile", fake_compile(5))
  assert call(f"--config={config}", "--topology=v5e-4", "--what=encode", "--search") == 0
  assert "largest batch: 5 images a device at a time" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("words", "code", "line"),
  [
    (["--topology=v5e-5"], 2, "v5e-64, v5litepod-16"),
    (["--topology=mine:2x2"], 2, "write NAME:SHAPE"),
    (["--topology=v5e-4", "--what=sample"], 2, "kind 'tokenizer' has no such program"),
    (["--topology=v5e-4", "--what=all"], 2, "invalid choice"),
    (["--topology=v5e-4", "--tokenizer-config=x.py"], 2, "kind 'maskgit'"),
    (["--topology=v5e-4", "--config.data.batch_size=6"], 1, "a micro-batch is 6 images"),
    (["--topology=v5e-4", "--slices=0"], 2, "--slices"),
    ([], 2, "--topology"),
  ],
)
def test_wrong_usage_is_one_line(config, capsys, words, code, line):
  assert call(f"--config={config}", *words) == code
  error = capsys.readouterr().err
  assert line in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["other.json", "other.json/x", ".", "/dev/null", "/proc/x/y"])
def test_files_that_hold_no_results(config, tmp_path, capsys, monkeypatch, name):
  (tmp_path / "other.json").write_text("[]")
  monkeypatch.setattr(compiling, "_compile", None)  # it is told before
  assert call(f"--config={config}", "--topology=v5e-4", f"--json={tmp_path / name}") == 1
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "error: " in error and "--debug" not in error


def test_without_libtpu(config, capsys, monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr(cli, "quiet", lambda: None)
  monkeypatch.setattr(chips, "has_libtpu", lambda: False)
  assert call(f"--config={config}", "--topology=v5e-4") == 1
  error = capsys.readouterr().err
  assert "pip install 'coda_jax[tpu]'" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not chips.has_libtpu(), reason="libtpu is not installed (extra `tpu`)")
def test_an_update_for_a_pod(config, tmp_path, capsys, monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr(cli, "quiet", lambda: None)
  results = []
  for words in ([], ["--no-code"]):
    file = tmp_path / f"{len(words)}.json"
    assert call(f"--config={config}", "--topology=v5e:2x2", f"--json={file}", *words) == 0
    out = capsys.readouterr().out
    assert (
      "update of" in out
      and "all-reduce" in out
      and (out.splitlines()[-1] == "fits" or "the arrays fit; " in out)
    )
    results.append(json.loads(file.read_text())["result"])
  whole, early = (result["costs"] for result in results)
  for key in ("flops", "passes", "sent", "count"):
    assert early[key] == whole[key]
  assert early["traffic"] == pytest.approx(whole["traffic"], rel=0.01)
