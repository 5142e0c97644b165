"""Every option of every command, and every config key, with what people mistype.

Whatever is not accepted ends with code 1 or 2 and one line, and nothing is written.
"""

import functools
import importlib
import itertools
import logging
import shutil
import sys

import ml_collections
import pytest

from coda_jax import (
  cli,
  eval,
  generate,
  pretrained,
  reconstruct,
  tokenize_dataset,
  train,
  visualize,
  weights,
)
from coda_jax.errors import UserError
from coda_jax.training import loop, registry
from convert import LAYOUTS
from tests.generation import test_generator
from tests.training import runs

VALUES = ("", "-1", "0.5", "99999999999999999999", "nan", "x", "a\0b")
PATHS = ("nowhere/file", "images", "mask.png", "~no_such_user/x", "/dev/null", "webdataset:images")
KEYS = ("", "-1", "0.5", "99999999999999999999", "nan", "x", "()", "None")


CONFIG = """
from coda_jax import config as c
from tests.training import runs
import pathlib

def get_config(arg="plain"):
  folder = pathlib.Path({folder!r})
  # Schedules do not depend on the number of steps, which some runs change.
  patchgan = c.AdversarialSettings(
    discriminator="patch", patch_width=4, patch_layers=1, ramp_steps=16,
    optimizer=c.OptimizerSettings(schedule_steps=16),
  )
  changes = {{"ema__start_epoch": 0, "eval__every": 8, "checkpoint__every": 4,
              "optimizer__schedule_steps": 16}}
  if arg == "plain":  # compiles in half the time
    changes |= {{"tokenizer__lora": None}}
  else:
    changes |= {{"adversarial": patchgan}}
  return c.config_dict(runs.config(folder, steps=16, **changes))
"""


