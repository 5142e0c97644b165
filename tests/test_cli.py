"""Exit codes, one-line errors and config overrides."""

import argparse
import errno
import pathlib
import subprocess
import sys

import jax
import pytest

import coda_jax
import coda_jax.__main__ as commands
from coda_jax import cli
from coda_jax.errors import UserError

CONFIG = """
import ml_collections

def get_config(arg="small"):
  config = ml_collections.ConfigDict()
  config.arg = arg
  config.lr = 1e-3
  config.model = ml_collections.ConfigDict(dict(size=3, patches=(1, 2), fast=True))
  return config
"""


@pytest.fixture(autouse=True)
def _loud(monkeypatch):
  monkeypatch.setattr(cli, "quiet", lambda: None)  # it would silence the tests after this one


def call(run, *argv, config=False):
  parser = cli.Parser(prog="test")
  parser.add_argument("--name")
  with pytest.raises(SystemExit) as e:
    cli.main(run, parser, argv, config=config)
  return e.value.code


def failing(error):
  def run(args):
    raise error

  return run


@pytest.mark.parametrize(
  ("error", "code", "line"),
  [
    (UserError("a.png: not an image"), 1, "error: a.png: not an image"),
    (UserError("two\nlines"), 1, "error: two lines"),
    (
      OSError(errno.ENOSPC, "No space left on device", "out/x"),
      1,
      "out/x: No space left on device",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "error: out: Permission denied"),
    (KeyboardInterrupt(), 130, "error: interrupted"),
    (MemoryError(), 1, "error: out of memory"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), 1, "error: out of memory"),
    (ValueError("a bug\nin two lines"), 1, "error: ValueError: a bug in two lines (--debug"),
    (cli.UsageError("give one"), 2, "test: error: give one"),
  ],
)
def test_failures_are_one_line(capsys, error, code, line):
  assert call(failing(error)) == code
  (only,) = capsys.readouterr().err.strip().splitlines()
  assert line in only


def test_the_cause_that_the_user_can_fix_is_told(capsys):
  def run(args):
    try:
      raise UserError("a.png: not an image")
    except UserError as e:
      raise RuntimeError("worker 3 died") from e

  assert call(run) == 1
  assert capsys.readouterr().err == "error: a.png: not an image\n"


def test_debug_shows_the_traceback(capsys):
  assert call(failing(UserError("bad")), "--debug") == 1
  error = capsys.readouterr().err
  assert "Traceback" in error and error.endswith("error: bad\n")


def test_success_and_usage(capsys):
  names = []
  assert call(lambda args: names.append(args.name), "--name", "x") == 0
  assert names == ["x"]
  assert call(lambda args: 7) == 7
  assert call(lambda args: None, "--nam", "x") == 2
  assert "--nam" in capsys.readouterr().err


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "c.py"
  path.write_text(CONFIG)
  return path


def test_config_overrides(config_file):
  found = []
  argv = [
    *("--config.model.size=5", "--config.lr", "0.5", "--noconfig.model.fast"),
    *(f"--config={config_file}:large", "--config.model.patches=(3,4)", "--name=x"),
  ]
  assert call(found.append, *argv, config=True) == 0
  config = found[0].config
  assert found[0].config_spec == f"{config_file}:large"
  assert (config.arg, config.lr, found[0].name) == ("large", 0.5, "x")
  assert config.model.to_dict() == {"size": 5, "patches": (3, 4), "fast": False}
  with pytest.raises(AttributeError):
    config.unknown = 1


@pytest.mark.parametrize(
  ("words", "line"),
  [
    (["--config.model.sise=5"], "no config key 'sise'; known here: fast, patches, size"),
    (["--config.modle.size=5"], "no config key 'modle'; known here: arg, lr, model"),
    (["--config.model.size=big"], "config.model.size"),
    (["--unknown=5"], "--unknown"),
    (["stray"], "stray"),
  ],
)
def test_a_wrong_override_is_wrong_usage(capsys, config_file, words, line):
  assert call(lambda args: None, f"--config={config_file}", *words, config=True) == 2
  assert line in capsys.readouterr().err.strip().splitlines()[-1]


