"""The folder of a run: which runs may be in it, and what it protects.

config.json          the run's config; a copy of it lies in checkpoints/
data.json            which images or tokens the run trains on
checkpoints/STEP     states of the run
metrics.jsonl, parameters.txt, tensorboard/
tokenizer/ or generator/     the result
"""

import json
from collections.abc import Mapping
from typing import Any

from coda_jax import config, outputs, storage
from coda_jax.data import inventory
from coda_jax.data.inventory import Inventory
from coda_jax.errors import UserError
from coda_jax.training.logging import METRICS_FILE

CONFIG = "config.json"
DATA = "data.json"
CHECKPOINTS = "checkpoints"
PARAMETERS = "parameters.txt"
_RECORDS = (METRICS_FILE, PARAMETERS, DATA)


def check(workdir: storage.Path, settings: Any, product: str) -> None:
  """Checks that a run with `settings` may be in `workdir`.

  A folder without checkpoints protects no config: a first try that failed leaves it usable.

  Args:
    workdir: the folder, which is there.
    settings: the frozen config.
    product: folder in it that the run will write, and the kind of its weights.

  Raises:
    UserError: it holds a run with another config, or something that is no run and would be lost.
  """
  storage.check_gs(workdir, "checkpoints are written to a disk or to gs:// alone")
  file, checkpoints, result = workdir / CONFIG, workdir / CHECKPOINTS, workdir / product
  saved = _steps(workdir)
  theirs = _read(file) or _read(checkpoints / CONFIG)
  if theirs is None and saved:
    raise UserError(
      f"{file} is missing or damaged, which says how {checkpoints} was trained: restore it, or "
      f"remove {checkpoints} to begin anew"
    )
  if theirs is None:
    held = [n for n in (CONFIG, *_RECORDS, product) if _holds_something(workdir / n)]
    if held:
      raise UserError(
        f"{workdir} holds {held[0]} but is the folder of no run; take a new --workdir, or remove "
        f"{workdir / held[0]}"
      )
  elif saved or _holds_something(result):
    config.check_resumable(settings, theirs, workdir)
  outputs.check_output(result, product, overwrite=True)


def _read(file: storage.Path) -> dict | None:
  """The config of a run, or None if the file holds none."""
  try:
    fields = json.loads(file.read_text())
  except (OSError, ValueError):
    return None
  return (
    fields if isinstance(fields, dict) and {"data", "seed", "optimizer"} <= set(fields) else None
  )


def _holds_something(path: storage.Path) -> bool:
  return any(path.iterdir()) if path.is_dir() else path.exists() and storage.size(path) > 0


def check_data(workdir: storage.Path, found: Mapping[str, Inventory], accept: bool) -> None:
  """Checks that a run with checkpoints goes on with the data with which it began.

  Args:
    found: what the run would read, by config key.
    accept: go on with other data, with a warning.

  Raises:
    UserError: images were added or removed.
  """
  if _steps(workdir):
    inventory.check_unchanged(workdir / DATA, found, accept)


def _steps(workdir: storage.Path) -> list[storage.Path]:
  return [p for p in (workdir / CHECKPOINTS).glob("*") if p.name.isdigit()]


def claim(workdir: storage.Path, fields: dict, found: Mapping[str, Inventory]) -> None:
  """Writes config and data to the folder of a run whose data and networks were found."""
  text = json.dumps(fields, indent=2) + "\n"
  (workdir / CHECKPOINTS).mkdir(exist_ok=True)
  for file in (workdir / CONFIG, workdir / CHECKPOINTS / CONFIG):
    outputs.write_text(file, text)
  inventory.write(workdir / DATA, found)