class Reached(UserError):
  """Everything that is checked before the work was right."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bad_input")
  runs.make_inputs(folder)
  test_generator.save(folder)
  image = next((folder / "images").rglob("*.png"))
  (folder / "mask.png").write_bytes(image.read_bytes())
  (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
  return folder


COMMANDS = {
  "reconstruct": (reconstruct, "--tokenizer generator/tokenizer --images mask.png"),
  "visualize": (visualize, "--tokenizer generator/tokenizer --data folder:images@val"),
  "generate": (generate, "--model generator --count 1 --steps 2"),
  "inpaint": (generate, "--model generator --count 1 --inpaint mask.png --mask 0,0,8,8"),
  "eval": (eval, "--tokenizer generator/tokenizer --data folder:images@val"),
  "tokenize_dataset": (
    tokenize_dataset,
    "--tokenizer generator/tokenizer --data folder:images@val",
  ),
}


GROUPS = {"inpaint": "editing", "eval": "how"}  # others are tried by "generate"


def options_of(parser, group=""):
  """Its options that take a value, without --output; of one group, if its title is given."""
  groups = [g for g in parser._action_groups if g.title.startswith(group)]
  actions = (a for g in groups for a in g._group_actions if a.option_strings and a.nargs != 0)
  return [a.option_strings[-1] for a in actions if "--output" not in a.option_strings]


def tree(folder):
  found = (p for p in folder.rglob("*") if "__pycache__" not in p.parts)
  return {p: p.is_file() and p.stat().st_mtime_ns for p in found}


def failure(run, parser, argv, capsys, **options):
  """The one line of a command that is refused, or None."""
  with pytest.raises(SystemExit) as e:
    cli.main(run, parser, argv, **options)
  _, err = capsys.readouterr()
  what = f"{argv}: code {e.value.code}: {err}"
  assert e.value.code in (0, 1, 2), what
  if e.value.code == 0:
    return None
  lines = err.strip().splitlines()
  assert sum("error: " in line for line in lines) == 1 and "error: " in lines[-1], what
  assert "Traceback" not in err and "--debug" not in err and len(lines[-1]) < 2000, what
  return lines[-1]


@pytest.fixture
def here(folder, monkeypatch):
  monkeypatch.chdir(folder)
  monkeypatch.setattr(cli, "quiet", lambda: None)  # it would silence the tests after this one
  monkeypatch.setattr(logging.getLogger("coda_jax"), "handlers", [])  # of tests that called it
  monkeypatch.setattr(generate, "load_generator", functools.cache(generate.load_generator))
  monkeypatch.setattr(weights, "load_tokenizer", functools.cache(weights.load_tokenizer))
  monkeypatch.setattr(
    pretrained, "find_lpips", lambda path: (path and pretrained.load_lpips(path), "")
  )
  return folder


def reached(*args, **kwargs):
  raise Reached("everything was right")


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "tokenize_dataset")) for n in COMMANDS]
)
def test_options(here, name, monkeypatch, capsys):
  module, base = COMMANDS[name]
  stop = "_write" if name == "tokenize_dataset" else "written_aside"
  if module is eval:
    monkeypatch.setattr(eval.comparison, "run", reached)
  else:
    monkeypatch.setattr(module, stop, reached)
  before, tried, refused = tree(here), 0, 0
  for option in options_of(module.parser(), GROUPS.get(name, "")):
    for value in (*VALUES, *PATHS):
      argv = [*base.split(), "--output", "out", f"{option}={value}"]
      line = failure(module.run, module.parser(), argv, capsys)
      tried, refused = tried + 1, refused + ("everything was right" not in (line or ""))
      if name == "tokenize_dataset":  # it has noted its settings by then
        shutil.rmtree(here / "out", ignore_errors=True)
      assert tree(here) == before, argv
  print(f"{name}: {tried} tried, {refused} refused")
  assert tried >= 36 and refused > tried / 2


@pytest.mark.parametrize("name", COMMANDS)
def test_outputs(here, name, monkeypatch, capsys):
  module, base = COMMANDS[name]
  before = tree(here)
  for value in (
    "",
    "images",
    "mask.png",
    "mask.png/x",
    "~no_such_user/x",
    "a\0b",
    "/dev/null",
    "/proc/x",
  ):
    for more in ([], ["--overwrite"] if name != "tokenize_dataset" else []):
      argv = [*base.split(), f"--output={value}", *more]
      assert failure(module.run, module.parser(), argv, capsys), argv
      assert tree(here) == before, argv


def test_convert(here, monkeypatch, capsys):
  convert_command = importlib.import_module("convert.__main__")
  monkeypatch.delitem(sys.modules, "convert.__main__")  # other tests run it as a program
  before, tried = tree(here), 0
  layouts = [*LAYOUTS, "to-torch"]
  for layout, value in itertools.product(layouts, (*VALUES, *PATHS)):
    for argv in ([layout, value, "--output", "out"], [layout, "mask.png", f"--output={value}"]):
      assert failure(convert_command._run, convert_command._parser(), argv, capsys), argv
      tried += 1
  parser = convert_command._parser()
  subparsers = parser._subparsers._group_actions[0].choices
  for layout, sub in subparsers.items():
    for option, value in itertools.product(options_of(sub), VALUES):
      argv = [layout, "vae", "--output", "out", f"{option}={value}"]
      assert failure(convert_command._run, convert_command._parser(), argv, capsys), argv
      tried += 1
  assert tree(here) == before
  print(f"convert: {tried} tried")
  assert tried > 200


def leaves(config, prefix=""):
  for key in config:
    value = config.get_ref(key).get() if key in config.keys() else None
    if isinstance(value, ml_collections.ConfigDict):
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key


@pytest.mark.slow
def test_config_keys(here, monkeypatch, capsys):
  monkeypatch.setattr(registry, "make_trainer", reached)
  before, tried, refused = tree(here), 0, 0
  spec = "config.py:adversarial"
  for key, value in itertools.product(leaves(cli.load_config(spec)), KEYS):
    argv = [f"--config={spec}", "--workdir=run", f"--config.{key}={value}"]
    line = failure(train.run, train.parser(), argv, capsys, config=True)
    tried, refused = tried + 1, refused + ("everything was right" not in line)
    if "everything was right" not in line:
      assert key.split(".")[-1] in line, f"{argv}: {line}"
    (here / "run").exists() and (here / "run").rmdir()
    assert tree(here) == before, argv
  print(f"config keys: {tried} tried, {refused} refused")
  assert refused > tried / 3


@pytest.mark.slow
def test_config_values_that_are_accepted(here, monkeypatch, capsys):
  """They make a trainer, or one line."""
  monkeypatch.setattr(loop, "run", lambda *args: True)
  before, spec, made = tree(here), "config.py:adversarial", 0
  for key, value in itertools.product(leaves(cli.load_config(spec)), KEYS):
    argv = [f"--config={spec}", "--workdir=run", f"--config.{key}={value}"]
    made += failure(train.run, train.parser(), argv, capsys, config=True) is None
    shutil.rmtree(here / "run", ignore_errors=True)
    assert tree(here) == before, argv
  print(f"{made} made a trainer")
  assert made > 50


def test_train_options(here, monkeypatch, capsys):
  monkeypatch.setattr(registry, "make_trainer", reached)
  before = tree(here)
  flags = ["--coordinator=x:1", "--num-processes=2", "--process-id=1"]
  for option, value in itertools.product(options_of(train.parser()), (*VALUES, *PATHS)):
    name = option.lstrip("-")
    argv = ["--config=config.py", "--workdir=run", f"{option}={value}"]
    if name in ("coordinator", "num-processes", "process-id"):
      argv += [f for f in flags if not f.startswith(option)]
    line = failure(train.run, train.parser(), argv, capsys, config=True)
    assert line, argv
    for made in set(here.iterdir()) - set(before):
      assert made.name == "__pycache__" or not any(p.is_file() for p in made.rglob("*"))
      shutil.rmtree(made)  # an empty workdir
  for value in (*VALUES, *PATHS):
    line = failure(train.run, train.parser(), [f"--config={value}"], capsys, config=True)
    assert line and "everything was right" not in line
  assert tree(here) == before