def test_config_files_that_are_none(tmp_path):
  empty = tmp_path / "empty.py"
  empty.touch()
  fixed = tmp_path / "fixed.py"
  fixed.write_text("def get_config(): pass")
  for spec, message in (
    (tmp_path / "none.py", "no such config file"),
    (empty, "no function get_config"),
    (f"{fixed}:arg", "takes no argument"),
  ):
    with pytest.raises(UserError, match=message):
      cli.load_config(str(spec))


def test_the_package_carries_config_files(tmp_path, monkeypatch):
  """An installed package has `configs/` below `coda_jax`; a file of the user's goes first."""
  (tmp_path / "coda_jax" / "configs").mkdir(parents=True)
  (tmp_path / "coda_jax" / "configs" / "own.py").write_text(CONFIG)
  folders = [*coda_jax.__path__, str(tmp_path / "coda_jax")]
  monkeypatch.setattr(coda_jax, "__path__", folders)
  monkeypatch.chdir(tmp_path)
  assert cli.load_config("configs/own.py").arg == "small"
  for path in ("own.py", "configs/none.py"):
    with pytest.raises(UserError, match=f"{path}: no such config file"):
      cli.load_config(path)
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "own.py").write_text(CONFIG.replace('"small"', '"mine"'))
  assert cli.load_config("configs/own.py").arg == "mine"


@pytest.mark.parametrize(
  ("spec", "folder"),
  [
    ("configs/flux.py", "runs/flux"),
    ("configs/flux.py:full,codebook_size=16384", "runs/flux_full,codebook_size=16384"),
    ("/a/my run.py:x/../y z", "runs/my-run_x-..-y-z"),
  ],
)
def test_default_workdir(spec, folder):
  assert cli.default_workdir(spec) == pathlib.Path(folder)


def test_paths(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  assert cli.path("~/run") == pathlib.Path("/home/me/run")
  for text, message in (("", "empty"), ("ftp://a/run", "not supported"), ("a\0b", "null")):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
      cli.path(text)


def test_config_files_in_folders_with_colons():
  for spec, parts in (
    ("a.py:b", ("a.py", "b")),
    ("/x:y/a.py", ("/x:y/a.py", "")),
    ("C:\\runs\\a.py:b:c", ("C:\\runs\\a.py", "b:c")),
    ("a:b", ("a", "b")),
  ):
    assert cli._split(spec) == parts


def test_quiet_leaves_our_own_log_alone():
  code = (
    "import logging, warnings; from coda_jax import cli; cli.quiet(); "
    "logging.getLogger('absl').error('noise'); warnings.warn('noise'); "
    "logging.getLogger('coda_jax.data').warning('1 image was replaced')"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stderr == "1 image was replaced\n"


def test_compiled_programs_are_kept_unless_told_otherwise(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    assert call(lambda args: None, "--no-compilation-cache") == 0
    assert jax.config.jax_compilation_cache_dir is None
    assert call(lambda args: None) == 0
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "coda_jax")
    jax.config.update("jax_compilation_cache_dir", "mine")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    assert call(lambda args: None) == 0 and jax.config.jax_compilation_cache_dir == "mine"
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_every_command_under_one_name():
  def run(*words):
    command = [sys.executable, "-m", "coda_jax", *words]
    return subprocess.run(command, capture_output=True, text=True)

  listed = run().stdout
  files = {p.stem for p in pathlib.Path(coda_jax.__file__).parent.glob("*.py")}
  for name, text in commands.COMMANDS.items():
    assert f"  {name} " in listed and text in listed
    assert name == "convert" or name in files
  with_main = {
    f
    for f in files
    if "cli.main(" in (pathlib.Path(coda_jax.__file__).parent / f"{f}.py").read_text()
  }
  assert with_main == set(commands.COMMANDS) - {"convert"}, "a command is not listed"
  assert run("--version").stdout.strip() == coda_jax.__version__
  assert "LAYOUT" in run("convert", "--help").stdout
  assert "--ten-crop" in run("tokenize-dataset", "--help").stdout
  wrong = run("trian")
  assert wrong.returncode == 2 and wrong.stderr == (
    "coda-jax: error: no command 'trian'; coda-jax --help lists them\n"
  )


def test_shipped_configs_are_found_from_elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.load_config("configs/demo.py").steps == 300
  with pytest.raises(UserError, match="configs/none.py: no such config file"):
    cli.load_config("configs/none.py")
